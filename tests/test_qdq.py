"""Q/DQ hold the right integers on the right axes: compared with loops over channels in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx_models import Net, feeds_for, linear

from hydra_edge import surgery
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import Observer, evaluate
from hydra_edge.errors import QuantizationError
from hydra_edge.precision import Precision
from hydra_edge.qdq import Inserter, observed
from hydra_edge.quantization import quantize

Array = npt.NDArray[np.float64]


def inserted(
    graph: Graph, precision: str, thresholds: Mapping[str, float] | None = None, block: int = 32
) -> onnx.ModelProto:
    """``graph`` with all its nodes in a precision; activations are kept up to 3 or as told."""
    surgeon = surgery.open_model(graph.model, 21)
    kept = {(name, precision): 3.0 for name in surgeon.tensors()}
    kept |= {(name, precision): value for name, value in (thresholds or {}).items()}
    inserter = Inserter(surgeon, kept, "minmax", block)
    for node in list(surgeon.nodes):
        inserter.quantize(node, precision)
    model = surgery.close_model(surgeon, like=graph.model)
    onnx.checker.check_model(model, full_check=True)
    return model


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def dequantized(model: onnx.ModelProto, feeds: Mapping[str, npt.NDArray[np.generic]]) -> Array:
    """The one weight of a model, as its layer reads it."""
    stored = {tensor.name for tensor in model.graph.initializer}
    (name,) = (
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    )
    found: Array = Observer(model, [name]).run(feeds)[name].astype(np.float64)
    return found


# weights


def by_groups(weight: Array, axis: int, size: int, limit: float) -> Array:
    """Every group of ``size`` slices along ``axis`` alone: per channel if one, in blocks if not."""
    moved = np.moveaxis(np.asarray(weight, np.float64), axis, 0)
    found = np.empty_like(moved)
    for start in range(0, len(moved), size):
        rows = moved[start : start + size]
        for index in np.ndindex(rows.shape[1:] if size > 1 else ()):
            group = rows[(slice(None), *index)]
            scale = float(np.float32(np.abs(group).max() / limit)) or 1.0
            found[start : start + size][(slice(None), *index)] = np.rint(group / scale) * scale
    return np.moveaxis(found, 0, axis)


def layer(op: str, shape: tuple[int, ...], x: tuple[int, ...], **attrs: object) -> Graph:
    """One layer with one dead channel on each axis and channels of different size."""
    net = Net()
    weight = net.rng.standard_normal(shape)
    for axis, size in enumerate(shape):
        where = [-1 if index == axis else 1 for index in range(len(shape))]
        weight *= np.linspace(0.0, 2.0, size).reshape(where) if size > 1 else 1.0
    y = net.op(op, net.input("x", x), net.const(weight), **attrs)
    return net.graph({y: (None,) * len(x)})


# op, shape of the weight, shape of x, attributes, axis of outputs, axis of inputs
CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, float], int, int]] = {
    "gemm": ("Gemm", (70, 5), (4, 70), {}, 1, 0),
    "gemm transB": ("Gemm", (5, 70), (4, 70), {"transB": 1}, 0, 1),
    "gemm transA": ("Gemm", (33, 5), (33, 4), {"transA": 1}, 1, 0),
    "gemm alpha": ("Gemm", (70, 5), (4, 70), {"alpha": 2.0}, 1, 0),
    "matmul": ("MatMul", (32, 5), (2, 4, 32), {}, 1, 0),
    "matmul of one row": ("MatMul", (1, 5), (4, 1), {}, 1, 0),
    "batched matmul": ("MatMul", (3, 41, 5), (3, 4, 41), {}, 2, 1),
    "conv 1d": ("Conv", (6, 4, 3), (2, 4, 9), {}, 0, -1),
    "conv 2d": ("Conv", (6, 4, 3, 3), (2, 4, 9, 9), {}, 0, -1),
    "conv 3d": ("Conv", (6, 4, 2, 2, 2), (2, 4, 5, 5, 5), {}, 0, -1),
    "grouped": ("Conv", (6, 2, 3, 3), (2, 4, 9, 9), {"group": 2}, 0, -1),
    "depthwise": ("Conv", (6, 1, 3, 3), (2, 6, 9, 9), {"group": 6}, 0, -1),
    "transposed": ("ConvTranspose", (4, 6, 3, 3), (2, 4, 5, 5), {}, 1, -1),
    "transposed, grouped": ("ConvTranspose", (4, 3, 3, 3), (2, 4, 5, 5), {"group": 2}, 1, -1),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_in_int8_and_int4(case: str) -> None:
    op, shape, x, attrs, out, into = CASES[case]
    graph = layer(op, shape, x, **attrs)
    feeds = feeds_for(graph)
    weight = onnx.numpy_helper.to_array(graph.model.graph.initializer[0])
    per_channel = by_groups(weight, out, 1, 127.0)
    blocked = by_groups(weight, into, 32, 7.0) if into >= 0 else per_channel
    for precision, expected in (("int8-weight-only", per_channel), ("int4-weight-only", blocked)):
        model = inserted(graph, precision)
        # A product in float64, rounded to float32, against one in float32.
        np.testing.assert_allclose(dequantized(model, feeds), expected, rtol=2e-7, atol=1e-12)
        exact = graph_with(graph, expected)
        (actual,), (right,) = evaluate(model, feeds).values(), evaluate(exact, feeds).values()
        np.testing.assert_allclose(actual, right, rtol=1e-4, atol=1e-5)


def graph_with(graph: Graph, weight: Array) -> onnx.ModelProto:
    """The same graph with another weight."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    name = model.graph.initializer[0].name
    array = onnx.numpy_helper.from_array(weight.astype(np.float32), name)
    model.graph.initializer[0].CopyFrom(array)
    return model


