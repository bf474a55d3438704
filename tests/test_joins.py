"""Sums and means of heads are joins; residual connections are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx_models import Net, assert_fuses, linear, ops_of

from hydra_edge.fusion import fuse

Make = Callable[[Net, str, int], str]


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
