"""The function bodies in ONNX Runtime against numpy in float64."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hydra_edge import ops
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.errors import GraphError
from hydra_edge.ops.grouped_matmul import quantize_weight, reference, reference_quantized

SHAPES = [  # M, B, K, N
    (1, 1, 1, 1),
    (1, 3, 5, 2),
    (4, 1, 5, 2),
    (3, 7, 1, 4),
    (3, 7, 5, 1),
    (5, 2, 33, 37),
]
TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.int8): TensorProto.INT8,
}


def run(op: str, arrays: dict[str, np.ndarray], rank: int = 3) -> np.ndarray:
    """One node of domain ``hydra``, in ONNX Runtime."""
    inputs = [
        helper.make_tensor_value_info(name, TYPES[array.dtype], array.shape)
        for name, array in arrays.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    node = helper.make_node(op, list(arrays), ["y"], domain=ops.DOMAIN)
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, [output]),
        opset_imports=[helper.make_opsetid("", ops.MINIMUM_OPSET)],
        ir_version=8,
    )
    ops.declare(model)
    onnx.checker.check_model(model)
    return evaluate(model, arrays)["y"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [True, False])
def test_grouped_matmul(shape: tuple[int, int, int, int], shared: bool) -> None:
    m, b, k, n = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((b, k) if shared else (m, b, k)).astype(np.float32)
    weight = rng.standard_normal((m, k, n)).astype(np.float32)
    bias = rng.standard_normal((m, 1, n)).astype(np.float32)
    y = run("GroupedMatMul", {"x": x, "weight": weight, "bias": bias})
    assert y.shape == (m, b, n)
    # fp32 keeps 24 bits: 6e-8 per operation, and there are K of them.
    np.testing.assert_allclose(y, reference(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
def test_quantized_grouped_matmul(
    shape: tuple[int, int, int, int], shared: bool, per_head: bool
) -> None:
    m, b, k, n = shape
    rng = np.random.default_rng(1)
    x = rng.standard_normal((b, k) if shared else (m, b, k)).astype(np.float32) * 3
    weight = rng.integers(-128, 128, (m, k, n)).astype(np.int8)
    bias = rng.standard_normal((m, 1, n)).astype(np.float32)
    weight_scale = rng.uniform(0.001, 0.1, (m, 1, n)).astype(np.float32)
    x_scale = rng.uniform(0.01, 0.03, (m, 1, 1) if per_head else ()).astype(np.float32)
    arrays = {"x": x, "weight": weight, "bias": bias, "weight_scale": weight_scale}
    y = run("QuantizedGroupedMatMul", {**arrays, "x_scale": x_scale})
    expected = reference_quantized(x, weight, bias, weight_scale, x_scale)
    assert y.shape == expected.shape == (m, b, n)
    # The integers are exact, so only the scaling rounds.
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


def test_quantized_rounds_halves_to_even_and_saturates() -> None:
    x = np.float32([[-1000.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1000.0]])
    weight = np.eye(8, dtype=np.int8)[None]
    ones, zeros = np.ones((1, 1, 8), np.float32), np.zeros((1, 1, 8), np.float32)
    arrays = {"x": x, "weight": weight, "bias": zeros, "weight_scale": ones}
    one = np.asarray(1.0, np.float32)
    y = run("QuantizedGroupedMatMul", {**arrays, "x_scale": one})
    expected = [-128, -2, -2, 0, 0, 2, 2, 127]
    assert y.reshape(-1).tolist() == expected
    assert reference_quantized(x, weight, zeros, ones, one).reshape(-1).tolist() == expected


def test_halves_after_division_in_fp32() -> None:
    """0.35 / 0.1 is 3.5 in fp32 and less in float64: the reference must divide in fp32."""
    x, scale = np.float32([[0.35]]), np.float32(0.1)
    weight = np.ones((1, 1, 1), np.int8)
    one, zero = np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    arrays = {"x": x, "weight": weight, "bias": zero, "weight_scale": one}
    y = run("QuantizedGroupedMatMul", {**arrays, "x_scale": np.asarray(scale)})
    assert y.item() == pytest.approx(0.4)
    assert reference_quantized(x, weight, zero, one, scale).item() == pytest.approx(0.4)


def test_quantize_weight_is_per_head_and_column() -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((3, 16, 5)).astype(np.float32) * np.float32(
        [[[1e-3]], [[1]], [[50]]]
    )
    weight[1, :, 2] = 0
    integers, scale = quantize_weight(weight)
    assert (integers.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (3, 1, 5))
    assert scale[1, 0, 2] == 1.0
    assert integers.min() >= -127
    assert (np.abs(integers).max(1) == 127).sum() == 14  # every column uses the whole range
    assert np.all(np.abs(integers * scale - weight) <= scale * 0.5001)


def test_declare_adds_what_is_used_once() -> None:
    node = helper.make_node("GroupedMatMul", ["x", "w", "b"], ["y"], domain=ops.DOMAIN)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in "xwby"]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:3], values[3:]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=7,
    )
    for _ in range(2):
        ops.declare(model)
    assert [f.name for f in model.functions] == ["GroupedMatMul"]
    assert [entry.version for entry in model.functions[0].opset_import] == [21]
    assert [(e.domain, e.version) for e in model.opset_import] == [("", 21), ("hydra", 1)]
    assert model.ir_version == 8
    del model.graph.node[:]
    ops.declare(model)
    assert not model.functions
    assert [e.domain for e in model.opset_import] == [""]


def test_an_op_of_a_newer_version_says_so() -> None:
    node = helper.make_node("FutureOp", ["x"], ["y"], domain=ops.DOMAIN)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    with pytest.raises(GraphError, match=r"uses the operator 'FutureOp'.*Upgrade hydra-edge"):
        ops.declare(model)


def test_inline_leaves_standard_ops() -> None:
    node = helper.make_node("GroupedMatMul", ["x", "w", "b"], ["y"], domain=ops.DOMAIN)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in "xwby"]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:3], values[3:]),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    ops.declare(model)
    assert [n.op_type for n in ops.inline(model).graph.node] == ["MatMul", "Add"]
    assert not ops.inline(model).functions


def test_inline_keeps_what_is_read_also_inside_of_branches() -> None:
    """Of a summary one output is read by the graph, and one by a branch."""
    branch = helper.make_graph(
        [helper.make_node("Neg", ["variation_ratio"], ["negative"])],
        "branch",
        [],
        [helper.make_tensor_value_info("negative", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node(
            "EnsembleSummary", ["x"], ["", "", "", "", "variation_ratio"], domain=ops.DOMAIN
        ),
        helper.make_node("If", ["which"], ["y"], then_branch=branch, else_branch=branch),
        helper.make_node("Exp", ["x"], ["unread"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 2, 4]),
        helper.make_tensor_value_info("which", TensorProto.BOOL, []),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    ops.declare(model)
    kinds = [node.op_type for node in ops.inline(model).graph.node]
    assert kinds.count("ArgMax") == 2
    assert {"If", "Equal"} <= set(kinds)
    assert not {"Log", "Exp"} & set(kinds)


def test_a_model_without_opset_says_so() -> None:
    with pytest.raises(GraphError, match="imports no version of the ONNX operator set"):
        ops.opset_of(onnx.ModelProto())


def test_a_model_that_cannot_be_upgraded_says_so() -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 11)],
    )
    with pytest.raises(GraphError, match="uses opset 11 and cannot be converted to 18"):
        ops.upgrade(model)
