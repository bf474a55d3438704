"""`HydraHeads` nodes become the ops that they were made of, for a runtime without our plugin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from hydra_edge import ops
from hydra_edge.ops import heads
from hydra_edge.ops.heads import Heads, Layer

Array = npt.NDArray[np.generic]
_SUMMARIES = {"softmax": "EnsembleSummary", "gaussian": "GaussianSummary"}


def restore(graph: gs.Graph) -> None:
    """Replace `HydraHeads` nodes by ops of `hydra_edge.ops` and standard ones."""
    for node in [node for node in graph.nodes if node.op == heads.OP]:
        _Restorer(graph, node).restore()


def _code(dtype: npt.DTypeLike) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class _Restorer:
    """One node, written in the ops of `hydra_edge.ops`."""

    def __init__(self, graph: gs.Graph, node: gs.Node) -> None:
        self.graph, self.node = graph, node
        parameters = [np.asarray(tensor.values) for tensor in node.inputs[1:]]
        self.heads = Heads.read(node.attrs, parameters)
        self.shape = node.inputs[0].shape  # of what `emit` writes next
        self.count = 0

    def restore(self) -> None:
        heads_ = self.heads
        h = self.fp32(self.node.inputs[0])
        if np.dtype(heads_.x_type) == np.int8:
            scale = heads_.layers[0].x_scale
            assert scale is not None
            shape = (-1, 1, 1) if scale.size > 1 else ()
            h = self.emit("Mul", [h, self.constant(scale.reshape(shape))])
        for index, layer in enumerate(heads_.layers):
            if index and layer.x_scale is None:
                h = self.fp32(self.rounded(h, np.dtype(heads_.x_type)))
            h = self.activated(layer, self.normed(layer, self.multiplied(layer, h)))
        y, *summary = self.node.outputs
        self.node.outputs.clear()
        self.node.inputs.clear()
        self.append("Cast", [h], [y], {"to": _code(heads_.y_type)})
        if summary:
            self.append(_SUMMARIES[heads_.summary], [h], summary, {}, ops.DOMAIN)

    def multiplied(self, layer: Layer, h: gs.Tensor) -> gs.Tensor:
        column = layer.bias[:, None]
        batch = self.shape[-2] if self.shape else "batch"
        self.shape = (len(layer.weight), batch, layer.weight.shape[2])
        wide = layer.weight.astype(np.float32) if layer.scale is None else layer.weight
        inputs = [h, self.constant(wide), self.constant(column)]
        if layer.scale is None:
            return self.emit("GroupedMatMul", inputs, domain=ops.DOMAIN)
        scale = layer.scale[:, None] if layer.scale.ndim == 2 else layer.scale
        inputs.append(self.constant(scale))
        if layer.x_scale is not None:
            shape = (-1, 1, 1) if layer.x_scale.size > 1 else ()
            inputs.append(self.constant(layer.x_scale.reshape(shape)))
            return self.emit("QuantizedGroupedMatMul", inputs, domain=ops.DOMAIN)
        inputs.append(self.constant(np.zeros((1, 1, 1), np.float32)))
        attrs: dict[str, object] = {"block": [self.heads.group or layer.weight.shape[1]]}
        return self.emit("WeightOnlyGroupedMatMul", inputs, attrs, ops.DOMAIN)

    def normed(self, layer: Layer, h: gs.Tensor) -> gs.Tensor:
        if layer.gamma is None or layer.beta is None:
            return h
        ones = self.constant(np.ones(layer.gamma.shape[1], np.float32))
        attrs: dict[str, object] = {"axis": -1, "epsilon": layer.epsilon}
        h = self.emit("LayerNormalization", [h, ones], attrs)
        h = self.emit("Mul", [h, self.constant(layer.gamma[:, None])])
        return self.emit("Add", [h, self.constant(layer.beta[:, None])])

    def activated(self, layer: Layer, h: gs.Tensor) -> gs.Tensor:
        return _WRITTEN[layer.activation](self, h)

    def gelu(self, h: gs.Tensor) -> gs.Tensor:
        half, root = (self.constant(np.asarray(v, np.float32)) for v in (0.5, 2**-0.5))
        one = self.constant(np.asarray(1, np.float32))
        erf = self.emit("Erf", [self.emit("Mul", [h, root])])
        return self.emit("Mul", [self.emit("Mul", [h, half]), self.emit("Add", [erf, one])])

    def silu(self, h: gs.Tensor) -> gs.Tensor:
        return self.emit("Mul", [h, self.emit("Sigmoid", [h])])

    def fp32(self, x: gs.Tensor) -> gs.Tensor:
        return self.emit("Cast", [x], {"to": onnx.TensorProto.FLOAT})

    def rounded(self, x: gs.Tensor, to: np.dtype) -> gs.Tensor:
        y = self.emit("Cast", [x], {"to": _code(to)})
        y.dtype = to
        return y

    def constant(self, values: Array) -> gs.Constant:
        self.count += 1
        return gs.Constant(f"{self.node.name}/constant_{self.count}", np.array(values, order="C"))

    def emit(
        self,
        op: str,
        inputs: list[gs.Tensor],
        attrs: dict[str, object] | None = None,
        domain: str | None = None,
    ) -> gs.Tensor:
        self.count += 1
        output = gs.Variable(f"{self.node.name}/{op}_{self.count}", np.float32, self.shape)
        self.append(op, inputs, [output], attrs or {}, domain)
        return output

    def append(
        self,
        op: str,
        inputs: list[gs.Tensor],
        outputs: list[gs.Tensor],
        attrs: dict[str, object],
        domain: str | None = None,
    ) -> None:
        self.count += 1
        name = f"{self.node.name}/{op}_node_{self.count}"
        self.graph.nodes.append(gs.Node(op, name, attrs, inputs, outputs, domain=domain))


_WRITTEN: dict[str, Callable[[_Restorer, gs.Tensor], gs.Tensor]] = {
    "none": lambda _, h: h,
    "relu": lambda at, h: at.emit("Relu", [h]),
    "gelu": _Restorer.gelu,
    "silu": _Restorer.silu,
    "tanh": lambda at, h: at.emit("Tanh", [h]),
}
