"""Compiling the plugin and the programs that drive it, on top of a library of kernels.

The kernels are the emulated ones, or those of a GPU; g++ and, for the plugin itself, headers of
TensorRT and CUDA are all that it takes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kernels.emulation import KERNELS

PLUGIN = KERNELS / "plugin"
HEADS = ("specification", "signature", "plan", "heads")
SYSTEM_HEADERS = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations")


@dataclass(frozen=True)
class Machine:
    """Where the programs run."""

    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()


EMULATED = Machine(("-DHYDRA_EMULATED",))


def gpu_machine() -> Machine:
    """A GPU, with the CUDA runtime of the toolkit."""
    toolkit = cuda_toolkit()
    assert toolkit
    runtime = ("-lcudart_static", "-ldl", "-lrt", "-lpthread")
    return Machine((f"-isystem{toolkit / 'include'}",), (f"-L{toolkit / 'lib64'}", *runtime))


def tensorrt_headers() -> list[Path]:
    """Folders with NvInferRuntime.h: those that TENSORRT_ROOT names, else the system's."""
    roots = [Path(root) for root in re.split("[;:]", os.environ.get("TENSORRT_ROOT", "")) if root]
    folders = [folder for root in roots for folder in (root / "include", root)]
    found = [folder for folder in folders or map(Path, SYSTEM_HEADERS) if is_tensorrt(folder)]
    assert found or not roots, "TENSORRT_ROOT names no folder with TensorRT's headers"
    return found


def is_tensorrt(folder: Path) -> bool:
    return (folder / "NvInferRuntime.h").exists()


def version_of(headers: Path) -> tuple[int, int]:
    """Major and minor version of TensorRT's headers."""
    text = (headers / "NvInferVersion.h").read_text()
    found = [
        re.search(rf"define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)", text)
        for part in ("MAJOR", "MINOR")
    ]
    major, minor = (int(match[1]) for match in found if match)
    return major, minor


def cuda_toolkit() -> Path | None:
    """Where CUDA's headers are, in include/, if they are."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1]] if nvcc else []
    folders.append(Path("/usr/local/cuda"))
    found = (path for path in folders if (path / "include" / "cuda_runtime_api.h").exists())
    return next(found, None)


def compile_objects(folder: Path, names: tuple[str, ...], *flags: str) -> list[Path]:
    """An object file of each source in kernels/plugin."""
    jobs, objects = [], []
    for name in names:
        objects.append(folder / f"{name}.o")
        command = ["g++", "-std=c++17", "-fPIC", *WARNINGS, f"-I{KERNELS}", *flags]
        jobs.append(subprocess.Popen([*command, "-c", PLUGIN / f"{name}.cpp", "-o", objects[-1]]))
    assert all(job.wait() == 0 for job in jobs)
    return objects


def link(to: Path, kernels: Path, *arguments: Path | str) -> Path:
    command = ["g++", *arguments, kernels, f"-Wl,-rpath,{kernels.parent}", "-o", to]
    subprocess.run(command, check=True)
    return to


def build_heads(folder: Path, kernels: Path, machine: Machine) -> Path:
    """The program that runs `Heads` alone."""
    objects = compile_objects(folder, (*HEADS, "host_case", "host_heads"), *machine.flags)
    return link(folder / "host_heads", kernels, *objects, *machine.libraries)


@dataclass(frozen=True)
class Plugin:
    """A plugin library, and the program that drives it."""

    library: Path
    host: Path

    @property
    def command(self) -> list[Path | str]:
        return [self.host, self.library]


def build_plugin(folder: Path, kernels: Path, headers: Path, machine: Machine) -> Plugin:
    """Both, for the TensorRT of these headers."""
    toolkit = cuda_toolkit()
    assert toolkit
    include = (f"-isystem{headers}", f"-isystem{toolkit / 'include'}")
    objects = compile_objects(folder, (*HEADS, "plugin"), "-fvisibility=hidden", *include)
    exports = f"-Wl,--version-script={PLUGIN / 'exports.map'}"
    library = folder / f"libhydra_plugin{version_of(headers)[0]}.so"
    link(library, kernels, "-shared", exports, "-Wl,--no-undefined", *objects)
    objects = compile_objects(folder, ("host_case", "host"), *machine.flags, *include)
    return Plugin(library, link(folder / "host", kernels, *objects, *machine.libraries, "-ldl"))
