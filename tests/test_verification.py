"""Gates must fail when diversity is lost, also where accuracy is not."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import hydra_edge as he
from hydra_edge import backends, programs, tasks
from hydra_edge.artifacts.graph import Graph
from hydra_edge.errors import GateError, InputError
from hydra_edge.exporting import summarize
from hydra_edge.verification import Gates, verify

HEADS, FEATURES, CLASSES, SAMPLES = 5, 6, 4, 200
RNG = np.random.default_rng(0)
# Heads that agree on the answer and differ around it: collapsing them costs no accuracy.
COMMON = RNG.standard_normal((1, FEATURES, CLASSES)) * 1.5
WEIGHTS = (COMMON + RNG.standard_normal((HEADS, FEATURES, CLASSES)) * 0.6).astype(np.float32)
INPUTS = RNG.standard_normal((SAMPLES, FEATURES)).astype(np.float32)
LABELS = np.argmax(INPUTS @ WEIGHTS.mean(0), -1)


def student(
    weights: np.ndarray,
    *,
    head_logits: bool = True,
    task: str = "classification",
    bias: np.ndarray | None = None,
) -> Graph:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["head_logits"])]
    constants = [numpy_helper.from_array(weights, "w")]
    if bias is not None:
        nodes[0].output[:] = ["products"]
        nodes.append(helper.make_node("Add", ["products", "b"], ["head_logits"]))
        constants.append(numpy_helper.from_array(bias, "b"))
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", FEATURES])],
        [
            helper.make_tensor_value_info(
                "head_logits", onnx.TensorProto.FLOAT, [len(weights), "batch", CLASSES]
            )
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return summarize(Graph(model), task, "head_logits", head_logits=head_logits)


@pytest.fixture(scope="module")
def reference() -> Graph:
    return student(WEIGHTS)


def test_a_model_equals_itself(reference: Graph) -> None:
    result = verify(reference, reference, INPUTS, labels=LABELS)
    assert result.passed
    assert result.require() is result
    assert result.samples == SAMPLES
    assert result.head_errors == (0.0,) * HEADS
    assert result.drift["mi_rank_correlation"] == pytest.approx(1.0)
    assert result.metrics == result.reference_metrics


def test_heads_replaced_by_their_mean_fail_though_accuracy_holds(reference: Graph) -> None:
    collapsed = student(np.broadcast_to(WEIGHTS.mean(0), WEIGHTS.shape).copy())
    result = verify(collapsed, reference, INPUTS, labels=LABELS)
    assert result.metrics["accuracy"] >= result.reference_metrics["accuracy"]
    assert result.drift["mi_ratio"] < 1e-3
    assert not result.passed
    assert any("mean epistemic uncertainty is" in failure for failure in result.failures)
    assert any("disagreement of the heads" in failure for failure in result.failures)
    with pytest.raises(GateError, match=r"no longer answers or doubts like its reference") as error:
        result.require()
    assert error.value.exit_code == 3


def test_swapped_uncertainty_fails_by_rank(reference: Graph) -> None:
    """The same mean uncertainty in the wrong places: only the rank correlation sees it."""
    result = verify(student(WEIGHTS[:, ::-1].copy()), reference, INPUTS)
    assert any("rank correlation" in failure for failure in result.failures)


def test_lost_accuracy_fails(reference: Graph) -> None:
    result = verify(student(-WEIGHTS), reference, INPUTS, labels=LABELS)
    assert any(failure.startswith("accuracy fell from") for failure in result.failures)
    assert any(failure.startswith("nll rose") for failure in result.failures)


def test_nan_outputs_fail(reference: Graph) -> None:
    weights = WEIGHTS.copy()
    weights[0, 0, 0] = np.nan
    assert verify(student(weights), reference, INPUTS).failures == ("head 0 gives NaN or infinity",)


UNLABELLED = "no labels: accuracy and calibration were not checked"


def regressor(
    mean_shift: float = 0.0, log_variance_shift: float = 0.0, offset: float = 0.0
) -> Graph:
    """WEIGHTS as two means and two log variances per head."""
    shift = np.array([offset + mean_shift] * 2 + [log_variance_shift] * 2, np.float32)
    return student(WEIGHTS, task="regression", bias=shift)


def test_the_same_wrong_class_in_every_head_fails_without_labels(reference: Graph) -> None:
    """Disagreement is blind to a permutation of the classes."""
    result = verify(student(np.roll(WEIGHTS, 1, axis=2)), reference, INPUTS)
    assert result.drift["mi_ratio"] == pytest.approx(1)
    assert UNLABELLED in result.notes
    assert [failure.split(" ")[0] for failure in result.failures] == ["mean_prob", "the"]
    assert any("the winning class is the same on" in failure for failure in result.failures)


def test_an_unrelated_single_head_fails() -> None:
    result = verify(student(-WEIGHTS[:1]), student(WEIGHTS[:1]), INPUTS)
    assert any(failure.startswith("mean_prob differs by") for failure in result.failures)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(
    ("shifts", "name"),
    [
        ((1000.0, 0.0), "mean"),
        ((-40.0, 0.0), "mean"),
        ((0.0, 10.0), "aleatoric_variance"),
        ((0.0, -3.0), "aleatoric_variance"),
    ],
)
def test_shifted_regressions_fail(shifts: tuple[float, float], name: str, offset: float) -> None:
    """Also behind an offset that makes the shift small against the mean itself."""
    result = verify(regressor(*shifts, offset=offset), regressor(offset=offset), INPUTS)
    assert [failure.split(" ")[0] for failure in result.failures] == [name]
    assert verify(regressor(offset=offset), regressor(offset=offset), INPUTS).passed


def test_a_regression_is_judged_on_one_sample_too() -> None:
    assert not verify(regressor(1000.0), regressor(), INPUTS[:1]).passed


def test_predictions_have_switches_and_limits(reference: Graph) -> None:
    rotated = student(np.roll(WEIGHTS, 1, axis=2))
    off = Gates(prediction_error=None, top1_agreement=None)
    assert verify(rotated, reference, INPUTS, gates=off).passed
    for gates, text in (
        (replace(off, head_error=0.1), r"head \d differs by"),
        (replace(off, prediction_error=0.1), "mean_prob differs by"),
        (replace(off, top1_agreement=0.97), "the winning class is the same on"),
    ):
        (failure,) = verify(rotated, reference, INPUTS, gates=gates).failures
        assert re.match(text, failure)
    fewer = verify(student(WEIGHTS[:3]), reference, INPUTS, gates=Gates(head_error=0.1))
    assert "the head counts differ: head errors were not checked" in fewer.notes


def _negated(graph: Graph, name: str) -> Graph:
    """The graph with one summary output negated behind the summary op."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for node in model.graph.node:
        node.output[:] = [f"{name}_right" if out == name else out for out in node.output]
    model.graph.node.append(helper.make_node("Neg", [f"{name}_right"], [name]))
    return Graph(model, graph.metadata)


