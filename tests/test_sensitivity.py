"""What single heads and layers cost in low precision, against quantizing just them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import Net, join, linear, mlp_heads, student

from hydra_edge import sensitivity
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.costs import cost
from hydra_edge.errors import InputError, QuantizationError
from hydra_edge.exporting import summarize
from hydra_edge.quantization import Precision, prepare, quantize
from hydra_edge.sensitivity import Study, analyze
from hydra_edge.tasks import find

X = np.random.default_rng(3).standard_normal((200, 6)).astype(np.float32)


def logits_of(graph: Graph) -> np.ndarray:
    return evaluate(graph.model, {"x": X})["head_logits"]


def labels_for(graph: Graph) -> np.ndarray:
    """Drawn from what the graph says, so that its quality is neither perfect nor chance."""
    prob = evaluate(graph.model, {"x": X})["mean_prob"]
    rng = np.random.default_rng(0)
    return np.asarray([rng.choice(len(p), p=p / p.sum()) for p in prob.astype(np.float64)])


def loud_head(m: int = 4, loud: int = 2) -> Graph:
    """Alike heads, but one has an outlier in every column, for a feature that is always 0."""
    net = Net()
    body = net.rng.standard_normal((6, 6))
    body[:, 0] = 0
    features = net.op("Tanh", net.op("MatMul", net.input("x", ("batch", 6)), net.const(body)))
    heads = []
    for head in range(m):
        weight = net.rng.standard_normal((6, 5))
        if head == loud:
            weight[0] = 60.0 * np.sign(weight[0])
        hidden = net.op("Relu", net.op("Gemm", features, net.const(weight), net.random(5)))
        heads.append(linear(net, hidden, 5, 3))
    return summarize(net.graph(join(net, heads, 3)), "classification", "logits")


@pytest.mark.parametrize("precision", ["int8", "int4-weight-only", "fp16"])
def test_each_part_is_what_quantizing_just_it_gives(precision: str) -> None:
    graph = student(4)
    labels = labels_for(graph)
    found = analyze(graph, precision, X, labels=labels, calibration=X)
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
        alone = quantize(graph, wanted[part.name], calibration=X)
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
    found = analyze(graph, "int4-weight-only", X, labels=labels_for(graph))
    by_name = {part.name: part.losses["mi"] for part in found.parts}
    heads = {name: loss for name, loss in by_name.items() if name.startswith("head.")}
    assert max(heads, key=heads.__getitem__) == "head.2"


def test_a_regression() -> None:
    graph = summarize(mlp_heads(c=4), "regression", "logits")
    truth = evaluate(graph.model, {"x": X})["mean"] + 0.1
    found = analyze(graph, "int8", X, labels=truth, calibration=X)
    assert {"rmse", "nll", "crps", "mi", "mi_rank"} == set(found.whole.losses)


def test_it_says_what_it_is_doing() -> None:
    steps: list[str] = []
    graph = student()
    Study(graph, X, None, prepare(graph, X), on_step=steps.append).analyze("int8")
    assert steps == ["everything at once", "each head alone", "n0 alone"]


def test_a_graph_without_a_task_is_refused() -> None:
    with pytest.raises(InputError, match="The graph has no task or no per-head output"):
        analyze(mlp_heads(), "int8", X, calibration=X)


def test_a_graph_without_heads_is_refused() -> None:
    net = Net()
    y = linear(net, net.input("x", ("batch", 6)), 6, 4)
    row = net.op("Unsqueeze", y, net.const([0], np.int64))
    graph = summarize(net.graph({row: (1, "batch", 4)}), "classification")
    with pytest.raises(QuantizationError, match="The graph has no heads to tell from its body"):
        analyze(graph, "int8", X, calibration=X)


def test_rows_that_are_not_heads_are_refused() -> None:
    """Two heads write each row's halves."""
    net = Net()
    features = net.op("Tanh", linear(net, net.input("x", ("batch", 6)), 6, 6))
    axes = net.const([0], np.int64)
    rows = [net.op("Unsqueeze", linear(net, features, 6, 4), axes) for _ in range(3)]
    y = net.op("Gather", net.op("Concat", *rows, axis=0), net.const([2, 0, 1], np.int64), axis=0)
    graph = summarize(net.graph({y: (3, "batch", 4)}), "classification")
    with pytest.raises(QuantizationError, match="are not one head each, in order"):
        analyze(graph, "int8", X, calibration=X)
