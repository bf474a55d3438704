"""Compiles ``libcuda.c`` and steers it: the CUDA driver of the tests where there is no GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

LIBRARY = "libcuda.so.1"
SOURCE = Path(__file__).with_name("libcuda.c")
# CUresult
INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILED = 1, 2, 700, 719


def missing() -> str | None:
    """Why the double cannot be compiled, or nothing run on it, if so."""
    if importlib.util.find_spec("pycuda") is None:
        return "PyCUDA is not installed: run python tests/gpu/driver/install_pycuda.py"
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        return "gcc or nm is not installed: the double of the CUDA driver cannot be compiled"
    if headers() is None:
        return "cuda.h is not there: the double of the CUDA driver cannot be compiled"
    return None


def is_driver_here() -> bool:
    """Whether this process finds a CUDA driver, be it the double."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def headers() -> Path | None:
    """The folder with ``cuda.h``: that of nvcc, or of NVIDIA's packages on PyPI."""
    folders = [Path("/usr/local/cuda/include")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        said = subprocess.run(
            [nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"],
            capture_output=True,
            text=True,
            check=False,
        ).stderr
        tops = [line.partition("TOP=")[2] for line in said.splitlines() if "TOP=" in line]
        folders = [Path(top) / "include" for top in tops] + folders
    package = importlib.util.find_spec("nvidia")
    for place in (package.submodule_search_locations or []) if package else []:
        folders += sorted(Path(place).glob("*/include"))
    return next((folder for folder in folders if (folder / "cuda.h").exists()), None)


def compile_double(folder: Path, pycuda: Path | None = None) -> Path:
    """Compile it.

    Args:
        folder: Where ``libcuda.so.1`` is put.
        pycuda: PyCUDA's extension module. Whatever it needs of the driver beside what the double
            has becomes a function that fails.

    Returns:
        The library.
    """
    include = headers()
    assert include is not None
    absent = folder / "absent.c"
    absent.write_text("".join(map(_failing, _needed(pycuda) if pycuda else [])))
    library = folder / LIBRARY
    subprocess.run(
        [
            *("gcc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
            *(f"-I{include}", "-o", str(library), str(SOURCE), str(absent)),
            *(f"-Wl,-soname,{LIBRARY}", "-ldl", "-lpthread"),
        ],
        check=True,
    )
    return library


def _needed(pycuda: Path) -> list[str]:
    said = subprocess.run(
        ["nm", "-D", "--undefined-only", str(pycuda)], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1].partition("@")[0] for line in said.stdout.splitlines()]
    return [name for name in names if name.startswith("cu")]


def _failing(name: str) -> str:
    return f"__attribute__((weak)) int {name}(void) {{ return 801; /* not supported */ }}\n"


def pycuda_library() -> Path:
    """PyCUDA's extension module."""
    package = importlib.util.find_spec("pycuda")
    assert package is not None
    (place,) = package.submodule_search_locations or []
    return next(Path(place).glob("_driver*.so"))


@dataclass(frozen=True)
class Counts:
    """What is there; ``lost`` are bytes and objects that were there when the context died.

    ``retained`` counts references to the primary context, ``pushed`` contexts on the stacks of all
    threads, ``pageable`` copies from or to memory
    that is not page-locked.
    """

    retained: int
    pushed: int
    device_bytes: int
    host_bytes: int
    streams: int
    events: int
    graphs: int
    executables: int
    lost: int
    pageable: int

    def left_over(self) -> dict[str, int]:
        """Of what should be none in the end."""
        return {name: count for name, count in vars(self).items() if name != "pageable"}


class Double:
    """The double that this process has loaded as its CUDA driver."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.double_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        self._library.double_calls.restype = ctypes.c_int64

    @staticmethod
    def is_loaded() -> bool:
        """Whether it, and no driver of NVIDIA's, is what this process finds."""
        return is_driver_here() and hasattr(ctypes.CDLL(LIBRARY), "double_set")

    def set(self, name: str, value: int) -> None:
        """Change what the double is, e.g. ``integrated``."""
        self._library.double_set(name.encode(), value)

    @contextmanager
    def having(self, **settings: int) -> Iterator[None]:
        """Change it for a while."""
        before = {name: self.get(name) for name in settings}
        for name, value in settings.items():
            self.set(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                self.set(name, value)

    def get(self, name: str) -> int:
        self._library.double_get.restype = ctypes.c_int64
        return int(self._library.double_get(name.encode()))

    def fail(self, function: str, code: int, after: int = 0) -> None:
        """The call of a function after ``after`` further ones fails, once."""
        self._library.double_fail(function.encode(), after, code)

    def stick(self, code: int) -> None:
        """From now on everything fails, as after an illegal access, until the context is gone."""
        self._library.double_stick(code)

    def counts(self) -> Counts:
        """What is left over now."""
        values = (ctypes.c_int64 * len(fields(Counts)))()
        self._library.double_counts(values)
        return Counts(*values)

    def calls(self, function: str) -> int:
        """How often a function was called."""
        return int(self._library.double_calls(function.encode()))
