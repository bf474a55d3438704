"""`lower`: from the canonical fused graph to the standard ops that one backend runs best.

Three ways to run grouped heads without a kernel of our own; `compile` times them and keeps one.

    grouped   every layer one batched MatMul over M
    wide      a first layer, whose input all heads share, is one dense [K, M·N] matmul; then grouped
    separate  M small matmuls per layer, as before fusion: some runtimes prepack only those

A fourth is for TensorRT and TensorRT-RTX, which multiply integers where they see QuantizeLinear and
DequantizeLinear around a MatMul, and optimize the rest themselves:

    qdq       as "wide", and what is stored in int8 stands between those two

And TensorRT can have the heads computed by our own kernels:

    plugin    heads become `HydraHeads` nodes; the rest is as in "qdq"

Weights stored in few bits become floats when the runtime loads them, unless their input is stored
in integers too. Integer matmuls stay integer in all three; `integer_path` and `float_path` do the
same for the layers of the body.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from hydra_edge import float_path, integer_path, plugin_path, plugin_restore, surgery
from hydra_edge.artifacts.graph import Graph
from hydra_edge.errors import CompilationError, InputError
from hydra_edge.ops import heads

Array = npt.NDArray[np.generic]
LOWERINGS = ("grouped", "wide", "separate")
EXPLICIT = "qdq"
PLUGIN = "plugin"
# Ops that act alike on every head and on a stack of them: "separate" carries M tensors through.
_ELEMENTWISE = (
    "Abs Add Cast Ceil Celu Clip Cos Div Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity "
    "LeakyRelu Log Max Min Mish Mul Neg Pow Reciprocal Relu Round Selu Sigmoid Sin Softplus "
    "Softsign Sqrt Sub Tanh ThresholdedRelu"
)


def lower(graph: Graph, lowering: str) -> Graph:
    """Replace the grouped ops of ``graph`` by standard ops.

    Args:
        graph: A fused graph.
        lowering: One of `LOWERINGS`, `EXPLICIT` or `PLUGIN`.

    Returns:
        A graph that computes the same. Inlining its functions leaves standard ops that the lowering
        was made for: a float ``GroupedMatMul`` that stays is a batched MatMul and an Add.

    Raises:
        InputError: There is no such lowering.
        CompilationError: "qdq" of heads stored in another type than floats or int8, or "plugin" of
            heads that the kernels have no format for.
    """
    known = (*LOWERINGS, EXPLICIT, PLUGIN)
    if lowering not in known:
        raise InputError(
            f"Unknown lowering '{lowering}'.",
            f"There are: {', '.join(known)}.",
            "Pick one of those, or let `compile` time them all.",
        )
    surgeon = surgery.open_model(graph.model)
    emitter = _Emitter(surgeon)
    steps = f"lower:{lowering}"
    if lowering == PLUGIN:
        steps = " ".join((steps, *_take_heads(surgeon)))
    else:
        plugin_restore.restore(surgeon)
    if lowering in (EXPLICIT, PLUGIN):
        for node in list(surgeon.nodes):
            emitter.explicit(node)
        return graph.derive(surgery.close_model(surgeon, like=graph.model), steps)
    for node in list(surgeon.nodes):
        if node.op in ("GroupedMatMul", "QuantizedGroupedMatMul", "WeightOnlyGroupedMatMul"):
            # What stands behind a node that was taken apart has lost its shape: heads are stacked.
            wide = lowering == "wide" and node.inputs[0].shape and len(node.inputs[0].shape) == 2
            if lowering == "separate":
                emitter.separate(node)
            elif node.op == "QuantizedGroupedMatMul":
                (emitter.wide_int8 if wide else emitter.grouped_int8)(node)
            elif node.op == "WeightOnlyGroupedMatMul":
                emitter.weight_only(node, bool(wide))
            elif wide:
                emitter.wide(node)
        elif lowering == "separate" and emitter.can_separate(node):
            emitter.separate_elementwise(node)
    emitter.gather_separated()
    float_path.cast_fp8(surgeon)
    integer_path.multiply_integers(surgeon)
    float_path.dequantize_at_load(surgeon)
    integer_path.hoist_quantize(surgeon)
    integer_path.shift_to_uint8(surgeon)
    return graph.derive(surgery.close_model(surgeon, like=graph.model), f"lower:{lowering}")


def note_of(lowered: Graph) -> str:
    """What `lower` has to say about what it made: what the plugin does not take, and why."""
    return lowered.metadata.provenance[-1].partition(" ")[2]


def _take_heads(surgeon: gs.Graph) -> list[str]:
    notes = plugin_path.take(surgeon)
    if not any(node.op == heads.OP for node in surgeon.nodes):
        raise CompilationError(
            "No heads of the graph can be computed by the plugin.",
            " ".join(notes) or "It has no fused heads.",
            "Store the heads in fp16, int8 or int4-weight-only, or take the lowering 'qdq'.",
        )
    return notes


def has_heads(graph: Graph) -> bool:
    """Whether there is anything to choose: a graph without grouped ops lowers in one way only."""
    return any("GroupedMatMul" in node.op_type for node in graph.model.graph.node)


class _Emitter:
    """Rewrites grouped nodes of one graph, in topological order."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.prefix = surgery.fresh_name(graph, "lowered")
        self.count = 0
        self.parts: dict[str, list[gs.Tensor]] = {}  # stacked tensor -> its M tensors
        self.integers: dict[tuple[str, bytes], gs.Tensor] = {}
        self.pending: list[gs.Tensor] = []  # stacked tensors that no node writes any more

    def wide(self, node: gs.Node) -> None:
        """``[B, K] @ [K, M·N]``, then back to ``[M, B, N]``."""
        x, weight, bias = node.inputs
        flat = self.op("Gemm", [x, self.flat(weight), self.flat(bias)], x.dtype)
        self.unflatten(node, flat)

    def wide_int8(self, node: gs.Node) -> None:
        """The same in integers."""
        x, weight, bias, weight_scale, x_scale = node.inputs
        if x_scale.values.size != 1:
            self.grouped_int8(node)
            return
        scale = self.flat(self.constant(x_scale.values * weight_scale.values))
        scaled = self.int8_matmul(self.quantized(x, x_scale), self.flat(weight), scale)
        self.unflatten(node, self.op("Add", [scaled, self.flat(bias)], x.dtype))

    def grouped_int8(self, node: gs.Node) -> None:
        """Integer matmul batched over M, scaled afterwards."""
        x, weight, bias, weight_scale, x_scale = node.inputs
        if x_scale.values.size > 1 and len(x.shape) == 2:
            x = self.op(
                "Expand", [x, self.constant(np.asarray([len(weight.values), 1, 1]))], x.dtype
            )
        scale = self.constant(x_scale.values * weight_scale.values)
        scaled = self.int8_matmul(self.quantized(x, x_scale), weight, scale)
        self.finish(node, "Add", [scaled, bias])

    def weight_only(self, node: gs.Node, wide: bool) -> None:
        """Integers where the input was integers too; else floats, made from integers at load."""
        x, weight, bias, scale, zero_point = node.inputs
        integer = None if _block(node) else integer_path.integer_source(x)
        if integer is not None and weight.dtype == np.int8 and not np.any(zero_point.values):
            source, x_scale, x_zero = integer
            both = self.constant(np.asarray(x_scale * scale.values, np.float32))
            if not wide:
                scaled = self.int8_matmul(source, weight, both, x_zero)
                self.finish(node, "Add", [scaled, bias])
                return
            scaled = self.int8_matmul(source, self.flat(weight), self.flat(both), x_zero)
            self.unflatten(node, self.op("Add", [scaled, self.flat(bias)], x.dtype))
        elif wide:
            weights, scales = _side_by_side(weight.values), _side_by_side(scale.values)
            matrix = self.real(weights, scales, _zero_rows(node, slice(None)), _block(node))
            self.unflatten(node, self.op("Gemm", [x, matrix, self.flat(bias)], x.dtype))

    def real(self, weight: Array, scale: Array, zero_point: Array | None, block: int) -> gs.Tensor:
        """``[K, N]`` weights as floats, from constants that a runtime folds when it loads them."""
        rows = np.arange(len(weight)) // block if block else None
        y = self.op("Cast", [self.constant(weight)], np.float32, {"to": 1})
        for op, values in (("Sub", zero_point), ("Mul", scale)):
            if values is not None:
                operand: gs.Tensor = self.constant(values)
                if rows is not None and len(values) > 1:
                    operand = self.op("Gather", [operand, self.constant(rows)], np.float32,
                                      {"axis": 0})  # fmt: skip
                y = self.op(op, [y, operand], np.float32)
        return y

    def quantized(self, x: gs.Tensor, scale: gs.Constant) -> gs.Tensor:
        """``x`` in int8; a scale per head lies along axis 0. Equal requests share one node."""
        values = scale.values.reshape(-1) if scale.values.size > 1 else scale.values.reshape(())
        key = (str(x.name), values.tobytes())
        if key not in self.integers:
            zeros = self.constant(np.zeros(values.shape, np.int8))
            attrs: dict[str, object] = {"axis": 0} if values.ndim else {}
            inputs = [x, self.constant(values), zeros]
            self.integers[key] = self.op("QuantizeLinear", inputs, np.int8, attrs)
        return self.integers[key]

    def int8_matmul(
        self, x: gs.Tensor, weight: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor | None = None
    ) -> gs.Tensor:
        """``((x - zero_point) @ weight) * scale`` with an exact integer product."""
        inputs = [x, weight, *([] if zero_point is None else [zero_point])]
        product = self.op("MatMulInteger", inputs, np.int32)
        real = self.op("Cast", [product], np.float32, {"to": 1})
        return self.op("Mul", [real, scale], np.float32)

    def explicit(self, node: gs.Node) -> None:
        """Integers between QuantizeLinear and DequantizeLinear.

        A weight ``[M, K, N]`` has scales along two axes, which DequantizeLinear cannot express: it
        becomes floats with scale 1, and the product is multiplied by the scales. TensorRT knows one
        scale for activations: where heads have their own, x is divided by them before.
        """
        if node.op not in ("GroupedMatMul", "QuantizedGroupedMatMul", "WeightOnlyGroupedMatMul"):
            return
        x, weight, bias = node.inputs[:3]
        wide = x.shape is not None and len(x.shape) == 2
        if node.op == "GroupedMatMul":
            if wide:
                self.wide(node)
            return
        scale = np.asarray(node.inputs[3].values, np.float32)
        if node.op == "QuantizedGroupedMatMul":
            x_scale = node.inputs[4].values
            if x_scale.size > 1:
                x = self.op("Div", [x, self.constant(x_scale)], x.dtype)
                scale, wide = scale * x_scale, False
                x_scale = np.ones((), np.float32)
            x = self.dequantized(self.quantized(x, self.constant(x_scale)), x_scale.reshape(()))
        elif weight.dtype != np.int8 or _block(node) or np.any(node.inputs[4].values):
            raise CompilationError(
                f"The heads '{node.name}' are stored in {weight.dtype}, or in blocks of rows.",
                "A stack of heads between Q and DQ is int8 with a scale for each column.",
                "Compile the graph as it was before fusion, or choose int8.",
            )
        if wide:
            columns = np.asarray(_side_by_side(scale).reshape(-1), np.float32)
            matrix = self.dequantized(self.flat(weight), columns, axis=1)
            product = self.op("MatMul", [x, matrix], np.float32)
            self.unflatten(node, self.op("Add", [product, self.flat(bias)], np.float32))
            return
        product = self.op("MatMul", [x, self.dequantized(weight, np.ones((), np.float32))])
        scaled = self.op("Mul", [product, self.constant(scale)], np.float32)
        self.finish(node, "Add", [scaled, bias])

    def dequantized(self, x: gs.Tensor, scale: Array, axis: int | None = None) -> gs.Tensor:
        """int8 as floats, zero point 0."""
        zeros = self.constant(np.zeros(scale.shape, np.int8))
        attrs: dict[str, object] = {} if axis is None else {"axis": axis}
        inputs = [x, self.constant(np.asarray(scale, np.float32)), zeros]
        return self.op("DequantizeLinear", inputs, np.float32, attrs)

    def separate(self, node: gs.Node) -> None:
        """One matmul per head, carried on as M tensors."""
        x, weight, bias = node.inputs[:3]
        heads = len(weight.values)
        shared = x.name not in self.parts and x.shape is not None and len(x.shape) == 2
        sources = [x] * heads if shared else self.split(x, heads)
        results = []
        for head, source in enumerate(sources):
            offset = self.constant(bias.values[head].reshape(-1))
            if node.op == "WeightOnlyGroupedMatMul":
                scale, zero_point = node.inputs[3].values[head], _zero_rows(node, head)
                real = self.real(weight.values[head], scale, zero_point, _block(node))
                results.append(self.op("Gemm", [source, real, offset], source.dtype))
                continue
            matrix = self.constant(weight.values[head])
            if node.op == "GroupedMatMul":
                results.append(self.op("Gemm", [source, matrix, offset], source.dtype))
                continue
            weight_scale, x_scales = node.inputs[3].values[head], node.inputs[4].values.reshape(-1)
            x_scale = self.constant(x_scales[head if x_scales.size > 1 else 0])
            scale = self.constant(x_scale.values * weight_scale.reshape(-1))
            scaled = self.int8_matmul(self.quantized(source, x_scale), matrix, scale)
            results.append(self.op("Add", [scaled, offset], source.dtype))
        self.retire(node, results)

    def can_separate(self, node: gs.Node) -> bool:
        """Whether ``node`` only passes separated heads on."""
        if node.op not in _ELEMENTWISE.split() or node.domain:
            return False
        separated = [tensor for tensor in node.inputs if tensor.name in self.parts]
        others = [tensor for tensor in node.inputs if tensor.name not in self.parts]
        return bool(separated) and all(
            isinstance(tensor, gs.Constant) and tensor.values.ndim <= 3 for tensor in others
        )

    def separate_elementwise(self, node: gs.Node) -> None:
        """The same op on each of the M tensors; constants with an axis M are taken apart."""
        known = [tensor for tensor in node.inputs if tensor.name in self.parts]
        heads = len(self.parts[known[0].name])
        results = []
        for head in range(heads):
            inputs = [self.part(tensor, head, heads) for tensor in node.inputs]
            results.append(self.op(node.op, inputs, node.outputs[0].dtype, dict(node.attrs)))
        self.retire(node, results)

    def part(self, tensor: gs.Tensor, head: int, heads: int) -> gs.Tensor:
        """What ``head`` sees of ``tensor``."""
        if tensor.name in self.parts:
            return self.parts[tensor.name][head]
        values = tensor.values
        if values.ndim < 3:
            return tensor
        return self.constant(values[head if len(values) == heads else 0])

    def split(self, x: gs.Tensor, heads: int) -> list[gs.Tensor]:
        """The M tensors of a stacked one."""
        if x.name not in self.parts:
            self.parts[x.name] = [
                self.op("Gather", [x, self.constant(np.asarray(head))], x.dtype, {"axis": 0})
                for head in range(heads)
            ]
        return self.parts[x.name]

    def retire(self, node: gs.Node, results: list[gs.Tensor]) -> None:
        """Remember the M results; the stacked tensor is rebuilt only where something reads it."""
        self.parts[node.outputs[0].name] = results
        self.pending.append(node.outputs[0])
        node.inputs.clear()
        node.outputs.clear()

    def gather_separated(self) -> None:
        """Stack separated tensors again where a remaining node or a graph output reads them."""
        for tensor in self.pending:
            if tensor.outputs or any(output is tensor for output in self.graph.outputs):
                axes = self.constant(np.asarray([0], np.int64))
                rows = [
                    self.op("Unsqueeze", [part, axes], tensor.dtype)
                    for part in self.parts[tensor.name]
                ]
                self.append("Concat", rows, tensor, {"axis": 0})

    def unflatten(self, node: gs.Node, flat: gs.Tensor) -> None:
        """``[B, M·N]`` to ``[M, B, N]``."""
        heads, _, width = node.inputs[1].shape
        shape = self.constant(np.asarray([0, heads, width], np.int64))
        rows = self.op("Reshape", [flat, shape], flat.dtype)
        self.finish(node, "Transpose", [rows], {"perm": [1, 0, 2]})

    def flat(self, tensor: gs.Constant) -> gs.Constant:
        """``[M, K, N]`` to ``[K, M·N]``."""
        return self.constant(_side_by_side(tensor.values))

    def constant(self, values: Array) -> gs.Constant:
        """A new constant."""
        self.count += 1
        return gs.Constant(f"{self.prefix}/constant_{self.count}", np.array(values, order="C"))

    def op(
        self,
        op: str,
        inputs: list[gs.Tensor],
        dtype: object = None,
        attrs: dict[str, object] | None = None,
    ) -> gs.Variable:
        """A new node with one new output."""
        self.count += 1
        output = gs.Variable(f"{self.prefix}/{op}_{self.count}", dtype=dtype)
        self.append(op, inputs, output, attrs)
        return output

    def append(
        self,
        op: str,
        inputs: list[gs.Tensor],
        output: gs.Tensor,
        attrs: dict[str, object] | None = None,
    ) -> None:
        """A new node that writes ``output``."""
        name = f"{self.prefix}/{op}_node_{self.count}_{len(self.graph.nodes)}"
        self.graph.nodes.append(gs.Node(op, name, attrs or {}, inputs, [output]))

    def finish(
        self,
        node: gs.Node,
        op: str,
        inputs: list[gs.Tensor],
        attrs: dict[str, object] | None = None,
    ) -> None:
        """Let a new node write what ``node`` wrote."""
        output = node.outputs[0]
        node.inputs.clear()
        node.outputs.clear()
        self.append(op, inputs, output, attrs)


def _side_by_side(values: Array) -> Array:
    """``[M, K, N]`` to ``[K, M·N]``."""
    moved = np.moveaxis(values, 0, 1)
    return moved.reshape(moved.shape[0], -1)


def _block(node: gs.Node) -> int:
    """Rows that share a scale; 0 when a whole column does."""
    size = int(node.attrs["block"][0])
    return 0 if node.inputs[3].values.shape[1] == 1 else size


def _zero_rows(node: gs.Node, head: int | slice) -> Array | None:
    """The zero points of one head or, side by side, of all; None when all are 0."""
    values = node.inputs[4].values
    if not np.any(values):
        return None
    return _side_by_side(values) if isinstance(head, slice) else values[head]
