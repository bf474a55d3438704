"""Cross-layer equalisation: neighbouring layers share the range of their common channels.

Where one layer's channel i feeds only channel i of the next, through operators f with
f(s·x) = s·f(x) for s > 0, dividing the first weight's channel by s and multiplying the second's by
s changes nothing, and s = sqrt(range 1 / range 2) gives both channels the range
sqrt(range 1 · range 2). One scale then fits more channels.
Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction"
(arXiv 1906.04721), section 4.1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from hydra_edge import surgery
from hydra_edge.qdq import weight_of

Array = npt.NDArray[np.float64]

_HOMOGENEOUS = (
    "AveragePool Dropout Flatten GlobalAveragePool GlobalMaxPool Identity LeakyRelu MaxPool Relu"
)
_SWEEPS = 20
_TOLERANCE = 1e-3
# A channel this small next to the largest is dead: its scale would blow up the noise in it.
_SMALLEST = 1e-6


def equalize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Equalise all pairs of layers that allow it; the model computes the same."""
    graph = surgery.open_model(model)
    outputs = {id(tensor) for tensor in graph.outputs}
    pairs = [
        (first, second)
        for first in graph.nodes
        if first.op in ("Conv", "Gemm") and _own_weight(first, outputs)
        for second in _follower(first, outputs)
    ]
    for _ in range(_SWEEPS):
        changes = [_balance(first, second) for first, second in pairs]
        if max(changes, default=0.0) < _TOLERANCE:
            break
    return surgery.close_model(graph, like=model) if pairs else model


def _follower(first: gs.Node, outputs: set[int]) -> list[gs.Node]:
    """The layer that reads what ``first`` writes and nobody else reads."""
    tensor = first.outputs[0]
    while id(tensor) not in outputs and len(tensor.outputs) == 1:
        node = tensor.outputs[0]
        if node.op in ("Conv", "Gemm") and node.inputs[0] is tensor:
            return [node] if _own_weight(node, outputs) and _fits(first, node) else []
        if node.op not in _HOMOGENEOUS.split() or not _keeps_channels(node):
            return []
        tensor = node.outputs[0]
    return []


def _keeps_channels(node: gs.Node) -> bool:
    """Whether channels stay on axis 1; where Flatten adds positions to them, sizes do not fit."""
    return bool(node.op != "Flatten" or node.attrs.get("axis", 1) == 1)


def _own_weight(node: gs.Node, outputs: set[int]) -> bool:
    """Whether the layer's weight and bias are constants that nothing else reads."""
    weight = weight_of(node)
    constants = [weight, *node.inputs[2:3]]
    return all(
        isinstance(c, gs.Constant) and len(c.outputs) == 1 and id(c) not in outputs
        for c in constants
    )


def _fits(first: gs.Node, second: gs.Node) -> bool:
    """Whether the channels that one writes are those that the other reads, one by one."""
    axis = _axis_in(second)
    if axis is None or second.attrs.get("transA", 0):
        return False
    channels = int(first.inputs[1].shape[_axis_out(first)])
    return channels == int(second.inputs[1].shape[axis])


def _axis_out(node: gs.Node) -> int:
    """The axis of output channels in the weight."""
    return 1 if node.op == "Gemm" and not node.attrs.get("transB", 0) else 0


def _axis_in(node: gs.Node) -> int | None:
    """The axis of input channels in the weight; of grouped convolutions only depthwise ones."""
    if node.op == "Gemm":
        return 1 if node.attrs.get("transB", 0) else 0
    group = int(node.attrs.get("group", 1))
    if group == 1:
        return 1
    return 0 if tuple(node.inputs[1].shape[:2]) == (group, 1) else None


def _balance(first: gs.Node, second: gs.Node) -> float:
    """One step; the largest relative change."""
    out, into = _axis_out(first), _axis_in(second)
    assert into is not None
    one, two = _ranges(first, out), _ranges(second, into)
    alive = (one > _SMALLEST * one.max()) & (two > _SMALLEST * two.max())
    factor = np.ones(len(one))
    factor[alive] = np.sqrt(one[alive] / two[alive])
    _scale(first.inputs[1], out, 1 / factor)
    _scale(second.inputs[1], into, factor)
    if len(first.inputs) > 2:
        bias = first.inputs[2]  # one number, or channels last
        bias.values = (bias.values / factor).astype(np.float32)
    return float(np.abs(factor - 1.0).max(initial=0.0))


def _scale(weight: gs.Constant, axis: int, factor: Array) -> None:
    shape = [1] * len(weight.shape)
    shape[axis] = -1
    weight.values = (weight.values * factor.reshape(shape)).astype(np.float32)


def _ranges(node: gs.Node, axis: int) -> Array:
    values = np.abs(node.inputs[1].values)
    others = tuple(index for index in range(values.ndim) if index != axis)
    return np.asarray(values.max(others), np.float64)
