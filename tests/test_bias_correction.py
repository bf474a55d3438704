"""The mean of every corrected layer's output is what it was; all else stays as it is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from onnx_models import Net, conv_student, feeds_for, linear

from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.bias_correction import correct
from hydra_edge.calibration import CalibrationOptions, Samples
from hydra_edge.precision import Precision
from hydra_edge.quantization import quantize

Feeds = Mapping[str, npt.NDArray[np.generic]]
ON = CalibrationOptions(correct_bias=True)


def shifted(graph: Graph, batch: int = 100) -> dict[str, npt.NDArray[np.generic]]:
    """Inputs whose mean is not 0, which makes rounded weights shift the output."""
    return {name: array + np.float32(1) for name, array in feeds_for(graph, batch).items()}


def mean_error(
    graph: Graph, found: onnx.ModelProto, feeds: Feeds, output: str | None = None
) -> float:
    """The largest shift of a channel's mean, in units of the largest output."""
    name = output or graph.outputs[0].name
    expected, actual = (
        np.moveaxis(evaluate(m, feeds)[name].astype(np.float64), 1, 0) for m in (graph.model, found)
    )
    shift = (actual - expected).reshape(len(expected), -1).mean(1)
    return float(np.abs(shift).max() / np.abs(expected).max())


def assert_corrected(graph: Graph, precision: str | Precision = "int4-weight-only") -> Graph:
    feeds = shifted(graph)
    found = quantize(graph, precision, calibration=feeds, options=ON)
    onnx.checker.check_model(found.model, full_check=True)
    plain = quantize(graph, precision, calibration=feeds)
    for spec in graph.outputs:
        assert mean_error(graph, plain.model, feeds, spec.name) > 1e-4
        # Means of 100 and more fp32 sums.
        assert mean_error(graph, found.model, feeds, spec.name) < 2e-6
    return found