@pytest.mark.parametrize("case", CASES)
def test_weights_in_fp8(case: str) -> None:
    """Three bits behind the first one: at most 1/16 of every value is lost."""
    op, shape, x, attrs, _, _ = CASES[case]
    graph = layer(op, shape, x, **attrs)
    weight = onnx.numpy_helper.to_array(graph.model.graph.initializer[0]).astype(np.float64)
    found = dequantized(inserted(graph, "fp8"), feeds_for(graph))
    peak = np.abs(weight).max()
    np.testing.assert_allclose(found, weight, rtol=1 / 16, atol=peak / 448 * 2.0**-10)
    assert np.abs(found).max() == pytest.approx(peak)
    assert not np.array_equal(found, weight) or weight.size < 10


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 129])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_the_last_block_may_be_smaller(rows: int, block: int) -> None:
    """An odd number of values in four bits leaves half a byte, too."""
    graph = layer("Gemm", (rows, 3), (4, rows))
    model = inserted(graph, "int4-weight-only", block=block)
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    (node,) = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
    assert [sizes[name] for name in node.input] == [
        [rows, 3],
        [math.ceil(rows / block), 3],
        [math.ceil(rows / block), 3],
    ]
    weight = onnx.numpy_helper.to_array(graph.model.graph.initializer[0])
    expected = by_groups(weight, 0, block, 7.0)
    np.testing.assert_allclose(dequantized(model, feeds_for(graph)), expected, rtol=2e-7)


@pytest.mark.parametrize("precision", ["int8-weight-only", "int4-weight-only", "fp8"])
@pytest.mark.parametrize("peak", [0.0, 1e-44, 1e-30, 1e30, 3.4e38])
def test_weights_of_any_size(peak: float, precision: str) -> None:
    net = Net()
    weight = np.float32(peak) * np.float32([[1, -1], [0.5, 0.25], [0, 1]])
    graph = net.graph({net.op("Gemm", net.input("x", (1, 3)), net.const(weight)): (1, 2)})
    found = dequantized(inserted(graph, precision), {"x": np.zeros((1, 3), np.float32)})
    np.testing.assert_allclose(found, weight, rtol=0.15, atol=max(peak / 14, 1e-37))


