"""QuantizeLinear and DequantizeLinear of any producer: per tensor, channel or block, any type."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from hydra_edge.branches import Shared, Step, Value
from hydra_edge.stacking.stacker import (
    CHANNELS,
    HEADS,
    SHARED,
    Array,
    Emitted,
    Rule,
    Stacker,
    UnsupportedError,
    attributes,
    channels_of,
    is_constant,
)


@dataclass(frozen=True, eq=False)
class Quantized:
    """M stored weights: ``(values - zero_point) * scale``, each ``[M, ...]``.

    Scale and zero point broadcast against the values; where ``block`` is not 0, one row of them
    along ``block_axis`` serves so many rows of values.
    """

    values: Array
    scale: Array
    zero_point: Array
    block: int = 0
    block_axis: int = 0

    def transposed(self, perm: list[int]) -> Quantized:
        """The same weights with the axes of each branch in another order."""
        order = [0, *(axis + 1 for axis in perm)]
        values, scale, zero_point = (
            array.transpose(order) for array in (self.values, self.scale, self.zero_point)
        )
        block_axis = order.index(self.block_axis) if self.block else 0
        return replace(
            self, values=values, scale=scale, zero_point=zero_point, block_axis=block_axis
        )


def quantized(stacker: Stacker, value: Value | None) -> Quantized | None:
    """The integers behind a constant operand, or None when it is not stored in integers."""
    if not isinstance(value, Step) or not is_constant(value):
        return None
    if value.op == "Identity":
        return quantized(stacker, value.inputs[0])
    if value.op == "Transpose":
        inner = quantized(stacker, value.inputs[0])
        if inner is None:
            return None
        rank = inner.values.ndim - 1
        perm = value.attrs.get("perm") or list(range(rank))[::-1]
        return inner.transposed([int(axis) for axis in perm])  # type: ignore[attr-defined]
    if value.op != "DequantizeLinear":
        return None
    return _stored(stacker, value)


def _stored(stacker: Stacker, step: Step) -> Quantized:
    values = stacker.arrays(step.inputs[0])
    scale = stacker.arrays(step.inputs[1])
    given = step.inputs[2] if len(step.inputs) > 2 else None
    zero_point = stacker.arrays(given) if given is not None else np.zeros_like(scale, values.dtype)
    axis = int(step.attrs.get("axis", 1))  # type: ignore[call-overload]
    block = int(step.attrs.get("block_size", 0))  # type: ignore[call-overload]
    rank = values.ndim - 1
    if block:
        return Quantized(values, scale, zero_point, block, axis % rank + 1)
    shape = [1] * rank
    if scale[0].size > 1:
        shape[axis % rank] = -1
    heads = stacker.heads_count
    return Quantized(values, scale.reshape(heads, *shape), zero_point.reshape(heads, *shape))


def _activations(stacker: Stacker, step: Step) -> Emitted:
    """Q or DQ of what is computed."""
    x = stacker.emitted(step.inputs[0])
    attrs = attributes(step)
    if int(attrs.get("block_size", 0)):  # type: ignore[arg-type]
        raise UnsupportedError("activations are quantized in blocks")
    rows = [stacker.arrays(value) for value in step.inputs[1:] if value is not None]
    alike = all((row == row[:1]).all() for row in rows)
    axis = int(attrs.get("axis", 1)) % max(x.rank, 1)  # type: ignore[arg-type]
    attrs.pop("axis", None)
    per_tensor = rows[0][0].size == 1
    if alike and per_tensor:
        parameters = [row[0].reshape(()) for row in rows]
    elif x.layout == CHANNELS and (per_tensor or axis == 1):
        width = channels_of(x)
        parameters = [
            np.broadcast_to(row.reshape(len(row), -1), (len(row), width)).reshape(-1)
            for row in rows
        ]
        attrs["axis"] = 1
    elif alike:
        x = stacker.heads(x)
        parameters = [row[0] for row in rows]
        attrs["axis"] = axis + 1 if x.is_stacked else axis
    elif per_tensor:
        x = stacker.heads(x, always=True)
        parameters = [row.reshape(-1) for row in rows]
        attrs["axis"] = 0
    else:
        raise UnsupportedError("activations are quantized per channel, differently in each branch")
    inputs = [x.tensor, *map(stacker.constant, parameters)]
    return stacker.emit(step.op, inputs, step, x.layout, **attrs)


def _dequantize(stacker: Stacker, step: Step) -> Emitted:
    if not is_constant(step):
        return _activations(stacker, step)
    values = stacker.arrays(step)
    return Emitted(stacker.constant(values), values.shape[1:], HEADS)


def int8_source(stacker: Stacker, x: Value | None) -> tuple[Emitted, Array] | None:
    """What is quantized in front of a layer, and its scale: ``[]`` for all heads or ``[M, 1, 1]``.

    None unless ``x`` is a symmetric int8 Q/DQ pair, per tensor.
    """
    if isinstance(x, Shared):
        return _shared_int8_source(x.tensor)
    quantize = x.inputs[0] if isinstance(x, Step) and x.op == "DequantizeLinear" else None
    if not isinstance(quantize, Step) or quantize.op != "QuantizeLinear":
        return None
    assert isinstance(x, Step)
    if not _is_int8(quantize.output) or x.attrs.get("block_size", 0):
        return None
    scales = [stacker.arrays(step.inputs[1]) for step in (quantize, x)]
    zeros = [stacker.arrays(v) for s in (quantize, x) for v in s.inputs[2:] if v is not None]
    if any(np.any(zero) for zero in zeros) or any(scale[0].size != 1 for scale in scales):
        return None
    if not np.array_equal(scales[0].reshape(-1), scales[1].reshape(-1)):
        return None
    scale = scales[0].reshape(-1)
    alike = (scale == scale[0]).all()
    return stacker.emitted(quantize.inputs[0]), scale[0] if alike else scale.reshape(-1, 1, 1)


def _shared_int8_source(tensor: gs.Tensor) -> tuple[Emitted, Array] | None:
    back = _writer(tensor, "DequantizeLinear")
    quantize = _writer(back.inputs[0], "QuantizeLinear") if back is not None else None
    if back is None or quantize is None or not _is_int8(back.inputs[0]):
        return None
    scales = []
    for node in (quantize, back):
        parameters = node.inputs[1:]
        if not all(isinstance(p, gs.Constant) and p.values.size == 1 for p in parameters):
            return None
        if len(parameters) > 1 and np.any(parameters[1].values):
            return None
        scales.append(np.asarray(parameters[0].values).reshape(()))
    source = quantize.inputs[0]
    if scales[0] != scales[1] or source.shape is None:
        return None
    return Emitted(source, tuple(source.shape), SHARED), scales[0]


def _writer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node that computes ``tensor``, if it is an ``op``."""
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op == op else None


def _is_int8(tensor: gs.Tensor) -> bool:
    return not isinstance(tensor.dtype, int) and tensor.dtype == np.int8


RULES: dict[str, Rule] = {"QuantizeLinear": _activations, "DequantizeLinear": _dequantize}
