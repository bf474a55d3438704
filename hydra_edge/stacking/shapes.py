"""Operators that move, cut, join or reduce axes: an axis counted from the front moves by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from hydra_edge.branches import Step
from hydra_edge.stacking.stacker import (
    CHANNELS,
    HEADS,
    SHARED,
    Emitted,
    Rule,
    Size,
    Stacker,
    UnsupportedError,
    attributes,
    channels_of,
    shape_of,
)


def _heads(stacker: Stacker, step: Step) -> Emitted:
    return stacker.heads(stacker.emitted(step.inputs[0]), always=True)


def _moved(axis: int) -> int:
    return axis + 1 if axis >= 0 else axis


def _axes(stacker: Stacker, axes: list[int]) -> gs.Constant:
    return stacker.constant(np.asarray([_moved(axis) for axis in axes], np.int64))


def _parameters(stacker: Stacker, step: Step) -> list[gs.Tensor]:
    return [stacker.same(value, step) for value in step.inputs[1:]]


def _along(default: int) -> Rule:
    """An operator with one attribute ``axis``; further operands are alike in all branches."""

    def rule(stacker: Stacker, step: Step) -> Emitted:
        attrs = attributes(step)
        attrs["axis"] = _moved(int(attrs.get("axis", default)))  # type: ignore[arg-type]
        inputs = [_heads(stacker, step).tensor, *_parameters(stacker, step)]
        return stacker.emit(step.op, inputs, step, HEADS, **attrs)

    return rule


def _reshape(stacker: Stacker, step: Step) -> Emitted:
    x = _heads(stacker, step)
    target = stacker.emitted(step.inputs[1])
    if target.is_stacked:
        raise UnsupportedError("the branches are reshaped differently")
    heads = np.asarray([stacker.heads_count], np.int64)
    if isinstance(target.tensor, gs.Constant):
        # An entry of 0 copies the size at its own position, which moves with the entry.
        shape: gs.Tensor = stacker.constant(np.append(heads, target.tensor.values))
    else:
        parts = [stacker.constant(heads), target.tensor]
        shape = stacker.node("Concat", parts, np.int64, None, axis=0)
    return stacker.emit(step.op, [x.tensor, shape], step, HEADS, **attributes(step))


def _flatten(stacker: Stacker, step: Step) -> Emitted:
    x = stacker.emitted(step.inputs[0])
    axis = int(step.attrs.get("axis", 1))  # type: ignore[call-overload]
    axis = axis % (x.rank + 1) if axis < 0 else axis
    rest = [size for size in x.shape[axis:] if isinstance(size, int)]
    width = math.prod(rest) if len(rest) == x.rank - axis else -1
    if x.layout == CHANNELS and axis == 1:
        rows = stacker.reshape(x.tensor, [Size(x.tensor, 0), stacker.heads_count, width])
        return Emitted(stacker.transpose(rows, [1, 0, 2]), shape_of(step.output), HEADS)
    x = stacker.heads(x, always=True)
    if axis == 1:
        dims: list[int | Size] = [stacker.heads_count, Size(x.tensor, 1), width]
    elif axis == 0:
        dims = [stacker.heads_count, 1, -1]
    elif width > 0:
        dims = [stacker.heads_count, -1, width]
    else:
        raise UnsupportedError("Flatten behind an axis of unknown size")
    return Emitted(stacker.reshape(x.tensor, dims), shape_of(step.output), HEADS)


def _transpose(stacker: Stacker, step: Step) -> Emitted:
    x = _heads(stacker, step)
    perm = step.attrs.get("perm") or list(range(x.rank))[::-1]
    order = [0, *(int(axis) + 1 for axis in perm)]  # type: ignore[attr-defined]
    return stacker.emit(step.op, [x.tensor], step, HEADS, perm=order)


def _squeeze(stacker: Stacker, step: Step) -> Emitted:
    x = _heads(stacker, step)
    if len(step.inputs) > 1 and step.inputs[1] is not None:
        axes = stacker.integers(step.inputs[1], step)
    elif all(isinstance(size, int) for size in x.shape):
        axes = [axis for axis, size in enumerate(x.shape) if size == 1]
    else:
        raise UnsupportedError("Squeeze of axes that are only known at run time")
    return stacker.emit(step.op, [x.tensor, _axes(stacker, axes)], step, HEADS)


def _unsqueeze(stacker: Stacker, step: Step) -> Emitted:
    x = _heads(stacker, step)
    axes = _axes(stacker, stacker.integers(step.inputs[1], step))
    return stacker.emit(step.op, [x.tensor, axes], step, HEADS)


def _concat(stacker: Stacker, step: Step) -> Emitted:
    operands = [stacker.emitted(value) for value in step.inputs]
    rank = len(shape_of(step.output))
    axis = int(step.attrs["axis"]) % rank  # type: ignore[call-overload]
    if axis != 1 and all(operand.layout == CHANNELS for operand in operands):
        inputs = [operand.tensor for operand in operands]
        return stacker.emit(step.op, inputs, step, CHANNELS, axis=axis)
    inputs = [stacker.heads(operand, always=True).tensor for operand in operands]
    return stacker.emit(step.op, inputs, step, HEADS, axis=axis + 1)


def _slice(stacker: Stacker, step: Step) -> Emitted:
    x = stacker.emitted(step.inputs[0])
    starts, ends = (stacker.same(value, step) for value in step.inputs[1:3])
    given = step.inputs[3] if len(step.inputs) > 3 else None
    if given is not None:
        axes = stacker.integers(given, step)
    elif isinstance(starts, gs.Constant):
        axes = list(range(starts.values.size))
    else:
        raise UnsupportedError("Slice of axes that are only known at run time")
    steps = [stacker.same(value, step) for value in step.inputs[4:]]
    if x.layout == CHANNELS and all(axis % x.rank > 1 for axis in axes):
        same = stacker.constant(np.asarray(axes, np.int64))
        return stacker.emit(step.op, [x.tensor, starts, ends, same, *steps], step, CHANNELS)
    inputs = [stacker.heads(x, always=True).tensor, starts, ends, _axes(stacker, axes), *steps]
    return stacker.emit(step.op, inputs, step, HEADS)


def _gather(stacker: Stacker, step: Step) -> Emitted:
    x, indices = (stacker.emitted(value) for value in step.inputs)
    axis = int(step.attrs.get("axis", 0))  # type: ignore[call-overload]
    if not x.is_stacked and axis % x.rank == 0:
        if _takes_all(stacker, x, indices):
            return Emitted(x.tensor, x.shape[1:], HEADS)
        inputs = [x.tensor, stacker.heads(indices).tensor]
        return stacker.emit(step.op, inputs, step, HEADS, axis=0)
    if indices.is_stacked:
        raise UnsupportedError("the branches gather at different indices")
    inputs = [stacker.heads(x, always=True).tensor, indices.tensor]
    return stacker.emit(step.op, inputs, step, HEADS, axis=_moved(axis))


def _takes_all(stacker: Stacker, x: Emitted, indices: Emitted) -> bool:
    """Whether branch m takes row m of M: the rows are stacked already."""
    heads = stacker.heads_count
    return (
        x.shape[0] == heads
        and isinstance(indices.tensor, gs.Constant)
        and indices.is_stacked
        and np.array_equal(indices.tensor.values, np.arange(heads))
    )


def _expand(stacker: Stacker, step: Step) -> Emitted:
    rank = len(shape_of(step.output))
    target = stacker.same(step.inputs[1], step)
    x = stacker.aligned(stacker.heads(stacker.emitted(step.inputs[0]), always=True), rank)
    lead: list[gs.Tensor] = [stacker.constant(np.ones(1, np.int64))]
    if target.shape is not None and isinstance(target.shape[0], int):
        lead *= 1 + rank - target.shape[0]
    shape = stacker.node("Concat", [*lead, target], np.int64, None, axis=0)
    return stacker.emit(step.op, [x, shape], step, HEADS)


def _tile(stacker: Stacker, step: Step) -> Emitted:
    one = stacker.constant(np.ones(1, np.int64))
    repeats = [one, stacker.same(step.inputs[1], step)]
    inputs = [
        _heads(stacker, step).tensor,
        stacker.node("Concat", repeats, np.int64, None, axis=0),
    ]
    return stacker.emit(step.op, inputs, step, HEADS)


def _pad(stacker: Stacker, step: Step) -> Emitted:
    x = stacker.emitted(step.inputs[0])
    pads = stacker.integers(step.inputs[1], step)
    value = stacker.same(step.inputs[2], step) if len(step.inputs) > 2 else gs.Variable.empty()
    axes = list(range(x.rank))
    if len(step.inputs) > 3 and step.inputs[3] is not None:
        axes = [axis % x.rank for axis in stacker.integers(step.inputs[3], step)]
    before, after = [0] * x.rank, [0] * x.rank
    for axis, left, right in zip(axes, pads, pads[len(axes) :], strict=False):
        before[axis], after[axis] = left, right
    spatial = not any((*before[:2], *after[:2]))
    if x.layout == CHANNELS and spatial:
        amounts, tensor, layout = [*before, *after], x.tensor, CHANNELS
    else:
        amounts, layout = [0, *before, 0, *after], HEADS
        tensor = stacker.heads(x, always=True).tensor
    inputs = [tensor, stacker.constant(np.asarray(amounts, np.int64)), value]
    return stacker.emit(step.op, inputs, step, layout, **attributes(step))


def _shape(stacker: Stacker, step: Step) -> Emitted:
    """The shape of one branch, which all branches have."""
    x = stacker.emitted(step.inputs[0])
    start = int(step.attrs.get("start", 0))  # type: ignore[call-overload]
    end = int(step.attrs.get("end", x.rank))  # type: ignore[call-overload]
    first, last = (min(max(i + x.rank if i < 0 else i, 0), x.rank) for i in (start, end))
    if x.layout == CHANNELS:
        sizes: list[gs.Tensor] = []
        for axis in range(first, last):
            if axis == 1:
                sizes.append(stacker.constant(np.asarray([channels_of(x)], np.int64)))
            else:
                sizes.append(
                    stacker.node("Shape", [x.tensor], np.int64, [1], start=axis, end=axis + 1)
                )
        return stacker.emit("Concat", sizes, step, SHARED, axis=0)
    offset = 1 if x.layout == HEADS else 0
    limits = {"start": first + offset, "end": last + offset}
    return stacker.emit(step.op, [x.tensor], step, SHARED, **limits)


def _reduce(stacker: Stacker, step: Step) -> Emitted:
    x = stacker.emitted(step.inputs[0])
    attrs = attributes(step)
    given = step.inputs[1] if len(step.inputs) > 1 else None
    axes = [] if given is None else stacker.integers(given, step)
    if not axes:
        if attrs.pop("noop_with_empty_axes", 0):
            return stacker.emit("Identity", [x.tensor], step, x.layout)
        axes = list(range(x.rank))
    keeps = bool(attrs.get("keepdims", 1))
    if x.layout == CHANNELS and all(axis % x.rank > 1 for axis in axes):
        same = stacker.constant(np.asarray(axes, np.int64))
        return stacker.emit(step.op, [x.tensor, same], step, CHANNELS, **attrs)
    if not keeps:
        axes = [axis % x.rank for axis in axes]
    inputs = [stacker.heads(x, always=True).tensor, _axes(stacker, axes)]
    return stacker.emit(step.op, inputs, step, HEADS, **attrs)


def _cumsum(stacker: Stacker, step: Step) -> Emitted:
    (axis,) = stacker.integers(step.inputs[1], step)
    inputs = [_heads(stacker, step).tensor, stacker.constant(np.asarray(_moved(axis), np.int64))]
    return stacker.emit(step.op, inputs, step, HEADS, **attributes(step))


def _matrices(stacker: Stacker, step: Step) -> Emitted:
    """What acts on the last two axes only."""
    inputs = [_heads(stacker, step).tensor, *_parameters(stacker, step)]
    return stacker.emit(step.op, inputs, step, HEADS, **attributes(step))


_AXIS: dict[str, int] = {
    "ArgMax": 0, "ArgMin": 0, "Hardmax": -1, "LogSoftmax": -1, "LpNormalization": -1,
    "Softmax": -1, "Split": 0, "TopK": -1,
}  # fmt: skip
_REDUCE = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare"
)
_OTHERS: dict[str, Callable[[Stacker, Step], Emitted]] = {
    "Concat": _concat,
    "CumSum": _cumsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _matrices,
    "Unsqueeze": _unsqueeze,
}
RULES: dict[str, Rule] = {
    **{op: _along(default) for op, default in _AXIS.items()},
    **dict.fromkeys(_REDUCE.split(), _reduce),
    **_OTHERS,
}
