"""What single heads and layers cost in low precision, against quantizing just them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import (
    SAMPLES,
    Net,
    labels_for,
    linear,
    logits_of,
    loud_head,
    mlp_heads,
    student,
)

from hydra_edge import sensitivity
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.costs import cost
from hydra_edge.errors import InputError, QuantizationError
from hydra_edge.exporting import summarize
from hydra_edge.quantization import Precision, prepare, quantize
from hydra_edge.sensitivity import Study, analyze
from hydra_edge.tasks import find


@pytest.mark.parametrize("precision", ["int8", "int4-weight-only", "fp16"])
def test_each_part_is_what_quantizing_just_it_gives(precision: str) -> None:
    graph = student(4)
    labels = labels_for(graph)
    found = analyze(graph, precision, SAMPLES, labels=labels, calibration=SAMPLES)
    assert [part.name for part in found.parts] == [*(f"head.{m}" for m in range(4)), "layer.n0"]
    assert (found.samples, found.heads, found.precision) == (200, 4, precision)
    task = find("classification")
    reference = logits_of(graph)
    assert found.metrics == task.metrics(reference, labels)
    wanted = {
        **{f"head.{m}": Precision(head_overrides={m: precision}) for m in range(4)},
        "layer.n0": Precision(layers={"n0": precision}),
        "all": Precision(precision, precision),
    }
    for part in (*found.parts, found.whole):
        alone = quantize(graph, wanted[part.name], calibration=SAMPLES)
        expected = sensitivity.losses(task, logits_of(alone), reference, labels)
        assert part.losses == pytest.approx(expected, abs=1e-6)
        assert part.saved_bytes == cost(graph).weight_bytes - cost(alone).weight_bytes


def test_losses_are_positive_for_what_is_worse() -> None:
    task = find("classification")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 400)
    good = 3.0 * np.eye(3)[truth] + rng.standard_normal((5, 400, 3))
    bad = good + 4.0 * rng.standard_normal((5, 400, 3))
    found = sensitivity.losses(task, bad, good, truth)
    assert all(found[name] > 0 for name in ("accuracy", "nll", "mi", "mi_rank"))
    back = sensitivity.losses(task, good, bad, truth)
    assert back["accuracy"] == -found["accuracy"]
    assert back["nll"] == -found["nll"]
    assert set(sensitivity.losses(task, bad, good, None)) == {"mi", "mi_rank"}
    same = sensitivity.losses(task, good, good, truth)
    assert same == pytest.approx(dict.fromkeys(same, 0.0), abs=1e-12)


def test_the_head_with_outliers_is_found() -> None:
    graph = loud_head()
    found = analyze(graph, "int4-weight-only", SAMPLES, labels=labels_for(graph))
    by_name = {part.name: part.losses["mi"] for part in found.parts}
    heads = {name: loss for name, loss in by_name.items() if name.startswith("head.")}
    assert max(heads, key=heads.__getitem__) == "head.2"


def test_a_regression() -> None:
    graph = summarize(mlp_heads(c=4), "regression", "logits")
    truth = evaluate(graph.model, {"x": SAMPLES})["mean"] + 0.1
    found = analyze(graph, "int8", SAMPLES, labels=truth, calibration=SAMPLES)
    assert {"rmse", "nll", "crps", "mi", "mi_rank"} == set(found.whole.losses)


def test_it_says_what_it_is_doing() -> None:
    steps: list[str] = []
    graph = student()
    Study(graph, SAMPLES, None, prepare(graph, SAMPLES), on_step=steps.append).analyze("int8")
    assert steps == ["everything at once", "each head alone", "n0 alone"]


def test_a_graph_without_a_task_is_refused() -> None:
    with pytest.raises(InputError, match="The graph has no task or no per-head output"):
        analyze(mlp_heads(), "int8", SAMPLES, calibration=SAMPLES)


def test_a_graph_without_heads_is_refused() -> None:
    net = Net()
    y = linear(net, net.input("x", ("batch", 6)), 6, 4)
    row = net.op("Unsqueeze", y, net.const([0], np.int64))
    graph = summarize(net.graph({row: (1, "batch", 4)}), "classification")
    with pytest.raises(QuantizationError, match="The graph has no heads to tell from its body"):
        analyze(graph, "int8", SAMPLES, calibration=SAMPLES)


def test_rows_that_are_not_heads_are_refused() -> None:
    """Two heads write each row's halves."""
    net = Net()
    features = net.op("Tanh", linear(net, net.input("x", ("batch", 6)), 6, 6))
    axes = net.const([0], np.int64)
    rows = [net.op("Unsqueeze", linear(net, features, 6, 4), axes) for _ in range(3)]
    y = net.op("Gather", net.op("Concat", *rows, axis=0), net.const([2, 0, 1], np.int64), axis=0)
    graph = summarize(net.graph({y: (3, "batch", 4)}), "classification")
    with pytest.raises(QuantizationError, match="are not one head each, in order"):
        analyze(graph, "int8", SAMPLES, calibration=SAMPLES)
