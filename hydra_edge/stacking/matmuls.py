"""Gemm, MatMul and Einsum: layers with weights become grouped matmuls, other products batched ones.

A grouped matmul takes ``[B, K]`` or ``[M, B, K]``; what has more axes is flattened around it.
"""

from __future__ import annotations

import string

import numpy as np
import onnx_graphsurgeon as gs

from hydra_edge.branches import Step, Value
from hydra_edge.stacking.elementwise import broadcasting, combine
from hydra_edge.stacking.quantized import Quantized, int8_source, quantized
from hydra_edge.stacking.stacker import (
    HEADS,
    Array,
    Emitted,
    Rule,
    Size,
    Stacker,
    UnsupportedError,
    is_constant,
    shape_of,
)


def _gemm(stacker: Stacker, step: Step) -> Emitted:
    """``alpha * A' @ B' + beta * C``; what is no bias per output column is added afterwards."""
    alpha, beta = (float(step.attrs.get(name, 1.0)) for name in ("alpha", "beta"))  # type: ignore[arg-type]
    swapped = bool(step.attrs.get("transB", 0))
    bias = step.inputs[2] if len(step.inputs) > 2 else None
    x = None
    if step.attrs.get("transA", 0):
        given = stacker.heads(stacker.emitted(step.inputs[0]))
        order = [0, 2, 1] if given.is_stacked else [1, 0]
        flipped = (given.shape[1], given.shape[0])
        x = Emitted(stacker.transpose(given.tensor, order), flipped, given.layout)
    width = shape_of(step.output)[-1]
    offset = None if bias is None else _offset(stacker, bias, beta, width)
    if is_constant(step.inputs[1]):
        y = _layer(stacker, step, step, swapped, offset, alpha, x)
    else:
        y = _product(stacker, step, swapped, alpha, x)
        bias_left = offset is not None
        if bias_left:
            assert offset is not None
            y = combine(
                stacker, step, "Add", [y, Emitted(stacker.constant(offset), (1, width), HEADS)]
            )
    if bias is not None and offset is None:
        term = stacker.emitted(bias)
        if beta != 1.0:
            factor = stacker.constant(np.asarray(beta, step.output.dtype or np.float32))
            term = combine(stacker, step, "Mul", [term, Emitted(factor, (), "shared")])
        y = combine(stacker, step, "Add", [y, term])
    return y


def _product(
    stacker: Stacker, step: Step, swapped: bool, alpha: float, x: Emitted | None
) -> Emitted:
    """A Gemm whose second operand is computed."""
    left = x or stacker.emitted(step.inputs[0])
    right = stacker.heads(stacker.emitted(step.inputs[1]))
    if swapped:
        order = [0, 2, 1] if right.is_stacked else [1, 0]
        right = Emitted(stacker.transpose(right.tensor, order), right.shape[::-1], right.layout)
    inputs = [stacker.aligned(left, 2), stacker.aligned(right, 2)]
    y = stacker.emit("MatMul", inputs, step, HEADS)
    if alpha != 1.0:
        factor = stacker.constant(np.asarray(alpha, step.output.dtype or np.float32))
        y = combine(stacker, step, "Mul", [y, Emitted(factor, (), "shared")])
    return y


def _matmul(stacker: Stacker, step: Step) -> Emitted:
    weight = step.inputs[1]
    if is_constant(weight) and len(_shape_of_constant(weight)) == 2 and _rank(step.inputs[0]) > 1:
        return _layer(stacker, step, step, False, None)
    operands = [stacker.heads(stacker.emitted(value)) for value in step.inputs]
    ranks = [operand.rank for operand in operands]
    if min(ranks) < 2:
        raise UnsupportedError("MatMul of a vector")
    inputs = [stacker.aligned(operand, max(ranks)) for operand in operands]
    return stacker.emit(step.op, inputs, step, HEADS)


def _add(stacker: Stacker, step: Step) -> Emitted:
    """Add behind MatMul is its bias, when it adds one value per output column."""
    for product, bias in (step.inputs, step.inputs[::-1]):
        if not (isinstance(product, Step) and product.op == "MatMul" and is_constant(bias)):
            continue
        weight = product.inputs[1]
        shape = shape_of(product.output)
        if not is_constant(weight) or len(_shape_of_constant(weight)) != 2 or len(shape) < 2:
            continue
        if _rank(product.inputs[0]) < 2 or len(shape_of(step.output)) != len(shape):
            continue
        offset = _offset(stacker, bias, 1.0, shape[-1])
        if offset is not None:
            return _layer(stacker, step, product, False, offset)
    return broadcasting(stacker, step)


