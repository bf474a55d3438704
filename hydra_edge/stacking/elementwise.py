"""Operators that act on every element, with broadcasting."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from hydra_edge.branches import Step
from hydra_edge.stacking.stacker import (
    CHANNELS,
    HEADS,
    SHARED,
    Array,
    Attribute,
    Emitted,
    Rule,
    Stacker,
    UnsupportedError,
    attributes,
)


def unary(stacker: Stacker, step: Step) -> Emitted:
    """One operand; further ones are parameters that all branches must have alike."""
    x = stacker.emitted(step.inputs[0])
    inputs = [x.tensor, *(stacker.same(value, step) for value in step.inputs[1:])]
    return stacker.emit(step.op, inputs, step, x.layout, **attributes(step))


def broadcasting(stacker: Stacker, step: Step) -> Emitted:
    """Several operands that broadcast."""
    operands = [stacker.emitted(value) for value in step.inputs]
    return combine(stacker, step, step.op, operands, **attributes(step))


def combine(
    stacker: Stacker, step: Step, op: str, operands: list[Emitted], **attrs: Attribute
) -> Emitted:
    """One broadcasting node, in channels if some operand is and all can be."""
    rank = max(operand.rank for operand in operands)
    if any(operand.layout == CHANNELS for operand in operands):
        tensors = [_in_channels(stacker, operand, rank, step) for operand in operands]
        found = [tensor for tensor in tensors if tensor is not None]
        if len(found) == len(operands):
            return stacker.emit(op, found, step, CHANNELS, **attrs)
    stacked = any(operand.is_stacked for operand in operands)
    inputs = [stacker.aligned(operand, rank) for operand in operands]
    return stacker.emit(op, inputs, step, HEADS if stacked else SHARED, **attrs)


def _in_channels(stacker: Stacker, x: Emitted, rank: int, step: Step) -> gs.Tensor | None:
    """``x`` so that it broadcasts against ``[B, M·C, ...]``; None where it cannot."""
    width = step.output.shape[1] if step.output.shape and len(step.output.shape) > 1 else None
    if not isinstance(width, int):
        return None
    if isinstance(x.tensor, gs.Constant):
        return _constant_in_channels(stacker, x, rank, width)
    if x.layout == SHARED and (x.rank < rank - 1 or (x.rank == rank and x.shape[1] == 1)):
        return x.tensor
    if x.rank != rank or x.shape[1] != width:
        return None
    return stacker.channels(x).tensor


def _constant_in_channels(
    stacker: Stacker, x: Emitted, rank: int, width: int
) -> gs.Constant | None:
    values = np.asarray(x.tensor.values)
    rows: Array = values if x.is_stacked else values[None]
    rows = rows.reshape(len(rows), *(1,) * (rank - x.rank), *rows.shape[1:])  # [M, B, C, ...]
    if x.rank > rank or rows.shape[1] != 1 or rows.shape[2] not in (1, width):
        return None
    if not x.is_stacked and rows.shape[2] == 1:
        return x.tensor
    heads = stacker.heads_count
    rows = np.broadcast_to(rows, (heads, 1, width, *rows.shape[3:]))
    return stacker.constant(rows.reshape(1, heads * width, *rows.shape[3:]))


def _clip(stacker: Stacker, step: Step) -> Emitted:
    """Limits that differ between branches make it a Max and a Min."""
    limits = [None if value is None else stacker.emitted(value) for value in step.inputs[1:]]
    if not any(limit is not None and limit.is_stacked for limit in limits):
        return unary(stacker, step)
    y = stacker.emitted(step.inputs[0])
    for op, limit in zip(("Max", "Min"), limits, strict=False):
        if limit is not None:
            y = combine(stacker, step, op, [y, limit])
    return y


def _prelu(stacker: Stacker, step: Step) -> Emitted:
    """The slope broadcasts against x, but x never against the slope."""
    x, slope = (stacker.emitted(value) for value in step.inputs)
    if slope.is_stacked:
        x = stacker.heads(x, always=True) if x.layout == SHARED else x
    return combine(stacker, step, step.op, [x, slope])


def _dropout(stacker: Stacker, step: Step) -> Emitted:
    training = step.inputs[2] if len(step.inputs) > 2 else None
    if step.position or (training is not None and stacker.arrays(training).any()):
        raise UnsupportedError("Dropout in training mode")
    x = stacker.emitted(step.inputs[0])
    return stacker.emit("Identity", [x.tensor], step, x.layout)


_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast CastLike Ceil Celu Cos Cosh Elu Erf Exp "
    "Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal "
    "Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh "
    "ThresholdedRelu"
)
_BROADCASTING = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less "
    "LessOrEqual Max Mean Min Mod Mul Or Pow Sub Sum Where Xor"
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), unary),
    **dict.fromkeys(_BROADCASTING.split(), broadcasting),
    "Clip": _clip,
    "Dropout": _dropout,
    "PRelu": _prelu,
}
