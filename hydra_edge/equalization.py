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

Array = npt.NDArray[np.float32]

_HOMOGENEOUS = (
    "AveragePool Dropout Flatten GlobalAveragePool GlobalMaxPool Identity LeakyRelu MaxPool Relu"
)
_SWEEPS = 20
_TOLERANCE = 1e-3
# A channel that is nearly dead is left as it is: its scale would blow up the noise in it.
_SMALLEST = 1e-6


def equalize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Equalise all pairs of layers that allow it; the model computes the same."""
    graph = surgery.open_model(model)
    outputs = {id(tensor) for tensor in graph.outputs}
    pairs = [
        (first, second)
        for first in graph.nodes
        if first.op in ("Conv", "Gemm") and _own_weight(first)
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
            fits = _own_weight(node) and not node.attrs.get("transA", 0)
            return [node] if fits and _channels_in(node) == _channels_out(first) else []
        if node.op not in _HOMOGENEOUS.split():
            return []
        tensor = node.outputs[0]
    return []


def _own_weight(node: gs.Node) -> bool:
    """Whether the layer's weight and bias are constants that no other layer reads."""
    weight = weight_of(node)
    constants = [weight, *node.inputs[2:3]]
    return all(isinstance(c, gs.Constant) and len(c.outputs) == 1 for c in constants)


def _channels_out(node: gs.Node) -> int:
    return len(_rows_out(node))


def _channels_in(node: gs.Node) -> int:
    return len(_rows_in(node))


def _rows_out(node: gs.Node) -> Array:
    """The weight, output channels first; a view."""
    values = node.inputs[1].values
    if node.op == "Gemm" and not node.attrs.get("transB", 0):
        return np.asarray(values).T
    return np.asarray(values)


def _rows_in(node: gs.Node) -> Array:
    """The weight, input channels first; a view. Of grouped convolutions only depthwise ones."""
    values = np.asarray(node.inputs[1].values)
    if node.op == "Gemm":
        return values.T if node.attrs.get("transB", 0) else values
    group = int(node.attrs.get("group", 1))
    if group == 1:
        return values.swapaxes(0, 1)
    return values if values.shape[:2] == (group, 1) else values[:0]


def _balance(first: gs.Node, second: gs.Node) -> float:
    """One step; the largest relative change."""
    one, two = _ranges(_rows_out(first)), _ranges(_rows_in(second))
    alive = (one > _SMALLEST) & (two > _SMALLEST)
    factor = np.where(alive, np.sqrt(one / np.where(alive, two, 1.0)), 1.0).astype(np.float32)
    for node, rows, scale in (
        (first, _rows_out(first), 1 / factor),
        (second, _rows_in(second), factor),
    ):
        rows *= scale.reshape(-1, *(1,) * (rows.ndim - 1))
        node.inputs[1].values = node.inputs[1].values
    if len(first.inputs) > 2:
        bias = np.asarray(first.inputs[2].values)
        first.inputs[2].values = (np.broadcast_to(bias, factor.shape) / factor).astype(np.float32)
    return float(np.abs(factor - 1.0).max(initial=0.0))


def _ranges(rows: Array) -> npt.NDArray[np.float64]:
    peaks = np.abs(rows).reshape(len(rows), -1).max(1)
    return np.asarray(peaks, np.float64)
