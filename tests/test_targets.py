"""The table of targets is consistent with itself, and with the backends there are."""

from __future__ import annotations

import pytest

from hydra_edge import backends, targets
from hydra_edge.errors import DeviceMismatchError, InputError
from hydra_edge.lowering import EXPLICIT, LOWERINGS
from hydra_edge.quantization import PRECISIONS


def test_names_are_unique_and_found() -> None:
    names = [target.name for target in targets.TARGETS]
    assert len(set(names)) == len(names)
    for target in targets.TARGETS:
        assert targets.find(target.name) is target


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_every_row_makes_sense(target: targets.Target) -> None:
    assert set(target.precisions) <= set(PRECISIONS)
    assert target.precisions
    assert target.description.endswith(".")
    if backends.build_for(target):
        backend = backends.find(target.backend)
        assert set(backend.LOWERINGS) <= {*LOWERINGS, EXPLICIT}
        if target.backend == "tensorrt_rtx":
            pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
        assert backend.versions()
    gpu = target.gpu
    assert (gpu is None) == (target.name == "cpu")
    if gpu is not None:
        assert gpu.source
        assert target.software
        assert ("fp8" in target.precisions) == (gpu.compute_capability >= 89)
        assert (gpu.fp8 > 0) == (gpu.compute_capability >= 89)


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("jetson-agx-orin", "int8", 85),
        ("a100", "fp16", 312),
        ("a100", "fp32", 19.5),
        ("h100", "fp16", 989),
        ("h100", "int8", 1979),
        ("l4", "fp8", 242),
        ("rtx-3090", "int8", 284),
        ("rtx-4090", "fp16", 165.2),
        ("rtx-5090", "fp8", 419),
    ],
)
def test_rates_are_those_that_are_printed(name: str, precision: str, tera: float) -> None:
    """Dense; the makers' figures, in 10^12 operations per second."""
    gpu = targets.find(name).gpu
    assert gpu is not None
    assert gpu.operations_per_s(precision) / 1e12 == pytest.approx(tera, rel=0.01)


def test_releases() -> None:
    target = targets.find("jetson-orin-nano@jp6.2")
    assert [one.tensorrt for one in target.software] == ["10.3"]
    with pytest.raises(InputError, match=r"no release 'jp7\.0' for 'jetson-orin-nano'.*jp6\.2"):
        targets.find("jetson-orin-nano@jp7.0")
    with pytest.raises(InputError, match="no release 'x' for 'cpu'"):
        targets.find("cpu@x")


@pytest.mark.parametrize("name", ["jetson-xavier", "jetson-xavier-nx", "jetson-nano@jp4.6"])
def test_what_is_too_old(name: str) -> None:
    with pytest.raises(DeviceMismatchError, match="TensorRT 8"):
        targets.find(name)


@pytest.mark.parametrize("name", ["", "CPU", "toaster"])
def test_an_unknown_target(name: str) -> None:
    with pytest.raises(InputError, match=rf"Unknown target '{name}'. There are: cpu, jetson"):
        targets.find(name)


@pytest.mark.parametrize("name", ["", "tpu", "__init__", "../os"])
def test_an_unknown_backend(name: str) -> None:
    with pytest.raises(DeviceMismatchError, match="onnxruntime"):
        backends.find(name)
