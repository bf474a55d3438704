"""How each operator acts on tensors with a new leading axis M: one rule per operator.

A rule receives the M equal nodes of one `branches.Step` and emits nodes for all of them at once.
The rank of a tensor counts the axes of one branch, so the stacked tensor has one more. Every step
is emitted in order, also those that a later rule absorbs (Q/DQ around a matmul, a MatMul before its
bias); GraphSurgeon's cleanup drops what nothing reads in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from hydra_edge import ops
from hydra_edge.branches import Branches, Shared, Step, Value, Weights

Array = npt.NDArray[np.generic]
Attribute = int | float | str | list[int]


class UnsupportedError(Exception):
    """Why a set of branches is left alone. Never leaves the fusion pass."""


@dataclass(frozen=True, eq=False)
class Emitted:
    """A tensor in the stacked graph; ``stacked`` is False where all branches share it."""

    tensor: gs.Tensor
    rank: int
    stacked: bool


class Stacker:
    """Emits the stacked form of one candidate; the graph is only touched by `commit`."""

    def __init__(self, candidate: Branches, prefix: str) -> None:
        self.candidate = candidate
        self.heads = candidate.heads
        self.nodes: list[gs.Node] = []
        self._prefix = prefix
        self._done: dict[int, Emitted | UnsupportedError] = {}
        self._names = 0

    def result(self) -> Emitted:
        """Emit all steps and return the value that meets at the join.

        Raises:
            UnsupportedError: Some operator of the branches has no stacked form here.
        """
        for step in self.candidate.steps:
            self._done[id(step)] = self._apply(step)
        assert self.candidate.value is not None
        value = self.emitted(self.candidate.value)
        if not value.stacked:
            raise UnsupportedError("all branches compute the same value")
        return value

    def _apply(self, step: Step) -> Emitted | UnsupportedError:
        """What a rule emits, or why it cannot, which matters only if a later rule reads it."""
        rule = RULES.get(step.op) if not step.nodes[0].domain else None
        if rule is None:
            return UnsupportedError(f"{step.op} has no stacked form")
        try:
            return rule(self, step)
        except UnsupportedError as exc:
            return exc

    def emitted(self, value: Value | None) -> Emitted:
        """The stacked form of an operand."""
        if isinstance(value, Step):
            done = self._done[id(value)]
            if isinstance(done, UnsupportedError):
                raise done
            return done
        if isinstance(value, Shared):
            return Emitted(value.tensor, rank_of(value.tensor), stacked=False)
        arrays = constants(value, self.heads)
        if all(np.array_equal(array, arrays[0]) for array in arrays):
            return Emitted(self.constant(arrays[0]), arrays[0].ndim, stacked=False)
        return Emitted(self.constant(np.stack(arrays)), arrays[0].ndim, stacked=True)

    def varying(self, value: Value | None) -> Emitted:
        """An operand that differs between branches."""
        operand = self.emitted(value)
        if not operand.stacked:
            raise UnsupportedError("the branches repeat a computation on their shared input")
        return operand

    def same(self, value: Value | None, step: Step) -> gs.Tensor:
        """A parameter that is one for all branches, or left out by all of them."""
        if value is None:
            return gs.Variable.empty()
        parameter = self.emitted(value)
        if parameter.stacked:
            raise UnsupportedError(f"{step.op} has parameters that differ between branches")
        return parameter.tensor

    def aligned(self, value: Value | None, rank: int) -> gs.Tensor:
        """An operand shaped so that it broadcasts against stacked tensors of ``rank`` + 1 axes."""
        operand = self.emitted(value)
        if not operand.stacked or operand.rank == rank:
            return operand.tensor
        if not isinstance(operand.tensor, gs.Constant):
            raise UnsupportedError("the branches combine computed tensors of different ranks")
        values = operand.tensor.values
        padding = (1,) * (rank - operand.rank)
        return self.constant(values.reshape(self.heads, *padding, *values.shape[1:]))

    def constant(self, values: Array) -> gs.Constant:
        """A new constant."""
        return gs.Constant(self._name("weight"), np.array(values, order="C"))

    def emit(
        self,
        op: str,
        inputs: list[gs.Tensor],
        step: Step,
        *,
        stacked: bool = True,
        **attrs: Attribute,
    ) -> Emitted:
        """A new node that does for all branches what ``step`` does for one."""
        like = step.output
        shape = like.shape
        if stacked and shape is not None:
            shape = [self.heads, *shape]
        return Emitted(self.node(op, inputs, like.dtype, shape, attrs), rank_of(like), stacked)

    def node(
        self,
        op: str,
        inputs: list[gs.Tensor],
        dtype: object,
        shape: list[int | str] | None,
        attrs: Mapping[str, Attribute],
    ) -> gs.Variable:
        """A new node with one output."""
        output = gs.Variable(self._name(op), dtype=dtype, shape=shape)
        domain = ops.DOMAIN if op in ops.NAMES else None
        self.nodes.append(
            gs.Node(op, f"{output.name}_node", dict(attrs), inputs, [output], domain=domain)
        )
        return output

    def _name(self, stem: str) -> str:
        self._names += 1
        return f"{self._prefix}/{stem}_{self._names}"


def rank_of(tensor: gs.Tensor) -> int:
    """Number of axes of one branch's tensor."""
    if tensor.shape is None:
        raise UnsupportedError(f"the shape of '{tensor.name}' is unknown")
    return len(tensor.shape)