def constants(model: onnx.ModelProto) -> dict[str, npt.NDArray[np.generic]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


# layers


@pytest.mark.parametrize(
    "style", ["gemm", "gemm_t", "gemm_scaled", "gemm_row", "gemm_scalar", "gemm_nobias"]
)
@pytest.mark.parametrize("precision", ["int8", "int8-weight-only", "int4-weight-only", "fp8"])
def test_gemm(style: str, precision: str) -> None:
    net = Net()
    y = linear(net, net.input("x", ("batch", 6)), 6, 4, style)
    graph = net.graph({y: ("batch", 4)})
    found = assert_corrected(graph, precision)
    biases = [node.input[2] for node in found.model.graph.node if node.op_type == "Gemm"]
    assert all(name in constants(found.model) for name in biases)


@pytest.mark.parametrize("bias", [(100, 1), (100, 4)])
def test_a_bias_by_sample(bias: tuple[int, int]) -> None:
    net = Net()
    y = net.op("Gemm", net.input("x", (100, 6)), net.random(6, 4), net.random(*bias), beta=0.5)
    assert_corrected(net.graph({y: (100, 4)}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("group", [1, 2])
def test_convolutions(op: str, dims: int, bias: bool, group: int) -> None:
    net = Net()
    x = net.input("x", ("batch", 4, *(5,) * dims))
    channels = (6, 4 // group) if op == "Conv" else (4, 6 // group)
    extra = [net.random(6)] if bias else []
    y = net.op(op, x, net.random(*channels, *(3,) * dims), *extra, group=group)
    assert_corrected(net.graph({y: ("batch", 6, *(None,) * dims)}))


def test_the_shift_is_the_mean_input_times_the_error_of_the_weight() -> None:
    net = Net()
    y = linear(net, net.input("x", ("batch", 40)), 40, 3)
    graph = net.graph({y: ("batch", 3)})
    feeds = shifted(graph)
    found = quantize(graph, "int8-weight-only", calibration=feeds, options=ON)
    weight, bias = (array.astype(np.float64) for array in constants(graph.model).values())
    scales = np.abs(weight).max(0) / 127
    error = weight - np.rint(weight / scales) * scales
    (node,) = (node for node in found.model.graph.node if node.op_type == "Gemm")
    expected = bias + np.asarray(feeds["x"], np.float64).mean(0) @ error
    np.testing.assert_allclose(constants(found.model)[node.input[2]], expected, rtol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "int4-weight-only"])
def test_a_chain_is_corrected_one_after_the_other(precision: str) -> None:
    """Every layer's mean is right at the end, with what the layers in front became."""
    net = Net()
    h, ends = net.input("x", ("batch", 6)), {}
    for width in (6, 8, 8):
        h = linear(net, h, width, 8)
        ends[h] = ("batch", 8)
        h = net.op("Relu", h)
    assert_corrected(net.graph(ends), precision)


def test_layers_with_other_numbers_of_rows() -> None:
    """One reads samples, the other their positions as rows."""
    net = Net()
    x = net.input("x", ("batch", 4, 6))
    mean = net.op("ReduceMean", x, net.const([1], np.int64), keepdims=0)
    rows = net.op("Reshape", x, net.const([-1, 6], np.int64))
    ends = {linear(net, mean, 6, 3): ("batch", 3), linear(net, rows, 6, 3): (None, 3)}
    assert_corrected(net.graph(ends))


def test_an_image_classifier_with_heads() -> None:
    graph = conv_student()
    feeds = shifted(graph)
    shifts = [
        np.abs(
            np.asarray(evaluate(found.model, feeds)["head_logits"], np.float64).mean(1)
            - np.asarray(evaluate(graph.model, feeds)["head_logits"], np.float64).mean(1)
        ).max()
        for found in (
            quantize(graph, "int4-weight-only", calibration=feeds, options=options)
            for options in (ON, CalibrationOptions())
        )
    ]
    assert shifts[0] < 1e-5 < 1e-3 < shifts[1]


# what stays


def two_layers(net: Net, bias: str) -> Graph:
    h = net.op("Relu", net.op("Gemm", net.input("x", ("batch", 6)), net.random(6, 5), bias))
    return net.graph({net.op("Gemm", h, net.random(5, 5), bias): ("batch", 5)})


def test_a_float_layer_that_shares_the_bias_keeps_it() -> None:
    net = Net()
    graph = two_layers(net, net.random(5))
    precision = Precision(layers={"n0": "int4-weight-only"})
    found = quantize(graph, precision, calibration=shifted(graph), options=ON)
    first, last = (node for node in found.model.graph.node if node.op_type == "Gemm")
    before = [node for node in graph.model.graph.node if node.op_type == "Gemm"][1]
    for ours, theirs in zip(last.input[1:], before.input[1:], strict=True):
        np.testing.assert_array_equal(constants(found.model)[ours], constants(graph.model)[theirs])
    assert first.input[2] != last.input[2]


@pytest.mark.parametrize("heads", ["fp32", "fp16"])
def test_float_heads_stay(heads: str) -> None:
    graph = conv_student()
    precision = Precision("int4-weight-only", heads)
    options = (ON, CalibrationOptions())
    one, other = (
        quantize(graph, precision, calibration=shifted(graph), options=o).model for o in options
    )
    gemms = [[n for n in model.graph.node if n.op_type == "Gemm"] for model in (one, other)]
    assert len(gemms[0]) == 6
    for ours, theirs in zip(*gemms, strict=True):
        for a, b in zip(ours.input[1:], theirs.input[1:], strict=True):
            np.testing.assert_array_equal(constants(one)[a], constants(other)[b])


def test_a_computed_bias_stays() -> None:
    net = Net()
    bias = net.op("Relu", net.input("b", (5,)))
    y = net.op("Gemm", net.input("x", ("batch", 6)), net.random(6, 5), bias, beta=0.5)
    graph = net.graph({y: ("batch", 5)})
    quantized = quantize(graph, "int8-weight-only").model
    samples = Samples({"x": feeds_for(graph, 5)["x"], "b": np.ones(5, np.float32)}, graph.inputs)
    assert alike(quantized, correct(quantized, graph.model, ["n1"], samples))


def alike(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    """Equal layers and equal constants."""
    layers = [[n for n in m.graph.node if n.op_type in ("Gemm", "MatMul")] for m in (one, other)]
    values = [sorted(a.tobytes() for a in constants(m).values()) for m in (one, other)]
    return layers[0] == layers[1] and values[0] == values[1]


def test_layers_without_a_bias_to_correct() -> None:
    net = Net()
    y = net.op("MatMul", net.input("x", ("batch", 3, 6)), net.random(6, 5))
    graph = net.graph({y: ("batch", 3, 5)})
    one, other = (
        quantize(graph, "int8", calibration=shifted(graph), options=options)
        for options in (ON, CalibrationOptions())
    )
    assert one.data == other.data


def test_a_tensor_that_is_called_like_the_new_bias() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    other = net.op("Sigmoid", x, name="n1_corrected_bias")
    graph = net.graph({linear(net, x, 6, 6): ("batch", 6), other: ("batch", 6)})
    feeds = shifted(graph)
    found = quantize(graph, "int4-weight-only", calibration=feeds, options=ON).model
    assert "n1" in {node.name for node in graph.model.graph.node if node.op_type == "Gemm"}
    assert mean_error(graph, found, feeds, other) == 0.0
    assert mean_error(graph, found, feeds) < 2e-6


def test_the_same_bytes_each_time_whatever_the_batches() -> None:
    graph = conv_student()
    feeds = shifted(graph)
    batches = [
        {n: array[a:b] for n, array in feeds.items()} for a, b in ((0, 1), (1, 70), (70, 100))
    ]
    one, other = (
        quantize(graph, "int8", calibration=data, options=ON) for data in (feeds, batches)
    )
    assert one.data == other.data
    assert one.metadata.calibration_sha256 == other.metadata.calibration_sha256
