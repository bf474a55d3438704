"""The integers that are multiplied stay the same, and ONNX Runtime really multiplies integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from onnx_models import Net, assert_same, conv_student, feeds_for, ops_of

from hydra_edge import integer_path, ops, surgery
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.fusion import fuse
from hydra_edge.lowering import LOWERINGS, lower
from hydra_edge.quantization import quantize


def rewritten(graph: Graph) -> Graph:
    surgeon = surgery.open_model(graph.model)
    integer_path.hoist_quantize(surgeon)
    integer_path.shift_to_uint8(surgeon)
    return Graph(surgery.close_model(surgeon, like=graph.model))


def plain(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Q/DQ as they stand: without optimizations, ONNX Runtime computes them in fp32."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    payload = ops.inline(graph.model).SerializeToString()
    session = ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def assert_exact(graph: Graph) -> Graph:
    """Bit by bit the same, as long as no optimizer touches either."""
    found = rewritten(graph)
    for batch in (1, 5):
        feeds = feeds_for(graph, batch)
        expected, actual = plain(graph, feeds), plain(found, feeds)
        for name, array in expected.items():
            np.testing.assert_array_equal(actual[name], array, err_msg=name)
    onnx.checker.check_model(found.model)
    return found


def image_net(tail: tuple[str, ...], *, dtype: type[np.integer] = np.int8, zero: int = 0) -> Graph:
    """Q/DQ, Conv, ``tail``, Q/DQ, Conv."""
    net = Net()
    x = net.qdq(net.input("x", ("batch", 2, 8, 8)))
    h = net.op("Conv", x, net.random(4, 2, 3, 3, scale=0.3), net.random(4))
    for op in tail:
        if op == "MaxPool":
            h = net.op(op, h, kernel_shape=[2, 2], strides=[2, 2])
        elif op == "Transpose":
            h = net.op(op, h, perm=[0, 1, 3, 2])
        elif op == "Reshape":
            h = net.op(op, h, net.const([0, 0, -1, 1], np.int64))
        elif op == "Unsqueeze":
            axes = net.const([2], np.int64)
            h = net.op("Squeeze", net.op(op, h, axes), axes)
        else:
            h = net.op(op, h)
    y = net.op("Conv", net.qdq(h, 0.02, dtype, zero), net.random(3, 4, 1, 1))
    return net.graph({y: ("batch", 3, "h", "w")})


TAILS = [
    (),
    ("Relu",),
    ("MaxPool",),
    ("Relu", "MaxPool"),
    ("MaxPool", "Relu"),
    ("Transpose",),
    ("Relu", "Reshape"),
    ("Unsqueeze", "Relu"),
    ("Relu", "Relu"),
]


@pytest.mark.parametrize("tail", TAILS)
def test_hoisting_and_shifting_are_exact(tail: tuple[str, ...]) -> None:
    found = assert_exact(image_net(tail))
    writers = {name: node.op_type for node in found.model.graph.node for name in node.output}
    quantized = [n for n in found.model.graph.node if n.op_type == "QuantizeLinear"]
    assert [writers.get(n.input[0]) for n in quantized] == [None, "Conv"]
    assert "Relu" not in ops_of(found)


@pytest.mark.parametrize("tail", [("Sigmoid",), ("Relu", "Tanh"), ("Exp", "MaxPool")])
def test_other_operators_are_not_passed(tail: tuple[str, ...]) -> None:
    graph = image_net(tail)
    assert Counter(ops_of(assert_exact(graph))) == Counter(ops_of(graph))


@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 0), (np.uint8, 128), (np.int8, 3)])
def test_asymmetric_quantization_is_left_alone(dtype: type[np.integer], zero: int) -> None:
    graph = image_net(("Relu",), dtype=dtype, zero=zero)
    assert Counter(ops_of(assert_exact(graph))) == Counter(ops_of(graph))


def test_a_tensor_with_two_readers_is_left_alone() -> None:
    net = Net()
    x = net.qdq(net.input("x", ("batch", 2, 8, 8)))
    h = net.op("Relu", net.op("Conv", x, net.random(4, 2, 3, 3)))
    y = net.op("Conv", net.qdq(h), net.random(3, 4, 1, 1))
    graph = net.graph({y: ("batch", 3, 6, 6), net.op("Neg", h): ("batch", 4, 6, 6)})
    assert Counter(ops_of(assert_exact(graph))) == Counter(ops_of(graph))


def test_an_inner_graph_output_is_left_alone() -> None:
    net = Net()
    x = net.qdq(net.input("x", ("batch", 2, 8, 8)))
    h = net.op("Relu", net.op("Conv", x, net.random(4, 2, 3, 3)))
    y = net.op("Conv", net.qdq(h), net.random(3, 4, 1, 1))
    assert_exact(net.graph({y: ("batch", 3, 6, 6), h: ("batch", 4, 6, 6)}))


@pytest.mark.parametrize("back", [True, False])
def test_integers_as_graph_output_keep_type_and_value(back: bool) -> None:
    net = Net()
    x = net.input("x", ("batch", 2, 8, 8))
    h = net.op("Relu", net.op("Conv", x, net.random(4, 2, 3, 3)))
    scale, zero = net.const(0.05), net.const(0, np.int8)
    q = net.op("QuantizeLinear", h, scale, zero)
    outputs = {q: ("batch", 4, 6, 6)}
    if back:
        outputs[net.op("DequantizeLinear", q, scale, zero)] = ("batch", 4, 6, 6)
    found = assert_exact(net.graph(outputs, dtypes={q: TensorProto.INT8}))
    assert found.outputs[0].dtype == "int8"


def test_a_back_conversion_with_another_zero_point_is_left_alone() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    q = net.op("QuantizeLinear", x, net.const(0.05), net.const(0, np.int8))
    y = net.op("DequantizeLinear", q, net.const(0.05), net.const(7, np.int8))
    assert_exact(net.graph({y: ("batch", 6)}))


@pytest.mark.parametrize("side", ["left", "right", "with zero points"])
def test_integer_matmuls_of_others(side: str) -> None:
    net = Net()
    x = net.input("x", (6, 6))
    q = net.op("QuantizeLinear", x, net.const(0.05), net.const(0, np.int8))
    weight = net.const(net.rng.integers(-99, 99, (6, 6)), np.int8)
    inputs = {
        "left": (q, weight),
        "right": (weight, q),
        "with zero points": (q, weight, net.const(1, np.int8), net.const(-3, np.int8)),
    }[side]
    y = net.op("Cast", net.op("MatMulInteger", *inputs), to=1)
    found = assert_exact(net.graph({y: (6, 6)}))
    shifted = any(t.data_type == TensorProto.UINT8 for t in found.model.graph.initializer)
    assert shifted == (side == "left")


def test_a_clip_of_integers_is_left_alone() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    scale, zero = net.const(0.05), net.const(0, np.int8)
    q = net.op("QuantizeLinear", x, scale, zero)
    clipped = net.op("Clip", q, net.const(-5, np.int8), net.const(9, np.int8))
    assert_exact(net.graph({net.op("DequantizeLinear", clipped, scale, zero): ("batch", 6)}))


def test_nodes_without_names() -> None:
    graph = image_net(("Relu",))
    for node in graph.model.graph.node:
        node.name = ""
    assert_exact(graph)


@pytest.fixture(scope="module")
def int8_student() -> Graph:
    graph = conv_student()
    return fuse(quantize(graph, "int8", calibration=feeds_for(graph, 64)))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_lowered_student_is_faithful(int8_student: Graph, lowering: str) -> None:
    feeds = feeds_for(int8_student, 9)
    expected = plain(int8_student, feeds)
    lowered = lower(int8_student, lowering)
    np.testing.assert_allclose(
        plain(lowered, feeds)["head_logits"], expected["head_logits"], atol=1e-5
    )
    # The optimizer may round a halfway case the other way: one step of the heads' input scale.
    np.testing.assert_allclose(
        evaluate(lowered.model, feeds)["head_logits"], expected["head_logits"], atol=0.05
    )


def test_onnxruntime_runs_integer_convolutions(int8_student: Graph, tmp_path: Path) -> None:
    """The reason for all this: without it, every convolution runs in fp32, silently."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    payload = ops.inline(lower(int8_student, "wide").model).SerializeToString()
    ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    found = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert found["QLinearConv"] == 2
    assert found["Conv"] + found["FusedConv"] == 0
    assert found["MatMulInteger"] + found["MatMulIntegerToFloat"] == 2


