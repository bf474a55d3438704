"""`plan`: counted bytes and operations, and the floors that follow from the table of devices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx_models import mlp_heads

import hydra_edge as he
from hydra_edge import backends, costs, targets
from hydra_edge.errors import DeviceMismatchError, InputError
from hydra_edge.planning import Plan, PrecisionPlan, plan

M, K, H, C = 4, 256, 512, 10


def student() -> he.Graph:
    """A body K -> K and M heads K -> H -> C, which an exporter stacks."""
    return mlp_heads(M, K, (H,), C)


def by_name(found: Plan) -> dict[str, PrecisionPlan]:
    return {row.precision: row for row in found.precisions}


def notes(found: Plan) -> dict[str, str]:
    return {note.code: note.text for note in found.notes}


BODY, HEAD = K * K, K * H + H * C  # multiply-adds


@pytest.mark.parametrize("fused", [False, True])
def test_operations_and_bytes(fused: bool) -> None:
    graph = he.fuse(student()) if fused else student()
    found = plan(graph, "jetson-agx-orin")
    assert found.heads == M
    assert found.flops_per_sample == 2 * (BODY + M * HEAD)
    assert found.ensemble is not None
    assert found.ensemble.what == "4 members of one body and one head each"
    assert found.ensemble.flops_per_sample == 2 * M * (BODY + HEAD)
    assert [row.precision for row in found.precisions] == list(found.target.precisions)
    rows = by_name(found)
    biases = K + M * (H + C)
    assert rows["fp32"].weight_bytes == pytest.approx(4 * (BODY + M * HEAD + biases), rel=1e-3)
    assert rows["int8"].weight_bytes == rows["fp32"].weight_bytes // 4
    ratio = rows["fp16"].ensemble_bytes / rows["fp16"].weight_bytes
    assert ratio == pytest.approx(M * (BODY + HEAD) / (BODY + M * HEAD), rel=0.01)


def test_floors_are_bandwidth_and_arithmetic() -> None:
    found = plan(student(), "jetson-agx-orin", batches=(1, 100_000))
    row = by_name(found)["int8"]
    small, large = row.floors
    assert small.bound == "memory"
    assert small.student_ms == pytest.approx(row.weight_bytes / 204.8e9 * 1e3)
    assert small.ensemble_ms == pytest.approx(row.ensemble_bytes / 204.8e9 * 1e3)
    assert large.bound == "compute"
    rate = 2 * 2048 * 16 * 1.3e9
    assert large.student_ms == pytest.approx(100_000 * found.flops_per_sample / rate * 1e3)
    assert found.ensemble is not None
    assert large.ensemble_ms == pytest.approx(
        100_000 * found.ensemble.flops_per_sample / rate * 1e3
    )
    assert all(row.fits and row.ensemble_fits for row in found.precisions)


def test_where_arithmetic_takes_over() -> None:
    """One batch earlier memory is the longer time, from there on arithmetic."""
    for row in plan(student(), "l4").precisions:
        start = row.compute_bound_from
        assert start is not None
        found = plan(student(), "l4", batches=(start - 1, start))
        before, after = by_name(found)[row.precision].floors
        assert (before.bound, after.bound) == ("memory", "compute")
        assert after.student_ms > before.student_ms


def test_larger_batches_say_so() -> None:
    def said(batch: int) -> str:
        return notes(plan(student(), "jetson-agx-orin", batches=(1, batch)))["compute"]

    start = by_name(plan(student(), "jetson-agx-orin"))["fp16"].compute_bound_from
    assert start is not None
    assert f"fp16 from batch {start}" in said(start)
    assert "fp16 from" not in said(start - 1)


def test_arithmetic_that_no_launch_waits_for_is_not_worth_a_note() -> None:
    found = plan(mlp_heads(2, 8, (8,), 4), "h200", batches=(1, 1000))
    assert {floor.bound for row in found.precisions for floor in row.floors} == {
        "memory",
        "compute",
    }
    assert "compute" not in notes(found)


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_every_target_has_a_plan(target: targets.Target) -> None:
    found = plan(student(), target.name)
    assert found.target is target
    assert found.buildable == backends.build_for(target)
    assert found.features
    for row in found.precisions:
        assert len(row.floors) == (3 if target.gpu else 0)
        known = target.gpu is not None and target.gpu.operations_per_s(row.precision) > 0
        assert {floor.bound for floor in row.floors} <= (
            {"memory", "compute"} if known else {"unknown"}
        )
        assert (row.compute_bound_from is None) != known


def test_a_rate_that_nobody_prints() -> None:
    """Reading weights still takes its time."""
    found = plan(student(), "jetson-thor", batches=(1, 10**6))
    row = by_name(found)["int8"]
    assert [floor.bound for floor in row.floors] == ["unknown", "unknown"]
    assert row.floors[1].student_ms == pytest.approx(row.weight_bytes / 273e9 * 1e3)
    assert "No tensor rate of int8 is published for jetson-thor" in notes(found)["no-rate"]
    assert "no-rate" not in notes(plan(student(), "l4"))


def with_gpu(name: str, **figures: float) -> targets.Target:
    row = targets.find(name)
    assert row.gpu is not None
    return replace(row, gpu=replace(row.gpu, **figures))


def test_a_card_of_which_little_is_known() -> None:
    found = plan(student(), with_gpu("l4", bandwidth_gb_s=0, fp16=0, int8=0, fp8=0))
    assert all(row.floors == () for row in found.precisions)
    assert notes(found) == {"no-rate": "The bandwidth of l4 is not known: no floors."}
    found = plan(student(), with_gpu("l4", fp16=0, int8=0, fp8=0))
    assert (
        "rate of fp16, int8, int8-weight-only, int4-weight-only, fp8 is" in notes(found)["no-rate"]
    )


def test_int8_that_is_no_faster() -> None:
    assert "int8 multiplies no faster" in notes(plan(student(), with_gpu("l4", int8=512)))["int8"]
    for target in targets.TARGETS:
        assert "int8" not in notes(plan(student(), target))


def test_launches_that_take_longer_than_weights() -> None:
    """The student has 0.6 million weights: 1.2 MB in fp16, 6 µs on an AGX Orin, 1 µs on an L4."""
    weights = BODY + M * HEAD
    assert 2 * weights / 204.8e9 > 5e-6 > 2 * weights / 300e9
    assert "At batch 1, 8, 32 the floor in fp16" in notes(plan(student(), "l4"))["launches"]
    assert "launches" not in notes(plan(student(), "jetson-agx-orin"))


def test_a_model_without_heads_has_no_ensemble() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 18]>\n'
        "g (float[batch,4] input) => (float[batch,2] y)\n{ y = MatMul(input, w) }"
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 2), np.float32), "w"))
    found = plan(he.Graph(model), "h200")
    assert (found.heads, found.ensemble) == (None, None)
    assert found.precisions[0].ensemble_bytes is None
    assert found.precisions[0].floors[0].ensemble_ms is None


def test_against_a_real_ensemble() -> None:
    """Its own figures, whatever its members are."""
    members = mlp_heads(7, K, (2 * H,), C)
    found = plan(student(), "l4", against=members)
    assert found.ensemble is not None
    assert found.ensemble.what == "as in its graph"
    assert found.ensemble.flops_per_sample == 2 * (K * K + 7 * (K * 2 * H + 2 * H * C))
    assert found.ensemble.weight_bytes == costs.cost(members).weight_bytes
    row = by_name(found)["fp16"]
    assert row.ensemble_bytes == found.ensemble.weight_bytes // 2
    assert row.floors[0].ensemble_ms == pytest.approx(row.ensemble_bytes / 300e9 * 1e3)
    assert "ensemble" not in notes(found)


def test_an_ensemble_that_costs_less() -> None:
    found = plan(student(), "cpu", against=mlp_heads(1, K, (8,), C))
    assert notes(found)["ensemble"] == "The ensemble takes fewer operations than the student."


@pytest.mark.parametrize(
    ("memory_gb", "student_lacks", "ensemble_lacks"),
    [
        (0.0012, ["fp32", "fp16"], ["fp32", "fp16"]),
        (0.0015, ["fp32"], ["fp32", "fp16"]),
        (0.0026, [], ["fp32"]),
    ],
)
def test_what_does_not_fit(
    memory_gb: float, student_lacks: list[str], ensemble_lacks: list[str]
) -> None:
    found = plan(student(), with_gpu("jetson-orin-nano", memory_gb=memory_gb))
    assert [row.precision for row in found.precisions if not row.fits] == student_lacks
    assert [row.precision for row in found.precisions if not row.ensemble_fits] == ensemble_lacks
    said = [note.text for note in found.notes if note.code == "memory"]
    assert len(said) == bool(student_lacks) + bool(ensemble_lacks)
    assert all("of memory, shared with the system, in fp32" in text for text in said)
    assert said[-1].startswith("The ensemble's weights alone are more than the")


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
    with pytest.raises(InputError, match="stored in fp16"):
        plan(graph, "cpu", against=he.quantize(graph, "fp16"))
    with pytest.raises(InputError, match=r"ensemble's inputs are .*512.*they do not do the same"):
        plan(graph, "cpu", against=mlp_heads(M, 512, (H,), C))
