"""Which activation some elementwise nodes compute, however an exporter writes it.

Nodes are not compared with patterns: what lies between two tensors is computed on a range of
numbers, and compared with the activations that the kernels know.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from hydra_edge import folding
from hydra_edge.kernels import ACTIVATIONS
from hydra_edge.ops.heads import activate

Array = npt.NDArray[np.generic]
_ELEMENTWISE = frozenset(["Add", "Div", "Erf", "Gelu", "Mul", "Relu", "Sigmoid", "Sub", "Tanh"])
_LONGEST = 8  # nodes; GELU takes five
_OPSET = 20  # the first that has Gelu; the others mean the same since 14
# Beyond 8 all but ReLU have saturated. In between, GELU by tanh is off by 5e-4.
_PROBES = np.linspace(-8, 8, 257, dtype=np.float32)
_SAME = 1e-5


def behind(graph: gs.Graph, y: gs.Tensor) -> tuple[gs.Tensor, str]:
    """The activation that follows ``y``.

    Returns:
        What it gives, and its name; ``y`` and "none" where none follows that the kernels know.
    """
    for nodes in _regions(graph, y):
        name = _recognised(nodes, y)
        if name:
            return nodes[-1].outputs[0], name
    return y, "none"


def _regions(graph: gs.Graph, y: gs.Tensor) -> Iterator[list[gs.Node]]:
    """Elementwise nodes that read only ``y``, one another and numbers, and end in one tensor."""
    inside: list[gs.Node] = []
    kept = {id(tensor) for tensor in graph.outputs}
    while len(inside) < _LONGEST:
        own = {id(node) for node in inside}
        tensors = [y, *(node.outputs[0] for node in inside)]
        known = {id(tensor) for tensor in tensors}
        seen_outside = [
            tensor
            for tensor in tensors
            if id(tensor) in kept or any(id(reader) not in own for reader in tensor.outputs)
        ]
        if inside and len(seen_outside) == 1 and seen_outside[0] is inside[-1].outputs[0]:
            yield list(inside)
        readers = (reader for tensor in seen_outside for reader in tensor.outputs)
        grown = next(
            (node for node in readers if id(node) not in own and _computes(node, known)), None
        )
        if grown is None:
            return
        inside.append(grown)


def _computes(node: gs.Node, known: set[int]) -> bool:
    return (
        node.op in _ELEMENTWISE
        and not node.domain
        and all(id(tensor) in known or _is_number(tensor) for tensor in node.inputs)
    )


def _is_number(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.values.size == 1


def _recognised(nodes: list[gs.Node], y: gs.Tensor) -> str | None:
    values: dict[int, Array] = {id(y): _PROBES}
    for node in nodes:
        operands: list[Array | None] = [
            values[id(tensor)] if id(tensor) in values else np.asarray(tensor.values, np.float32)
            for tensor in node.inputs
        ]
        try:
            values[id(node.outputs[0])] = folding.evaluate(node, operands, _OPSET)[0]
        except Exception:  # the reference implementation raises whatever its parts raise
            return None
    result = np.asarray(values[id(nodes[-1].outputs[0])], np.float64).reshape(_PROBES.shape)
    for name in ACTIVATIONS[1:]:
        if np.abs(result - activate(name, _PROBES)).max() < _SAME:
            return name
    return None
