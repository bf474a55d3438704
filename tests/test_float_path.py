"""Weights become floats when a program is loaded, fp8 becomes casts, and nothing else changes."""

from __future__ import annotations

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx_models import Net, assert_same, conv_student, feeds_for, ops_of, student

from hydra_edge import ops
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.equivalence import difference
from hydra_edge.fusion import fuse
from hydra_edge.lowering import LOWERINGS, lower
from hydra_edge.quantization import PRECISIONS, quantize
from hydra_edge.runtime import load


def loaded_types(graph: Graph, folder: Path) -> set[int]:
    """Types of the weights that are left when ONNX Runtime has loaded a program."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    options.log_severity_level = 3
    payload = ops.inline(graph.model).SerializeToString()
    ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    return weight_types(onnx.load(folder / "loaded.onnx"))


def weight_types(model: onnx.ModelProto) -> set[int]:
    return {t.data_type for t in model.graph.initializer if len(t.dims) > 1}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("precision", ["int8-weight-only", "int4-weight-only,block=32"])
@pytest.mark.parametrize("make", [student, conv_student])
def test_weights_are_floats_once_loaded(
    make: type, precision: str, lowering: str, tmp_path: Path
) -> None:
    found = quantize(make(), precision)
    for graph in (found, fuse(found)):
        lowered = lower(graph, lowering)
        assert loaded_types(lowered, tmp_path) == {TensorProto.FLOAT}
        assert_same(lowered, found, rtol=1e-5)
        # The file still holds the few bits.
        assert weight_types(lowered.model) & {TensorProto.INT8, TensorProto.INT4}


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize("block", [0, 3, 4])
def test_any_scales_and_zero_points(axis: int, dtype: type, block: int) -> None:
    """K of 6 is no multiple of 4: the last block is short."""
    net = Net(opset=21)
    x = net.input("x", ("batch", 6))
    signed = dtype in (np.int8, ml_dtypes.int4)
    values = net.const(net.rng.integers(-7 if signed else 0, 8, (6, 4)), dtype)
    shape = [6, 4]
    if block:
        shape[axis] = -(-shape[axis] // block)
    else:
        shape = [shape[axis]]
    scale = net.const(net.rng.uniform(0.1, 0.2, shape))
    zero = net.const(net.rng.integers(0, 4, shape), dtype)
    attrs = {"block_size": block} if block else {}
    w = net.op("DequantizeLinear", values, scale, zero, axis=axis, **attrs)
    graph = net.graph({net.op("MatMul", x, w): ("batch", 4)})
    lowered = lower(graph, "grouped")
    assert "DequantizeLinear" not in ops_of(lowered)
    assert_same(lowered, graph, rtol=1e-6)


def test_weights_of_integer_layers_stay() -> None:
    """A convolution behind Q/DQ runs in integers, and needs its weight as they are."""
    found = lower(
        quantize(conv_student(), "int8", calibration=feeds_for(conv_student())), "grouped"
    )
    assert ops_of(found).count("DequantizeLinear") >= 4


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("axis", [None, 1])
def test_fp8_becomes_casts(kind: str, axis: int | None) -> None:
    net = Net(opset=21)
    x = net.input("x", ("batch", 6))
    size = () if axis is None else (6,)
    scale = net.const(np.abs(net.rng.standard_normal(size)) * 1e-3 + 1e-3)  # some overflow
    zero = net.const(np.zeros(size), getattr(ml_dtypes, kind))
    attrs = {} if axis is None else {"axis": axis}
    q = net.op("QuantizeLinear", x, scale, zero, **attrs)
    y = net.op("DequantizeLinear", q, scale, zero, **attrs)
    graph = net.graph({y: ("batch", 6)})
    lowered = lower(graph, "grouped")
    assert set(ops_of(lowered)) == {"Div", "Cast", "Mul"}
    assert_same(lowered, graph, rtol=1e-6)


@pytest.mark.parametrize(("body", "heads"), list(itertools.product(PRECISIONS, PRECISIONS)))
def test_every_precision_compiles_and_says_the_same(body: str, heads: str) -> None:
    """With all of ONNX Runtime's optimizations, which judge nothing."""
    graph = conv_student()
    feeds = feeds_for(graph, 16)
    found = quantize(graph, f"body={body},heads={heads}", calibration=feeds)
    options = CompileOptions(threads=1, batch=(1, 4, 16), lowering="wide")
    with load(compile(fuse(found), options=options)) as session:
        session.self_test()
        logits = session.run(feeds, head_logits=True)["head_logits"]
    with load(compile(graph, options=CompileOptions(lowering="grouped"))) as session:
        expected = session.run(feeds, head_logits=True)["head_logits"]
    assert difference(logits, expected) < 0.4  # int4 keeps one decimal digit


