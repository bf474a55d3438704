"""`HydraHeads` nodes become the ops that they were made of, for a runtime without our plugin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from hydra_edge import ops, surgery
from hydra_edge.ops import heads
from hydra_edge.ops.heads import Heads, Layer

Array = npt.NDArray[np.generic]
_OPS = {summary: op for op, summary in heads.SUMMARY_OPS.items()}


def restore(graph: gs.Graph) -> None:
    """Replace `HydraHeads` nodes by ops of `hydra_edge.ops` and standard ones."""
    for node in [node for node in graph.nodes if node.op == heads.OP]:
        _Restorer(graph, node).restore()


def _code(dtype: npt.DTypeLike) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class _Restorer(surgery.Writer):
    """One node, written in the ops of `hydra_edge.ops`."""

    def __init__(self, graph: gs.Graph, node: gs.Node) -> None:
        super().__init__(graph, node.name)
        self.node = node
        parameters = [np.asarray(tensor.values) for tensor in node.inputs[1:]]
        self.heads = Heads.read(node.attrs, parameters)
        self.shape = node.inputs[0].shape  # of what `write` writes next

    def restore(self) -> None:
        heads_ = self.heads
        h = self.fp32(self.node.inputs[0])
        if np.dtype(heads_.x_type) == np.int8:
            scale = heads_.layers[0].x_scale
            assert scale is not None
            shape = (-1, 1, 1) if scale.size > 1 else ()
            h = self.write("Mul", [h, self.constant(scale.reshape(shape))])
        for index, layer in enumerate(heads_.layers):
            if index and layer.x_scale is None:
                h = self.fp32(self.rounded(h, np.dtype(heads_.x_type)))
            h = self.activated(layer, self.normed(layer, self.multiplied(layer, h)))
        y, *summary = self.node.outputs
        self.node.outputs.clear()
        self.node.inputs.clear()
        self.append("Cast", [h], [y], {"to": _code(heads_.y_type)})
        if summary:
            self.append(_OPS[heads_.summary], [h], summary, {}, ops.DOMAIN)

    def multiplied(self, layer: Layer, h: gs.Tensor) -> gs.Tensor:
        column = layer.bias[:, None]
        batch = self.shape[-2] if self.shape else "batch"
        self.shape = (len(layer.weight), batch, layer.weight.shape[2])
        wide = layer.weight.astype(np.float32) if layer.scale is None else layer.weight
        inputs = [h, self.constant(wide), self.constant(column)]
        if layer.scale is None:
            return self.write("GroupedMatMul", inputs, domain=ops.DOMAIN)
        scale = layer.scale[:, None] if layer.scale.ndim == 2 else layer.scale
        inputs.append(self.constant(scale))
        if layer.x_scale is not None:
            shape = (-1, 1, 1) if layer.x_scale.size > 1 else ()
            inputs.append(self.constant(layer.x_scale.reshape(shape)))
            return self.write("QuantizedGroupedMatMul", inputs, domain=ops.DOMAIN)
        inputs.append(self.constant(np.zeros((1, 1, 1), np.float32)))
        attrs: dict[str, object] = {"block": [self.heads.group or layer.weight.shape[1]]}
        return self.write("WeightOnlyGroupedMatMul", inputs, attrs, ops.DOMAIN)

    def normed(self, layer: Layer, h: gs.Tensor) -> gs.Tensor:
        if layer.gamma is None or layer.beta is None:
            return h
        ones = self.constant(np.ones(layer.gamma.shape[1], np.float32))
        attrs: dict[str, object] = {"axis": -1, "epsilon": layer.epsilon}
        h = self.write("LayerNormalization", [h, ones], attrs)
        h = self.write("Mul", [h, self.constant(layer.gamma[:, None])])
        return self.write("Add", [h, self.constant(layer.beta[:, None])])

    def activated(self, layer: Layer, h: gs.Tensor) -> gs.Tensor:
        return _WRITTEN[layer.activation](self, h)

    def gelu(self, h: gs.Tensor) -> gs.Tensor:
        half, root = (self.constant(np.asarray(v, np.float32)) for v in (0.5, 2**-0.5))
        one = self.constant(np.asarray(1, np.float32))
        erf = self.write("Erf", [self.write("Mul", [h, root])])
        return self.write("Mul", [self.write("Mul", [h, half]), self.write("Add", [erf, one])])

    def silu(self, h: gs.Tensor) -> gs.Tensor:
        return self.write("Mul", [h, self.write("Sigmoid", [h])])

    def fp32(self, x: gs.Tensor) -> gs.Tensor:
        return self.write("Cast", [x], {"to": onnx.TensorProto.FLOAT})

    def rounded(self, x: gs.Tensor, to: np.dtype) -> gs.Tensor:
        return self.emit("Cast", [x], to, {"to": _code(to)}, shape=self.shape)

    def write(
        self,
        op: str,
        inputs: list[gs.Tensor],
        attrs: dict[str, object] | None = None,
        domain: str | None = None,
    ) -> gs.Tensor:
        """A node whose result is fp32 and as large as what is written now."""
        return self.emit(op, inputs, attrs=attrs, domain=domain, shape=self.shape)


_WRITTEN: dict[str, Callable[[_Restorer, gs.Tensor], gs.Tensor]] = {
    "none": lambda _, h: h,
    "relu": lambda at, h: at.write("Relu", [h]),
    "gelu": _Restorer.gelu,
    "silu": _Restorer.silu,
    "tanh": lambda at, h: at.write("Tanh", [h]),
}
