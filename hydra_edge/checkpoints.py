"""The checkpoint of a distillation: where a run stopped, and everything it needs to go on.

One safetensors file. Learning rates and random draws are functions of the seed and the position, so
they are not in it, and a run may go on with another number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import nn

from hydra_edge.artifacts.files import write_atomic
from hydra_edge.ensembles import tensor_state
from hydra_edge.errors import ArtifactError, DistillationError

NAME = "checkpoint.safetensors"
_STUDENT, _OPTIMIZER, _LOSSES = "student.", "optimizer.", "losses."


@dataclass
class Checkpoint:
    """A position in a run and its state.

    Attributes:
        phase: 0 for the mean of the members, 1 for the heads.
        epoch: Whole epochs done in that phase.
        step: Batches done in the epoch after those.
        losses: Loss of every batch so far, by phase; of a captioner, of every epoch.
        student: The student's tensors.
        optimizer: AdamW's state by parameter number.
        param_groups: AdamW's settings.
        scaler: State of the gradient scaler of fp16, or None.
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    losses: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    student: Mapping[str, torch.Tensor] = field(default_factory=dict)
    optimizer: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    param_groups: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, Any] | None = None

    @property
    def started(self) -> bool:
        """Whether anything was trained."""
        return bool(self.student)


def write(
    folder: Path,
    identity: Mapping[str, str],
    position: tuple[int, int, int],
    losses: tuple[list[float], list[float]],
    student: nn.Module,
    optimizer: Any,
    scaler: Any,
) -> None:
    """Write the checkpoint in one step: a kill leaves the old one.

    Args:
        folder: The work folder.
        identity: What must be equal for a run to go on from it.
        position: Phase, epochs done, steps done in the next epoch.
        losses: Of every batch so far, by phase.
        student: The student.
        optimizer: Its optimizer.
        scaler: Of fp16 gradients, or None.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    saved = optimizer.state_dict()
    tensors = {f"{_STUDENT}{name}": value for name, value in tensor_state(student).items()}
    for index, state in saved["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{name}": value for name, value in state.items()}
    for phase, values in enumerate(losses):
        tensors[f"{_LOSSES}{phase}"] = torch.tensor(values, dtype=torch.float32)
    # Clones, because safetensors refuses tensors that share memory.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    phase, epoch, step = position
    header = {
        "identity": identity,
        "phase": phase,
        "epoch": epoch,
        "step": step,
        "param_groups": saved["param_groups"],
        "scaler": scaler.state_dict() if scaler else None,
    }
    data: bytes = safetensors.torch.save(tensors, {"hydra_edge": json.dumps(header)})
    write_atomic(folder / NAME, data)


def read(folder: Path, identity: Mapping[str, str]) -> Checkpoint:
    """Read the checkpoint of a work folder; an empty one where there is none.

    Raises:
        ArtifactError: The file is damaged.
        DistillationError: It belongs to another run.
    """
    path = folder / NAME
    if not path.exists():
        return Checkpoint()
    header, tensors = _load(path)
    saved: dict[str, str] = header["identity"]
    changed = [name for name, value in identity.items() if saved.get(name) != value]
    if changed:
        raise DistillationError(
            f"'{path}' belongs to a run with another {', another '.join(changed)}.",
            "Going on from it would mix two runs.",
            "Choose another workdir, or delete the file to start over.",
        )
    optimizer: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in _under(_OPTIMIZER, tensors).items():
        index, name = key.split(".", 1)
        optimizer.setdefault(int(index), {})[name] = value
    losses = [tensors[f"{_LOSSES}{phase}"].tolist() for phase in range(2)]
    return Checkpoint(
        header["phase"],
        header["epoch"],
        header["step"],
        (losses[0], losses[1]),
        _under(_STUDENT, tensors),
        optimizer,
        header["param_groups"],
        header["scaler"],
    )


def loss_curve(folder: Path | str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The loss of every batch of a run so far.

    Args:
        folder: The run's work folder.

    Returns:
        One array per phase, float32, in the order of training.

    Raises:
        ArtifactError: There is no checkpoint, or it is damaged.
    """
    _, tensors = _load(Path(folder) / NAME)
    return tensors[f"{_LOSSES}0"].numpy(), tensors[f"{_LOSSES}1"].numpy()


def _load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads(file.metadata()["hydra_edge"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name in ("identity", "phase", "epoch", "step", "param_groups", "scaler"):
            header[name]
        for phase in range(2):
            tensors[f"{_LOSSES}{phase}"]
    except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError) as exc:
        raise ArtifactError(
            f"'{path}' cannot be read: {exc}.",
            "It is damaged or was not written by this version of distill.",
            "Delete it to start over, or choose another workdir.",
        ) from exc
    return header, tensors


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
