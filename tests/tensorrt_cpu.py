"""The real bindings of TensorRT 11.4 on a machine without a GPU, in processes of their own.

The builder behind them is that of TensorRT-RTX, which needs no GPU: what a build configures is
checked for real, what it gives cannot be loaded.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

MAKE = Path(__file__).parents[2] / "shared" / "tensorrt_cpu" / "make.py"


@functools.cache
def environment() -> dict[str, str]:
    """What a process has to be started with so that it can import ``tensorrt``."""
    if not MAKE.exists():
        pytest.skip("the stand-in for TensorRT's libraries is not here")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    folder = tempfile.mkdtemp(prefix="tensorrt_cpu")
    made = subprocess.run([sys.executable, MAKE, folder], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"TensorRT's bindings cannot be had: {made.stderr.strip().splitlines()[-1:]}")
    exports = dict(re.findall(r"export (\w+)=(.+)", made.stdout))
    return {**os.environ, **{name: value.split("${")[0] for name, value in exports.items()}}


def run(script: str, *arguments: str) -> str:
    """What a script prints that may import ``tensorrt`` and the modules of the tests."""
    preamble = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + script, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
