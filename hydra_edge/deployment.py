"""`steps`: what has to be done where until an engine lies on its device, as commands.

TensorRT builds where it runs; TensorRT-RTX builds anywhere for a generation of cards; a program for
the CPU is timed where it is built.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra_edge import targets
from hydra_edge.errors import InputError
from hydra_edge.targets import Target

HERE, DEVICE = "here", "device"
_USUAL = (1, 8, 32)  # what `compile` takes without --batch
_CALIBRATED = ("int8", "fp8")
_CALIBRATION = "calibration.npz"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        where: "here" or "device".
        command: For a shell; DEVICE stands for the name that ssh knows the device by.
        why: What it is for.
    """

    where: str
    command: str
    why: str


def steps(
    target: Target, asked: str, graph: Path, precision: str, batches: Sequence[int] = _USUAL
) -> tuple[Step, ...]:
    """Tell what has to be done where.

    Args:
        target: The row.
        asked: What the user called it, e.g. with a release; ``local`` means that here is there.
        graph: The float graph's file.
        precision: To build in.
        batches: To build for.

    Raises:
        InputError: The target does not have that precision.
    """
    if precision not in target.precisions:
        raise InputError(
            f"{target.name} has no {precision}.",
            f"It has: {', '.join(target.precisions)}.",
            "Pick one of those.",
        )
    local = asked.partition("@")[0] == targets.LOCAL
    engine = shlex.quote(f"{graph.stem}.hydra")
    words = [
        *("hydra-edge compile", shlex.quote(str(graph))),
        *("--target", asked),
        *(("--precision", precision) if precision != "fp32" else ()),
        *(("--calibration", _CALIBRATION) if precision in _CALIBRATED else ()),
        *(("--batch", _range(batches)) if tuple(batches) != _USUAL else ()),
        *("-o", engine),
    ]
    compiling = Step(HERE, " ".join(words), _why(target, packed=False))
    if local or target.gpu is None:
        return (*_full_speed(target, HERE), compiling)
    copying = Step(HERE, f"scp {engine} DEVICE:", "one file holds all that is needed there")
    if target.backend == "tensorrt_rtx":
        return (compiling, copying)
    packing = replace(compiling, why=_why(target, packed=True))
    building = Step(DEVICE, f"hydra-edge compile {engine} -o {engine}", _why(target, packed=False))
    return (packing, copying, _checking(target), *_full_speed(target, DEVICE), building)


def _range(batches: Sequence[int]) -> str:
    """Smallest, best and largest."""
    ordered = sorted(batches)
    return f"{ordered[0]},{ordered[len(ordered) // 2]},{ordered[-1]}"


def _checking(target: Target) -> Step:
    why = "names what is not installed yet"
    if target.is_jetson:
        why += "; TensorRT is JetPack's, seen from `python3 -m venv --system-site-packages`"
    return Step(DEVICE, "hydra-edge doctor", why)


def _full_speed(target: Target, where: str) -> list[Step]:
    """Power mode and clocks of the row's figures, which are also those to time kernels at."""
    if target.gpu is None or not target.gpu.modes:
        return []
    fastest = target.gpu.modes[0]
    return [
        Step(
            where,
            f"sudo nvpmodel -m {fastest.number}",
            f"{fastest.name}, as `sudo nvpmodel -q` must say then; it may want to reboot",
        ),
        Step(where, "sudo jetson_clocks", "holds its highest clocks while kernels are timed"),
    ]


def _why(target: Target, *, packed: bool) -> str:
    if packed:
        return "quantizes, fuses, verifies and packs up; that needs no GPU"
    return {
        "onnxruntime": "lowerings are timed where they will run",
        "tensorrt": "TensorRT times its kernels where they will run",
        "tensorrt_rtx": "TensorRT-RTX needs no GPU to build",
    }[target.backend]
