from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernels.emulation import Emulator, compile_emulated


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("HYDRA_KERNELS_UNDER_TEST")  # test_mutations.py
    if given:
        return Path(given)
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the kernels' emulator cannot be compiled")
    return compile_emulated(tmp_path_factory.mktemp("kernels") / "libhydra_kernels_emulated.so")


@pytest.fixture
def emulator(library: Path) -> Iterator[Emulator]:
    with Emulator(library) as emulator:
        emulator.device(87, 16, 163 * 1024)
        emulator.reverse(False)
        yield emulator
