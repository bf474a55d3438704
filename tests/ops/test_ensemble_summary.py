"""The summaries in ONNX Runtime against numpy in float64, at sizes and values that could fail."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from scipy import special

from hydra_edge import ops
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.ops.ensemble_summary import (
    CLASSIFICATION_OUTPUTS,
    GAUSSIAN_OUTPUTS,
    entropy,
    reference_classification,
    reference_gaussian,
    reference_sigmoid,
    sigmoid,
    softmax,
)

OUTPUTS = {
    "EnsembleSummary": CLASSIFICATION_OUTPUTS,
    "SigmoidSummary": CLASSIFICATION_OUTPUTS,
    "GaussianSummary": GAUSSIAN_OUTPUTS,
}
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
}
SHAPES = [(1, 1, 1), (1, 4, 3), (5, 1, 3), (5, 4, 1), (3, 2, 1000), (40, 3, 7)]


def run(op: str, values: np.ndarray, opset: int = ops.MINIMUM_OPSET) -> dict[str, np.ndarray]:
    """One summary node in ONNX Runtime."""
    outputs = OUTPUTS[op]
    node = helper.make_node(op, ["x"], list(outputs), domain=ops.DOMAIN)
    model = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TYPES[str(values.dtype)], values.shape)],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    ops.declare(model)
    return evaluate(model, {"x": values})


def check(found: dict[str, np.ndarray], logits: np.ndarray) -> None:
    """Equal to float64, and what must hold whatever the input is."""
    expected = reference_classification(logits)
    assert list(found) == list(expected)
    classes = logits.shape[-1]
    for name, array in found.items():
        assert array.dtype == np.float32
        assert array.shape == expected[name].shape
        # Entropies sum C terms of fp32; log C is their largest value.
        np.testing.assert_allclose(
            array, expected[name], rtol=1e-5, atol=3e-6 * (1 + np.log(classes))
        )
    assert np.all(found["mutual_information"] >= 0)
    assert np.all(found["predictive_entropy"] <= np.log(classes) + 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_classification(shape: tuple[int, int, int], scale: float) -> None:
    logits = (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
    check(run("EnsembleSummary", logits), logits)


@pytest.mark.parametrize("opset", [18, 21, 22])
def test_classification_in_newer_opsets(opset: int) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    check(run("EnsembleSummary", logits, opset), logits)


@pytest.mark.parametrize(
    "row",
    [
        [300.0, -300.0, 0.0],
        [-300.0, -300.0, -300.0],
        [300.0, 300.0, 300.0],
        [-np.inf, 0.0, 1.0],
        [-np.inf, -np.inf, 5.0],
        [3e38, -3e38, 0.0],
    ],
)
def test_extreme_logits_stay_finite(row: list[float]) -> None:
    logits = np.float32([[row], [[0.0, 1.0, 2.0]]])
    found = run("EnsembleSummary", logits)
    assert all(np.isfinite(array).all() for array in found.values())
    check(found, logits)


def test_opposite_certain_heads_disagree_by_log_two() -> None:
    logits = np.float32([[[300, -300]], [[-300, 300]]])
    found = run("EnsembleSummary", logits)
    assert found["mutual_information"].item() == pytest.approx(np.log(2), abs=1e-6)  # nats
    assert found["expected_entropy"].item() == pytest.approx(0, abs=1e-6)
    assert found["variation_ratio"].item() == 0.5


def test_uniform_heads_have_the_entropy_of_c_classes() -> None:
    found = run("EnsembleSummary", np.zeros((3, 2, 8), np.float32))
    np.testing.assert_allclose(found["predictive_entropy"], np.log(8), rtol=1e-6)
    np.testing.assert_allclose(found["mutual_information"], 0, atol=1e-6)
    np.testing.assert_array_equal(found["variation_ratio"], 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-4, 1.0, 100.0]), c=st.integers(1, 50))
def test_mutual_information_of_equal_heads_is_never_negative(
    seed: int, scale: float, c: int
) -> None:
    """Equal heads: the difference of the entropies is only rounding, of either sign."""
    head = np.random.default_rng(seed).standard_normal((1, 8, c)).astype(np.float32) * scale
    logits = np.repeat(head, 7, 0).astype(np.float32)
    found = run("EnsembleSummary", logits)["mutual_information"]
    assert np.all(found >= 0)
    assert np.all(found < 1e-5)


def test_half_precision_logits_are_summarized_in_fp32() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 4, 500)).astype(np.float16)
    check(run("EnsembleSummary", logits), logits)


def check_sigmoid(found: dict[str, np.ndarray], logits: np.ndarray) -> None:
    """Equal to scipy's entropies of float64 probabilities, and to the reference."""
    values = logits.astype(np.float64)
    p, q = special.expit(values), special.expit(-values)
    mean, rest = p.mean(0), q.mean(0)
    predictive = (special.entr(mean) + special.entr(rest)).sum(-1)
    expected = (special.entr(p) + special.entr(q)).sum(-1).mean(0)
    reference = reference_sigmoid(logits)
    np.testing.assert_allclose(reference["mean_prob"], mean, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(reference["predictive_entropy"], predictive, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(reference["expected_entropy"], expected, rtol=1e-9, atol=1e-12)
    assert list(found) == list(reference)
    # The entropies sum C terms of up to log 2, of which fp32 keeps 1e-7 each.
    rounding = 1e-6 * (1 + logits.shape[-1] ** 0.5)
    for name, array in found.items():
        assert array.dtype == np.float32
        assert array.shape == reference[name].shape
        # A mean of one half may round to either side, and moves the ratio by one class at most.
        allowed = rounding + (1 / logits.shape[-1] if name == "variation_ratio" else 0)
        np.testing.assert_allclose(array, reference[name], rtol=1e-5, atol=allowed, err_msg=name)
    assert np.all(found["mutual_information"] >= 0)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 2, 3129)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_sigmoid(shape: tuple[int, int, int], scale: float) -> None:
    logits = (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
    check_sigmoid(run("SigmoidSummary", logits), logits)


def test_unlikely_answers_keep_their_entropy() -> None:
    """3129 answers of e^-20 each: 1 - p rounds to 1 in fp32, and their entropy is not 0."""
    logits = np.full((4, 1, 3129), -20.0, np.float32)
    found = run("SigmoidSummary", logits)
    exact = 3129 * (special.entr(special.expit(-20.0)) + special.entr(special.expit(20.0)))
    assert found["predictive_entropy"].item() == pytest.approx(exact, rel=1e-4)
    assert found["expected_entropy"].item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("row", [[300.0, -300.0, 0.0], [-np.inf, np.inf, 1.0], [3e38, -3e38, 0.0]])
def test_extreme_logits_of_sigmoids_stay_finite(row: list[float]) -> None:
    logits = np.float32([[row], [[0.0, 1.0, 2.0]]])
    found = run("SigmoidSummary", logits)
    assert all(np.isfinite(array).all() for array in found.values())
    check_sigmoid(found, logits)
    assert np.isfinite(sigmoid(row)).all()


def test_sigmoids_vote_answer_by_answer() -> None:
    # Mean probabilities .5 up and .1 down: one of three heads is against the first, none the other.
    logits = np.float32([[[9, -2]], [[9, -3]], [[-1, -2]]])
    assert run("SigmoidSummary", logits)["variation_ratio"].item() == pytest.approx(1 / 6)
    opposite = np.float32([[[300]], [[-300]]])
    found = run("SigmoidSummary", opposite)
    assert found["mutual_information"].item() == pytest.approx(np.log(2), abs=1e-6)
    assert found["expected_entropy"].item() == pytest.approx(0, abs=1e-6)


def test_half_precision_logits_of_sigmoids_are_summarized_in_fp32() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 4, 500)).astype(np.float16)
    check_sigmoid(run("SigmoidSummary", logits), logits)