@pytest.mark.parametrize(
    ("task", "name"), [(task, name) for task in tasks.names() for name in tasks.find(task).outputs]
)
def test_the_summary_must_follow_from_the_heads(task: str, name: str) -> None:
    right = student(WEIGHTS, task=task)
    wrong = _negated(right, name)
    for model in (wrong, he.compile(wrong, "cpu")):
        (failure,) = verify(model, right, INPUTS).failures
        assert failure.startswith(f"the model's {name} does not follow from its heads: ")
        assert "of it is wrong, by up to" in failure
    (failure,) = verify(right, wrong, INPUTS).failures
    assert failure.startswith(f"the reference's {name} does not follow")


def test_a_summary_of_another_shape_fails(reference: Graph) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(reference.model)
    value = next(value for value in model.graph.output if value.name == "mutual_information")
    value.type.tensor_type.shape.dim.add().dim_value = 1
    for node in model.graph.node:
        node.output[:] = ["flat" if out == value.name else out for out in node.output]
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 1]), "column"))
    model.graph.node.append(helper.make_node("Reshape", ["flat", "column"], [value.name]))
    (failure,) = verify(Graph(model, reference.metadata), reference, INPUTS).failures
    assert failure.endswith(f"it is [{SAMPLES}, 1], not [{SAMPLES}]")


def test_ties_are_not_wrong_votes() -> None:
    """Two heads that mirror each other leave the winner to rounding."""
    mirrored = np.stack([WEIGHTS[0], WEIGHTS[0][:, ::-1]])
    assert verify(student(mirrored), student(mirrored), INPUTS).passed


def test_sigmoid_heads_are_judged_by_their_own_summary() -> None:
    graph = student(WEIGHTS, task="vqa_sigmoid")
    result = verify(graph, graph, INPUTS, labels=np.eye(WEIGHTS.shape[-1])[np.arange(SAMPLES) % 2])
    assert result.passed
    assert result.metrics["accuracy"] == result.reference_metrics["accuracy"]
    softmax = student(WEIGHTS, task="vqa")
    model = onnx.ModelProto()
    model.CopyFrom(softmax.model)
    wrong = Graph(model, replace(softmax.metadata, task="vqa_sigmoid"))
    failures = verify(wrong, graph, INPUTS).failures
    assert any("model's mean_prob does not follow from its heads" in text for text in failures)


def test_coins_of_one_half_are_not_wrong_votes() -> None:
    """Two heads that mirror each other and one of 0 leave the mean to rounding."""
    mirrored = np.stack([WEIGHTS[0], -WEIGHTS[0], 0 * WEIGHTS[0]])
    graph = student(mirrored, task="vqa_sigmoid")
    assert verify(graph, graph, INPUTS).passed


