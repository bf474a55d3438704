"""One layer of all M heads at once: in floats, in integers, or with weights stored in few bits.

    GroupedMatMul            y[m] = x[m] @ weight[m] + bias[m]
    QuantizedGroupedMatMul   y[m] = (q(x[m]) @ weight[m]) * x_scale[m] * weight_scale[m] + bias[m]
                             q(x) = clip(round_half_even(x / x_scale), -128, 127)
    WeightOnlyGroupedMatMul  y[m] = x[m] @ w[m] + bias[m]
                             w[m,k,n] = (weight[m,k,n] - zero[m,k//block,n]) * scale[m,k//block,n]

    x             [B, K] shared by all heads, or [M, B, K]
    weight        [M, K, N]   float; int8 with zero point 0; or int8, int4, uint4, float8
    bias          [M, 1, N]
    weight_scale  [M, 1, N]   per head and output column; [M, ceil(K / block), N] for weight-only
    x_scale       [] for all heads, or [M, 1, 1]
    weight_zero_point         like weight_scale, or [1, 1, 1]; a float
    block         [K] when one scale serves a whole column
    y             [M, B, N]

A 2-D ``x`` broadcasts against ``weight``, so the bodies need no case for it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FUNCTIONS = {
    "GroupedMatMul": """
GroupedMatMul (x, weight, bias) => (y)
{
    product = MatMul (x, weight)
    y = Add (product, bias)
}
""",
    "QuantizedGroupedMatMul": """
QuantizedGroupedMatMul (x, weight, bias, weight_scale, x_scale) => (y)
{
    low = Constant <value: tensor = float {-128.0}> ()
    high = Constant <value: tensor = float {127.0}> ()
    scaled = Div (x, x_scale)
    rounded = Round (scaled)
    x_int = Clip (rounded, low, high)
    weight_int = Cast <to: int = 1> (weight)
    accumulator = MatMul (x_int, weight_int)
    scale = Mul (x_scale, weight_scale)
    product = Mul (accumulator, scale)
    y = Add (product, bias)
}
""",
    "WeightOnlyGroupedMatMul": """
WeightOnlyGroupedMatMul <block> (x, weight, bias, weight_scale, weight_zero_point) => (y)
{
    zero = Constant <value: tensor = int64 {0}> ()
    one = Constant <value: tensor = int64 {1}> ()
    first = Constant <value_ints: ints = [0]> ()
    size = Constant <value_ints: ints = @block> ()
    stored = Cast <to: int = 1> (weight)
    weight_rows = Shape <start: int = 1, end: int = 2> (stored)
    scale_rows = Shape <start: int = 1, end: int = 2> (weight_scale)
    zero_rows = Shape <start: int = 1, end: int = 2> (weight_zero_point)
    length = Squeeze (weight_rows, first)
    rows = Range (zero, length, one)
    blocks = Div (rows, size)
    scale_index = Mod (blocks, scale_rows)
    zero_index = Mod (blocks, zero_rows)
    scale = Gather <axis: int = 1> (weight_scale, scale_index)
    zero_point = Gather <axis: int = 1> (weight_zero_point, zero_index)
    stored_like = CastLike (stored, weight_scale)
    centred = Sub (stored_like, zero_point)
    real = Mul (centred, scale)
    product = MatMul (x, real)
    y = Add (product, bias)
}
""",
}


def reference(
    x: npt.ArrayLike, weight: npt.ArrayLike, bias: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """`GroupedMatMul` in numpy float64; shapes as in the module's docstring."""
    product = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    return np.asarray(product + np.asarray(bias, np.float64))


def reference_quantized(
    x: npt.ArrayLike,
    weight: npt.NDArray[np.int8],
    bias: npt.ArrayLike,
    weight_scale: npt.ArrayLike,
    x_scale: npt.ArrayLike,
) -> npt.NDArray[np.float64]:
    """`QuantizedGroupedMatMul` in numpy float64; shapes as in the module's docstring.

    The division is done in float32, as the kernels and runtimes do it: a value that lies halfway
    between two integers there must round the same way here.
    """
    scaled = np.asarray(x, np.float32) / np.asarray(x_scale, np.float32)
    x_int = np.clip(np.rint(scaled), -128, 127).astype(np.int64)
    scale = np.asarray(x_scale, np.float64) * np.asarray(weight_scale, np.float64)
    product = (x_int @ weight.astype(np.int64)) * scale
    return np.asarray(product + np.asarray(bias, np.float64))


def reference_weight_only(
    x: npt.ArrayLike,
    weight: npt.NDArray[np.generic],
    bias: npt.ArrayLike,
    weight_scale: npt.ArrayLike,
    weight_zero_point: npt.ArrayLike,
    block: int,
) -> npt.NDArray[np.float64]:
    """`WeightOnlyGroupedMatMul` in numpy float64; shapes as in the module's docstring."""
    blocks = np.arange(weight.shape[1]) // block
    scale = np.asarray(weight_scale, np.float64)[:, blocks]
    zero_point = np.asarray(weight_zero_point, np.float64)
    zero_point = zero_point[:, blocks % zero_point.shape[1]]
    real = (weight.astype(np.float64) - zero_point) * scale
    return reference(x, real, bias)


def quantize_weight(
    weight: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric int8, one scale per head and output column.

    Args:
        weight: ``[M, K, N]``.

    Returns:
        int8 ``[M, K, N]`` and its scale ``[M, 1, N]``; all-zero columns get scale 1.
    """
    peak = np.abs(weight).max(1, keepdims=True)
    scale = np.where(peak > 0, peak / 127.0, 1.0).astype(np.float32)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale
