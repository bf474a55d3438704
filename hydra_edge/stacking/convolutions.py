"""Convolutions and what usually stands around them, in the layout "channels".

The first convolution of all heads reads what they share: one wide convolution. Behind it every head
reads its own channels: a grouped convolution. Pooling and normalization work channel by channel.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from hydra_edge.branches import Step
from hydra_edge.stacking.elementwise import combine
from hydra_edge.stacking.quantized import Quantized, quantized
from hydra_edge.stacking.stacker import (
    CHANNELS,
    HEADS,
    Array,
    Emitted,
    Rule,
    Stacker,
    UnsupportedError,
    attributes,
    channels_of,
    is_constant,
)


def _conv(stacker: Stacker, step: Step) -> Emitted:
    attrs = attributes(step)
    group = int(attrs.get("group", 1))  # type: ignore[arg-type]
    x = stacker.emitted(step.inputs[0])
    if x.is_stacked or group > 1:
        x = stacker.channels(x)
        attrs["group"] = group * stacker.heads_count
    weight = _joined(stacker, step, 0)
    inputs = [x.tensor, weight, *_bias(stacker, step)]
    return stacker.emit(step.op, inputs, step, CHANNELS, **attrs)


def _conv_transpose(stacker: Stacker, step: Step) -> Emitted:
    """Its weight is [C, O / group, ...], so what is shared is joined along the outputs."""
    attrs = attributes(step)
    group = int(attrs.get("group", 1))  # type: ignore[arg-type]
    x = stacker.emitted(step.inputs[0])
    wide = not x.is_stacked and group == 1
    if not wide:
        x = stacker.channels(x)
        attrs["group"] = group * stacker.heads_count
    weight = _joined(stacker, step, 1 if wide else 0)
    inputs = [x.tensor, weight, *_bias(stacker, step)]
    return stacker.emit(step.op, inputs, step, CHANNELS, **attrs)


def _joined(stacker: Stacker, step: Step, axis: int) -> gs.Tensor:
    """The weights of all branches, one behind the other along ``axis``."""
    stored = quantized(stacker, step.inputs[1])
    if stored is None or stored.block or (axis != 0 or step.op != "Conv"):
        return stacker.constant(_side_by_side(stacker.arrays(step.inputs[1]), axis))
    return _dequantized(stacker, stored)


def _side_by_side(rows: Array, axis: int) -> Array:
    """``[M, ...]`` to branches one behind the other along ``axis`` of a branch."""
    moved = np.moveaxis(rows, 0, axis)
    shape = rows.shape[1:]
    return moved.reshape(*shape[:axis], rows.shape[0] * shape[axis], *shape[axis + 1 :])


def _dequantized(stacker: Stacker, stored: Quantized) -> gs.Tensor:
    """Integers of all branches behind one DequantizeLinear per output channel."""
    heads, width = stored.values.shape[:2]
    parameters = []
    for rows in (stored.scale, stored.zero_point):
        if any(size != 1 for size in rows.shape[2:]):
            raise UnsupportedError("convolution weights are quantized per input channel")
        flat = np.broadcast_to(rows.reshape(heads, -1), (heads, width))
        parameters.append(stacker.constant(flat.reshape(-1)))
    values = stacker.constant(stored.values.reshape(heads * width, *stored.values.shape[2:]))
    inputs = [values, *parameters]
    return stacker.node("DequantizeLinear", inputs, stored.scale.dtype, values.shape, axis=0)


def _bias(stacker: Stacker, step: Step) -> list[gs.Tensor]:
    value = step.inputs[2] if len(step.inputs) > 2 else None
    return [] if value is None else [stacker.constant(stacker.arrays(value).reshape(-1))]


def _pool(stacker: Stacker, step: Step) -> Emitted:
    if step.position:
        raise UnsupportedError(f"the indices of {step.op} count over all channels")
    x = stacker.channels(stacker.emitted(step.inputs[0]))
    return stacker.node_of(step, [x.tensor], CHANNELS)


def _batch_norm(stacker: Stacker, step: Step) -> Emitted:
    if step.attrs.get("training_mode", 0) or step.position:
        raise UnsupportedError("BatchNormalization in training mode")
    x = stacker.emitted(step.inputs[0])
    rows = [stacker.arrays(value) for value in step.inputs[1:5]]
    if x.layout == CHANNELS:
        flat = [stacker.constant(array.reshape(-1)) for array in rows]
        return stacker.node_of(step, [x.tensor, *flat], CHANNELS)
    # In inference y = x * a + b with a = scale / sqrt(var + epsilon), b = bias - mean * a.
    scale, bias, mean, var = (array.astype(np.float64) for array in rows)
    a = scale / np.sqrt(var + float(step.attrs.get("epsilon", 1e-5)))  # type: ignore[arg-type]
    b = bias - mean * a
    y = x
    for op, factor in (("Mul", a), ("Add", b)):
        values = factor.reshape(*factor.shape, *(1,) * (x.rank - 2)).astype(rows[0].dtype)
        operand = Emitted(stacker.constant(values), values.shape[1:], HEADS)
        y = combine(stacker, step, op, [y, operand])
    return y


def _instance_norm(stacker: Stacker, step: Step) -> Emitted:
    x = stacker.channels(stacker.emitted(step.inputs[0]))
    flat = [stacker.constant(stacker.arrays(v).reshape(-1)) for v in step.inputs[1:3]]
    return stacker.node_of(step, [x.tensor, *flat], CHANNELS)


def _group_norm(stacker: Stacker, step: Step) -> Emitted:
    x = stacker.channels(stacker.emitted(step.inputs[0]))
    flat = [stacker.constant(stacker.arrays(v).reshape(-1)) for v in step.inputs[1:3]]
    groups = int(step.attrs["num_groups"]) * stacker.heads_count  # type: ignore[call-overload]
    return stacker.node_of(step, [x.tensor, *flat], CHANNELS, num_groups=groups)


def _layer_norm(stacker: Stacker, step: Step) -> Emitted:
    """Scale and bias have no axis M, so where they differ they become a Mul and an Add.

    Heads that begin with it normalize their shared input alike: that part is emitted once.
    """
    if step.position:
        raise UnsupportedError(f"the statistics of {step.op} are used")
    x = stacker.heads(stacker.emitted(step.inputs[0]))
    attrs = attributes(step)
    axis = int(attrs.get("axis", -1))  # type: ignore[arg-type]
    attrs["axis"] = axis if axis < 0 else axis - x.rank
    parameters = [stacker.emitted(value) for value in step.inputs[1:] if value is not None]
    if not any(parameter.is_stacked for parameter in parameters):
        inputs = [x.tensor, *(parameter.tensor for parameter in parameters)]
        return stacker.node_of(step, inputs, x.layout, **attrs)
    if not is_constant(step.inputs[1]):
        raise UnsupportedError(f"the scale of {step.op} is computed")
    scale = stacker.arrays(step.inputs[1])
    ones = stacker.constant(np.ones(scale.shape[1:], scale.dtype))
    y = stacker.node_of(step, [x.tensor, ones], x.layout, **attrs)
    for op, parameter in zip(("Mul", "Add"), parameters, strict=False):
        y = combine(stacker, step, op, [y, parameter])
    return y


def _resize(stacker: Stacker, step: Step) -> Emitted:
    """Channels stay as they are, so a size given for them counts M times."""
    x = stacker.channels(stacker.emitted(step.inputs[0]))
    inputs: list[gs.Tensor] = [x.tensor]
    for name, value in zip(("roi", "scales", "sizes"), step.inputs[1:], strict=False):
        parameter = stacker.same(value, step)
        if name == "sizes" and value is not None and "axes" not in step.attrs:
            sizes = np.array(stacker.integers(value, step), np.int64)
            if sizes[1] != channels_of(x):
                raise UnsupportedError("Resize changes the channels")
            sizes[1] *= stacker.heads_count
            parameter = stacker.constant(sizes)
        inputs.append(parameter)
    scales = step.inputs[2] if len(step.inputs) > 2 else None
    if scales is not None and is_constant(scales) and "axes" not in step.attrs:
        values = stacker.arrays(scales)
        if values.shape[1] and np.any(values[:, :2] != 1):
            raise UnsupportedError("Resize changes the channels")
    elif scales is not None or step.attrs.get("axes", [2])[0] < 2:  # type: ignore[index]
        raise UnsupportedError("Resize by computed scales")
    return stacker.node_of(step, inputs, CHANNELS)


_POOLS = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"
RULES: dict[str, Rule] = {
    **dict.fromkeys(_POOLS.split(), _pool),
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "Resize": _resize,
}