def constants(value: Value | None, heads: int) -> list[Array]:
    """The constant of every branch."""
    if isinstance(value, Weights):
        return [np.asarray(tensor.values) for tensor in value.tensors]
    if isinstance(value, Shared) and isinstance(value.tensor, gs.Constant):
        return [np.asarray(value.tensor.values)] * heads
    raise UnsupportedError("an operand that must be constant is computed")


def is_constant(value: Value | None) -> bool:
    """Whether an operand is constant in every branch."""
    return isinstance(value, Weights) or (
        isinstance(value, Shared) and isinstance(value.tensor, gs.Constant)
    )


def _unary(stacker: Stacker, step: Step) -> Emitted:
    x = stacker.emitted(step.inputs[0])
    inputs = [x.tensor, *(stacker.same(value, step) for value in step.inputs[1:])]
    return stacker.emit(step.op, inputs, step, stacked=x.stacked, **step.nodes[0].attrs)


def _binary(stacker: Stacker, step: Step) -> Emitted:
    if step.op == "Add" and (fused := _matmul_bias(stacker, step)) is not None:
        return fused
    rank = rank_of(step.output)
    inputs = [stacker.aligned(value, rank) for value in step.inputs]
    stacked = any(stacker.emitted(value).stacked for value in step.inputs)
    return stacker.emit(step.op, inputs, step, stacked=stacked, **step.nodes[0].attrs)


def _unsqueeze(stacker: Stacker, step: Step) -> Emitted:
    """An axis counted from the front moves by one."""
    x = stacker.varying(step.inputs[0])
    inputs = [x.tensor, stacker.constant(_moved(stacker.same(step.inputs[1], step)))]
    return stacker.emit(step.op, inputs, step)


def _moved(axes: gs.Tensor) -> npt.NDArray[np.int64]:
    if not isinstance(axes, gs.Constant):
        raise UnsupportedError("axes are computed")
    values = axes.values.reshape(-1).tolist()
    return np.asarray([axis + 1 if axis >= 0 else axis for axis in values], np.int64)


def _last_axis(stacker: Stacker, step: Step) -> Emitted:
    """Softmax and LogSoftmax: an axis counted from the front moves by one."""
    attrs = dict(step.nodes[0].attrs)
    axis = int(attrs.get("axis", -1))
    attrs["axis"] = axis + 1 if axis >= 0 else axis
    return stacker.emit(step.op, [stacker.varying(step.inputs[0]).tensor], step, **attrs)


def _reduce_mean(stacker: Stacker, step: Step) -> Emitted:
    if len(step.inputs) < 2:
        raise UnsupportedError("ReduceMean over all axes mixes the branches")
    moved = _moved(stacker.same(step.inputs[1], step))
    inputs = [stacker.varying(step.inputs[0]).tensor, stacker.constant(moved)]
    return stacker.emit(step.op, inputs, step, **step.nodes[0].attrs)


