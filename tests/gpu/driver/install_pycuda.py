"""Builds and installs PyCUDA on a machine that has no GPU.

Usage: python tests/gpu/driver/install_pycuda.py [--constraint FILE]

PyCUDA comes as source and is linked with the CUDA driver, for which the double of the tests stands
in; at run time the real one is loaded where there is one. Without a compiler or CUDA's headers
nothing is installed, and what needs PyCUDA is skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import double


def obstacle() -> str | None:
    """What keeps PyCUDA from being built here, if anything does."""
    for compiler in ("gcc", "g++"):
        if shutil.which(compiler) is None:
            return f"{compiler} is not installed"
    return None if double.headers() else "cuda.h was found neither beside nvcc nor on PyPI's paths"


def install(constraints: list[str]) -> None:
    """Fetch the source, tell it where CUDA is, and let pip do the rest."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    limits = [word for file in constraints for word in ("--constraint", str(Path(file).resolve()))]
    include = double.headers()
    assert include is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link = double.compile_double(folder).rename(folder / "libcuda.so")
        fetch = ["download", "--no-deps", "--no-binary", "pycuda", "--dest", name, "pycuda>=2024.1"]
        subprocess.run([*pip, *fetch, *limits], check=True)
        with tarfile.open(next(folder.glob("pycuda-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source = next(path for path in folder.glob("pycuda-*") if path.is_dir())
        (source / "siteconf.py").write_text(
            f"CUDA_ROOT = {str(include.parent)!r}\n"
            "CUDA_ENABLE_CURAND = False\n"
            f"CUDADRV_LIB_DIR = [{str(link.parent)!r}]\n"
            "CXXFLAGS = ['-O1', '-w']\n"  # compiles sooner than by default, and is as fast
        )
        subprocess.run([*pip, "install", *limits, str(source)], check=True)


def main() -> None:
    """Install it, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--constraint", action="append", default=[])
    arguments = parser.parse_args()
    if importlib.util.find_spec("pycuda") is not None:
        return
    reason = obstacle()
    if reason:
        print(f"PyCUDA is not installed, and what needs it is not tested: {reason}.")
        return
    install(arguments.constraint)


if __name__ == "__main__":
    main()
