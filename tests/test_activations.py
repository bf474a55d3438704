"""An activation is recognised by what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from onnx_models import Net

from hydra_edge import activations, surgery

Make = Callable[[Net, str], str]


def gelu_by_erf(net: Net, x: str) -> str:
    erf = net.op("Erf", net.op("Div", x, net.const(math.sqrt(2))))
    return net.op("Mul", net.op("Mul", x, net.op("Add", erf, net.const(1.0))), net.const(0.5))


def gelu_by_erf_of_halves(net: Net, x: str) -> str:
    half = net.op("Mul", x, net.const(0.5))
    erf = net.op("Erf", net.op("Mul", x, net.const(math.sqrt(0.5))))
    return net.op("Add", half, net.op("Mul", half, erf))


def almost_gelu(net: Net, x: str) -> str:
    return net.op("Gelu", x, approximate="tanh")


def shifted_relu(net: Net, x: str) -> str:
    return net.op("Add", net.op("Relu", x), net.const(0.01))


def named(op: str) -> Make:
    return lambda net, x: net.op(op, x)


def silu(net: Net, x: str) -> str:
    return net.op("Mul", net.op("Sigmoid", x), x)


def behind(make: Make, *, seen: bool = False) -> tuple[str, bool]:
    """What follows the first node, and whether all of it was taken."""
    net = Net()
    first = net.op("Neg", net.input("x", ("batch", 5)), name="first")
    y = make(net, first)
    last = net.op("Abs", y)
    graph = net.graph({last: ("batch", 5), **({first: ("batch", 5)} if seen else {})})
    surgeon = surgery.open_model(graph.model)
    start = next(node for node in surgeon.nodes if node.op == "Neg").outputs[0]
    found, name = activations.behind(surgeon, start)
    return name, found.name == y


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (named("Relu"), "relu"),
        (named("Tanh"), "tanh"),
        (named("Gelu"), "gelu"),
        (gelu_by_erf, "gelu"),
        (gelu_by_erf_of_halves, "gelu"),
        (silu, "silu"),
    ],
)
def test_however_it_is_written(make: Make, name: str) -> None:
    assert behind(make) == (name, True)


@pytest.mark.parametrize("make", [named("Sigmoid"), named("Elu"), almost_gelu])
def test_others_are_none(make: Make) -> None:
    assert behind(make) == ("none", False)


def test_only_what_is_one_is_taken() -> None:
    assert behind(shifted_relu) == ("relu", False)


def test_what_others_read_stays() -> None:
    """A fused kernel would not write the tensor before the activation."""
    assert behind(named("Relu"), seen=True)[0] == "none"