def _layer_norm(stacker: Stacker, step: Step) -> Emitted:
    """The scale and bias of LayerNormalization have no axis M, so they become Mul and Add.

    Heads that begin with it normalize their shared input alike: that part is emitted once.
    """
    x = stacker.emitted(step.inputs[0])
    attrs = dict(step.nodes[0].attrs)
    axis = int(attrs.get("axis", -1))
    if axis not in (-1, x.rank - 1) or len(step.nodes[0].outputs) > 1:
        raise UnsupportedError("LayerNormalization over more than the last axis")
    attrs["axis"] = -1
    scale = stacker.aligned(step.inputs[1], x.rank)
    ones = stacker.constant(np.ones(scale.shape[-1:], np.dtype(scale.dtype)))
    y = stacker.emit(step.op, [x.tensor, ones], step, stacked=x.stacked, **attrs)
    stacked = x.stacked or stacker.emitted(step.inputs[1]).stacked
    y = stacker.emit("Mul", [y.tensor, scale], step, stacked=stacked)
    bias = step.inputs[2] if len(step.inputs) > 2 else None
    if bias is not None:
        stacked = stacked or stacker.emitted(bias).stacked
        inputs = [y.tensor, stacker.aligned(bias, x.rank)]
        y = stacker.emit("Add", inputs, step, stacked=stacked)
    return y


def _batch_norm(stacker: Stacker, step: Step) -> Emitted:
    """Inference: y = x * a + b with a = scale / sqrt(var + epsilon), b = bias - mean * a."""
    x = stacker.emitted(step.inputs[0])
    if x.rank != 2 or step.nodes[0].attrs.get("training_mode", 0):
        raise UnsupportedError("BatchNormalization of anything but [B, K] features")
    scale, bias, mean, var = (
        np.stack(constants(value, stacker.heads)).astype(np.float64) for value in step.inputs[1:5]
    )
    a = scale / np.sqrt(var + float(step.nodes[0].attrs.get("epsilon", 1e-5)))
    b = bias - mean * a
    dtype = np.dtype(step.output.dtype or np.float32)
    y = stacker.emit("Mul", [x.tensor, stacker.constant(a[:, None].astype(dtype))], step)
    return stacker.emit("Add", [y.tensor, stacker.constant(b[:, None].astype(dtype))], step)


def _quantize(stacker: Stacker, step: Step) -> Emitted:
    """Q or DQ of activations; scales that differ between branches lie along axis 0."""
    x = stacker.emitted(step.inputs[0])
    parameters = [np.stack(constants(value, stacker.heads)) for value in step.inputs[1:]]
    if any(p.size != stacker.heads for p in parameters):
        raise UnsupportedError("activations are quantized per channel")
    parameters = [p.reshape(-1) for p in parameters]
    attrs = dict(step.nodes[0].attrs)
    if all((p == p[0]).all() for p in parameters):
        parameters = [p[0] for p in parameters]
    elif not x.stacked:
        raise UnsupportedError("a shared input is quantized differently in each branch")
    else:
        attrs["axis"] = 0
    inputs = [x.tensor, *(stacker.constant(p) for p in parameters)]
    return stacker.emit(step.op, inputs, step, stacked=x.stacked, **attrs)


def _dequantize(stacker: Stacker, step: Step) -> Emitted:
    if not is_constant(step.inputs[0]):
        return _quantize(stacker, step)
    values = _dequantized(step, stacker.heads)
    return Emitted(stacker.constant(values), values.ndim - 1, stacked=True)


def _dequantized(step: Step, heads: int) -> npt.NDArray[np.float32]:
    """What ``DequantizeLinear(constant)`` gives in every branch, ``[M, ...]``."""
    integers, scale = quantized_constant(step, heads)
    return np.asarray(integers.astype(np.float32) * scale, np.float32)


def quantized_constant(step: Step, heads: int) -> tuple[Array, npt.NDArray[np.float32]]:
    """Integers ``[M, ...]`` of ``DequantizeLinear(constant)``, and their scale, broadcastable."""
    weight = np.stack(constants(step.inputs[0], heads))
    scale = np.stack(constants(step.inputs[1], heads)).astype(np.float32)
    _require_zero_points(step, heads)
    if step.nodes[0].attrs.get("block_size", 0):
        raise UnsupportedError("weights are quantized in blocks")
    if scale.size == heads:
        return weight, scale.reshape(heads, *(1,) * (weight.ndim - 1))
    axis = int(step.nodes[0].attrs.get("axis", 1)) % (weight.ndim - 1)
    shape = [heads, *(1,) * (weight.ndim - 1)]
    shape[axis + 1] = -1
    return weight, scale.reshape(shape)


