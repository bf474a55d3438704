"""Grouped heads become `HydraHeads` nodes, which a TensorRT plugin runs with our kernels.

A node takes as many layers as stand in a row, at most four, with LayerNorm and activation between
them, and the summary behind the last. What multiplies floats of 32 bits stays, and so does what the
kernels have no format for; `take` says which and why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from hydra_edge import activations, ops, surgery
from hydra_edge.kernels import MAX_LAYERS
from hydra_edge.ops import heads
from hydra_edge.ops.heads import Heads, Layer

Array = npt.NDArray[np.generic]
GROUPED = ("GroupedMatMul", "QuantizedGroupedMatMul", "WeightOnlyGroupedMatMul")
_HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_INT4 = np.dtype(ml_dtypes.int4)
_BLOCKS = (32, 64, 128)


class _LeftError(Exception):
    """Why a layer stays as it is."""


def take(graph: gs.Graph) -> list[str]:
    """Replace grouped layers by `HydraHeads` nodes.

    Returns:
        One sentence per layer that stays as it is, or is rounded where the graph does not.
    """
    taker = _Taker(graph)
    for node in list(graph.nodes):
        if node.op in GROUPED and node.outputs:
            try:
                taker.take(node)
            except _LeftError as reason:
                taker.notes.append(f"'{node.name}' {reason}.")
    surgery.sort(graph)
    return taker.notes


@dataclass(frozen=True)
class _Tail:
    """What a node takes over behind a matmul: up to ``tensor``, which it writes instead."""

    tensor: gs.Tensor
    layer: Layer


class _Taker(surgery.Writer):
    def __init__(self, graph: gs.Graph) -> None:
        super().__init__(graph, surgery.fresh_name(graph, "plugin"))
        self.outputs = {id(tensor) for tensor in graph.outputs}
        self.taken: set[int] = set()
        self.notes: list[str] = []

    def take(self, node: gs.Node) -> None:
        """One node for ``node`` and what follows it.

        Raises:
            _LeftError: The kernels have no format for it.
        """
        if id(node) in self.taken:
            return
        layer, group = _layer(node)
        kind = (node.op, layer.weight.dtype, group)
        x, x_type, x_per_head, layer = self.input_of(node, layer)
        layers: list[Layer] = []
        while True:
            self.taken.add(id(node))
            tail = self.behind(node.outputs[0], layer)
            following = self.only_reader(tail.tensor)
            if len(layers) + 1 == MAX_LAYERS or following is None or following.op not in GROUPED:
                break
            try:
                next_layer, next_group = _layer(following)
            except _LeftError:
                break
            same = (following.op, next_layer.weight.dtype, next_group) == kind
            if not same or len(next_layer.weight) != len(layer.weight):
                break
            layers.append(tail.layer)
            node, layer = following, next_layer
        # A LayerNorm behind the last layer is not the kernels': it needs a row of all outputs.
        if tail.layer.gamma is not None:
            tail = _Tail(node.outputs[0], layer)
        found = Heads((*layers, tail.layer), x_type, x_per_head, group=group)
        self.write(found, x, tail.tensor)

    def input_of(self, node: gs.Node, layer: Layer) -> tuple[gs.Tensor, np.dtype, bool, Layer]:
        """X in a type that the kernels read, and whether it is ``[M, B, K]``."""
        x = _before_widening(node.inputs[0])
        per_head = x.shape is None or len(x.shape) != 2
        dtype = surgery.dtype_of(x) or np.dtype(np.float32)
        if layer.x_scale is not None and dtype not in _HALVES:
            return self.quantized(x, layer, per_head)
        if layer.weight.dtype in _HALVES and dtype != layer.weight.dtype:
            return (
                self.cast(x, layer.weight.dtype),
                layer.weight.dtype,
                per_head,
                layer,
            )
        if dtype not in _HALVES:
            self.notes.append(
                f"The input of '{node.name}' is {dtype} in the graph and float16 in the plugin."
            )
            half = np.dtype(np.float16)
            return self.cast(x, half), half, per_head, layer
        return x, dtype, per_head, layer

    def quantized(
        self, x: gs.Tensor, layer: Layer, per_head: bool
    ) -> tuple[gs.Tensor, np.dtype, bool, Layer]:
        """X in int8. TensorRT knows one scale for it: heads with their own divide before."""
        assert layer.x_scale is not None
        scale = layer.x_scale
        if scale.size > 1:
            x = self.emit("Div", [x, self.constant(scale.reshape(-1, 1, 1))], np.float32)
            scale, per_head = np.ones(1, np.float32), True
        inputs = [x, self.constant(scale.reshape(())), self.constant(np.zeros((), np.int8))]
        stored = self.emit("QuantizeLinear", inputs, np.int8)
        return stored, np.dtype(np.int8), per_head, layer

    def behind(self, y: gs.Tensor, layer: Layer) -> _Tail:
        """LayerNorm and activation that follow a matmul."""
        y, layer = self.norm(y, layer)
        y, activation = activations.behind(self.graph, y)
        return _Tail(y, replace(layer, activation=activation))

    def norm(self, y: gs.Tensor, layer: Layer) -> tuple[gs.Tensor, Layer]:
        node = self.only_reader(y)
        if node is None or node.op != "LayerNormalization" or len(node.outputs) != 1:
            return y, layer
        if node.attrs.get("axis", -1) not in (-1, 2):
            return y, layer
        shape = (len(layer.weight), 1, layer.weight.shape[2])
        parts = [_broadcast(tensor, shape) for tensor in node.inputs[1:]]
        if any(part is None for part in parts):
            return y, layer
        gamma = np.asarray(parts[0])
        beta = np.asarray(parts[1]) if len(parts) > 1 else np.zeros_like(gamma)
        y = node.outputs[0]
        for op in ("Mul", "Add"):
            follower = self.only_reader(y)
            if follower is None or follower.op != op:
                continue
            operands = [tensor for tensor in follower.inputs if tensor is not y]
            values = _broadcast(operands[0], shape) if len(operands) == 1 else None
            if values is None:
                break
            gamma, beta = (gamma * values, beta * values) if op == "Mul" else (gamma, beta + values)
            y = follower.outputs[0]
        epsilon = float(node.attrs.get("epsilon", 1e-5))
        flat = (len(layer.weight), -1)
        return y, replace(
            layer, gamma=gamma.reshape(flat), beta=beta.reshape(flat), epsilon=epsilon
        )

    def write(self, found: Heads, x: gs.Tensor, y: gs.Tensor) -> None:
        """The node, writing ``y`` and the summary of it."""
        self.detach(y)
        kind, out = surgery.dtype_of(y) or np.dtype(np.float32), y
        if kind in _HALVES:
            widened = self.widened(y)
            if widened is None and len(found.layers) == 1:
                found = replace(found, y_type=kind)
            else:  # the kernels write fp32; readers of the 16-bit tensor keep it
                out = gs.Variable(self.name("logits"), np.float32) if widened is None else widened
                self.detach(out)
                if y.outputs or id(y) in self.outputs:
                    self.append("Cast", [out], [y], {"to": _code(kind)})
        outputs = [out]
        reader = self.summary_of(out) if np.dtype(found.y_type) == np.float32 else None
        if reader is not None:
            found = replace(found, summary=heads.SUMMARY_OPS[reader.op])
            outputs += list(reader.outputs)
            reader.outputs.clear()
            reader.inputs.clear()
        stem = self.name("heads")
        parameters = [gs.Constant(f"{stem}/{name}", values) for name, values in found.parameters()]
        self.append(heads.OP, [x, *parameters], outputs, found.attributes(), heads.DOMAIN)

    def widened(self, y: gs.Tensor) -> gs.Tensor | None:
        """``y`` in fp32, where the graph has that."""
        for node in y.outputs:
            if node.op == "Cast" and node.attrs.get("to") == onnx.TensorProto.FLOAT:
                widened: gs.Tensor = node.outputs[0]
                return widened
        return None

    def summary_of(self, y: gs.Tensor) -> gs.Node | None:
        return next(
            (n for n in y.outputs if n.op in heads.SUMMARY_OPS and n.domain == ops.DOMAIN), None
        )

    def detach(self, tensor: gs.Tensor) -> None:
        """Nobody writes ``tensor`` any more."""
        for node in list(tensor.inputs):
            node.outputs.clear()
            node.inputs.clear()

    def only_reader(self, tensor: gs.Tensor) -> gs.Node | None:
        if len(tensor.outputs) != 1 or id(tensor) in self.outputs:
            return None
        node: gs.Node = tensor.outputs[0]
        return node if node.inputs[0] is tensor or node.op in ("Mul", "Add") else None

    def cast(self, x: gs.Tensor, to: np.dtype) -> gs.Tensor:
        return self.emit("Cast", [x], to, {"to": _code(to)})


def _before_widening(x: gs.Tensor) -> gs.Tensor:
    """The 16-bit tensor that ``x`` was cast from, if it was: the kernels read that."""
    node = x.inputs[0] if x.inputs else None
    if node is None or node.op != "Cast":
        return x
    source: gs.Tensor = node.inputs[0]
    return source if surgery.dtype_of(source) in _HALVES else x


def _code(dtype: np.dtype) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def _layer(node: gs.Node) -> tuple[Layer, int]:
    """What a grouped node holds, and K that share a scale of int4.

    Raises:
        _LeftError: The kernels have no format for it.
    """
    if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        raise _LeftError("has weights that the graph computes")
    weight, bias = (np.asarray(tensor.values) for tensor in node.inputs[1:3])
    count, _, outputs = weight.shape
    layer = Layer(weight, np.broadcast_to(bias, (count, 1, outputs)).reshape(count, outputs))
    if node.op == "GroupedMatMul":
        if weight.dtype not in _HALVES:
            raise _LeftError(f"multiplies {weight.dtype}, the kernels float16 and bfloat16")
        return layer, 0
    scale = np.asarray(node.inputs[3].values, np.float32)
    if node.op == "QuantizedGroupedMatMul":
        x_scale = np.asarray(node.inputs[4].values, np.float32).reshape(-1)
        scale = np.broadcast_to(scale, (count, 1, outputs)).reshape(count, outputs)
        return replace(layer, scale=scale, x_scale=x_scale), 0
    return _weight_only(node, layer, scale)


def _weight_only(node: gs.Node, layer: Layer, scale: Array) -> tuple[Layer, int]:
    count, inputs, outputs = layer.weight.shape
    if np.any(node.inputs[4].values):
        raise _LeftError("has weights with zero points")
    if layer.weight.dtype == np.int8:
        if scale.shape[1] != 1:
            raise _LeftError("has int8 weights in blocks of rows")
        return replace(layer, scale=scale.reshape(count, outputs)), 0
    if layer.weight.dtype != _INT4:
        raise _LeftError(f"has weights in {layer.weight.dtype}, which the kernels do not read")
    if not np.all(np.asarray(scale, np.float32) > 0):
        raise _LeftError("has int4 weights with scales that are not positive")
    if scale.shape[1] == 1:
        rows = -(-inputs // _BLOCKS[-1])
        return replace(layer, scale=np.repeat(scale, rows, axis=1)), _BLOCKS[-1]
    block = int(node.attrs["block"][0])
    if block not in _BLOCKS:
        raise _LeftError(f"has int4 weights in blocks of {block}")
    return replace(layer, scale=scale), block


def _broadcast(tensor: gs.Tensor, shape: tuple[int, int, int]) -> Array | None:
    if not isinstance(tensor, gs.Constant):
        return None
    try:
        return np.broadcast_to(np.asarray(tensor.values, np.float32), shape)
    except ValueError:
        return None