def test_votes_are_against_the_winner_of_the_mean() -> None:
    # Two heads say 0 weakly, one says 1 strongly: the mean says 1, so two of three disagree.
    logits = np.float32([[[0.1, 0]], [[0.1, 0]], [[0, 9]]])
    assert run("EnsembleSummary", logits)["variation_ratio"].item() == pytest.approx(2 / 3)
    assert reference_classification(logits)["variation_ratio"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 2), (7, 1, 8), (1, 4, 6)])
def test_gaussian(shape: tuple[int, int, int]) -> None:
    params = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found, expected = run("GaussianSummary", params), reference_gaussian(params)
    assert list(found) == list(expected)
    for name, array in found.items():
        assert array.shape == expected[name].shape == (shape[1], shape[2] // 2)
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


def test_gaussian_variance_survives_a_large_mean() -> None:
    """E[x²] − E[x]² would lose every digit here."""
    params = np.float32([[[10_000.0, 0.0]], [[10_000.5, 0.0]], [[10_001.0, 0.0]]])
    found = run("GaussianSummary", params)
    np.testing.assert_allclose(found["epistemic_variance"], [[1 / 6]], rtol=1e-3)


def test_total_variance_is_that_of_the_mixture() -> None:
    rng = np.random.default_rng(0)
    params = rng.standard_normal((4, 1, 2))
    draws = params[..., 0] + np.exp(params[..., 1] / 2) * rng.standard_normal((4, 200_000))
    found = reference_gaussian(params)
    total = found["aleatoric_variance"] + found["epistemic_variance"]
    assert total.item() == pytest.approx(draws.var(), rel=0.02)


def test_softmax_and_entropy_in_float64() -> None:
    p = softmax([[1000.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(p, [[1, 0], [0.5, 0.5]])
    np.testing.assert_allclose(entropy(p), [0, np.log(2)])
    assert p.dtype == np.float64


def test_functions_pass_the_checker() -> None:
    for op, outputs in OUTPUTS.items():
        model = helper.make_model(
            helper.make_graph(
                [helper.make_node(op, ["x"], list(outputs), domain=ops.DOMAIN)],
                "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", "B", "C"])],
                [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["a"]) for n in outputs],
            ),
            opset_imports=[helper.make_opsetid("", 18)],
            ir_version=8,
        )
        ops.declare(model)
        onnx.checker.check_model(model)