def _require_zero_points(step: Step, heads: int) -> None:
    given = step.inputs[2] if len(step.inputs) > 2 else None
    if given is not None and any(np.any(array) for array in constants(given, heads)):
        raise UnsupportedError(f"{step.op} has a zero point other than 0")


def _gemm(stacker: Stacker, step: Step) -> Emitted:
    attrs = step.nodes[0].attrs
    if attrs.get("transA", 0):
        raise UnsupportedError("Gemm transposes its input")
    alpha, beta = float(attrs.get("alpha", 1.0)), float(attrs.get("beta", 1.0))
    bias = step.inputs[2] if len(step.inputs) > 2 else None
    return _matmul_of(stacker, step, step, bool(attrs.get("transB", 0)), bias, alpha, beta)


def _matmul(stacker: Stacker, step: Step) -> Emitted:
    return _matmul_of(stacker, step, step, False, None)


def _matmul_bias(stacker: Stacker, step: Step) -> Emitted | None:
    """Add behind MatMul, when it adds a bias per output column; None when it is something else."""
    for product, bias in (step.inputs, step.inputs[::-1]):
        if isinstance(product, Step) and product.op == "MatMul" and is_constant(bias):
            if rank_of(step.output) != rank_of(product.output):
                return None
            array = constants(bias, stacker.heads)[0]
            if array.ndim and array.size == array.shape[-1] == (product.output.shape or [0])[-1]:
                return _matmul_of(stacker, step, product, False, bias)
    return None


