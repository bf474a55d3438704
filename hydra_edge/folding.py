"""Which tensors are constant, also behind nodes, and what they hold.

Exporters store a weight transposed, or put a Transpose, a Cast, a Reshape or a QuantizeLinear
between the constant and the layer. Such nodes are computed here, for the tensors that a pass asks
for and without touching the graph. DequantizeLinear is not folded: it is how a graph says that
a weight is stored in integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

Array = npt.NDArray[np.generic]

_RANDOM = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
_DEQUANTIZE = "DequantizeLinear"
# The reference implementation lacks the older versions, which mean the same.
_SINCE_19 = ("DequantizeLinear", "QuantizeLinear")


def is_plain(node: gs.Node) -> bool:
    """Whether ``node`` is a deterministic standard operator without control flow."""
    return (
        not node.domain
        and node.op not in _RANDOM
        and not any(isinstance(value, gs.Graph) for value in node.attrs.values())
    )


class Folder:
    """Knows the constant tensors of one graph."""

    def __init__(self, graph: gs.Graph) -> None:
        self._opset = int(graph.opset)
        self._derived: set[int] = set()
        self._folded: dict[int, gs.Constant | None] = {}
        self._alive: list[gs.Tensor] = []  # ids are only unique among objects that live
        for node in graph.nodes:
            if node.inputs and is_plain(node) and all(map(self._known, node.inputs)):
                for tensor in node.outputs:
                    self._derived.add(id(tensor))
                    self._alive.append(tensor)

    def _known(self, tensor: gs.Tensor) -> bool:
        return isinstance(tensor, gs.Constant) or tensor.is_empty() or id(tensor) in self._derived

    def is_derived(self, tensor: gs.Tensor) -> bool:
        """Whether nodes compute ``tensor`` from nothing but constants, dequantized ones included.

        An output of the graph is not: the node that writes it has to stay.
        """
        return id(tensor) in self._derived

    def constant(self, tensor: gs.Tensor) -> gs.Constant | None:
        """``tensor`` as a constant, or None when it depends on an input or is dequantized."""
        if isinstance(tensor, gs.Constant):
            return tensor
        if id(tensor) not in self._derived:
            return None
        if id(tensor) not in self._folded:
            self._folded[id(tensor)] = self._fold(tensor)
        return self._folded[id(tensor)]

    def _fold(self, tensor: gs.Tensor) -> gs.Constant | None:
        node = tensor.inputs[0]
        if node.op == _DEQUANTIZE:
            return None
        operands: list[Array | None] = []
        for operand in node.inputs:
            constant = None if operand.is_empty() else self.constant(operand)
            if constant is None and not operand.is_empty():
                return None
            operands.append(None if constant is None else np.asarray(constant.values))
        position = next(index for index, output in enumerate(node.outputs) if output is tensor)
        try:
            values = self._evaluate(node, operands)[position]
        except Exception:  # the reference implementation raises whatever its parts raise
            return None
        return gs.Constant(f"{tensor.name}/folded", np.asarray(values))

    def _evaluate(self, node: gs.Node, operands: list[Array | None]) -> list[Array]:
        quick = _QUICK.get(node.op)
        if quick is not None and (found := quick(node.attrs, operands)) is not None:
            return [found]
        return evaluate(node, operands, self._opset)


def evaluate(node: gs.Node, operands: list[Array | None], opset: int) -> list[Array]:
    """The outputs of one standard node on given operands, by ONNX's reference implementation."""
    names = [f"i{index}" for index in range(len(operands))]
    given = [name if array is not None else "" for name, array in zip(names, operands, strict=True)]
    outputs = [f"o{index}" for index in range(len(node.outputs))]
    proto = onnx.helper.make_node(node.op, given, outputs)
    proto.attribute.extend(OnnxExporter.export_attributes(node.attrs))
    feeds = {n: a for n, a in zip(names, operands, strict=True) if a is not None}
    graph = onnx.helper.make_graph(
        [proto],
        "one",
        [onnx.helper.make_value_info(n, onnx.TypeProto()) for n in feeds],
        [onnx.helper.make_value_info(n, onnx.TypeProto()) for n in outputs],
    )
    if node.op in _SINCE_19:
        opset = max(opset, 19)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return [np.asarray(array) for array in ReferenceEvaluator(model).run(outputs, feeds)]


Attributes = Mapping[str, object]


def _identity(_: Attributes, operands: list[Array | None]) -> Array | None:
    return operands[0]


def _transpose(attrs: Attributes, operands: list[Array | None]) -> Array | None:
    assert operands[0] is not None
    perm = attrs.get("perm")
    return operands[0].transpose(perm)  # type: ignore[call-overload,no-any-return]


def _reshape(attrs: Attributes, operands: list[Array | None]) -> Array | None:
    array, target = operands[:2]
    assert array is not None
    assert target is not None
    if attrs.get("allowzero", 0):
        return None
    return array.reshape([s or array.shape[i] for i, s in enumerate(target.tolist())])


# The reference implementation takes about a millisecond a node, too long for a thousand heads.
_QUICK: Mapping[str, Callable[[Attributes, list[Array | None]], Array | None]] = {
    "Identity": _identity,
    "Transpose": _transpose,
    "Reshape": _reshape,
}
