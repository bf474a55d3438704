"""The order in which the CUDA kernels read weights: fragments of `mma.sync`, 16 bytes a lane.

The kernels compute y' = W' x' (primes are transposes): weights are operand A, 16 outputs high, and
the batch is operand B, 8 columns wide. A *tile* is 16 outputs by 64 bytes of K (32 halves, 64
bytes of int8, 128 of int4), which is 1024 bytes in two *steps* of 512: in one, lane l of a warp
reads 16 bytes, registers a0 to a3 of one MMA, so that a warp reads 512 consecutive bytes.

    lane l = 4 g + t, g = 0…7, t = 0…3; 4-byte word w = 0…15 of a row of 64 bytes

                     word 4t    word 4t+1    word 4t+2    word 4t+3
    row g         |  step 0 a0 |  step 0 a2 |  step 1 a0 |  step 1 a2 |
    row g + 8     |  step 0 a1 |  step 0 a3 |  step 1 a1 |  step 1 a3 |

An MMA sums over K in any order as long as both operands agree, so lane t takes 16 *consecutive*
bytes of a row, and reads the 16 bytes of x at the same K with one load. Nothing is shuffled, and no
shared memory is needed between global memory and the tensor cores.

The eight int4 of a word stand in the order 0 2 4 6 1 3 5 7, lowest bits first. Lane t takes its
four words of int4, eight values of K each, in the order t, t ^ 1, t ^ 2, t ^ 3: the 16 bytes of x
that the lanes of a row read at once then lie in different banks.

In bytes: ``[M, ceil(N/16), ceil(K·bits/512), 2 steps, 8 g, 4 t, 4 registers, 4]``. What is missing
to full tiles is 0.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hydra_edge.errors import InputError

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]

LAYOUT = "hydra-mma16-2"  # changes whenever a byte moves
ROWS = 16
ROW_BYTES = 64
TILE_BYTES = ROWS * ROW_BYTES
# K of the nibbles of a word, lowest first: one mask then takes two neighbours.
_NIBBLES = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_LANE_WORDS = np.arange(4)[:, None] ^ np.arange(4)  # [t, place]; its own inverse
_BITS = {
    np.dtype(np.float16): 16,
    np.dtype(ml_dtypes.bfloat16): 16,
    np.dtype(np.int8): 8,
    np.dtype(ml_dtypes.int4): 4,
}


def rows_per_tile(dtype: npt.DTypeLike) -> int:
    """K of one tile.

    Raises:
        InputError: There is no kernel for weights of this type.
    """
    bits = _BITS.get(np.dtype(dtype))
    if bits is None:
        raise InputError(
            f"Weights of type {np.dtype(dtype)} cannot be packed.",
            f"The kernels read {', '.join(str(kind) for kind in _BITS)}.",
            "Quantize or cast the heads to one of those.",
        )
    return ROW_BYTES * 8 // bits


def packed_bytes(heads: int, inputs: int, outputs: int, dtype: npt.DTypeLike) -> int:
    """Bytes that ``[heads, inputs, outputs]`` weights take when packed."""
    return heads * -(-outputs // ROWS) * -(-inputs // rows_per_tile(dtype)) * TILE_BYTES


def pack(weight: Array) -> Bytes:
    """Bring weights into the order of the kernels.

    Args:
        weight: ``[M, K, N]`` in float16, bfloat16, int8 or int4.

    Returns:
        uint8 ``[M, ceil(N/16), ceil(K/k), 1024]``, with k as `rows_per_tile` says.

    Raises:
        InputError: There is no kernel for weights of this type or shape.
    """
    depth = rows_per_tile(weight.dtype)
    if weight.ndim != 3 or 0 in weight.shape:
        raise InputError(
            f"Weights of shape {list(weight.shape)} cannot be packed.",
            "Grouped weights are [M, K, N], each at least 1.",
            "Stack the heads along axis 0.",
        )
    heads, inputs, outputs = weight.shape
    tiles, blocks = -(-outputs // ROWS), -(-inputs // depth)
    packed = np.zeros((heads, tiles, blocks, 2, 8, 4, 2, 2), np.uint32)
    for head in range(heads):  # one at a time: a model's worth of temporaries would be one too many
        rows = np.zeros((tiles * ROWS, blocks * depth), weight.dtype)
        rows[:outputs, :inputs] = weight[head].T
        # [tile, half, g, block, t, step, register pair]; registers are (pair, half).
        words = _as_bytes(rows).view(np.uint32).reshape(tiles, 2, 8, blocks, 4, 2, 2)
        if rows.dtype == ml_dtypes.int4:
            words = _exchange(words)
        packed[head] = words.transpose(0, 3, 5, 2, 4, 6, 1)
    return packed.view(np.uint8).reshape(heads, tiles, blocks, TILE_BYTES)


def unpack(packed: Bytes, inputs: int, outputs: int, dtype: npt.DTypeLike) -> Array:
    """What `pack` packed, as ``[M, K, N]``: for tests, and to look into an engine."""
    heads, tiles, blocks, _ = packed.shape
    depth = rows_per_tile(dtype)
    words = packed.view(np.uint32).reshape(heads, tiles, blocks, 2, 8, 4, 2, 2)
    words = np.ascontiguousarray(words.transpose(0, 1, 7, 4, 2, 5, 3, 6), np.uint32)
    if np.dtype(dtype) == ml_dtypes.int4:
        words = _exchange(words)
    rows = words.view(np.uint8)
    values = _from_bytes(rows.reshape(heads, tiles * ROWS, blocks * ROW_BYTES), dtype)
    assert values.shape == (heads, tiles * ROWS, blocks * depth)
    return np.ascontiguousarray(values[:, :outputs, :inputs].swapaxes(1, 2))


def _exchange(words: Words) -> Words:
    """The words of each lane, ``[..., t, 2, 2]``, in the order of `_LANE_WORDS`, or back."""
    lanes = words.reshape(*words.shape[:-2], 4)
    order = np.broadcast_to(_LANE_WORDS, lanes.shape)
    return np.take_along_axis(lanes, order, -1).reshape(words.shape)


def _as_bytes(rows: Array) -> Bytes:
    """Rows as they lie in memory; of int4 eight in a word, in the order of `_NIBBLES`."""
    if rows.dtype != ml_dtypes.int4:
        return rows.view(np.uint8)
    nibbles = rows.astype(np.int8).view(np.uint8) & 0xF
    nibbles = nibbles.reshape(len(rows), -1, 8)[:, :, _NIBBLES].reshape(rows.shape)
    return np.asarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), np.uint8)


def _from_bytes(rows: Bytes, dtype: npt.DTypeLike) -> Array:
    if np.dtype(dtype) != ml_dtypes.int4:
        return rows.view(dtype)
    nibbles = np.stack([rows & 0xF, rows >> 4], axis=-1).reshape(*rows.shape[:-1], -1, 8)
    nibbles = nibbles[..., np.argsort(_NIBBLES)].reshape(*rows.shape[:-1], -1)
    signed = np.where(nibbles > 7, nibbles.astype(np.int8) - 16, nibbles).astype(np.int8)
    return signed.astype(dtype)


def pack_group_scales(scale: Array, group: int, dtype: npt.DTypeLike) -> tuple[Array, Array]:
    """Split scales of int4 weights into one per column and a factor per group.

    The kernels apply the factor, at most 1, in the type of x before they multiply, and the scale of
    the column in fp32 afterwards: so small scales lose nothing in fp16.

    Args:
        scale: ``[M, ceil(K/group), N]``, positive.
        group: 32, 64 or 128 consecutive K.
        dtype: float16 or bfloat16, the type of x.

    Returns:
        float32 ``[M, N]``, and `dtype` ``[M, ceil(N/16), ceil(K/128), 128/group, 8, 2]``: rows g
        and g + 8 of a tile side by side.
    """
    heads, _, outputs = scale.shape
    per_tile, tiles = 128 // group, -(-outputs // ROWS)
    groups = -(-scale.shape[1] // per_tile) * per_tile
    column = np.asarray(scale, np.float32).max(1)
    factor = np.zeros((heads, groups, tiles * ROWS), np.float32)
    factor[:, : scale.shape[1], :outputs] = scale / column[:, None]
    rows = factor.reshape(heads, groups // per_tile, per_tile, tiles, 2, 8)
    return column, np.ascontiguousarray(rows.transpose(0, 3, 1, 2, 5, 4).astype(dtype))


def unpack_group_scales(column: Array, factors: Array, group: int, inputs: int) -> Array:
    """What `pack_group_scales` packed: float32 ``[M, ceil(K/group), N]`` for K ``inputs``."""
    heads, outputs = column.shape
    rows = np.asarray(factors, np.float32).transpose(0, 2, 3, 1, 5, 4)
    flat = rows.reshape(heads, -1, factors.shape[1] * ROWS)[:, : -(-inputs // group), :outputs]
    return np.asarray(flat * np.asarray(column, np.float32)[:, None], np.float32)