def _matmul_of(
    stacker: Stacker,
    step: Step,
    product: Step,
    transposed: bool,
    bias: Value | None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Emitted:
    """One grouped matmul for ``alpha * x @ weight + beta * bias``; int8 when both sides are."""
    x, weight = product.inputs[0], _opened(product.inputs[1], stacker.heads)
    if any(rank_of(tensor) != 2 for tensor in (product.nodes[0].inputs[0], product.output)):
        raise UnsupportedError(f"{product.op} of anything but [B, K] features")
    if isinstance(weight, Step) and weight.op == "DequantizeLinear":
        values, scale = quantized_constant(weight, stacker.heads)
        if values.dtype != np.int8:
            raise UnsupportedError(f"weights are quantized to {values.dtype}, not int8")
        source, x_scale = _quantized_input(stacker, x)
        if transposed:
            values, scale = values.swapaxes(1, 2), scale.swapaxes(1, 2)
        if scale.shape[1] != 1:
            raise UnsupportedError("weights are quantized per input feature, not per output")
        width = values.shape[-1]
        scale = np.broadcast_to(scale * np.float32(alpha), (stacker.heads, 1, width))
        offset = _offset(stacker, bias, beta, width)
        operands: list[Array] = [
            values,
            offset.astype(np.float32),
            scale.astype(np.float32),
            x_scale,
        ]
        op = "QuantizedGroupedMatMul"
    else:
        source = stacker.emitted(x)
        values = np.stack(constants(weight, stacker.heads))
        if transposed:
            values = values.swapaxes(1, 2)
        offset = _offset(stacker, bias, beta, values.shape[-1])
        # A Python float is a weak scalar: it does not change the dtype of the weights.
        values = values if alpha == 1.0 else np.multiply(values, alpha)
        operands = [values, offset.astype(values.dtype)]
        op = "GroupedMatMul"
    inputs = [source.tensor, *(stacker.constant(operand) for operand in operands)]
    return stacker.emit(op, inputs, step)


def _offset(stacker: Stacker, bias: Value | None, beta: float, width: int) -> Array:
    """``beta * bias`` as ``[M, 1, width]``."""
    offset: Array = np.zeros((stacker.heads, 1, width), np.float32)
    if bias is None:
        return offset
    bias = _opened(bias, stacker.heads)
    if isinstance(bias, Step) and bias.op == "DequantizeLinear":
        rows: Array = _dequantized(bias, stacker.heads)
    else:
        rows = np.stack(constants(bias, stacker.heads))
    rows = rows.reshape(stacker.heads, -1, rows.shape[-1] if rows.ndim > 1 else 1)
    if rows.shape[1] != 1 or rows.shape[2] not in (1, width):
        raise UnsupportedError("a matmul adds more than one value per output column")
    return offset + np.multiply(rows, beta)


def _opened(value: Value | None, heads: int) -> Value | None:
    """One dequantized weight that all branches share, as if each had its own."""
    node = _writer(value.tensor, "DequantizeLinear") if isinstance(value, Shared) else None
    if node is None:
        return value
    inputs = tuple(Shared(tensor) for tensor in node.inputs)
    return Step((node,) * heads, inputs, node.outputs[0])


def _quantized_input(stacker: Stacker, x: Value | None) -> tuple[Emitted, npt.NDArray[np.float32]]:
    """What is quantized before a matmul, and its scale: [] for all heads or [M, 1, 1]."""
    if isinstance(x, Shared):
        return _shared_quantized_input(x.tensor)
    quantize = x.inputs[0] if isinstance(x, Step) and x.op == "DequantizeLinear" else None
    if not isinstance(quantize, Step) or quantize.op != "QuantizeLinear":
        raise UnsupportedError("weights are quantized but the activations are not")
    assert isinstance(x, Step)
    for step in (quantize, x):
        _require_zero_points(step, stacker.heads)
    scale = np.stack(constants(quantize.inputs[1], stacker.heads)).astype(np.float32)
    back = np.stack(constants(x.inputs[1], stacker.heads)).astype(np.float32)
    _require_int8(quantize.output)
    if scale.size != stacker.heads or not np.array_equal(scale, back):
        raise UnsupportedError("activations are not quantized with one scale per branch")
    scale = scale.reshape(-1)
    per_head = scale[0] if (scale == scale[0]).all() else scale.reshape(-1, 1, 1)
    return stacker.emitted(quantize.inputs[0]), np.asarray(per_head, np.float32)


def _shared_quantized_input(tensor: gs.Tensor) -> tuple[Emitted, npt.NDArray[np.float32]]:
    back = _writer(tensor, "DequantizeLinear")
    quantize = _writer(back.inputs[0], "QuantizeLinear") if back is not None else None
    if back is None or quantize is None:
        raise UnsupportedError("weights are quantized but the activations are not")
    _require_int8(back.inputs[0])
    scales = []
    for node in (quantize, back):
        parameters = node.inputs[1:]
        if not all(isinstance(p, gs.Constant) and p.values.size == 1 for p in parameters):
            raise UnsupportedError("activations are not quantized with one constant scale")
        if len(parameters) > 1 and np.any(parameters[1].values):
            raise UnsupportedError(f"{node.op} has a zero point other than 0")
        scales.append(np.asarray(parameters[0].values, np.float32).reshape(()))
    if scales[0] != scales[1]:
        raise UnsupportedError("Q and DQ of the activations have different scales")
    source = quantize.inputs[0]
    return Emitted(source, rank_of(source), stacked=False), scales[0]


def _writer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node that computes ``tensor``, if it is an ``op``."""
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op == op else None


def _require_int8(tensor: gs.Tensor) -> None:
    if tensor.dtype is None or np.dtype(tensor.dtype) != np.int8:
        raise UnsupportedError(f"activations are quantized to {tensor.dtype}, not int8")


_UNARY = (
    "Abs Cast Ceil Celu Clip Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu "
    "Log Mish Neg Reciprocal Relu Round Selu Sigmoid Sin Softplus Softsign Sqrt Tanh "
    "ThresholdedRelu"
)
_BINARY = "Add Sub Mul Div Pow Min Max"
RULES: Mapping[str, Callable[[Stacker, Step], Emitted]] = {
    **dict.fromkeys(_UNARY.split(), _unary),
    **dict.fromkeys(_BINARY.split(), _binary),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "Softmax": _last_axis,
    "LogSoftmax": _last_axis,
    "ReduceMean": _reduce_mean,
    "Unsqueeze": _unsqueeze,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}