def optimized(graph: Graph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What a program computes, with all that ONNX Runtime's optimizer does to it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    payload = ops.inline(graph.model).SerializeToString()
    session = ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def assert_optimized(graph: Graph, limit: float = 1e-5) -> None:
    feeds = feeds_for(graph)
    expected = evaluate(graph.model, feeds)[graph.outputs[0].name]
    found = optimized(lower(graph, "grouped"), feeds)
    assert difference(found, expected) <= limit


@pytest.mark.parametrize(("shape", "axis"), [((6, 6), 0), ((6, 4), 0), ((2, 6, 4), 1), ((6,), 0)])
def test_scales_that_onnxruntime_would_take_for_those_of_columns(
    shape: tuple[int, ...], axis: int
) -> None:
    """Its kernel refuses them, takes the wrong ones or crashes."""
    net = Net()
    back = net.qdq(net.input("x", ("batch", 6)))
    values, scale = net.rng.integers(-99, 99, shape), net.rng.uniform(0.01, 0.1, shape[axis])
    w = net.op("DequantizeLinear", net.const(values, np.int8), net.const(scale), axis=axis)
    y = net.op("MatMul", back, w)
    ends: tuple[int | str, ...] = (*shape[:-2], "batch", *shape[-1:]) if shape[1:] else ("batch",)
    assert_optimized(net.graph({y: ends, net.op("Neg", w): shape}))


def test_activations_with_a_scale_per_column_stay_signed() -> None:
    net = Net()
    scale, zero = net.const(np.linspace(0.03, 0.06, 6)), net.const(np.zeros(6), np.int8)
    q = net.op("QuantizeLinear", net.input("x", ("batch", 6)), scale, zero, axis=1)
    back = net.op("DequantizeLinear", q, scale, zero, axis=1)
    w = net.op("DequantizeLinear", net.const(np.ones((6, 4)), np.int8), net.const(0.1))
    assert_optimized(net.graph({net.op("MatMul", back, w): ("batch", 4)}))


def test_large_integers_with_scales_in_fp16() -> None:
    """They would be infinite in fp16 before they meet their scale."""
    net = Net()
    x = net.input("x", ("batch", 6), TensorProto.FLOAT16)
    scale = net.const(0.01, np.float16)
    w = net.op("DequantizeLinear", net.const(np.ones((6, 4)), np.int8), scale)
    bias = net.const([200_000, -150_000, 3, 100_000], np.int32)
    b = net.op("DequantizeLinear", bias, net.const(1e-4, np.float16))
    y = net.op("Gemm", x, w, b)
    assert_optimized(net.graph({y: ("batch", 4)}, dtypes={y: TensorProto.FLOAT16}), 5e-3)


@pytest.mark.parametrize("quantized", [False, True])
def test_other_output_types(quantized: bool) -> None:
    net = Net(opset=23)
    x = net.input("x", ("batch", 6), TensorProto.FLOAT)
    half = {"output_dtype": int(TensorProto.FLOAT16)}
    if quantized:
        scale, zero = net.const(0.05), net.const(0, np.int8)
        q = net.op("QuantizeLinear", x, scale, zero)
        x = net.op("DequantizeLinear", q, scale, zero, **half)
    else:
        x = net.op("Cast", x, to=TensorProto.FLOAT16)
    w = net.op("DequantizeLinear", net.const(np.ones((6, 4)), np.int8), net.const(0.1), **half)
    y = net.op("Cast", net.op("MatMul", x, w), to=TensorProto.FLOAT)
    graph = net.graph({y: ("batch", 4)})
    assert_same(lower(graph, "grouped"), graph, rtol=5e-3)


def test_fp8_scales_found_at_run_time_stay() -> None:
    net = Net(opset=21)
    x = net.input("x", ("batch", 6))
    top = net.op("ReduceMax", net.op("Abs", x), keepdims=0)
    scale, zero = net.op("Div", top, net.const(448)), net.const(0, ml_dtypes.float8_e4m3fn)
    q = net.op("QuantizeLinear", x, scale, zero)
    y = net.op("MatMul", net.op("DequantizeLinear", q, scale, zero), net.random(6, 4))
    graph = net.graph({y: ("batch", 4)})
    assert_same(lower(graph, "grouped"), graph)
