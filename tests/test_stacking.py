"""Every operator that has a stacked form computes the same for all heads at once."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from onnx_models import (
    Net,
    assert_fuses,
    assert_same,
    feeds_for,
    heads_of,
    join,
    linear,
    mlp_heads,
    ops_of,
    student,
)
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.fusion import fuse
from hydra_edge.ops.grouped_matmul import reference
from hydra_edge.quantization import quantize

STYLES = [
    "gemm",
    "gemm_t",
    "gemm_scaled",
    "gemm_row",
    "gemm_scalar",
    "gemm_nobias",
    "matmul_add",
    "add_matmul",
    "matmul",
]
JOINS = ("stack0", "stack1", "stack2", "concat1", "concat-1", "concat0", "outputs")


# what must fuse


@pytest.mark.parametrize("hidden", [(), (5,), (5, 7), (5, 4, 3)])
@pytest.mark.parametrize("activation", ["Relu", "Gelu", "Silu", "Tanh"])
@pytest.mark.parametrize("norm", ["", "layer", "batch"])
def test_mlp_heads(hidden: tuple[int, ...], activation: str, norm: str) -> None:
    fused = assert_fuses(mlp_heads(hidden=hidden, activation=activation, norm=norm))
    assert ops_of(fused).count("GroupedMatMul") == len(hidden) + 1
    assert ops_of(fused).count("Gemm") == 1  # the body


@pytest.mark.parametrize("style", STYLES)
def test_every_way_to_write_a_linear_layer(style: str) -> None:
    fused = assert_fuses(mlp_heads(style=style))
    assert ops_of(fused)[-3:] == ["GroupedMatMul", "Relu", "GroupedMatMul"]


@pytest.mark.parametrize("kind", JOINS)
@pytest.mark.parametrize("m", [2, 4])  # 4 heads of 4 outputs: no axis can be told by its size
def test_every_way_to_join(kind: str, m: int) -> None:
    assert_fuses(mlp_heads(m=m, kind=kind), heads=m)


def test_summary_follows_and_keeps_its_names() -> None:
    graph = student()
    fused = assert_fuses(graph)
    assert ops_of(fused)[-1] == "EnsembleSummary"
    assert fused.metadata.logits == "head_logits"
    assert fused.metadata.provenance == (*graph.metadata.provenance, "fuse")


def test_ensemble_of_pure_mlps_fuses_from_the_input_on() -> None:
    fused = assert_fuses(mlp_heads(body=False))
    assert ops_of(fused) == ["GroupedMatMul", "Relu", "GroupedMatMul"]
    assert fused.fusion[0].source == "x"


@pytest.mark.parametrize("shared", ["all", "first layer", "last layer"])
def test_heads_that_share_weights(shared: str) -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    w1, b1, w2, b2 = net.random(6, 5), net.random(5), net.random(5, 4), net.random(4)
    heads = []
    for _ in range(3):
        if shared == "last layer":
            w1, b1 = net.random(6, 5), net.random(5)
        if shared == "first layer":
            w2, b2 = net.random(5, 4), net.random(4)
        heads.append(net.op("Gemm", net.op("Relu", net.op("Gemm", x, w1, b1)), w2, b2))
    assert_fuses(net.graph(join(net, heads, 4)))


def test_equal_weights_in_separate_constants() -> None:
    def head(net: Net, x: str, _: int) -> str:
        net.rng = np.random.default_rng(3)
        return linear(net, x, 6, 4)

    assert_fuses(heads_of(head))


def test_two_groups_of_heads_in_one_graph() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    first = join(net, [linear(net, x, 6, 4) for _ in range(3)], 4)
    mean = net.op("ReduceMean", "logits", net.const([0], np.int64), keepdims=0)
    heads = [linear(net, net.op("Relu", linear(net, mean, 4, 5)), 5, 2) for _ in range(4)]
    graph = net.graph({**first, net.op("Concat", *heads, axis=1): ("batch", 8)})
    fused = fuse(graph)
    assert [(group.fused, group.heads) for group in fused.fusion] == [(True, 3), (True, 4)]
    assert ops_of(fused).count("GroupedMatMul") == 3
    assert_same(fused, graph)
    assert fuse(fused).data == fused.data
    onnx.checker.check_model(fused.model)


def test_a_fused_and_an_odd_group() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    first = join(net, [linear(net, x, 6, 4) for _ in range(3)], 4)
    odd = [linear(net, x, 6, 5), linear(net, x, 6, 7)]
    graph = net.graph({**first, net.op("Concat", *odd, axis=1): ("batch", 12)})
    fused = fuse(graph)
    assert [group.fused for group in fused.fusion] == [True, False]
    assert_same(fused, graph)
    again = fuse(fused)
    assert again.data == fused.data
    assert again.fusion == fused.fusion


def test_deep_branches_do_not_recurse() -> None:
    net = Net()
    x = net.input("x", ("batch", 4))
    heads = []
    for _ in range(2):
        h = x
        for _ in range(250):
            h = net.op("Tanh", net.op("Gemm", h, net.random(4, 4, scale=0.4), net.random(4)))
        heads.append(h)
    fused = fuse(net.graph(join(net, heads, 4)))
    assert fused.fusion[0].fused
    assert len(ops_of(fused)) == 500


def test_two_hundred_heads_in_seconds() -> None:
    graph = mlp_heads(m=200, k=16, hidden=(16,), c=10)
    start = time.perf_counter()
    fused = fuse(graph)
    assert time.perf_counter() - start < 20  # 0.2 s on an idle core; quadratic would take minutes
    assert fused.fusion[0].heads == 200
    assert_same(fused, graph, batches=(3,))


def test_values_used_twice_inside_a_branch() -> None:
    def head(net: Net, x: str, _: int) -> str:
        product = net.op("MatMul", x, net.random(6, 6))
        return linear(net, net.op("Mul", net.op("Add", product, net.random(6)), product), 6, 4)

    assert_fuses(heads_of(head))


def test_residual_to_the_shared_input() -> None:
    assert_fuses(
        heads_of(lambda net, x, _: linear(net, net.op("Add", linear(net, x, 6, 6), x), 6, 4))
    )


@pytest.mark.parametrize("side", ["min", "max", "both"])
def test_optional_inputs_keep_their_place(side: str) -> None:
    def head(net: Net, x: str, _: int) -> str:
        low, high = net.const(-0.2), net.const(0.5)
        limits = {"min": (low,), "max": ("", high), "both": (low, high)}[side]
        return linear(net, net.op("Clip", linear(net, x, 6, 5), *limits), 5, 4)

    assert_fuses(heads_of(head))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_softmax_in_a_head(op: str, axis: int) -> None:
    assert_fuses(heads_of(lambda net, x, _: net.op(op, linear(net, x, 6, 4), axis=axis)))


@pytest.mark.parametrize("axis", [1, -1])
def test_mean_in_a_head(axis: int) -> None:
    def head(net: Net, x: str, _: int) -> str:
        h = linear(net, x, 6, 5)
        mean = net.op("ReduceMean", h, net.const([axis], np.int64), keepdims=1)
        return linear(net, net.op("Sub", h, mean), 5, 4)

    assert_fuses(heads_of(head))


def test_a_scale_per_head() -> None:
    assert_fuses(heads_of(lambda net, x, _: net.op("Mul", linear(net, x, 6, 4), net.random())))


@pytest.mark.parametrize("opset", [11, 13, 17, 22])
def test_opsets(opset: int) -> None:
    net = Net(opset=opset)
    x = net.input("x", ("batch", 6))
    heads = [linear(net, net.op("Relu", linear(net, x, 6, 5)), 5, 4) for _ in range(3)]
    graph = net.graph({net.op("Concat", *heads, axis=1): ("batch", 12)})
    assert_fuses(graph)


@pytest.mark.parametrize(
    ("dtype", "kind", "rtol"),
    [(np.float64, TensorProto.DOUBLE, 1e-12), (np.float16, TensorProto.FLOAT16, 1e-2)],
)
def test_other_float_types(dtype: type[np.floating], kind: int, rtol: float) -> None:
    net = Net()
    x = net.input("x", ("batch", 6), kind)
    heads = [
        net.op(
            "Gemm",
            x,
            net.const(net.rng.random((6, 4)), dtype),
            net.const(net.rng.random(4), dtype),
            alpha=0.5,
        )
        for _ in range(3)
    ]
    y = net.op("Concat", *heads, axis=1)
    fused = assert_fuses(net.graph({y: ("batch", 12)}, dtypes={y: kind}), rtol=rtol)
    assert {init.data_type for init in fused.model.graph.initializer if init.dims} == {
        kind,
        TensorProto.INT64,
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(2, 9),
    k=st.integers(1, 17),
    hidden=st.lists(st.integers(1, 9), max_size=3),
    c=st.integers(1, 11),
    batch=st.integers(1, 9),
    kind=st.sampled_from(JOINS),
    style=st.sampled_from(STYLES),
    seed=st.integers(0, 99),
)
def test_any_sizes(
    m: int, k: int, hidden: list[int], c: int, batch: int, kind: str, style: str, seed: int
) -> None:
    graph = mlp_heads(m, k, hidden, c, kind=kind, style=style, seed=seed, activation="Tanh")
    fused = fuse(graph)
    assert [group.fused for group in fused.fusion] == [True]
    assert_same(fused, graph, batches=(batch,))


def test_against_numpy_in_float64() -> None:
    graph = mlp_heads(4, 6, (5,), 3, body=False, style="gemm")
    weights = [onnx.numpy_helper.to_array(t) for t in graph.model.graph.initializer]
    w1, b1, w2, b2 = (np.stack(weights[i : 4 * 4 : 4]) for i in range(4))
    feeds = feeds_for(graph)
    hidden = np.maximum(reference(feeds["x"], w1, b1[:, None]), 0)
    expected = reference(hidden, w2, b2[:, None])
    found = evaluate(fuse(graph).model, feeds)["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# behind Q/DQ


class Batches(CalibrationDataReader):
    def __init__(self, graph: Graph) -> None:
        self.batches = iter([feeds_for(graph, 20, seed) for seed in range(3)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


# Halfway cases may round either way: one step of 127 in one input of a head.
QUANTIZED = 3e-2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": ()},
        {"hidden": (5, 4)},
        {"norm": "layer", "activation": "Gelu"},
        {"norm": "batch", "activation": "Silu"},
        {"style": "matmul_add"},
        {"style": "gemm_t", "kind": "concat1"},
        {"kind": "outputs"},
    ],
)
def test_our_int8(options: dict[str, object]) -> None:
    graph = mlp_heads(**options)  # type: ignore[arg-type]
    int8 = quantize(graph, "int8", calibration=feeds_for(graph, 50))
    fused = assert_fuses(int8, rtol=QUANTIZED)
    layers = len(options.get("hidden", (5,))) + 1  # type: ignore[arg-type]
    assert ops_of(fused).count("QuantizedGroupedMatMul") == layers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": ()},
        {"norm": "layer", "activation": "Gelu"},
        {"style": "matmul_add"},
        {"activation": "Tanh", "kind": "concat1"},
        {"kind": "outputs"},
        {"kind": "stack1"},
    ],
)
def test_onnxruntime_int8(options: dict[str, object], per_channel: bool, tmp_path: Path) -> None:
    graph = mlp_heads(**options)  # type: ignore[arg-type]
    quantize_static(
        graph.model,
        tmp_path / "int8.onnx",
        Batches(graph),
        per_channel=per_channel,
        activation_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    int8 = Graph.load(tmp_path / "int8.onnx")
    fused = assert_fuses(int8, rtol=QUANTIZED)
    layers = len(options.get("hidden", (5,))) + 1  # type: ignore[arg-type]
    assert ops_of(fused).count("QuantizedGroupedMatMul") == layers
    assert ops_of(fused).count("Gemm") <= 1  # the body


@pytest.mark.parametrize("shared", ["first layer", "last layer"])
@pytest.mark.parametrize("bias_too", [True, False])
def test_int8_heads_that_share_a_layer(shared: str, bias_too: bool) -> None:
    """Quantizers write the shared weight once, behind one DequantizeLinear."""
    net = Net()
    x = net.input("x", ("batch", 6))
    w1, b1, w2, b2 = net.random(6, 5), net.random(5), net.random(5, 4), net.random(4)
    heads = []
    for _ in range(3):
        if shared == "last layer":
            w1, b1 = net.random(6, 5), net.random(5)
            b2 = b2 if bias_too else net.random(4)
        else:
            w2, b2 = net.random(5, 4), net.random(4)
            b1 = b1 if bias_too else net.random(5)
        heads.append(net.op("Gemm", net.op("Relu", net.op("Gemm", x, w1, b1)), w2, b2))
    graph = net.graph(join(net, heads, 4))
    int8 = quantize(graph, "int8", calibration=feeds_for(graph, 50))
    fused = assert_fuses(int8, rtol=QUANTIZED)
    # The optimizer computes an equal first layer once, so it belongs to the body.
    once = shared == "first layer" and bias_too
    assert ops_of(fused).count("QuantizedGroupedMatMul") == (1 if once else 2)


def quantized_heads(
    *,
    x_dtype: type[np.integer] = np.int8,
    x_zero: int = 0,
    w_dtype: type[np.integer] = np.int8,
    w_zero: int = 0,
    axis: int = 1,
    quantize_x: bool = True,
    back_scale: float = 0.05,
) -> Graph:
    """Linear heads on one quantized input, with everything that may be odd about them."""
    net = Net()
    x = net.input("x", ("batch", 6))
    if quantize_x:
        q = net.op("QuantizeLinear", x, net.const(0.05), net.const(x_zero, x_dtype))
        x = net.op("DequantizeLinear", q, net.const(back_scale), net.const(x_zero, x_dtype))
    heads = []
    for _ in range(3):
        w = net.const(net.rng.integers(0, 100, (6, 4)), w_dtype)
        scale = net.const(np.full((6, 4)[axis], 0.02))
        zero = net.const(np.full((6, 4)[axis], w_zero), w_dtype)
        heads.append(net.op("MatMul", x, net.op("DequantizeLinear", w, scale, zero, axis=axis)))
    return net.graph(join(net, heads, 4))


@pytest.mark.parametrize("options", [{}, {"w_dtype": np.uint8, "w_zero": 128}])
def test_quantized_by_hand_fuses(options: dict[str, object]) -> None:
    fused = assert_fuses(quantized_heads(**options), rtol=QUANTIZED)  # type: ignore[arg-type]
    assert "QuantizedGroupedMatMul" in ops_of(fused)


@pytest.mark.parametrize(
    ("options", "dtype", "zero"),
    [
        ({"x_zero": 3}, "int8", 0.0),
        ({"x_dtype": np.uint8, "x_zero": 120}, "int8", 0.0),
        ({"w_zero": 1}, "int8", 1.0),
        ({"w_dtype": np.uint8}, "int8", -128.0),
        ({"axis": 0}, "int8", 0.0),
        ({"quantize_x": False}, "int8", 0.0),
        ({"back_scale": 0.06}, "int8", 0.0),
    ],
)
def test_odd_quantization_keeps_its_integers(
    options: dict[str, object], dtype: str, zero: float
) -> None:
    """What the integer kernels do not take is multiplied in floats, from integer weights."""
    fused = assert_fuses(quantized_heads(**options), rtol=1e-4)  # type: ignore[arg-type]
    (node,) = [n for n in fused.model.graph.node if n.op_type == "WeightOnlyGroupedMatMul"]
    constants = {t.name: numpy_helper.to_array(t) for t in fused.model.graph.initializer}
    assert constants[node.input[1]].dtype == dtype
    assert float(constants[node.input[4]].reshape(-1)[0]) == zero


@pytest.mark.parametrize("opset", [13, 20])  # ONNX's reference implementation begins at 19
def test_one_shared_dequantized_bias(opset: int) -> None:
    net = Net(opset=opset)
    x = net.qdq(net.input("x", ("batch", 6)))
    ints = net.const([100, -50, 7, 0], np.int32)
    bias = net.op("DequantizeLinear", ints, net.const(0.01))
    heads = []
    for _ in range(3):
        weight = net.const(net.rng.integers(-99, 99, (6, 4)), np.int8)
        w = net.op("DequantizeLinear", weight, net.const(0.02))
        heads.append(net.op("Gemm", x, w, bias))
    assert_fuses(net.graph(join(net, heads, 4)), rtol=QUANTIZED)


@pytest.mark.parametrize(
    ("scales", "shape"), [((0.05, 0.05, 0.05), ()), ((0.05, 0.1, 0.02), (3, 1, 1))]
)
def test_q_dq_in_every_branch_on_a_shared_input(
    scales: tuple[float, ...], shape: tuple[int, ...]
) -> None:
    def head(net: Net, x: str, index: int) -> str:
        weight = net.const(net.rng.integers(-99, 99, (6, 4)), np.int8)
        zero = net.const(np.zeros(4), np.int8)
        scale = net.const(net.rng.random(4) * 0.01)
        w = net.op("DequantizeLinear", weight, scale, zero, axis=1)
        return net.op("Gemm", net.qdq(x, scales[index]), w, net.random(4))

    fused = assert_fuses(heads_of(head), rtol=QUANTIZED)
    node = next(n for n in fused.model.graph.node if n.op_type == "QuantizedGroupedMatMul")
    constants = {t.name: tuple(t.dims) for t in fused.model.graph.initializer}
    assert constants[node.input[4]] == shape
    assert node.input[0] == "x"


def test_alpha_beta_and_transposition_behind_q_dq() -> None:
    def head(net: Net, x: str, _: int) -> str:
        weight = net.const(net.rng.integers(-99, 99, (4, 6)), np.int8)
        w = net.op("DequantizeLinear", weight, net.const(np.arange(1, 5) / 100), axis=0)
        return net.op("Gemm", net.qdq(x), w, net.random(4), alpha=0.5, beta=-2.0, transB=1)

    assert_fuses(heads_of(head), rtol=QUANTIZED)


@pytest.mark.parametrize("same", [True, False])
def test_heads_that_begin_with_a_layer_norm(same: bool) -> None:
    def head(net: Net, x: str, index: int) -> str:
        scale, bias = (np.full(6, 0.5 + value * (not same)) for value in (index, -index))
        normed = net.op("LayerNormalization", x, net.const(scale), net.const(bias))
        return net.op("Gemm", normed, net.random(6, 4), net.random(4))

    fused = assert_fuses(heads_of(head))
    assert [n.op_type for n in fused.model.graph.node].count("LayerNormalization") == 1


def test_a_sum_that_adds_an_axis_is_no_bias() -> None:
    def head(net: Net, x: str, _: int) -> str:
        product = net.op("MatMul", x, net.random(6, 4))
        return net.op(
            "ReduceMean",
            net.op("Add", product, net.random(1, 1, 4)),
            net.const([0], np.int64),
            keepdims=0,
        )

    graph = heads_of(head)
    x = {"x": np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)}
    (name,) = (spec.name for spec in graph.outputs)
    expected = evaluate(graph.model, x)[name]
    assert np.allclose(evaluate(fuse(graph).model, x)[name], expected, atol=1e-5)
