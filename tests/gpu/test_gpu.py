"""Runs this folder's tests of the GPU on a double of the CUDA driver: no GPU is needed.

PyCUDA and cuda-python's bindings are the real ones. Each file has a process of its own, whose
``libcuda.so.1`` is compiled from ``driver/libcuda.c``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.driver import double

HERE = Path(__file__).parent
NEEDS_A_GPU = {"test_engines.py", Path(__file__).name}
FILES = sorted(
    path.name
    for path in HERE.glob("test_*.py")
    if "pytest.mark.gpu" in path.read_text() and path.name not in NEEDS_A_GPU
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = double.missing()
    if reason:
        pytest.skip(reason)
    return double.compile_double(tmp_path_factory.mktemp("driver"), double.pycuda_library())


@pytest.mark.parametrize("name", FILES)
def test_on_the_double(library: Path, name: str) -> None:
    path = f"{library.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(HERE / name), "-m", "gpu", "-q"),
            *("-p", "no:cacheprovider", "-p", "no:xdist"),
        ],
        env={**os.environ, "LD_LIBRARY_PATH": path},
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parents[1],
        timeout=300,  # callers that wait for each other in vain
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert re.search(r"\b[1-9]\d* passed", said), said
    assert "PyCUDA WARNING" not in said, said
