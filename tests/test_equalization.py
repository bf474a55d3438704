"""Channels of neighbours get one range and the function stays; what is no such pair stays as is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from onnx_models import Net, feeds_for, linear

from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.equalization import equalize
from hydra_edge.quantization import CalibrationOptions, quantize

Array = npt.NDArray[np.float64]


def uneven(net: Net, *shape: int, axis: int = 0) -> str:
    """A weight whose channels along ``axis`` differ in size by up to 10^4."""
    sizes = 10.0 ** np.linspace(-2, 2, shape[axis])
    others = [-1 if index == axis else 1 for index in range(len(shape))]
    return net.const(net.rng.standard_normal(shape) * sizes.reshape(others))


def weights(model: onnx.ModelProto) -> list[Array]:
    """Weights of the layers in order, in float64."""
    arrays = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    return [arrays[node.input[1]] for node in layers if node.input[1] in arrays]


def ranges(weight: Array, axis: int) -> Array:
    return np.array([np.abs(channel).max() for channel in np.moveaxis(weight, axis, 0)])


def assert_same_function(model: onnx.ModelProto, graph: Graph, batch: int = 7) -> None:
    """Scaling rounds every weight once a sweep, by 6e-8; terms are larger than their sums."""
    feeds = feeds_for(graph, batch)
    actual, expected = evaluate(model, feeds), evaluate(graph.model, feeds)
    for name, values in expected.items():
        atol = 5e-6 * np.abs(values).max()
        np.testing.assert_allclose(actual[name], values, rtol=0, atol=atol)


def assert_equalized(graph: Graph) -> list[Array]:
    """Something changed, but not what is computed, and a second time changes next to nothing."""
    before = graph.model.SerializeToString(deterministic=True)
    model = equalize(graph.model)
    onnx.checker.check_model(model, full_check=True)
    assert graph.model.SerializeToString(deterministic=True) == before
    assert_same_function(model, graph)
    found = weights(model)
    pairs = zip(found, weights(graph.model), strict=True)
    assert any(not np.allclose(new, old, rtol=0.1) for new, old in pairs)
    for new, again in zip(found, weights(equalize(model)), strict=True):
        np.testing.assert_allclose(again, new, rtol=2e-3)  # sweeps end at changes of 1e-3
    return found


def assert_untouched(graph: Graph) -> None:
    found, old = weights(equalize(graph.model)), weights(graph.model)
    assert found
    for ours, theirs in zip(found, old, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# matches


@pytest.mark.parametrize("first_t", [0, 1])
@pytest.mark.parametrize("second_t", [0, 1])
def test_both_channels_get_the_geometric_mean(first_t: int, second_t: int) -> None:
    net = Net()
    x = net.input("x", ("batch", 4))
    one = uneven(net, 8, 4) if first_t else uneven(net, 4, 8, axis=1)
    two = net.random(*((3, 8) if second_t else (8, 3)))
    h = net.op("Relu", net.op("Gemm", x, one, net.random(8), transB=first_t, alpha=0.5, beta=2.0))
    graph = net.graph({net.op("Gemm", h, two, net.random(3), transB=second_t): ("batch", 3)})
    axes = (1 - first_t, second_t)
    old = [ranges(weight, axis) for weight, axis in zip(weights(graph.model), axes, strict=True)]
    for weight, axis in zip(assert_equalized(graph), axes, strict=True):
        np.testing.assert_allclose(ranges(weight, axis), np.sqrt(old[0] * old[1]), rtol=1e-5)


@pytest.mark.parametrize("bias", [(), (1,), (8,), (1, 8), None])
def test_biases_of_all_shapes(bias: tuple[int, ...] | None) -> None:
    net = Net()
    constants = [uneven(net, 4, 8, axis=1)] + ([] if bias is None else [net.random(*bias)])
    h = net.op("Relu", net.op("Gemm", net.input("x", ("batch", 4)), *constants))
    assert_equalized(net.graph({linear(net, h, 8, 3): ("batch", 3)}))


@pytest.mark.parametrize("bias", [(7, 1), (7, 8)])
def test_biases_by_sample(bias: tuple[int, int]) -> None:
    net = Net()
    x = net.input("x", (7, 4))
    h = net.op("Relu", net.op("Gemm", x, uneven(net, 4, 8, axis=1), net.random(*bias)))
    graph = net.graph({linear(net, h, 8, 3): (7, 3)})
    assert_same_function(equalize(graph.model), graph)


def pooled(net: Net, h: str, kind: str) -> str:
    return net.op(kind, h, kernel_shape=[2, 2], strides=[2, 2], pads=[1, 0, 0, 1])


BETWEEN: dict[str, Callable[[Net, str], str]] = {
    "nothing": lambda net, h: h,
    "relu": lambda net, h: net.op("Relu", h),
    "leaky relu": lambda net, h: net.op("LeakyRelu", h, alpha=0.3),
    "max pool": lambda net, h: pooled(net, net.op("Relu", h), "MaxPool"),
    "max pool of negative values": lambda net, h: pooled(net, h, "MaxPool"),
    "average pool": lambda net, h: pooled(net, h, "AveragePool"),
    "dropout": lambda net, h: net.op("Dropout", net.op("Identity", h)),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_may_stand_between_convolutions(between: str) -> None:
    net = Net()
    x = net.input("x", ("batch", 3, 6, 6))
    h = net.op("Conv", x, uneven(net, 8, 3, 3, 3), net.random(8), pads=[1, 1, 1, 1])
    y = net.op("Conv", BETWEEN[between](net, h), net.random(4, 8, 1, 1))
    one, two = assert_equalized(net.graph({y: ("batch", 4, None, None)}))
    np.testing.assert_allclose(ranges(one, 0), ranges(two, 1), rtol=1e-5)


@pytest.mark.parametrize("pool", ["GlobalAveragePool", "GlobalMaxPool"])
def test_from_convolution_to_gemm(pool: str) -> None:
    net = Net()
    x = net.input("x", ("batch", 3, 6))
    h = net.op("Relu", net.op("Conv", x, uneven(net, 8, 3, 3), net.random(8)))
    h = net.op("Flatten", net.op(pool, h))
    one, two = assert_equalized(net.graph({linear(net, h, 8, 3): ("batch", 3)}))
    np.testing.assert_allclose(ranges(one, 0), ranges(two, 0), rtol=1e-5)


def test_a_depthwise_chain() -> None:
    net = Net()
    x = net.input("x", ("batch", 3, 6, 6))
    h = net.op("Relu", net.op("Conv", x, uneven(net, 8, 3, 1, 1), net.random(8)))
    h = net.op("Relu", net.op("Conv", h, net.random(8, 1, 3, 3), net.random(8), group=8))
    y = net.op("Conv", h, net.random(4, 8, 1, 1), net.random(4))
    one, middle, last = assert_equalized(net.graph({y: ("batch", 4, 4, 4)}))
    for weight, axis in ((one, 0), (last, 1)):
        np.testing.assert_allclose(ranges(weight, axis), ranges(middle, 0), rtol=1e-2)


def test_a_grouped_convolution_in_front() -> None:
    net = Net()
    x = net.input("x", ("batch", 4, 6))
    h = net.op("Relu", net.op("Conv", x, uneven(net, 8, 2, 3), net.random(8), group=2))
    assert_equalized(net.graph({net.op("Conv", h, net.random(3, 8, 1)): ("batch", 3, 4)}))


def test_large_weights() -> None:
    """They are read where they are, in the model, which must not change."""
    net = Net()
    h = net.op(
        "Relu", net.op("Gemm", net.input("x", ("batch", 600)), uneven(net, 600, 500, axis=1))
    )
    graph = net.graph({net.op("Gemm", h, net.random(500, 3, scale=1e-3)): ("batch", 3)})
    before = graph.model.SerializeToString(deterministic=True)
    model = equalize(graph.model)
    assert graph.model.SerializeToString(deterministic=True) == before
    assert_same_function(model, graph)
    np.testing.assert_allclose(*(ranges(w, 1 - i) for i, w in enumerate(weights(model))), rtol=1e-5)


def test_dead_channels_stay() -> None:
    """Zero in front, zero behind, both, and one that is almost zero."""
    net = Net()
    one = net.rng.standard_normal((4, 6)) * [0, 10, 0, 1e-9, 10, 1]
    two = net.rng.standard_normal((6, 3)) * np.array([[1], [0], [0], [1], [1], [1]])
    h = net.op("Relu", net.op("Gemm", net.input("x", ("batch", 4)), net.const(one), net.random(6)))
    graph = net.graph({net.op("Gemm", h, net.const(two)): ("batch", 3)})
    first, second = assert_equalized(graph)
    np.testing.assert_array_equal(first[:, :4], one[:, :4].astype(np.float32))
    np.testing.assert_array_equal(second[:4], two[:4].astype(np.float32))


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_layer(dead: int) -> None:
    net = Net()
    one, two = net.random(4, 6, scale=1 - dead), net.random(6, 3, scale=dead)
    h = net.op("Relu", net.op("Gemm", net.input("x", ("batch", 4)), one))
    assert_untouched(net.graph({net.op("Gemm", h, two): ("batch", 3)}))


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_it_does_not_depend_on_the_unit(scale: float) -> None:
    found = []
    for unit in (1.0, scale):
        net = Net()
        h = net.op("Gemm", net.input("x", ("batch", 4)), net.random(4, 6, scale=unit))
        graph = net.graph({net.op("Gemm", h, net.random(6, 3, scale=unit)): ("batch", 3)})
        found.append([weight / unit for weight in weights(equalize(graph.model))])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_it_makes_few_bits_better() -> None:
    """Hidden channels of very different size share one scale."""
    net = Net()
    sizes = 10.0 ** np.linspace(-2, 2, 16)
    one, two = net.rng.standard_normal((6, 16)) * sizes, net.rng.standard_normal((16, 3))
    h = net.op("Relu", net.op("Gemm", net.input("x", ("batch", 6)), net.const(one)))
    y = net.op("Gemm", h, net.const(two / sizes[:, None]))
    graph = net.graph({y: ("batch", 3)})
    feeds = feeds_for(graph, 256)
    errors = []
    for on in (False, True):
        options = CalibrationOptions(equalize=on)
        found = quantize(graph, "int8", calibration=feeds, options=options)
        difference = evaluate(found.model, feeds)[y] - evaluate(graph.model, feeds)[y]
        errors.append(float(np.abs(difference).mean()))
    assert errors[1] < 0.1 * errors[0]


# near misses


def second_conv(net: Net, h: str, **attrs: object) -> dict[str, object]:
    return {net.op("Conv", h, net.random(4, 8, 1, 1), **attrs): ("batch", 4, None, None)}


def flattened(net: Net, h: str, axis: int, width: int) -> dict[str, object]:
    h = net.op("Flatten", net.op("Relu", h), axis=axis)
    return {linear(net, h, width, 3): (None, 3)}


def residual(net: Net, h: str) -> dict[str, object]:
    return second_conv(net, net.op("Add", net.op("Relu", h), net.op("Sigmoid", h)))


def read_twice(net: Net, h: str) -> dict[str, object]:
    return second_conv(net, net.op("Relu", h)) | {net.op("Sigmoid", h): ("batch", 8, 6, 6)}


def an_output(net: Net, h: str) -> dict[str, object]:
    return second_conv(net, net.op("Relu", h)) | {h: ("batch", 8, 6, 6)}


def an_output_between(net: Net, h: str) -> dict[str, object]:
    h = net.op("Relu", h)
    return second_conv(net, h) | {h: ("batch", 8, 6, 6)}


def weight_is_output(net: Net, h: str) -> dict[str, object]:
    return second_conv(net, net.op("Relu", h)) | {net.nodes[0].input[1]: (8, 3, 3, 3)}


def bias_is_output(net: Net, h: str) -> dict[str, object]:
    return second_conv(net, net.op("Relu", h)) | {net.nodes[0].input[2]: (8,)}


def bias_is_shared(net: Net, h: str) -> dict[str, object]:
    weight, bias = net.random(8, 8, 1, 1), net.nodes[0].input[2]
    return {net.op("Conv", net.op("Relu", h), weight, bias): ("batch", 8, 6, 6)}


def weight_is_shared(net: Net, h: str) -> dict[str, object]:
    other = net.op("Conv", net.inputs[0].name, net.nodes[0].input[1])
    return second_conv(net, net.op("Relu", h)) | {other: ("batch", 8, 4, 4)}


def second_weight_is_shared(net: Net, h: str) -> dict[str, object]:
    weight = net.random(8, 8, 1, 1)
    h = net.op("Sigmoid", net.op("Conv", net.op("Relu", h), weight))
    return {net.op("Conv", h, weight): ("batch", 8, 6, 6)}


def computed_weight(net: Net, h: str) -> dict[str, object]:
    weight = net.op("Mul", net.random(4, 8, 1, 1), net.random(8, 1, 1))
    return {net.op("Conv", net.op("Relu", h), weight): ("batch", 4, 6, 6)}


def grouped(net: Net, h: str) -> dict[str, object]:
    y = net.op("Conv", net.op("Relu", h), net.random(8, 4, 1, 1), group=2)
    return {y: ("batch", 8, 6, 6)}


def multiplied(net: Net, h: str) -> dict[str, object]:
    """Depthwise with two outputs for each input."""
    y = net.op("Conv", net.op("Relu", h), net.random(16, 1, 1, 1), group=8)
    return {y: ("batch", 16, 6, 6)}


NEAR_MISSES: dict[str, Callable[[Net, str], dict[str, object]]] = {
    "clip": lambda net, h: second_conv(net, net.op("Clip", h, net.const(0.0), net.const(6.0))),
    "sigmoid": lambda net, h: second_conv(net, net.op("Sigmoid", h)),
    "prelu": lambda net, h: second_conv(net, net.op("PRelu", h, net.random(8, 1, 1))),
    "positions among channels": lambda net, h: flattened(net, h, 1, 8 * 36),
    "positions alone": lambda net, h: flattened(net, h, 3, 6),
    "residual": residual,
    "read twice": read_twice,
    "an output": an_output,
    "an output between": an_output_between,
    "the weight is an output": weight_is_output,
    "the bias is an output": bias_is_output,
    "the bias is shared": bias_is_shared,
    "the weight is shared": weight_is_shared,
    "the second weight is shared": second_weight_is_shared,
    "a computed weight": computed_weight,
    "grouped": grouped,
    "multiplied": multiplied,
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_near_misses_stay_untouched(miss: str) -> None:
    net = Net()
    x = net.input("x", ("batch", 3, 6, 6))
    pads = {} if miss == "the weight is shared" else {"pads": [1, 1, 1, 1]}
    h = net.op("Conv", x, uneven(net, 8, 3, 3, 3), net.random(8), **pads)
    assert_untouched(net.graph(NEAR_MISSES[miss](net, h)))  # type: ignore[arg-type]


def test_positions_as_many_as_channels_are_no_channels() -> None:
    """Flatten makes ``[N * C, L]`` of ``[N, C, L]``, and L is C here."""
    net = Net()
    h = net.op("Conv", net.input("x", ("batch", 3, 10)), uneven(net, 8, 3, 3))
    assert_untouched(net.graph(flattened(net, h, 2, 8)))


def test_a_transposed_input_has_other_channels() -> None:
    net = Net()
    h = net.op("Relu", net.op("Gemm", net.input("x", (5, 4)), uneven(net, 4, 5, axis=1)))
    assert_untouched(net.graph({net.op("Gemm", h, net.random(5, 3), transA=1): (5, 3)}))


def test_without_a_pair_the_model_itself_comes_back() -> None:
    net = Net()
    graph = net.graph({linear(net, net.input("x", ("batch", 6)), 6, 3): ("batch", 3)})
    assert equalize(graph.model) is graph.model