# matmuls of the body


def int8_layer(kind: str, *, axis: int | None = -1, dtype: type = np.int8, zero: int = 0) -> Graph:
    """One layer behind Q/DQ, written the way of ``kind``."""
    net = Net()
    rank3 = kind == "sequence"
    x = net.input("x", ("batch", 5, 6) if rank3 else ("batch", 6))
    swapped = kind in ("transposed", "scaled")
    shape = (4, 6) if swapped else (6, 4)
    weight = net.const(net.rng.integers(-127, 128, shape), np.int8)
    channel = 0 if swapped else 1
    if axis is None:
        w = net.op("DequantizeLinear", weight, net.const(0.03))
    else:
        scale = net.const(net.rng.uniform(0.01, 0.05, shape[channel]))
        w = net.op("DequantizeLinear", weight, scale, axis=channel)
    back = net.qdq(x, 0.04, dtype, zero)
    if kind == "scaled":
        y = net.op("Gemm", back, w, net.random(4), transB=1, alpha=0.5, beta=2.0)
    elif kind == "transposed":
        y = net.op("Gemm", back, w, net.random(1, 4), transB=1)
    elif kind == "plain":
        y = net.op("Gemm", back, w, net.random(4))
    else:
        y = net.op("MatMul", back, w)
    return net.graph({y: ("batch", 5, 4) if rank3 else ("batch", 4)})


