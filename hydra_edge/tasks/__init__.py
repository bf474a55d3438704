"""What a model is for. One file per task; `find` loads it by file name, so there is no registry.

A task module defines ``TASK``, an object that satisfies `Task`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import InputError

if TYPE_CHECKING:
    import torch

Float = npt.NDArray[np.float64]


class Task(Protocol):
    """One task. Per-head tensors are ``[M, B, C]`` (M heads, B batch, C outputs).

    Attributes:
        name: The task's file name.
        summary_op: The op of domain ``hydra`` that turns per-head outputs into a prediction.
        outputs: Names of the summary op's outputs, in order.
        epistemic: Which of them measures disagreement between heads.
        vector_outputs: Those of shape ``[B, C]`` (or ``[B, D]``); the others are ``[B]``.
    """

    name: str
    summary_op: str
    outputs: tuple[str, ...]
    epistemic: str
    vector_outputs: tuple[str, ...]

    def width(self, channels: int) -> int:
        """Size of the last axis of ``vector_outputs`` when heads have ``channels`` outputs."""
        ...

    def summarize(self, logits: npt.ArrayLike) -> dict[str, Float]:
        """The summary op in numpy float64: ``[M, B, C]`` to arrays by output name."""
        ...

    def metrics(self, logits: npt.ArrayLike, target: npt.ArrayLike) -> dict[str, float]:
        """Quality of what ``logits [M, B, C]`` predict, against the truth ``[B]`` or ``[B, D]``."""
        ...

    def drift(self, logits: npt.ArrayLike, reference: npt.ArrayLike) -> dict[str, float]:
        """How far the uncertainty of ``logits`` is from that of ``reference`` (no labels needed).

        Head counts may differ. Every task gives at least ``mi_rank_correlation`` (Spearman),
        ``mi_ratio`` (mean over mean) and ``disagreement_ratio``.
        """
        ...

    def mean_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Phase 1: one head ``[B, C]`` imitates the mean of the members ``[M, B, C]``."""
        ...

    def head_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Phase 2: heads ``[H, B, C]`` imitate the members ``[H, B, C]`` one to one."""
        ...

    def disagreement_loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """How far the size of the heads' disagreement is from the members', sample by sample.

        Imitating each member exactly would imply it, but a student of limited size trades it away
        first: its uncertainty shrinks while every head looks right. Head counts may differ.
        """
        ...


def names() -> tuple[str, ...]:
    """The tasks there are, sorted."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__)))


def find(name: str) -> Task:
    """Load a task by name.

    Raises:
        InputError: There is no such task.
    """
    if name not in names():
        raise InputError(
            f"Unknown task '{name}'.",
            f"Tasks are the files of hydra_edge/tasks: {', '.join(names())}.",
            "Pick one of those.",
        )
    task: Task = importlib.import_module(f"{__name__}.{name}").TASK
    return task


def mean_ratio(values: Mapping[str, Float], reference: Mapping[str, Float], name: str) -> float:
    """Ratio of the means of one output; NaN when the reference's mean is 0."""
    base = float(np.mean(reference[name]))
    return float(np.mean(values[name])) / base if base > 0 else float("nan")


def rank_correlation(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation with average ranks for ties; NaN when one side is constant."""

    def ranks(values: npt.ArrayLike) -> Float:
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        average = last - (counts - 1) / 2.0
        return np.asarray(average[inverse.reshape(-1)])

    left, right = ranks(a), ranks(b)
    if left.std() == 0 or right.std() == 0:
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])