def _layer(
    stacker: Stacker,
    step: Step,
    product: Step,
    swapped: bool,
    offset: Array | None,
    alpha: float = 1.0,
    x: Emitted | None = None,
) -> Emitted:
    """One grouped matmul: ``alpha * x @ weight + offset``, in integers where both sides are."""
    stored = quantized(stacker, product.inputs[1])
    if stored is None or (stored.block and stored.block_axis != (2 if swapped else 1)):
        weight = stacker.arrays(product.inputs[1], swapped=swapped)
        # A Python float is a weak scalar: it does not change the dtype of the weights.
        weight = weight if alpha == 1.0 else np.multiply(weight, alpha)
        return _grouped(stacker, step, product, x, "GroupedMatMul", [weight], offset)
    stored = stored.transposed([1, 0]) if swapped else stored
    stored = _signed(stored if alpha == 1.0 else _scaled(stored, alpha))
    source = int8_source(stacker, product.inputs[0]) if x is None else None
    per_column = not stored.block and stored.scale.shape[1] == 1
    symmetric = stored.values.dtype == np.int8 and not np.any(stored.zero_point)
    if source is not None and per_column and symmetric:
        shape = (stacker.heads_count, 1, stored.values.shape[2])
        weights = [stored.values, np.broadcast_to(stored.scale, shape), source[1]]
        return _grouped(
            stacker, step, product, source[0], "QuantizedGroupedMatMul", weights, offset
        )
    if not stored.block and stored.scale.shape[1] != 1:  # one scale per row: blocks of one
        stored = Quantized(stored.values, stored.scale, stored.zero_point, 1, 1)
    shape = (stacker.heads_count, stored.scale.shape[1], stored.values.shape[2])
    zero_point = np.asarray(stored.zero_point).astype(stored.scale.dtype)
    weights = [
        stored.values,
        np.broadcast_to(stored.scale, shape),
        np.broadcast_to(zero_point, shape) if np.any(zero_point) else zero_point[:1, :1, :1] * 0,
    ]
    block = stored.block or stored.values.shape[1]
    return _grouped(
        stacker, step, product, x, "WeightOnlyGroupedMatMul", weights, offset, block=[block]
    )


def _scaled(stored: Quantized, alpha: float) -> Quantized:
    scale = np.multiply(stored.scale, alpha)
    return Quantized(stored.values, scale, stored.zero_point, stored.block, stored.block_axis)


def _signed(stored: Quantized) -> Quantized:
    """uint8 around 128 is int8 around 0: the same weights, and the form that kernels take."""
    if stored.values.dtype != np.uint8:
        return stored
    values, zero_point = (
        (array.astype(np.int16) - 128).astype(np.int8)
        for array in (stored.values, stored.zero_point)
    )
    return Quantized(values, stored.scale, zero_point, stored.block, stored.block_axis)


def _grouped(
    stacker: Stacker,
    step: Step,
    product: Step,
    x: Emitted | None,
    op: str,
    weights: list[Array],
    offset: Array | None,
    **attrs: list[int],
) -> Emitted:
    source = stacker.heads(x if x is not None else stacker.emitted(product.inputs[0]))
    width = weights[0].shape[2]
    if offset is None:
        float_dtype = weights[0].dtype if op == "GroupedMatMul" else weights[1].dtype
        offset = np.zeros((stacker.heads_count, 1, width), float_dtype)
    operands = [weights[0], np.broadcast_to(offset, (stacker.heads_count, 1, width)), *weights[1:]]
    constants = [stacker.constant(operand) for operand in operands]
    heads, rank = stacker.heads_count, source.rank
    tensor = source.tensor
    flat = rank > 2
    if flat:
        lead = [heads] if source.is_stacked else []
        tensor = stacker.reshape(tensor, [*lead, -1, weights[0].shape[1]])
    if not flat:
        return stacker.emit(op, [tensor, *constants], step, HEADS, **attrs)
    y = stacker.node(op, [tensor, *constants], step.output.dtype, [heads, None, width], **attrs)
    first = 1 if source.is_stacked else 0
    sizes = [Size(source.tensor, first + axis) for axis in range(rank - 1)]
    back = stacker.reshape(y, [heads, *sizes, width])
    return Emitted(back, shape_of(step.output), HEADS)


def _offset(
    stacker: Stacker, bias: Value | None, beta: float, width: int | str | None
) -> Array | None:
    """``beta * bias`` as ``[M, 1, width]``; None when it is not one value per output column."""
    if bias is None or not is_constant(bias):
        return None
    rows = stacker.arrays(bias)
    shape = rows.shape[1:]
    if any(size != 1 for size in shape[:-1]) or (shape and shape[-1] not in (1, width)):
        return None
    rows = rows.reshape(stacker.heads_count, 1, -1)
    rows = rows if beta == 1.0 else np.multiply(rows, beta)
    if isinstance(width, int):
        rows = np.broadcast_to(rows, (stacker.heads_count, 1, width))
    return rows


def _einsum(stacker: Stacker, step: Step) -> Emitted:
    """A new letter for the axis M."""
    equation = str(step.attrs["equation"]).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if not arrow or "." in equation:
        raise UnsupportedError("Einsum without an explicit result")
    letter = next(c for c in string.ascii_letters if c not in equation)
    operands = [stacker.heads(stacker.emitted(value)) for value in step.inputs]
    names = [
        (letter if operand.is_stacked else "") + term
        for operand, term in zip(operands, terms.split(","), strict=True)
    ]
    inputs = [operand.tensor for operand in operands]
    text = f"{','.join(names)}->{letter}{result}"
    return stacker.emit(step.op, inputs, step, HEADS, equation=text)


def _rank(value: Value | None) -> int:
    if isinstance(value, Step):
        return len(shape_of(value.output))
    assert value is not None
    tensor: gs.Tensor = value.tensors[0] if hasattr(value, "tensors") else value.tensor
    return len(shape_of(tensor))


def _shape_of_constant(value: Value | None) -> tuple[object, ...]:
    if isinstance(value, Step):
        return shape_of(value.output)
    assert value is not None
    tensor: gs.Tensor = value.tensors[0] if hasattr(value, "tensors") else value.tensor
    return tuple(tensor.shape)


RULES: dict[str, Rule] = {"Add": _add, "Einsum": _einsum, "Gemm": _gemm, "MatMul": _matmul}