@pytest.mark.parametrize("kind", ["plain", "transposed", "scaled", "matmul", "sequence"])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize(("dtype", "zero"), [(np.int8, 0), (np.uint8, 128), (np.uint8, 7)])
def test_matmuls_multiply_integers(kind: str, axis: int | None, dtype: type, zero: int) -> None:
    graph = int8_layer(kind, axis=axis, dtype=dtype, zero=zero)
    lowered = lower(graph, "grouped")
    kinds = ops_of(lowered)
    assert "MatMulInteger" in kinds
    assert not {"Gemm", "MatMul", "DequantizeLinear"} & set(kinds)
    assert_same(lowered, graph, rtol=1e-5)
    if zero in (0, 128):  # the integers that fast kernels take
        (product,) = [n for n in lowered.model.graph.node if n.op_type == "MatMulInteger"]
        zeros = {t.name: numpy_helper.to_array(t) for t in lowered.model.graph.initializer}
        assert zeros[product.input[2]] == 128
        assert zeros[product.input[2]].dtype == np.uint8


def per_row(net: Net, back: str) -> str:
    weight, scale = net.const(np.ones((6, 4)), np.int8), net.const(np.full(6, 0.1))
    return net.op("MatMul", back, net.op("DequantizeLinear", weight, scale, axis=0))


def shifted(net: Net, back: str) -> str:
    weight, zero = net.const(np.ones((6, 4)), np.int8), net.const(3, np.int8)
    return net.op("MatMul", back, net.op("DequantizeLinear", weight, net.const(0.1), zero))


def quantized_bias(net: Net, back: str) -> str:
    w = net.op("DequantizeLinear", net.const(np.ones((6, 4)), np.int8), net.const(0.1))
    bias = net.op("DequantizeLinear", net.const([1, 2, 3, 4], np.int32), net.const(0.004))
    return net.op("Gemm", back, w, bias)


def computed(net: Net, back: str) -> str:
    return net.op("MatMul", back, net.op("Transpose", back))


def float_weight(net: Net, back: str) -> str:
    return net.op("Gemm", back, net.random(6, 4), net.random(4))


@pytest.mark.parametrize("make", [per_row, shifted, quantized_bias, computed, float_weight])
def test_products_that_stay(make: Callable[[Net, str], str]) -> None:
    net = Net()
    y = make(net, net.qdq(net.input("x", ("batch", 6)), 0.04))
    graph = net.graph({y: ("batch", "batch" if make is computed else 4)})
    lowered = lower(graph, "grouped")
    assert "MatMulInteger" not in ops_of(lowered)
    assert_same(lowered, graph)


def test_sums_that_do_not_fit_32_bits_stay_in_floats() -> None:
    rows = 70_000
    net = Net()
    x = net.op("Add", net.op("Abs", net.input("x", ("batch", rows))), net.const(1e3))
    weight = net.const(np.full((rows, 2), 127), np.int8)
    w = net.op("DequantizeLinear", weight, net.const(0.03))
    y = net.op("MatMul", net.qdq(x, 0.05, np.uint8), w)
    graph = net.graph({y: ("batch", 2)})
    lowered = lower(graph, "grouped")
    feeds = feeds_for(graph, 2)
    payload = lowered.model.SerializeToString()
    session = ort.InferenceSession(payload, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, feeds)[0], plain(graph, feeds)[y], rtol=1e-3)


def test_integers_that_leave_a_branch_stay_signed() -> None:
    """What reads them behind the If cannot be seen from inside it."""
    net = Net()
    x = net.input("x", (5, 6))
    scale, zero = net.const(0.05), net.const(0, np.int8)
    q = net.op("QuantizeLinear", x, scale, zero)

    def branch(name: str) -> onnx.GraphProto:
        node = onnx.helper.make_node("Transpose", [q], [name], perm=[1, 0])
        end = onnx.helper.make_tensor_value_info(name, TensorProto.INT8, (6, 5))
        return onnx.helper.make_graph([node], name, [], [end])

    positive = net.op("Greater", net.op("ReduceSum", x, keepdims=0), net.const(0))
    turned = net.op("If", positive, then_branch=branch("yes"), else_branch=branch("no"))
    assert_exact(net.graph({net.op("DequantizeLinear", turned, scale, zero): (6, 5)}))
