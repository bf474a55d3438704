"""Capsules as numpy and torch write and read them."""

from __future__ import annotations

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch

from hydra_edge.gpu import dlpack

CPU = (1, 0)
DTYPES = ["bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"]


class Memory:
    """Memory of the CPU, handed on by our own capsules."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU

    def __dlpack__(self, **_: object) -> object:
        address = self.values.ctypes.data
        return dlpack.write(self, address, self.values.shape, self.values.dtype, CPU)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 2)])
@pytest.mark.parametrize("name", DTYPES)
def test_reading_those_of_numpy(name: str, shape: tuple[int, ...]) -> None:
    values = np.ones(shape, name)
    content = dlpack.read(values.__dlpack__())
    assert content.address == values.ctypes.data
    assert content.shape == shape
    assert content.dtype == values.dtype
    assert content.device == 0


def test_reading_strides_and_offsets() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    content = dlpack.read(values[1:, :, 2].__dlpack__())
    assert content.address == values.data_ptr() + 4 * 14
    assert content.shape == (1, 3)
    assert content.strides == (12, 4)


def test_reading_what_begins_later() -> None:
    values = np.arange(6.0)
    capsule = values.__dlpack__()
    dlpack._Tensor.from_address(dlpack._pointer(capsule, b"dltensor")).byte_offset = 16
    assert dlpack.read(capsule).address == values.ctypes.data + 16


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, np.dtype(ml_dtypes.bfloat16)),
        (torch.float16, np.dtype(np.float16)),
        (torch.bool, np.dtype(np.bool_)),
        (torch.complex64, None),
    ],
)
def test_reading_those_of_torch(dtype: torch.dtype, expected: np.dtype | None) -> None:
    assert dlpack.read(torch.zeros(3, dtype=dtype).__dlpack__()).dtype == expected


@pytest.mark.parametrize(
    ("code", "bits", "lanes"),
    [(0, 4, 1), (2, 8, 1), (2, 32, 4), (6, 32, 1), (9, 8, 1), (2, 128, 1)],
)
def test_types_that_numpy_lacks(code: int, bits: int, lanes: int) -> None:
    kind = dlpack._Type(code, bits, lanes)
    assert dlpack._dtype_of(kind) is None


@pytest.mark.parametrize("name", DTYPES)
def test_others_read_ours(name: str) -> None:
    values = (np.arange(6) % 2).astype(name).reshape(2, 3)
    np.testing.assert_array_equal(np.from_dlpack(Memory(values)), values)
    tensor = torch.from_dlpack(Memory(values))
    np.testing.assert_array_equal(tensor.numpy(), values)
    assert tensor.data_ptr() == values.ctypes.data


def test_torch_reads_our_bfloat16() -> None:
    values = np.arange(6).astype(ml_dtypes.bfloat16)
    tensor = torch.from_dlpack(Memory(values))
    assert tensor.dtype == torch.bfloat16
    assert tensor.float().tolist() == [0, 1, 2, 3, 4, 5]


def test_memory_lives_as_long_as_what_reads_it() -> None:
    memory = Memory(np.arange(5.0))
    gone = weakref.ref(memory)
    tensor = torch.from_dlpack(memory)
    view = tensor[1:3]
    del memory, tensor
    gc.collect()
    assert view.tolist() == [1, 2]
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


def test_a_capsule_that_nobody_takes() -> None:
    memory = Memory(np.arange(5.0))
    gone = weakref.ref(memory)
    capsule = memory.__dlpack__()
    del memory
    gc.collect()
    assert gone() is not None
    del capsule
    gc.collect()
    assert gone() is None


def test_a_capsule_that_was_taken_cannot_be_read_again() -> None:
    capsule = Memory(np.arange(5.0)).__dlpack__()
    torch.utils.dlpack.from_dlpack(capsule)
    with pytest.raises(ValueError, match="incorrect name"):
        dlpack.read(capsule)
