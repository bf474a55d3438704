"""Convolutional heads, sequences, and operators that move axes: same numbers, none left behind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import helper
from onnx_models import (
    Net,
    Shape,
    assert_fuses,
    assert_same,
    assert_untouched,
    heads_of,
    join,
    linear,
    ops_of,
)

from hydra_edge.artifacts.graph import Graph
from hydra_edge.fusion import fuse

Make = Callable[[Net, str, int], str]
ALL_CONVS = {"Conv", "ConvTranspose"}


def images(make: Make, *, m: int = 3, kind: str = "stack0", opset: int = 20) -> Graph:
    """A one-layer body with six channels of 8x8, then heads ``[B, 4]``."""
    net = Net(opset=opset)
    x = net.input("x", ("batch", 3, 8, 8))
    body = net.op("Conv", x, net.random(6, 3, 3, 3, scale=0.3), net.random(6), pads=[1, 1, 1, 1])
    features = net.op("Relu", body)
    return net.graph(join(net, [make(net, features, head) for head in range(m)], 4, kind))


def conv(
    net: Net, x: str, c: int, o: int, k: int = 3, *, bias: bool = True, **attrs: object
) -> str:
    group = int(attrs.get("group", 1))  # type: ignore[call-overload]
    weight = net.random(o, c // group, k, k, scale=1 / np.sqrt(c * k * k))
    return net.op("Conv", x, weight, *([net.random(o)] if bias else []), **attrs)


def classify(net: Net, x: str, width: int) -> str:
    return linear(net, net.op("Flatten", net.op("GlobalAveragePool", x)), width, 4)


def residual_stage(net: Net, x: str, _: int) -> str:
    """The last stage of a ResNet, as every head of a Hydra may have it."""
    h = conv(net, x, 6, 8, strides=[2, 2], pads=[1, 1, 1, 1], bias=False)
    var = net.const(np.abs(net.rng.standard_normal(8)) + 0.5)
    h = net.op("BatchNormalization", h, net.random(8), net.random(8), net.random(8), var)
    h = conv(net, net.op("Relu", h), 8, 8, pads=[1, 1, 1, 1])
    h = net.op("Relu", net.op("Add", h, conv(net, x, 6, 8, 1, strides=[2, 2])))
    return classify(net, h, 8)


@pytest.mark.parametrize(
    "kind", ["stack0", "stack1", "stack2", "concat0", "concat1", "concat-1", "outputs"]
)
def test_residual_stages(kind: str) -> None:
    fused = assert_fuses(images(residual_stage, kind=kind))
    found = {
        node.output[0]: next((a.i for a in node.attribute if a.name == "group"), 1)
        for node in fused.model.graph.node
        if node.op_type == "Conv"
    }
    # The body, two wide convolutions that read it, and one grouped.
    assert sorted(found.values()) == [1, 1, 1, 3]


def depthwise(net: Net, x: str, _: int) -> str:
    h = net.op("HardSwish", conv(net, x, 6, 12, 1))
    h = net.op("HardSwish", conv(net, h, 12, 12, group=12, pads=[1, 1, 1, 1]))
    gate = net.op("Sigmoid", conv(net, net.op("GlobalAveragePool", h), 12, 12, 1))
    return classify(net, net.op("Mul", h, gate), 12)


def scaled_channels(net: Net, x: str, head: int) -> str:
    h = net.op("Mul", conv(net, x, 6, 8), net.random(8, 1, 1))
    h = net.op("PRelu", net.op("Add", h, net.const(0.1 * head)), net.random(8, 1, 1))
    return classify(net, net.op("Clip", h, net.const(-1 - head), net.const(2)), 8)


def transposed(net: Net, x: str, _: int) -> str:
    h = net.op("ConvTranspose", x, net.random(6, 4, 2, 2), net.random(4), strides=[2, 2])
    h = net.op("ConvTranspose", net.op("Relu", h), net.random(4, 3, 2, 2), strides=[2, 2])
    return linear(net, net.op("Flatten", net.op("MaxPool", h, kernel_shape=[8, 8],
                                               strides=[8, 8])), 48, 4)  # fmt: skip


def pooled(net: Net, x: str, _: int) -> str:
    h = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])  # alike in all heads
    h = net.op("AveragePool", conv(net, h, 6, 8), kernel_shape=[2, 2])
    return linear(net, net.op("Reshape", h, net.const([0, -1], np.int64)), 8, 4)


def instance_norm(net: Net, x: str, _: int) -> str:
    h = net.op("InstanceNormalization", conv(net, x, 6, 8), net.random(8), net.random(8))
    return classify(net, net.op("Relu", h), 8)


def group_norm(net: Net, x: str, _: int) -> str:
    h = net.op("GroupNormalization", conv(net, x, 6, 8), net.random(8), net.random(8), num_groups=4)
    return classify(net, net.op("Relu", h), 8)


def decomposed_group_norm(net: Net, x: str, _: int) -> str:
    """As exporters for older opsets write it."""
    h = conv(net, x, 6, 8)
    shape = net.op("Shape", h)
    h = net.op("Reshape", h, net.const([0, 4, -1], np.int64))
    h = net.op("InstanceNormalization", h, net.const(np.ones(4)), net.const(np.zeros(4)))
    h = net.op("Reshape", h, shape)
    h = net.op("Add", net.op("Mul", h, net.random(8, 1, 1)), net.random(8, 1, 1))
    return classify(net, net.op("Relu", h), 8)


def upsampled(net: Net, x: str, _: int) -> str:
    h = net.op("Resize", conv(net, x, 6, 4), "", net.const([1, 1, 2, 2]))
    h = net.op("Resize", conv(net, h, 4, 4), "", "", net.const([2, 4, 5, 5], np.int64))
    return classify(net, h, 4)


def padded(net: Net, x: str, _: int) -> str:
    pads = net.const([0, 0, 1, 1, 0, 0, 2, 2], np.int64)
    h = net.op("Pad", conv(net, x, 6, 4, 1), pads, mode="reflect")
    return classify(net, conv(net, h, 4, 8), 8)


def dense_block(net: Net, x: str, _: int) -> str:
    h = conv(net, x, 6, 4, pads=[1, 1, 1, 1])
    return classify(net, net.op("Concat", x, h, axis=1), 10)


def squeezed(net: Net, x: str, _: int) -> str:
    h = net.op("ReduceMean", conv(net, x, 6, 8), net.const([2, 3], np.int64), keepdims=0)
    return linear(net, h, 8, 4)


def first_layer_in_groups(net: Net, x: str, _: int) -> str:
    return classify(net, conv(net, x, 6, 6, group=3), 6)


CONV_HEADS = [
    depthwise, scaled_channels, transposed, pooled, instance_norm, decomposed_group_norm, padded,
    dense_block, squeezed, first_layer_in_groups,
]  # fmt: skip


@pytest.mark.parametrize("make", CONV_HEADS, ids=lambda make: make.__name__)
def test_convolutional_heads(make: Make) -> None:
    fused = assert_fuses(images(make), rtol=1e-4)
    source = ops_of(images(make, m=1))
    for op in ALL_CONVS:
        assert ops_of(fused).count(op) == source.count(op)


def test_group_norm_as_one_node() -> None:
    assert_fuses(images(group_norm, opset=21), rtol=1e-4)


def test_upsampling_heads() -> None:
    """A size fixes the batch in it, too."""
    net = Net()
    x = net.input("x", (2, 6, 8, 8))
    graph = net.graph(join(net, [upsampled(net, x, head) for head in range(3)], 4))
    fused = fuse(graph)
    assert fused.fusion[0].fused
    assert ops_of(fused).count("Resize") == 2
    assert_same(fused, graph, batches=(2,))


def test_segmentation_heads_concatenate_for_free() -> None:
    net = Net()
    x = net.input("x", ("batch", 6, 8, 8))
    heads = [conv(net, net.op("Relu", conv(net, x, 6, 8)), 8, 2, 1) for _ in range(3)]
    graph = net.graph({net.op("Concat", *heads, axis=1): ("batch", 6, 6, 6)})
    assert ops_of(assert_fuses(graph)) == ["Conv", "Relu", "Conv"]


@pytest.mark.parametrize("how", ["Sum", "Mean", "Max", "Min", "chain", "python sum"])
def test_heads_that_are_reduced(how: str) -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    heads = [linear(net, net.op("Tanh", linear(net, x, 6, 5)), 5, 4) for _ in range(3)]
    if how in ("Sum", "Mean", "Max", "Min"):
        result = net.op(how, *heads)
    else:
        result = net.op("Add", net.const(0), heads[0]) if how == "python sum" else heads[0]
        for head in heads[1:]:
            result = net.op("Add", result, head)
        result = net.op("Div", result, net.const(3))
    fused = assert_fuses(net.graph({result: ("batch", 4)}))
    assert ops_of(fused).count("GroupedMatMul") == 2


def test_a_sum_keeps_what_is_no_branch() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    result = net.op("Tanh", x)
    for _ in range(3):
        result = net.op("Add", linear(net, net.op("Relu", linear(net, x, 6, 5)), 5, 6), result)
    assert_fuses(net.graph({net.op("Neg", result): ("batch", 6)}))


def test_residual_connections_are_no_group() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    h = net.op("Add", x, linear(net, x, 6, 6))
    h = net.op("Add", h, linear(net, net.op("Relu", linear(net, h, 6, 5)), 5, 6))
    graph = net.graph({net.op("Neg", h): ("batch", 6)})
    assert fuse(graph).fusion == ()


# sequences


def sequences(make: Make, shape: Shape = ("batch", 5, 6), out: Shape = ("batch", 5, 4)) -> Graph:
    net = Net()
    x = net.op("Tanh", net.input("x", shape))
    axes = net.const([0], np.int64)
    heads = [net.op("Unsqueeze", make(net, x, head), axes) for head in range(3)]
    assert out is not None
    return net.graph({net.op("Concat", *heads, axis=0): (3, *out)})


def token_mlp(net: Net, x: str, _: int) -> str:
    h = net.op("Gelu", linear(net, x, 6, 5, "matmul_add"))
    return linear(net, h, 5, 4, "add_matmul")


@pytest.mark.parametrize("time", [5, "time"])
def test_heads_on_every_token(time: int | str) -> None:
    fused = assert_fuses(sequences(token_mlp, ("batch", time, 6), ("batch", time, 4)))
    assert ops_of(fused).count("GroupedMatMul") == 2
    assert "MatMul" not in ops_of(fused)


def attention(net: Net, x: str, _: int) -> str:
    """One block of attention with a residual, then the mean over time."""
    q, k, v = (linear(net, x, 6, 6, "matmul_add") for _ in range(3))
    split = net.const([0, 5, 2, 3], np.int64)
    q, k, v = (
        net.op("Transpose", net.op("Reshape", t, split), perm=[0, 2, 1, 3]) for t in (q, k, v)
    )
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    weights = net.op("Softmax", net.op("Div", scores, net.const(1.7)), axis=3)
    h = net.op("Transpose", net.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    h = net.op("Reshape", h, net.const([0, 0, 6], np.int64))
    h = net.op("Add", x, linear(net, h, 6, 6, "matmul_add"))
    h = net.op("LayerNormalization", h, net.random(6), net.random(6))
    h = net.op("ReduceMean", h, net.const([1], np.int64), keepdims=0)
    return linear(net, h, 6, 4)


def gated(net: Net, x: str, _: int) -> str:
    h = linear(net, x, 6, 8, "matmul")
    a, b = f"a{len(net.nodes)}", f"b{len(net.nodes)}"
    net.nodes.append(helper.make_node("Split", [h], [a, b], f"n{len(net.nodes)}", axis=2,
                                      num_outputs=2))  # fmt: skip
    return linear(net, net.op("Mul", a, net.op("Sigmoid", b)), 4, 4, "matmul_add")


def pooled_by_query(net: Net, x: str, _: int) -> str:
    scores = net.op("Softmax", linear(net, x, 6, 1, "matmul"), axis=1)
    h = net.op("Squeeze", net.op("MatMul", net.op("Transpose", scores, perm=[0, 2, 1]), x),
               net.const([1], np.int64))  # fmt: skip
    return linear(net, h, 6, 4)


def first_token(net: Net, x: str, _: int) -> str:
    h = linear(net, x, 6, 6, "matmul_add")
    return linear(net, net.op("Gather", h, net.const(0, np.int64), axis=1), 6, 4)


def last_tokens(net: Net, x: str, _: int) -> str:
    h = linear(net, x, 6, 4, "matmul_add")
    h = net.op("Slice", h, net.const([-2], np.int64), net.const([99], np.int64),
               net.const([1], np.int64))  # fmt: skip
    h = net.op("Pad", net.op("Concat", h, h, axis=1), net.const([0, 0, 0, 0, 1, 0], np.int64))
    return net.op("Where", net.op("Greater", h, net.const(0)), h, net.op("Neg", h))


def einsum(net: Net, x: str, _: int) -> str:
    return net.op("Einsum", x, net.random(6, 4), equation="btk,kc->btc")


def top_values(net: Net, x: str, _: int) -> str:
    h = linear(net, x, 6, 8, "matmul_add")
    n = len(net.nodes)
    net.nodes.append(helper.make_node("TopK", [h, net.const([4], np.int64)], [f"v{n}", f"i{n}"],
                                      f"n{n}", axis=-1))  # fmt: skip
    return net.op("CumSum", f"v{n}", net.const(1, np.int64))


@pytest.mark.parametrize("make", [attention, pooled_by_query, first_token])
def test_sequences_to_vectors(make: Make) -> None:
    assert_fuses(sequences(make, out=("batch", 4)))


@pytest.mark.parametrize("make", [gated, last_tokens, einsum, top_values])
def test_sequences_to_sequences(make: Make) -> None:
    assert_fuses(sequences(make))


def test_embeddings_of_each_head() -> None:
    net = Net()
    ids = net.input("ids", ("batch", 5), 7)
    heads = [
        linear(net, net.op("ReduceMean", net.op("Gather", net.random(2, 6), ids),
                           net.const([1], np.int64), keepdims=0), 6, 4)
        for _ in range(3)
    ]  # fmt: skip
    assert_fuses(net.graph(join(net, heads, 4)))


# layers whose weights are written in unusual ways


def behind(op: str) -> Make:
    def make(net: Net, x: str, _: int) -> str:
        if op == "Cast":
            half = net.const(net.rng.standard_normal((6, 4)), np.float16)
            return net.op("MatMul", x, net.op("Cast", half, to=1))
        if op == "Transpose":
            return net.op("MatMul", x, net.op("Transpose", net.random(4, 6)))
        if op == "Identity":
            return net.op("Gemm", x, net.op("Identity", net.random(6, 4)), net.random(4))
        if op == "Reshape":
            return net.op("MatMul", x, net.op("Reshape", net.random(24), net.const([6, 4], int)))
        weight = net.random(6, 4)
        norm = net.op("ReduceL2", weight, net.const([0], np.int64))
        return net.op("MatMul", x, net.op("Div", net.op("Mul", weight, net.random(4)), norm))

    return make


@pytest.mark.parametrize("op", ["Cast", "Transpose", "Identity", "Reshape", "weight norm"])
def test_weights_behind_other_nodes(op: str) -> None:
    assert ops_of(assert_fuses(heads_of(behind(op)))) == ["GroupedMatMul"]


def test_a_transposed_input() -> None:
    def make(net: Net, x: str, _: int) -> str:
        return net.op("Gemm", net.op("Transpose", x), net.random(6, 4), net.random(4), transA=1)

    assert "GroupedMatMul" in ops_of(assert_fuses(heads_of(make)))


def test_a_bias_per_sample() -> None:
    def make(net: Net, x: str, _: int) -> str:
        bias = net.op("ReduceMax", x, net.const([1], np.int64))
        return net.op("Gemm", x, net.random(6, 4), bias, beta=0.5)

    assert "GroupedMatMul" in ops_of(assert_fuses(heads_of(make)))


def test_products_of_two_computed_tensors() -> None:
    def make(net: Net, x: str, _: int) -> str:
        square = net.op("Gemm", x, linear(net, x, 6, 6), transA=1, alpha=0.5)
        return net.op("Gemm", x, net.op("Relu", linear(net, square, 6, 4)), net.random(4))

    assert_fuses(heads_of(make))


def test_limits_that_differ() -> None:
    def make(net: Net, x: str, head: int) -> str:
        return linear(net, net.op("Clip", linear(net, x, 6, 5), net.const(-head)), 5, 4)

    assert_fuses(heads_of(make))


def test_axes_that_differ_stay() -> None:
    net = Net()
    x = net.input("x", (6, 6))
    heads = [
        net.op("ReduceMean", linear(net, x, 6, 6), net.const([axis], np.int64), keepdims=0)
        for axis in (0, 1)
    ]
    graph = net.graph({net.op("Concat", *heads, axis=0): (12,)})
    assert_untouched(graph, "ReduceMean has parameters that differ between branches")
