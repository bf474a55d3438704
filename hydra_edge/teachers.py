"""What a student learns from: members that run on every batch, or outputs that were kept.

On several processes each holds and runs only some members, on the inputs of all, and they exchange
the answers: M members need the memory of M / processes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hydra_edge.ensembles import Ensemble, tensor_state
from hydra_edge.errors import InputError
from hydra_edge.processes import Processes
from hydra_edge.transfer import Inputs, architecture, check_finite, hash_tensors


class EnsembleShare(nn.Module):
    """Those of an ensemble's M members that one process holds.

    Attributes:
        members: The networks held here; each maps the same inputs to ``[B, C]``.
        indices: Their numbers in the whole ensemble, ascending.
        heads: M, the number of members of the whole ensemble.
        task: File name under ``hydra_edge/tasks``.
        labels: Names of the C outputs, or empty.

    Raises:
        InputError: A number is out of range.
    """

    def __init__(
        self,
        members: Mapping[int, nn.Module],
        heads: int,
        task: str = "classification",
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for index in members:
            if not 0 <= index < heads:
                raise InputError(
                    f"Member {index} was given for an ensemble of {heads}.",
                    f"Members are numbered from 0 to {heads - 1}.",
                    "Correct the number, or the size of the ensemble.",
                )
        self.indices = tuple(sorted(members))
        self.members = nn.ModuleList(members[index] for index in self.indices)
        self.heads = heads
        self.task = task
        self.labels = tuple(labels)

    @classmethod
    def of(cls, ensemble: Ensemble, indices: Iterable[int]) -> EnsembleShare:
        """Some members of a whole ensemble; `share` and `taught` say which."""
        held = {m: ensemble.members[m] for m in indices}
        return cls(held, ensemble.heads, ensemble.task, ensemble.labels)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The raw outputs ``[B, C]`` of each member held here."""
        return [member(*inputs) for member in self.members]


def share(heads: int, processes: Processes) -> range:
    """Numbers of the members that a process holds: rank, rank + size, …; none when rank ≥ M."""
    return range(processes.rank, heads, processes.size)


def taught(heads: int, processes: Processes) -> range:
    """As `share`, but where processes outnumber members several hold the same one."""
    if processes.size <= heads:
        return share(heads, processes)
    return range(processes.rank % heads, processes.rank % heads + 1)


class Teacher(Protocol):
    """Gives targets for one piece of a batch."""

    def targets(
        self, x: Inputs, indices: Sequence[Sequence[int]], processes: Processes
    ) -> torch.Tensor:
        """The members' outputs ``[M, B, C]`` in float32 for the piece of this process.

        Args:
            x: The piece's inputs on the device, each ``[B, …]``.
            indices: The samples of every process's piece, by rank; B is the length of our own.
            processes: Who takes part; all call this together.
        """
        ...


class LiveTeacher:
    """Members that run on every batch, all here or some in each process.

    Raises:
        InputError: The processes together do not hold every member once.
    """

    def __init__(self, ensemble: Ensemble | EnsembleShare, processes: Processes) -> None:
        self.ensemble = ensemble
        own = range(ensemble.heads) if isinstance(ensemble, Ensemble) else ensemble.indices
        held = [tuple(own)] if isinstance(ensemble, Ensemble) else processes.gather(tuple(own))
        self._counts = [len(part) for part in held]
        members = [index for part in held for index in part]
        if sorted(members) != list(range(ensemble.heads)):
            raise InputError(
                f"The processes hold the members {sorted(members)} of {ensemble.heads}.",
                "Each member is run by exactly one process.",
                "Build the shares with `share`, one for each process.",
            )
        self._order = np.argsort(members)
        self._shape: tuple[int, ...] | None = None

    def targets(
        self, x: Inputs, indices: Sequence[Sequence[int]], processes: Processes
    ) -> torch.Tensor:
        """See `Teacher.targets`."""
        rank = processes.rank
        if isinstance(self.ensemble, Ensemble):
            with torch.no_grad():
                return check_finite(self.ensemble(*x).float(), indices[rank])
        counts = [len(piece) for piece in indices]
        everyone = tuple(processes.concatenate(part, counts) for part in x)
        with torch.no_grad():
            answers = [answer.float() for answer in self.ensemble(*everyone)]
        if self._shape is None:  # a process may hold no member
            shapes = processes.gather(tuple(answers[0].shape[1:]) if answers else None)
            self._shape = next(shape for shape in shapes if shape is not None)
        shape = (len(answers), sum(counts), *self._shape)
        mine = torch.stack(answers) if answers else torch.zeros(shape, device=x[0].device)
        complete = processes.concatenate(mine, self._counts)
        start = sum(counts[:rank])
        return check_finite(
            complete[self._order][:, start : start + counts[rank]], list(indices[rank])
        )

    def direction(
        self, x: Inputs, draw: Callable[[torch.Size], torch.Tensor], member: int
    ) -> list[torch.Tensor]:
        """Gradient of a weighted sum of one member's outputs; see `perturbations.diversify`.

        Args:
            x: Inputs ``[B, …]``; the floating-point ones get a gradient.
            draw: Gives the weights for the shape of the outputs.
            member: Which of the members held here answers, counted round.

        Returns:
            One gradient per floating-point input, of its shape.
        """
        network = self.ensemble.members[member % len(self.ensemble.members)]
        with torch.enable_grad():
            watched = tuple(
                part.detach().requires_grad_() if part.is_floating_point() else part for part in x
            )
            output = network(*watched).float()
            moving = [part for part in watched if part.requires_grad]
            total = (output * draw(output.shape).to(output)).sum()
            return list(torch.autograd.grad(total, moving))


class KeptTeacher:
    """Outputs that were computed before."""

    def __init__(self, outputs: Any, device: torch.device) -> None:
        self.outputs, self.device = outputs, device

    def targets(
        self, x: Inputs, indices: Sequence[Sequence[int]], processes: Processes
    ) -> torch.Tensor:
        """See `Teacher.targets`."""
        found: npt.NDArray[np.float32] = self.outputs[:, indices[processes.rank]]
        return torch.from_numpy(found).to(self.device)


def identity(ensemble: Ensemble | EnsembleShare, processes: Processes) -> str:
    """Hash of what the members are built of and of their weights, the same for all shares."""
    if isinstance(ensemble, Ensemble):
        own = dict(enumerate(ensemble.members))
    else:
        own = dict(zip(ensemble.indices, ensemble.members, strict=True))
    digests: dict[int, str] = {}
    for part in processes.gather({index: digest(member) for index, member in own.items()}):
        digests |= part
    text = f"{ensemble.task} {[digests[index] for index in sorted(digests)]}"
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def evaluating(ensemble: nn.Module, device: torch.device) -> Iterator[None]:
    """Members on a device and in eval mode; afterwards as they were."""
    modes, home = {module: module.training for module in ensemble.modules()}, device_of(ensemble)
    ensemble.to(device).eval()
    try:
        yield
    finally:
        ensemble.to(home)
        for module, mode in modes.items():
            module.training = mode


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first tensor is."""
    tensor = next(iter(tensor_state(module).values()), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def digest(member: nn.Module) -> str:
    """Hash of what a network is built of and of its weights."""
    hasher = hashlib.sha256(architecture(member).encode())
    hash_tensors(hasher, tensor_state(member).values())
    return hasher.hexdigest()
