"""The emulator itself: it computes what the GPU would, and catches what the GPU would not tell."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from kernels.emulation import KERNELS, OUTPUT, UNINITIALISED

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
FLAGS = ("-std=c++17", "-DHYDRA_EMULATED", f"-I{KERNELS}", "-Wno-unused-value")
SOURCES = ["-x", "c++", str(Path(__file__).parent / "faulty.cu")]
SOURCES += [str(path) for path in sorted((KERNELS / "emulator").glob("*.cpp"))]

# kernel: what the message says, beside block and thread
FAULTS = {
    "race_between_warps": "race",
    "race_between_lanes": "race",
    "write_after_read": "race",
    "poison": "written",
    "shared_outside": "outside",
    "shared_misaligned": "misaligned",
    "global_outside": "cells",
    "global_misaligned": "misaligned",
    "before_the_wait": "wait_for_previous_kernel",
    "read_only_cache": "written in this launch",
    "no_fence": "fence",
    "some_skip_the_barrier": "sync_block",
    "some_skip_the_shuffle": "shuffle_xor",
    "different_masks": "mask",
    "different_operations": "mma_half",
    "overflow": "overflow",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("emulator") / "libfaulty.so"
    subprocess.run(["g++", "-O2", "-shared", "-fPIC", *FLAGS, *SOURCES, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.hydra_emulator_fault.restype = ctypes.c_char_p
    return library


def run(library: ctypes.CDLL, kernel: str, kind: int = OUTPUT) -> tuple[int, str]:
    """Status and message of a kernel on 64 registered floats, 16-byte aligned."""
    room = np.zeros(128, np.float32)
    start = -room.ctypes.data % 16 // 4
    address = ctypes.c_void_p(room[start:].ctypes.data)
    library.hydra_emulator_clear()
    library.hydra_emulator_register(address, ctypes.c_size_t(256), b"cells", kind)
    status = getattr(library, kernel)(address)
    message = library.hydra_emulator_fault().decode()
    library.hydra_emulator_clear()
    return status, message


@pytest.mark.parametrize("reverse", [0, 1], ids=["forward", "reverse"])
def test_what_is_right_passes(library: ctypes.CDLL, reverse: int) -> None:
    library.hydra_emulator_schedule(reverse)
    assert run(library, "good") == (0, "")
    assert run(library, "lanes_meet_in_between") == (0, "")
    library.hydra_emulator_schedule(0)


@pytest.mark.parametrize("reverse", [0, 1], ids=["forward", "reverse"])
@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_named_and_placed(library: ctypes.CDLL, kernel: str, reverse: int) -> None:
    library.hydra_emulator_schedule(0 if kernel == "no_fence" else reverse)
    status, message = run(library, kernel)
    library.hydra_emulator_schedule(0)
    assert status != 0
    assert FAULTS[kernel] in message.lower(), message
    assert "block (" in message
    assert "thread " in message
    assert "faulty.cu" in message
    assert run(library, "good") == (0, "")  # and the next launch is none the worse


def test_a_read_of_what_nobody_wrote(library: ctypes.CDLL) -> None:
    status, message = run(library, "read_nobody_wrote", UNINITIALISED)
    assert status != 0
    assert "byte 0" in message
    assert run(library, "read_nobody_wrote", OUTPUT) == (0, "")


@pytest.mark.parametrize("kernel", ["odd_block", "too_much_shared"])
def test_a_launch_that_no_device_takes(library: ctypes.CDLL, kernel: str) -> None:
    status, message = run(library, kernel)
    assert status != 0
    assert message


def fragments(
    matrix: npt.NDArray[np.generic], register: int, across: bool
) -> npt.NDArray[np.uint32]:
    """One register of all lanes: 4 bytes of row g (or column g), K from 4 bytes times t on."""
    if across:
        matrix = matrix.T
    words = np.ascontiguousarray(matrix).view(np.uint32)  # [rows, 8 words of K]
    rows = 8 * (register % 2) if not across else 0
    first = 4 * (register // 2) if not across else 4 * register
    return words[rows : rows + 8, first : first + 4].reshape(32)


@pytest.mark.parametrize(
    ("function", "dtype", "depth"),
    [
        ("multiply_half", np.float16, 16),
        ("multiply_bfloat", ml_dtypes.bfloat16, 16),
        ("multiply_int8", np.int8, 32),
    ],
)
def test_mma(library: ctypes.CDLL, function: str, dtype: npt.DTypeLike, depth: int) -> None:
    rng = np.random.default_rng(0)
    scale = 100 if dtype == np.int8 else 1
    a = (rng.uniform(-1, 1, (16, depth)) * scale).astype(dtype)
    b = (rng.uniform(-1, 1, (depth, 8)) * scale).astype(dtype)
    sums = np.int32 if dtype == np.int8 else np.float32
    c = (rng.uniform(-1, 1, (16, 8)) * 100).astype(sums)
    a_registers = np.stack([fragments(a, r, False) for r in range(4)], 1).copy()
    b_registers = np.stack([fragments(b, r, True) for r in range(2)], 1).copy()
    # C: rows g and g + 8, columns 2 t and 2 t + 1.
    c_registers = c.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4).copy()
    library.hydra_emulator_clear()
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (a_registers, b_registers, c_registers)]
    assert getattr(library, function)(*pointers) == 0
    found = c_registers.reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)
    expected = c.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_conversions(library: ctypes.CDLL) -> None:
    halves = np.arange(65536, dtype=np.uint16)
    floats = np.empty(65536, np.float32)
    library.halves_to_floats(*(ctypes.c_void_p(x.ctypes.data) for x in (halves, floats)), 65536)
    np.testing.assert_array_equal(floats, halves.view(np.float16).astype(np.float32))

    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 200000, np.uint32).view(np.float32)
    values = np.concatenate([values, floats, rng.uniform(-2, 2, 100000).astype(np.float32)])
    values = values[~np.isnan(values)]
    numbers = floats[np.isfinite(floats)]
    ties = (numbers[:-1] + numbers[1:]) / 2  # exact in fp32: one bit more than a half has
    values = np.concatenate([values, ties])
    for name, dtype in [
        ("floats_to_halves", np.float16),
        ("floats_to_bfloats_each", ml_dtypes.bfloat16),
    ]:
        bits = np.empty(len(values), np.uint16)
        getattr(library, name)(
            *(ctypes.c_void_p(x.ctypes.data) for x in (values, bits)), len(values)
        )
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(bits, values.astype(dtype).view(np.uint16))
    integers = np.empty(len(values), np.int8)
    library.floats_to_int8s(
        *(ctypes.c_void_p(x.ctypes.data) for x in (values, integers)), len(values)
    )
    expected = np.rint(np.clip(values, -128, 127)).astype(np.int8)
    np.testing.assert_array_equal(integers, expected)


MAIN = """
#include <cstdio>
extern "C" int good(float*);
extern "C" int shared_outside(float*);
extern "C" const char* hydra_emulator_fault();
int main() {
  float data[64];
  for (int i = 0; i < 20; ++i) {
    if (good(data) != 0) return std::puts(hydra_emulator_fault()), 1;
    if (shared_outside(data) == 0) return std::puts("missed"), 1;
  }
  return std::puts("fine"), 0;
}
"""


def test_under_the_sanitizers(tmp_path: Path) -> None:
    main, program = tmp_path / "main.cpp", tmp_path / "main"
    main.write_text(MAIN)
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    subprocess.run(["g++", *sanitizers, *FLAGS, *SOURCES, main, "-o", program], check=True)
    result = subprocess.run(
        [program],
        capture_output=True,
        text=True,
        env={"ASAN_OPTIONS": "detect_leaks=0"},
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr[-3000:]
