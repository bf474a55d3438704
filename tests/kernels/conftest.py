from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kernels.emulation import Emulator, compile_emulated

if TYPE_CHECKING:
    from kernels.gpu import Gpu

COMPILING_SECONDS = 600


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("HYDRA_KERNELS_UNDER_TEST")  # test_mutations.py
    if given:
        return Path(given)
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the kernels' emulator cannot be compiled")
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent  # of all workers: the first to come compiles
    path, claim = folder / "libhydra_kernels_emulated.so", folder / "compiling"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        for _ in range(COMPILING_SECONDS):
            if path.exists():
                return path
            time.sleep(1)
        pytest.fail(f"the kernels were not compiled within {COMPILING_SECONDS} s")
    return compile_emulated(folder / "unfinished.so").rename(path)


@pytest.fixture
def emulator(library: Path) -> Iterator[Emulator]:
    with Emulator(library) as emulator:
        emulator.device(87, 16, 163 * 1024)
        emulator.reverse(False)
        yield emulator


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    from kernels import gpu

    reason = gpu.missing()
    if reason:
        pytest.skip(reason)
    path = gpu.library_path()
    assert path is not None
    with gpu.Gpu(path) as device:
        yield device


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Emulator | Gpu:
    """What runs the kernels: the emulator, and a GPU where there is one."""
    return request.getfixturevalue("emulator" if request.param == "emulated" else "gpu")
