"""Convolutional heads: one wide convolution, then grouped ones; same numbers, none left behind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx_models import (
    Net,
    assert_fuses,
    assert_same,
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
