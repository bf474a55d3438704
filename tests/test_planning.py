"""`plan`: counted bytes and operations, and the floors that follow from the table of devices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx_models import mlp_heads
from rich.console import Console

import hydra_edge as he
from hydra_edge import inspection, targets
from hydra_edge.errors import DeviceMismatchError, InputError
from hydra_edge.planning import plan

M, K, H, C = 4, 256, 512, 10


def student() -> he.Graph:
    """A body K -> K and M heads K -> H -> C, which an exporter stacks."""
    return mlp_heads(M, K, (H,), C)


BODY, HEAD = K * K, K * H + H * C  # multiply-adds


@pytest.mark.parametrize("fused", [False, True])
def test_operations_and_bytes(fused: bool) -> None:
    graph = he.fuse(student()) if fused else student()
    found = plan(graph, "jetson-agx-orin")
    assert found.heads == M
    assert found.flops_per_sample == 2 * (BODY + M * HEAD)
    assert found.ensemble_flops_per_sample == 2 * M * (BODY + HEAD)
    assert [row.precision for row in found.precisions] == list(found.target.precisions)
    by_name = {row.precision: row for row in found.precisions}
    biases = K + M * (H + C)
    assert by_name["fp32"].weight_bytes == pytest.approx(4 * (BODY + M * HEAD + biases), rel=1e-3)
    assert by_name["int8"].weight_bytes == by_name["fp32"].weight_bytes // 4
    ratio = by_name["fp16"].ensemble_bytes / by_name["fp16"].weight_bytes
    assert ratio == pytest.approx(M * (BODY + HEAD) / (BODY + M * HEAD), rel=0.01)


def test_floors_are_bandwidth_and_arithmetic() -> None:
    found = plan(student(), "jetson-agx-orin", batches=(1, 100_000))
    row = next(row for row in found.precisions if row.precision == "int8")
    small, large = row.floors
    assert small.bound == "memory"
    assert small.student_ms == pytest.approx(row.weight_bytes / 204.8e9 * 1e3)
    assert large.bound == "compute"
    rate = 2 * 2048 * 16 * 1.3e9
    assert large.student_ms == pytest.approx(100_000 * found.flops_per_sample / rate * 1e3)
    assert large.ensemble_ms == pytest.approx(
        100_000 * found.ensemble_flops_per_sample / rate * 1e3
    )
    assert all(row.fits for row in found.precisions)


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_every_target_has_a_plan(target: targets.Target) -> None:
    found = plan(student(), target.name)
    assert found.buildable == (target.backend in ("onnxruntime", "tensorrt_rtx"))
    rows = inspection.describe_plan(found)
    assert rows["target"] == target.description
    for row in found.precisions:
        published = target.gpu is not None and target.gpu.operations_per_s(row.precision) > 0
        assert len(row.floors) == (3 if published else 0)
    lines = sum(max(1, len(row.floors)) for row in found.precisions)
    assert inspection.plan_table(found).row_count == lines


def test_a_model_without_heads_has_no_ensemble() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 18]>\n'
        "g (float[batch,4] input) => (float[batch,2] y)\n{ y = MatMul(input, w) }"
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 2), np.float32), "w"))
    found = plan(he.Graph(model), "h200")
    assert found.heads is None
    assert found.ensemble_flops_per_sample is None
    assert found.precisions[0].floors[0].ensemble_ms is None
    assert "its ensemble" not in inspection.describe_plan(found)


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5 MB of memory are too little for the ensemble in fp32, and enough in int8."""
    row = targets.find("jetson-orin-nano")
    assert row.gpu is not None
    tiny = replace(row, gpu=replace(row.gpu, memory_gb=0.0015))
    monkeypatch.setattr(targets, "TARGETS", (tiny,))
    found = plan(student(), "jetson-orin-nano")
    fits = {row.precision: row.fits for row in found.precisions}
    assert fits == {row.precision: row.ensemble_bytes <= 1_500_000 for row in found.precisions}
    assert not fits["fp32"]
    assert fits["int8"]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(inspection.plan_table(found))
    assert capture.get().count("more than the memory") == list(fits.values()).count(False)


def test_bad_input() -> None:
    graph = student()
    with pytest.raises(InputError, match=r"Batches \[0\]"):
        plan(graph, "cpu", batches=(0,))
    with pytest.raises(InputError, match="Unknown target 'toaster'"):
        plan(graph, "toaster")
    with pytest.raises(DeviceMismatchError, match="JetPack 5 is its last"):
        plan(graph, "jetson-xavier-nx")
    with pytest.raises(InputError, match="stored in fp16"):
        plan(he.quantize(graph, "fp16"), "cpu")
