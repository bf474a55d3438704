"""Packed weights hold every weight once, where the MMA of its lane expects it."""

from __future__ import annotations

import time

import ml_dtypes
import numpy as np
import pytest

from hydra_edge.errors import InputError
from hydra_edge.ops.packing import (
    LAYOUT,
    TILE_BYTES,
    pack,
    packed_bytes,
    rows_per_tile,
    unpack,
)

TYPES = [np.float16, ml_dtypes.bfloat16, np.int8, ml_dtypes.int4]
SHAPES = [(1, 1, 1), (3, 50, 2), (2, 32, 16), (2, 129, 37), (1, 64, 10), (4, 200, 33)]


def weights(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 8, shape).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_is_there_and_the_rest_is_zero(
    shape: tuple[int, int, int], dtype: type
) -> None:
    weight = weights(shape, dtype)
    packed = pack(weight)
    assert packed.dtype == np.uint8
    assert packed.nbytes == packed_bytes(*shape, dtype)
    back = unpack(packed, shape[1], shape[2], dtype)
    assert back.dtype == weight.dtype
    np.testing.assert_array_equal(back.astype(np.float32), weight.astype(np.float32))
    tiles, blocks = packed.shape[1:3]
    whole = unpack(packed, blocks * rows_per_tile(dtype), tiles * 16, dtype).astype(np.float32)
    assert np.abs(whole).sum() == np.abs(weight.astype(np.float32)).sum()


def fragment(packed: np.ndarray, lane: int, step: int, register: int) -> np.ndarray:
    """The four bytes of one register of one lane, of the first tile."""
    start = step * 512 + lane * 16 + register * 4
    return packed[0, 0, 0, start : start + 4]


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("lane", [0, 1, 2, 5, 7, 30, 31])
@pytest.mark.parametrize(("dtype", "columns"), [(np.float16, 2), (np.int8, 4)])
def test_registers_of_an_mma(dtype: type, columns: int, lane: int, step: int) -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k16" (halves) and "mma.m16n8k32" (int8): a0 and a1
    hold rows g and g + 8 of as many consecutive columns as fit 4 bytes, a2 and a3 those of the
    second half of columns. Columns are K permuted so that lane t holds consecutive ones throughout
    the two MMAs of a tile.
    """
    depth = rows_per_tile(dtype)
    weight = np.random.default_rng(0).integers(-127, 128, (1, depth, 16)).astype(dtype)
    packed = pack(weight)
    g, t = divmod(lane, 4)
    for register in range(4):
        k = columns * (4 * t + 2 * step + (register >= 2))
        expected = weight[0, k : k + columns, g + 8 * (register % 2)]
        np.testing.assert_array_equal(fragment(packed, lane, step, register).view(dtype), expected)


def test_a_warp_reads_consecutive_bytes_and_tiles_lie_along_k() -> None:
    weight = weights((2, 70, 20), np.float16)
    packed = pack(weight)
    assert packed.shape == (2, 2, 3, TILE_BYTES)
    second = np.zeros((1, 32, 16), np.float16)
    second[0, :, :4] = weight[1, 32:64, 16:20]
    np.testing.assert_array_equal(packed[1, 1, 1], pack(second)[0, 0, 0])


def test_half_a_gigabyte_takes_seconds() -> None:
    """The target is 500 MB in 10 s; a tenth of it, and room for a busy machine."""
    weight = np.ones((8, 1024, 3129), np.float16)
    start = time.perf_counter()
    pack(weight)
    seconds = time.perf_counter() - start
    assert seconds * 500e6 / weight.nbytes < 30


def test_what_cannot_be_packed() -> None:
    with pytest.raises(InputError, match="Weights of type float32 cannot be packed"):
        pack(np.ones((1, 2, 3), np.float32))
    for shape in ((2, 3), (1, 0, 3)):
        with pytest.raises(InputError, match=r"Weights of shape \[.*\] cannot be packed"):
            pack(np.ones(shape, np.int8))
    assert LAYOUT == "hydra-mma16-2"