def test_the_per_head_output_may_have_any_name(reference: Graph) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(reference.model)
    for node in model.graph.node:
        node.input[:] = ["says" if name == "head_logits" else name for name in node.input]
        node.output[:] = ["says" if name == "head_logits" else name for name in node.output]
    for value in model.graph.output:
        value.name = "says" if value.name == "head_logits" else value.name
    renamed = Graph(model, replace(reference.metadata, logits="says"))
    for other in (renamed, he.compile(renamed, "cpu")):
        result = verify(other, reference, INPUTS)
        assert result.passed
        assert max(result.head_errors) < 1e-5


@pytest.mark.parametrize("size", [1, 7, 8, 64, 100])
def test_a_fixed_batch_takes_any_number_of_samples(reference: Graph, size: int) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(reference.model)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "batch":
                dim.dim_value = 8
    fixed = Graph(model, reference.metadata)
    result = verify(reference, fixed, INPUTS[:size], gates=Gates(mi_rank_correlation=None))
    assert (result.passed, result.samples) == (True, size)


def test_a_graph_is_opened_once(reference: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    backend = backends.find("onnxruntime")
    real = backend.open

    def counting(payload: bytes, threads: int | None, facts: object = None) -> programs.Runner:
        opened.append(payload)
        return real(payload, threads)

    monkeypatch.setattr(backend, "open", counting)
    assert verify(reference, reference, INPUTS).passed
    assert len(opened) == 2


def test_masked_classes_are_legal_where_another_is_left(reference: Graph) -> None:
    mask = np.array([0, 0, 0, -np.inf], np.float32)
    masked = student(WEIGHTS, bias=mask)
    result = verify(masked, masked, INPUTS, labels=LABELS % 3)
    assert result.passed
    assert result.head_errors == (0.0,) * HEADS
    assert verify(masked, reference, INPUTS).head_errors == (np.inf,) * HEADS
    for bias in (np.full(CLASSES, -np.inf, np.float32), -mask):
        dead = student(WEIGHTS, bias=bias)
        assert verify(dead, masked, INPUTS).failures == ("head 0 gives NaN or infinity",)
        with pytest.raises(InputError, match="Head 0 of the reference gives NaN or infinity"):
            verify(masked, dead, INPUTS)
    right = student(WEIGHTS, task="regression")
    dead = student(WEIGHTS, task="regression", bias=mask)
    assert verify(dead, right, INPUTS).failures == ("head 0 gives NaN or infinity",)


def test_a_gate_can_be_switched_off(reference: Graph) -> None:
    collapsed = student(np.broadcast_to(WEIGHTS.mean(0), WEIGHTS.shape).copy())
    off = Gates(mi_rank_correlation=None, mi_ratio=None, disagreement_ratio=None)
    assert verify(collapsed, reference, INPUTS, gates=off).passed


def test_engines_and_sessions_are_models_too(reference: Graph) -> None:
    engine = he.compile(reference, "cpu", batch=(1, 8, 16))
    with he.load(engine) as session:
        for model in (engine, session):
            result = verify(model, reference, {"x": INPUTS}, labels=LABELS)
            assert result.passed
            assert max(result.head_errors) < 1e-5


def test_head_counts_may_differ(reference: Graph) -> None:
    result = verify(student(WEIGHTS[:3]), reference, INPUTS, labels=LABELS)
    assert result.head_errors == ()
    assert 0 < result.drift["mi_ratio"] < 1.5


def test_one_head_has_no_uncertainty_to_check() -> None:
    single = student(WEIGHTS[:1])
    result = verify(single, single, INPUTS)
    assert result.passed
    assert "the reference has one head: uncertainty was not checked" in result.notes
    assert "no labels: accuracy and calibration were not checked" in result.notes


def test_messages(reference: Graph) -> None:
    plain = Graph(reference.model, replace(reference.metadata, task=None))
    with pytest.raises(InputError, match="Neither model has a task"):
        verify(plain, plain, INPUTS)
    silent = student(WEIGHTS, head_logits=False)
    with pytest.raises(InputError, match="The model gives no per-head output"):
        verify(silent, reference, INPUTS)
    with pytest.raises(InputError, match="The engine has no per-head output"):
        verify(he.compile(silent, "cpu"), reference, INPUTS)
    lost = Graph(reference.model, replace(reference.metadata, logits="lost"))
    with pytest.raises(InputError, match="The model gives no per-head output"):
        verify(lost, reference, INPUTS)
    engine = he.compile(reference, "cpu")
    program = replace(engine.programs["main"], optional=("lost",))
    with pytest.raises(InputError, match="The model's per-head output 'lost' is missing"):
        verify(replace(engine, programs={"main": program}), reference, INPUTS)
    flat = Graph(reference.model, replace(reference.metadata, logits="mean_prob"))
    with pytest.raises(InputError, match=r"The reference's per-head output 'mean_prob' is \["):
        verify(reference, flat, INPUTS[:2])
    other = student(RNG.standard_normal((HEADS, FEATURES, CLASSES)).astype(np.float32))
    with pytest.raises(InputError, match="has shape"):
        verify(other, reference, INPUTS[:, :3])
