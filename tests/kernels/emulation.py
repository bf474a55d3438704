"""The kernels on the CPU: compiled with g++, every access checked, behind their C interface."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hydra_edge.kernels import Library

KERNELS = Path(__file__).parents[2] / "kernels"
SOURCES = ("launchers.cu", "tables.cu", "memory.cu", "configuration.cpp")
CONSTANT, INPUT, OUTPUT, UNINITIALISED = range(4)

Array = npt.NDArray[np.generic]


def compile_emulated(to: Path, kernels: Path = KERNELS, flags: tuple[str, ...] = ("-O2",)) -> Path:
    """The shared library of the kernels in `kernels`, for this CPU; one object per source."""
    sources = [kernels / name for name in SOURCES]
    sources += sorted((KERNELS / "emulator").glob("*.cpp"))
    objects, jobs = [], []
    for source in sources:
        objects.append(to.parent / f"{to.stem}-{source.stem}.o")
        command = ["g++", "-std=c++17", "-fPIC", "-DHYDRA_EMULATED", f"-I{kernels}", *flags]
        jobs.append(subprocess.Popen([*command, "-c", "-x", "c++", source, "-o", objects[-1]]))
    assert all(job.wait() == 0 for job in jobs)
    subprocess.run(["g++", "-shared", *flags, *objects, "-o", to], check=True)
    return to


def poison(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """What an output holds before a kernel writes it: NaN, or -86."""
    byte = 0xAA if np.dtype(dtype) == np.int8 else 0xFF
    values = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, byte, np.uint8)
    return values.view(dtype).reshape(shape)


class Emulator:
    """One emulated library, and the arrays that its kernels may touch."""

    def __init__(self, path: Path) -> None:
        self.library = Library(path)
        self.handle = self.library.handle
        self.handle.hydra_emulator_fault.restype = ctypes.c_char_p
        self.arrays: list[Array] = []

    def __enter__(self) -> Emulator:
        self.handle.hydra_emulator_clear()
        self.arrays = []
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.hydra_emulator_clear()

    def array(self, values: npt.ArrayLike | None, name: str, kind: int = CONSTANT) -> int | None:
        """A copy that starts at a multiple of 16, registered; kernels see nothing around it."""
        if values is None:
            return None
        values = np.asarray(values)
        room = np.zeros(values.nbytes + 16, np.uint8)
        start = -room.ctypes.data % 16
        copy = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        copy[...] = values
        self.arrays.append(copy)
        self.handle.hydra_emulator_register(
            ctypes.c_void_p(copy.ctypes.data), ctypes.c_size_t(copy.nbytes), name.encode(), kind
        )
        return copy.ctypes.data

    def output(self, shape: tuple[int, ...], dtype: npt.DTypeLike, name: str) -> tuple[int, Array]:
        """Memory that holds `poison` until a kernel writes it."""
        address = self.array(poison(shape, dtype), name, UNINITIALISED)
        assert address is not None
        return address, self.arrays[-1]

    def device(self, compute_capability: int, sm_count: int, shared_bytes: int) -> None:
        self.handle.hydra_emulator_device(compute_capability, sm_count, shared_bytes)

    def reverse(self, on: bool) -> None:
        self.handle.hydra_emulator_schedule(int(on))

    @property
    def fault(self) -> str:
        return str(self.handle.hydra_emulator_fault().decode())


class Machine(Protocol):
    """What runs the kernels, and holds the arrays that they may touch."""

    @property
    def library(self) -> Library: ...
    @property
    def arrays(self) -> list[Array]: ...
    @property
    def fault(self) -> str: ...
    def array(
        self, values: npt.ArrayLike | None, name: str, kind: int = CONSTANT
    ) -> int | None: ...
    def output(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, name: str
    ) -> tuple[int, Array]: ...
    def reverse(self, on: bool) -> None: ...
    def __enter__(self) -> Machine: ...
    def __exit__(self, *error: object) -> None: ...
