"""fp16 for chosen nodes, with one Cast per tensor that crosses between them and the rest.

ONNX Runtime's own converter treats every tensor as fp16 and puts a pair of casts around each node
that must not be: values that never meet an fp16 node would be rounded all the same.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from hydra_edge import surgery
from hydra_edge.errors import QuantizationError

# Operators whose float operands or results have a fixed type or carry sizes rather than values.
_STAYS = (
    "Cast CastLike ConstantOfShape DequantizeLinear If Loop NonMaxSuppression QuantizeLinear "
    "RandomNormal RandomUniform Range Resize Scan Upsample"
)
_LARGEST = float(np.finfo(np.float16).max)


def to_fp16(model: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """Run the nodes called ``names`` in fp16; inputs and outputs of the graph keep their type.

    Raises:
        QuantizationError: A weight is too large for fp16.
    """
    graph = surgery.open_model(model)
    chosen = [node for node in graph.nodes if node.name in names and _can_be_half(node)]
    casts = _Casts(graph)
    for node in chosen:
        node.inputs = [casts.half(tensor) for tensor in node.inputs]
    for node in chosen:
        for index, tensor in enumerate(node.outputs):
            if tensor.dtype is not None and np.dtype(tensor.dtype) == np.float32:
                node.outputs[index] = casts.written_half(tensor)
                casts.restore(tensor)
    return surgery.close_model(graph, like=model)


def _can_be_half(node: gs.Node) -> bool:
    """Operators of other domains may know no fp16, and ONNX does not know what they write."""
    standard = node.domain in (None, "", "ai.onnx")
    tensors = [tensor for tensor in (*node.inputs, *node.outputs) if not tensor.is_empty()]
    typed = all(tensor.dtype is not None for tensor in tensors)
    return standard and typed and node.op not in _STAYS.split()


class _Casts:
    """The one fp16 twin of every fp32 tensor that needs one."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.prefix = surgery.fresh_name(graph, "fp16")
        self.twins: dict[str, gs.Tensor] = {}

    def half(self, tensor: gs.Tensor) -> gs.Tensor:
        """The fp16 twin of an operand; other types stay as they are."""
        if tensor.is_empty() or tensor.dtype is None or np.dtype(tensor.dtype) != np.float32:
            return tensor
        if tensor.name not in self.twins:
            name = f"{self.prefix}/{tensor.name}"
            if isinstance(tensor, gs.Constant):
                self.twins[tensor.name] = gs.Constant(name, _rounded(tensor))
            else:
                twin = gs.Variable(name, np.float16, tensor.shape)
                self.graph.nodes.append(
                    gs.Node("Cast", f"{name}/cast", {"to": 10}, [tensor], [twin])
                )
                self.twins[tensor.name] = twin
        return self.twins[tensor.name]

    def written_half(self, tensor: gs.Tensor) -> gs.Tensor:
        """The fp16 twin of a result, which its node is about to write itself."""
        twin = self.twins.get(tensor.name)
        if twin is None:
            twin = gs.Variable(f"{self.prefix}/{tensor.name}", np.float16, tensor.shape)
            self.twins[tensor.name] = twin
        else:
            twin.inputs[0].inputs.clear()
            twin.inputs.clear()
        return twin

    def restore(self, tensor: gs.Tensor) -> None:
        """Cast back to fp32 what fp32 nodes or the graph's outputs still read."""
        if tensor.outputs or any(output is tensor for output in self.graph.outputs):
            twin = self.twins[tensor.name]
            name = f"{twin.name}/back"
            self.graph.nodes.append(gs.Node("Cast", name, {"to": 1}, [twin], [tensor]))


def _rounded(tensor: gs.Constant) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    peak = float(np.abs(tensor.values).max(initial=0.0, where=np.isfinite(tensor.values)))
    if peak > _LARGEST:
        raise QuantizationError(
            f"The weight '{tensor.name}' holds {peak:.3g}.",
            f"fp16 ends at {_LARGEST:g}.",
            "Keep that part in fp32, e.g. 'body=fp32,heads=fp16'.",
        )
    return np.asarray(tensor.values, np.float16)
