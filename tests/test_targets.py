"""The table of targets is consistent with the backends there are."""

from __future__ import annotations

import pytest

from hydra_edge import backends, targets
from hydra_edge.errors import DeviceMismatchError, InputError
from hydra_edge.lowering import LOWERINGS
from hydra_edge.quantization import PRECISIONS


def test_names_are_unique_and_found() -> None:
    names = [target.name for target in targets.TARGETS]
    assert len(set(names)) == len(names)
    for target in targets.TARGETS:
        assert targets.find(target.name) is target


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_every_row_names_a_backend_and_known_precisions(target: targets.Target) -> None:
    backend = backends.find(target.backend)
    assert set(backend.LOWERINGS) <= set(LOWERINGS)
    assert backend.versions()
    assert set(target.precisions) <= set(PRECISIONS)
    assert target.precisions
    assert target.description.endswith(".")


@pytest.mark.parametrize("name", ["", "CPU", "toaster"])
def test_an_unknown_target(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"Unknown target '{name}'. This version compiles for: cpu"
    ):
        targets.find(name)


@pytest.mark.parametrize("name", ["", "tpu", "__init__", "../os"])
def test_an_unknown_backend(name: str) -> None:
    with pytest.raises(DeviceMismatchError, match="onnxruntime"):
        backends.find(name)
