"""The float graph that a quantized one was made from, as far as its structure goes.

An engine in few bits is timed against its twin in floats. Where the original is not at hand, as on
a device that got a packed-up engine, its values do not matter, only its layers do.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from hydra_edge import folding, surgery
from hydra_edge.artifacts.graph import Graph
from hydra_edge.errors import GraphError

Array = npt.NDArray[np.generic]
_HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_FEW_BITS = frozenset({
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"),
    *("ConvInteger", "QLinearMatMul", "QLinearConv"),
    *("QuantizedGroupedMatMul", "WeightOnlyGroupedMatMul"),
})  # fmt: skip
_BLOCKED_OPSET = 21  # the first with blocks of rows, and int4


def in_floats(graph: Graph) -> Graph:
    """Take Q, DQ and half precision out of a graph.

    Args:
        graph: An unfused graph.

    Returns:
        An fp32 graph with the same layers, and inputs and outputs of the same names. Its weights
        are rounded as they were stored.

    Raises:
        GraphError: Something in it works on integers in another way than Q and DQ around a layer.
    """
    surgeon = surgery.open_model(graph.model)
    for node in list(surgeon.nodes):
        if node.op == "DequantizeLinear":
            _to_floats(node)
    for node in list(surgeon.nodes):
        if node.op == "Cast" and _between_floats(node):
            _bypass(surgeon, node, node.inputs[0])
    for tensor in surgeon.tensors().values():
        if not _is_half(tensor):
            continue
        if isinstance(tensor, gs.Constant):
            tensor.values = np.asarray(tensor.values, np.float32)
        else:
            tensor.dtype = np.dtype(np.float32)
    model = surgery.close_model(surgeon, like=graph.model)
    left = sorted({node.op_type for node in model.graph.node} & _FEW_BITS)
    if left:
        raise GraphError(
            f"The graph has no twin in floats: {', '.join(left)} stays in it.",
            "Only Q and DQ around layers of standard operators can be taken out.",
            "Compare with the graph that it was quantized from.",
        )
    return graph.derive(model, "float-twin", precision="fp32")


def _to_floats(node: gs.Node) -> None:
    """A stored weight as floats; of an activation, what was quantized."""
    source = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if source is not None and source.op == "QuantizeLinear":
        _replace(node.outputs[0], source.inputs[0])
    elif all(isinstance(tensor, gs.Constant) for tensor in node.inputs):
        operands: list[Array | None] = [surgery.read(tensor) for tensor in node.inputs]
        (values,) = folding.evaluate(node, operands, _BLOCKED_OPSET)
        weight = gs.Constant(f"{node.outputs[0].name}/float", np.asarray(values, np.float32))
        _replace(node.outputs[0], weight)


def _replace(tensor: gs.Tensor, other: gs.Tensor) -> None:
    for reader in list(tensor.outputs):
        reader.inputs = [other if one is tensor else one for one in reader.inputs]


def _is_half(tensor: gs.Tensor) -> bool:
    return surgery.dtype_of(tensor) in _HALVES


def _between_floats(cast: gs.Node) -> bool:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    source = cast.inputs[0]
    return (_is_half(source) or source.dtype == np.float32) and cast.attrs.get("to") in floats


def _bypass(graph: gs.Graph, node: gs.Node, source: gs.Tensor) -> None:
    """Readers read ``source``; what the graph returns is still written, in fp32."""
    target = node.outputs[0]
    _replace(target, source)
    if any(output is target for output in graph.outputs):
        node.op, node.attrs = "Identity", {}
    else:
        node.inputs.clear()
        node.outputs.clear()
