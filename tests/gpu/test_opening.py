"""An engine is checked before TensorRT sees it, and the GPU is given back when it does not fit."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hydra_edge import detection, targets
from hydra_edge.errors import ArtifactError, DeviceMismatchError, MissingDependencyError
from hydra_edge.gpu import opening
from hydra_edge.gpu.fit import BuiltFor, Plugin

HERE = BuiltFor("tensorrt", "10.13.3", (90,))


class Gpu:
    """A device that knows whether it was closed."""

    name, compute_capability = "a GPU", 90
    opened: list[Gpu]

    def __init__(self) -> None:
        self.closed = False
        self.opened.append(self)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Gpu]:
    Gpu.opened = []
    found = detection.Detection(targets.find("h200"), "An H200.")
    monkeypatch.setattr(detection, "detect", lambda: found)
    monkeypatch.setattr(opening, "Device", Gpu)
    return Gpu


def library() -> Any:
    return SimpleNamespace(__version__="10.13.3.9")


def facts(built: BuiltFor) -> dict[str, Any]:
    return {"built_for": built.to_json()}


def test_what_fits_is_opened(gpu: type[Gpu]) -> None:
    trt, device = opening.on_device(library, "tensorrt", facts(HERE))
    assert trt.__version__ == "10.13.3.9"
    assert gpu.opened == [device]
    assert not gpu.opened[0].closed


@pytest.mark.parametrize(
    ("built", "words"),
    [
        (BuiltFor("tensorrt", "10.13.3", (87,)), "built for sm_87, here is sm_90"),
        (BuiltFor("tensorrt", "10.3.0", (90,)), "TensorRT 10.3.0"),
        (
            BuiltFor("tensorrt", "10.13.3", (90,), plugin=Plugin("hydra-mma16-0", "1")),
            "needs the plugin library 1 for weights packed as hydra-mma16-0",
        ),
    ],
)
def test_what_does_not_gives_the_gpu_back(gpu: type[Gpu], built: BuiltFor, words: str) -> None:
    with pytest.raises(DeviceMismatchError, match=words):
        opening.on_device(library, "tensorrt", facts(built))
    assert [device.closed for device in gpu.opened] == [True]


def test_without_the_library_no_gpu_is_taken(gpu: type[Gpu]) -> None:
    def missing() -> ModuleType:
        raise MissingDependencyError("No TensorRT.", "It is not installed.", "Install it.")

    with pytest.raises(MissingDependencyError, match="No TensorRT"):
        opening.on_device(missing, "tensorrt", facts(HERE))
    assert gpu.opened == []


def test_without_a_gpu_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = detection.Detection(targets.find("cpu"), "No GPU of NVIDIA.")
    monkeypatch.setattr(detection, "detect", lambda: found)
    with pytest.raises(DeviceMismatchError, match=r"for a GPU, sm_90\. Here is none") as caught:
        opening.on_device(lambda: pytest.fail("asked"), "tensorrt", facts(HERE))
    assert "--target cpu" in caught.value.fix


def test_an_engine_that_does_not_say(gpu: type[Gpu]) -> None:
    with pytest.raises(ArtifactError, match="does not say what it was built for"):
        opening.on_device(library, "tensorrt", {})
    assert gpu.opened == []
