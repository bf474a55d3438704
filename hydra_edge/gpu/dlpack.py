"""DLPack capsules of CUDA arrays, which PyCUDA does not know.

Layout and rules: https://dmlc.github.io/dlpack/latest/python_spec.html (version 0: every consumer
takes it). A capsule is destroyed by C code that must leave a raised exception alone, which no
callback written in Python can: so numpy makes the capsules, and they are relabelled.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

CUDA, CUDA_MANAGED = 2, 13  # DLDeviceType
_NAME = b"dltensor"
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode of numpy's own types
_OTHERS: dict[np.dtype[Any], tuple[int, int]] = {
    np.dtype(ml_dtypes.bfloat16): (4, 16),
    np.dtype(ml_dtypes.float8_e4m3fn): (10, 8),
    np.dtype(ml_dtypes.float8_e5m2): (12, 8),
}


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """``DLTensor``, with which a ``DLManagedTensor`` begins."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("type", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@dataclass(frozen=True)
class Content:
    """What a capsule says.

    Attributes:
        address: Of the first element.
        shape: Sizes.
        strides: In elements; None for C order.
        dtype: Type of the elements; None if numpy has none like it.
        device: Which GPU.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any] | None
    device: int


def read(capsule: object) -> Content:
    """What is in a capsule, which keeps the memory alive for as long as it lives itself."""
    tensor = _Tensor.from_address(_pointer(capsule, _NAME))
    ndim = tensor.ndim
    return Content(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=tuple(tensor.shape[:ndim]),
        strides=tuple(tensor.strides[:ndim]) if tensor.strides else None,
        dtype=_dtype_of(tensor.type),
        device=int(tensor.device.id),
    )


def write(
    owner: object,
    address: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    device: tuple[int, int],
) -> object:
    """A capsule of memory in C order.

    Args:
        owner: Kept alive until the consumer lets go.
        address: Of the first element.
        shape: Sizes.
        dtype: Type of the elements.
        device: What kind of memory, and which of that kind.
    """
    code, bits = _OTHERS.get(dtype) or (_KINDS[dtype.kind], 8 * dtype.itemsize)
    known = np.dtype(f"u{dtype.itemsize}") if dtype in _OTHERS else dtype
    # numpy keeps what it is shown alive, and never looks at the memory.
    capsule = np.asarray(_Shown(owner, address, shape, known.str)).__dlpack__()
    tensor = _Tensor.from_address(_pointer(capsule, _NAME))
    tensor.device = _Device(*device)
    tensor.type = _Type(code, bits, 1)
    return capsule


class _Shown:
    """Memory of any kind, as numpy wants to see it."""

    def __init__(self, owner: object, address: int, shape: tuple[int, ...], kind: str) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": kind,
            "version": 3,
        }


def _dtype_of(kind: _Type) -> np.dtype[Any] | None:
    if kind.lanes != 1:
        return None
    for other, known in _OTHERS.items():
        if known == (kind.code, kind.bits):
            return other
    letter = next((letter for letter, code in _KINDS.items() if code == kind.code), None)
    if letter == "b":
        return np.dtype(np.bool_) if kind.bits == 8 else None
    least = 16 if letter == "f" else 8
    if letter is None or kind.bits not in (8, 16, 32, 64) or kind.bits < least:
        return None
    dtype: np.dtype[Any] = np.dtype(f"{letter}{kind.bits // 8}")
    return dtype
