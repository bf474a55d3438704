"""Gates must fail when diversity is lost, also where accuracy is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import hydra_edge as he
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


def student(weights: np.ndarray, *, head_logits: bool = True) -> Graph:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["head_logits"])]
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", FEATURES])],
        [
            helper.make_tensor_value_info(
                "head_logits", onnx.TensorProto.FLOAT, [len(weights), "batch", CLASSES]
            )
        ],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return summarize(Graph(model), "classification", "head_logits", head_logits=head_logits)


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
    other = student(RNG.standard_normal((HEADS, FEATURES, CLASSES)).astype(np.float32))
    with pytest.raises(InputError, match="has shape"):
        verify(other, reference, INPUTS[:, :3])
