"""One suite for all backends: what they offer, build, refuse and, where it runs here, compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_cpu

from backends import conformance
from hydra_edge import backends
from hydra_edge.backends import onnxruntime


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt", "tensorrt_rtx"])
def test_they_offer_everything(name: str) -> None:
    conformance.offers_everything(backends.find(name))


@pytest.mark.parametrize("how", onnxruntime.LOWERINGS)
def test_onnxruntime(how: str) -> None:
    conformance.builder_side(onnxruntime.build, "cpu", how)  # type: ignore[arg-type]
    conformance.runs_what_it_builds(onnxruntime, onnxruntime.build, "cpu", how)  # type: ignore[arg-type]
    conformance.has_new_weights_after_a_refit(onnxruntime, onnxruntime.build, "cpu", how)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["rtx-3090", "rtx-5090"])
def test_tensorrt_rtx(target: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from hydra_edge.backends import tensorrt_rtx

    conformance.builder_side(tensorrt_rtx.build, target, "qdq")  # type: ignore[arg-type]


def test_tensorrt_by_its_real_bindings() -> None:
    path = Path(conformance.__file__)
    script = f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
    assert tensorrt_cpu.run(script).strip() == "conforms"
