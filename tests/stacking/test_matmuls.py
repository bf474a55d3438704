"""Layers whose weights, inputs and biases are written in unusual ways."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx_models import Net, assert_fuses, heads_of, linear, ops_of

Make = Callable[[Net, str, int], str]


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
