"""Checks that find, before hours of training, what cannot be distilled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from hydra_edge import tasks
from hydra_edge.ensembles import Hydra
from hydra_edge.errors import HydraError, InputError
from hydra_edge.transfer import Inputs, TransferSet, architecture


class Imitated(Protocol):
    """What is known of a teacher before it runs: an `Ensemble`, a share of one, or predictions."""

    heads: int
    task: str
    labels: tuple[str, ...]


def check_request(
    ensemble: Imitated,
    student: Hydra,
    inputs: TransferSet,
    *,
    cached: bool,
    changed: Sequence[str],
    copies_head: bool,
) -> None:
    """Check what can be told without running the models.

    Raises:
        InputError: Ensemble, student and data do not fit each other.
    """
    if ensemble.task != student.task or (
        ensemble.labels and student.labels and ensemble.labels != student.labels
    ):
        raise InputError(
            f"The ensemble's task is {ensemble.task} {ensemble.labels}, "
            f"the student's {student.task} {student.labels}.",
            "Heads imitate members output by output.",
            "Give both the same task and the same labels in the same order.",
        )
    if len(student.heads) > ensemble.heads:
        raise InputError(
            f"The student has {len(student.heads)} heads, the ensemble {ensemble.heads} members.",
            "A head without a member to imitate would learn nothing of its own.",
            f"Give the student at most {ensemble.heads} heads.",
        )
    if changed and cached:
        raise InputError(
            f"{' and '.join(changed)} is given, but teacher is 'cached'.",
            "Cached outputs belong to the samples as they are, not to changed ones.",
            f"Set teacher='online', or leave {' and '.join(changed)} out.",
        )
    if cached and not inputs.arrays and inputs.digest(True) != inputs.digest(True):
        raise InputError(
            "Reading the dataset twice gave different samples, but teacher is 'cached'.",
            "Cached outputs belong to one fixed version of every sample.",
            "Set teacher='online', or remove the random transforms.",
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise InputError(
            "The student has no trainable parameters.",
            "There is nothing to distill into.",
            "Set requires_grad on the parameters to train.",
        )
    first, *others = map(architecture, student.heads)
    for index, other in enumerate(others, 1):
        if other != first and copies_head:
            raise InputError(
                f"Head {index} is not built like head 0.",
                "After the first phase head 0 is copied to all heads.",
                "Give all heads one structure, or set epochs_mean=0 or warmstart_heads=False.",
            )


def check_outputs(
    ensemble: Callable[..., torch.Tensor],
    student: Hydra,
    inputs: TransferSet,
    temperatures: tuple[float, ...],
    device: torch.device,
) -> torch.Size:
    """Run both models on the first samples.

    Args:
        ensemble: Gives the members' outputs ``[M, B, C]``.
        student: What is to be trained.
        inputs: The samples.
        temperatures: Of the losses.
        device: Where both are.

    Returns:
        The shape of the ensemble's answer, ``[M, 2, C]``.

    Raises:
        InputError: One of them cannot run, or their outputs do not fit each other or the task.
    """
    x = tuple(part.to(device) for part in inputs.__getitems__(range(min(2, len(inputs)))))
    teacher = _answer("ensemble", ensemble, x)
    answer = _answer("student", student.eval(), x)
    if teacher.ndim < 3:
        raise InputError(
            f"Members give {list(teacher.shape[1:])} for {len(x[0])} samples.",
            "Every member needs a batch axis and an output axis: it needs [M, B, C] in all.",
            "Keep the batch axis in the members' outputs.",
        )
    if teacher.shape[1:] != answer.shape[1:]:
        raise InputError(
            f"Members give {list(teacher.shape[1:])} but heads give {list(answer.shape[1:])}.",
            "Heads imitate members output by output.",
            "Give the heads as many outputs as the members have.",
        )
    for temperature in temperatures:
        tasks.find(student.task).head_loss(answer, teacher[: len(answer)], temperature)
    return teacher.shape


def _answer(name: str, module: Callable[..., torch.Tensor], x: Inputs) -> torch.Tensor:
    try:
        with torch.no_grad():
            output = module(*x)
    except HydraError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as exc:
        shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in x)
        raise InputError(
            f"The {name} cannot run on the data: {exc}.",
            f"The first batch has inputs {shapes}.",
            "Give data of the shape and dtype that both models take.",
        ) from exc
    return output.float()
