"""Sequences, and operators that move, cut, join or reduce axes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import helper
from onnx_models import Net, Shape, assert_fuses, assert_untouched, join, linear, ops_of

from hydra_edge.artifacts.graph import Graph

Make = Callable[[Net, str, int], str]


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


def test_axes_that_differ_stay() -> None:
    net = Net()
    x = net.input("x", (6, 6))
    heads = [
        net.op("ReduceMean", linear(net, x, 6, 6), net.const([axis], np.int64), keepdims=0)
        for axis in (0, 1)
    ]
    graph = net.graph({net.op("Concat", *heads, axis=0): (12,)})
    assert_untouched(graph, "ReduceMean has parameters that differ between branches")