@pytest.mark.parametrize("precision", ["int8-weight-only", "int4-weight-only", "fp8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_without_a_range(value: float, precision: str) -> None:
    net = Net()
    weight = net.const([[1.0], [value]])
    graph = net.graph({net.op("Gemm", net.input("x", (1, 2)), weight): (1, 1)})
    message = r"The weight 'c0' holds NaN or infinity.*Check the graph in fp32 first"
    with pytest.raises(QuantizationError, match=message):
        inserted(graph, precision)


def test_a_shared_weight_is_stored_once_for_each_axis() -> None:
    net = Net()
    x, weight = net.input("x", ("batch", 6)), net.random(6, 6, scale=0.3)
    h = net.op("Gemm", net.op("Gemm", x, weight), weight)
    graph = net.graph({net.op("Gemm", h, weight, transB=1): ("batch", 6)})
    for precision in ("int8-weight-only", "int4-weight-only"):
        assert ops(inserted(graph, precision)).count("DequantizeLinear") == 2
    assert ops(inserted(graph, "fp8")).count("QuantizeLinear") == 3
    for precision in ("int8-weight-only", "fp8"):
        feeds = feeds_for(graph)
        (actual,) = evaluate(inserted(graph, precision), feeds).values()
        (expected,) = evaluate(graph.model, feeds).values()
        np.testing.assert_allclose(actual, expected, atol=0.15 * np.abs(expected).max())


def test_two_weights_in_fp8_have_their_own_scales() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    graph = net.graph({linear(net, linear(net, x, 6, 5), 5, 3): ("batch", 3)})
    assert ops(inserted(graph, "fp8")).count("DequantizeLinear") == 4


@pytest.mark.parametrize("precision", ["int8", "int8-weight-only", "int4-weight-only", "fp8"])
def test_a_weight_that_is_an_output_stays_one(precision: str) -> None:
    net = Net()
    x, weight = net.input("x", ("batch", 6)), net.random(6, 3)
    y = net.op("Gemm", x, weight)
    graph = net.graph({y: ("batch", 3), weight: (6, 3)})
    feeds = feeds_for(graph, 40)
    found = quantize(graph, precision, calibration=feeds)
    actual, expected = evaluate(found.model, feeds), evaluate(graph.model, feeds)
    np.testing.assert_array_equal(actual[weight], expected[weight])
    assert not np.array_equal(actual[y], expected[y])
    np.testing.assert_allclose(actual[y], expected[y], atol=0.15 * np.abs(expected[y]).max())


def constant_node(net: Net) -> str:
    value = onnx.numpy_helper.from_array(net.rng.standard_normal((6, 3)).astype(np.float32))
    return net.op("Constant", value=value)


BEHIND: dict[str, Callable[[Net], str]] = {
    "transpose": lambda net: net.op("Transpose", net.random(3, 6)),
    "identity": lambda net: net.op("Identity", net.random(6, 3)),
    "constant": constant_node,
    "reshape": lambda net: net.op("Reshape", net.random(18), net.const([6, 3], np.int64)),
}


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("precision", ["int8-weight-only", "int4-weight-only", "fp8"])
def test_a_weight_behind_other_nodes(behind: str, precision: str) -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    graph = net.graph({net.op("MatMul", x, BEHIND[behind](net)): ("batch", 3)})
    found = quantize(graph, precision, calibration=feeds_for(graph, 40))
    assert set(ops(found.model)) <= {"MatMul", "DequantizeLinear", "QuantizeLinear"}
    assert ops(found.model).count("DequantizeLinear") == (2 if precision == "fp8" else 1)


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("precision", ["int8", "int4-weight-only", "fp8"])
def test_older_opsets_are_raised_as_far_as_it_needs(opset: int, precision: str) -> None:
    net = Net(opset=opset)
    x = net.input("x", ("batch", 3, 8, 8))
    h = net.op("Relu", net.op("Conv", x, net.random(4, 3, 3, 3, scale=0.2), net.random(4)))
    if opset < 18:
        h = net.op("ReduceMean", h, axes=[2, 3], keepdims=0)
    else:
        h = net.op("ReduceMean", h, net.const([2, 3], np.int64), keepdims=0)
    graph = net.graph({linear(net, net.op("Softmax", h), 4, 3): ("batch", 3)})
    feeds = feeds_for(graph, 64)
    found = quantize(graph, precision, calibration=feeds)
    (entry,) = found.model.opset_import
    assert entry.version == max(opset, {"int8": 18, "int4-weight-only": 21, "fp8": 19}[precision])
    (actual,), (expected,) = (evaluate(g.model, feeds).values() for g in (found, graph))
    np.testing.assert_allclose(actual, expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.parametrize("precision", ["int8", "int4-weight-only", "fp8"])
def test_large_weights(precision: str) -> None:
    """Above 1 MB ONNX Runtime reads them from shared memory."""
    net = Net()
    x = net.input("x", ("batch", 600))
    h = net.op("Relu", linear(net, x, 600, 700))
    graph = net.graph({linear(net, h, 700, 3): ("batch", 3)})
    feeds = feeds_for(graph, 40)
    found = quantize(graph, precision, calibration=feeds)
    (actual,), (expected,) = (evaluate(g.model, feeds).values() for g in (found, graph))
    assert 0 < np.abs(actual - expected).max() < 0.2 * np.abs(expected).max()


# activations


def identity(shape: tuple[int | str, ...]) -> Graph:
    """A layer whose result is what it reads."""
    net = Net()
    y = net.op("MatMul", net.input("x", shape), net.const(np.eye(int(shape[-1]))))
    return net.graph({y: shape})


def test_activations_in_int8() -> None:
    """Ties go to even, and what is larger is cut at 127 steps on both sides."""
    x = np.float32([[0.5, 1.5, -2.5, 126.4], [127.0, 1000.0, -1000.0, -127.4]])
    (found,) = evaluate(inserted(identity((2, 4)), "int8", {"x": 127.0}), {"x": x}).values()
    # ONNX has -128, too.
    np.testing.assert_array_equal(found, [[0, 2, -2, 126], [127, 127, -128, -127]])


def test_activations_in_fp8_become_the_largest_not_nan() -> None:
    x = np.float32([[1.0, 0.3, -1.0, 0.0], [1.04, 1e30, -7.0, 1e-9]])
    (found,) = evaluate(inserted(identity((2, 4)), "fp8", {"x": 1.0}), {"x": x}).values()
    three = float(np.float64(0.3 * 448).astype(ml_dtypes.float8_e4m3fn)) / 448
    expected = [[1.0, three, -1.0, 0.0], [1.0, 1.0, -1.0, 0.0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("kept", [0.0, 1e-44])
def test_activations_that_are_always_zero(kept: float, precision: str) -> None:
    x = np.float32([[0, kept, 0, 0]])
    (found,) = evaluate(inserted(identity((1, 4)), precision, {"x": kept}), {"x": x}).values()
    np.testing.assert_array_equal(found, np.zeros((1, 4)))


def seen(graph: Graph, precision: str) -> list[list[str]]:
    nodes = surgery.open_model(graph.model).nodes
    return [[tensor.name for tensor in observed(node, precision)] for node in nodes]


def test_products_of_two_activations() -> None:
    net = Net()
    a, b = net.input("a", (2, 3, 4)), net.input("b", (2, 4, 3))
    graph = net.graph({net.op("MatMul", a, b): (2, 3, 3)})
    assert (seen(graph, "int8"), seen(graph, "fp8")) == ([["a", "b"]], [[]])
    assert ops(inserted(graph, "int8")).count("QuantizeLinear") == 2
    square = Net()
    x = square.input("x", (3, 3))
    graph = square.graph({square.op("MatMul", x, x): (3, 3)})
    assert ops(inserted(graph, "int8")).count("QuantizeLinear") == 1


def constant_first(net: Net) -> str:
    return net.op("MatMul", net.random(4, 6), net.input("x", (6, 6)))


def computed_kernel(net: Net) -> str:
    return net.op("Conv", net.input("x", (1, 2, 6)), net.op("Relu", net.input("k", (3, 2, 3))))


def computed_gemm(net: Net) -> str:
    return net.op("Gemm", net.input("x", (4, 6)), net.input("w", (6, 3)))


def vector(net: Net) -> str:
    return net.op("MatMul", net.input("x", (4, 6)), net.random(6))


@pytest.mark.parametrize(
    ("make", "rank"),
    [(constant_first, 2), (computed_kernel, 3), (computed_gemm, 2), (vector, 1)],
)
def test_one_operand_is_not_rounded_alone(make: Callable[[Net], str], rank: int) -> None:
    net = Net()
    graph = net.graph({make(net): (None,) * rank})
    for precision in ("int8", "fp8"):
        assert "QuantizeLinear" not in ops(inserted(graph, precision))


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((2, 3, 4, 4), [2, 3], ["x"]),
        ((2, 3, 4, 4), [-1, -2], ["x"]),
        ((2, 3, 4, 4, 4), [2, 3, 4], ["x"]),
        ((2, 3, 4, 4), [1], []),  # a norm over channels
        ((2, 3, 4, 4), [-1], []),  # a norm, channels last
        ((2, 3, 4), [2], []),  # a norm of a sequence
        ((2, 3), [1], []),
    ],
)
def test_means_over_positions_alone_are_pools(
    shape: tuple[int, ...], axes: list[int], expected: list[str]
) -> None:
    net = Net()
    y = net.op("ReduceMean", net.input("x", shape), net.const(axes, np.int64))
    graph = net.graph({y: (None,) * len(shape)})
    assert (seen(graph, "int8"), seen(graph, "fp8")) == ([expected], [[]])


def test_a_mean_over_all_and_a_mean_over_axes_given_later() -> None:
    net = Net()
    x, axes = net.input("x", (2, 3, 4, 4)), net.input("axes", (1,), onnx.TensorProto.INT64)
    ends = [net.op("ReduceMean", x), net.op("ReduceMean", x, axes)]
    graph = net.graph(dict.fromkeys(ends, (None,) * 4))
    assert seen(graph, "int8") == [[], []]


def test_pools_read_what_layers_read() -> None:
    net = Net()
    x = net.input("x", ("batch", 3, 6, 6))
    h = net.op("Conv", x, net.random(4, 3, 1, 1))
    p = net.op("GlobalAveragePool", x)
    graph = net.graph({h: ("batch", 4, 6, 6), p: ("batch", 3, 1, 1)})
    assert ops(inserted(graph, "int8")).count("QuantizeLinear") == 1
    assert ops(inserted(graph, "fp8")).count("QuantizeLinear") == 1
    assert "QuantizeLinear" not in ops(inserted(graph, "int8-weight-only"))


# names


@pytest.mark.parametrize("name", ["x_scale", "x_zero_point", "x_quantized", "x_dequantized"])
def test_tensors_of_the_same_name(name: str) -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    h = net.op("Mul", linear(net, x, 6, 6), net.op("Sigmoid", x, name=name))
    graph = net.graph({linear(net, h, 6, 3): ("batch", 3)})
    feeds = feeds_for(graph, 40)
    found = quantize(graph, "int8", calibration=feeds)
    (actual,), (expected,) = (evaluate(g.model, feeds).values() for g in (found, graph))
    np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())


def test_one_tensor_in_two_precisions() -> None:
    """Its fp8 twin is called like the int8 twin of another tensor."""
    net = Net()
    x, other = net.input("x", ("batch", 6)), net.input("x_fp8", ("batch", 6))
    ends = [linear(net, tensor, 6, 3) for tensor in (x, x, other)]
    graph = net.graph(dict.fromkeys(ends, ("batch", 3)))
    feeds = feeds_for(graph, 40)
    feeds["x_fp8"] = feeds["x_fp8"] * np.float32(100)
    precision = Precision("int8", "int8", layers={"n0": "fp8"})
    found = quantize(graph, precision, calibration=feeds)
    assert ops(found.model).count("QuantizeLinear") == 3
    actual, expected = evaluate(found.model, feeds), evaluate(graph.model, feeds)
    for name in ends:
        atol = 0.1 * np.abs(expected[name]).max()
        np.testing.assert_allclose(actual[name], expected[name], atol=atol)
