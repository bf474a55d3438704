"""How good the answers of sessions are, and how right their uncertainty is: the figures of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hydra_edge import tasks
from hydra_edge.artifacts.engine import MAIN
from hydra_edge.artifacts.prediction import Prediction
from hydra_edge.artifacts.report import (
    IN_DISTRIBUTION,
    Histogram,
    Reliability,
    ReliabilityBin,
)
from hydra_edge.errors import MissingDependencyError
from hydra_edge.runtime import EnsembleSession, Session
from hydra_edge.tasks import Float, Task
from hydra_edge.tasks.classification import ood_auroc

Array = npt.NDArray[np.generic]
AnySession = Session | EnsembleSession
_RELIABILITY_BINS = 15  # as many as the calibration error uses
_HISTOGRAM_BINS = 30
_HISTOGRAM_DECADES = 4.0


@dataclass(frozen=True)
class Answers:
    """What one session said to every data set.

    Attributes:
        task: The task, or None when nobody declared one.
        logits: Per-head outputs ``[M, B, C]`` by data set; empty when the engine has none.
    """

    task: Task | None
    logits: Mapping[str, Array]


@dataclass(frozen=True)
class Quality:
    """Figures by name, and why others are missing."""

    figures: dict[str, float] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float]) -> None:
        """Take figures over; those that are not finite become a reason."""
        for name, value in figures.items():
            if math.isfinite(value):
                self.figures[name] = value
            else:
                self.not_measured[name] = "it is not defined here: one side never varies or is 0"


def task_of(session: AnySession) -> str | None:
    """Task that an engine declares."""
    return session.engine.task if isinstance(session, Session) else session.task


def ask(session: AnySession, datasets: Mapping[str, Mapping[str, Array]], task: str | None) -> Answers:
    """Run every data set through a session.

    Args:
        session: A session. An engine that only returns ``[B, C]`` counts as one head.
        datasets: Inputs by data set.
        task: The task of an engine that declares none, such as a single member.
    """
    name = task_of(session) or task
    found = tasks.find(name) if name else None
    output = _logits_output(session)
    if output is None:
        return Answers(found, {})
    whole = isinstance(session, EnsembleSession) or output in _optional(session)
    logits = {}
    for dataset, inputs in datasets.items():
        prediction = session.run(inputs, head_logits=True) if whole else session.run(inputs)
        array = prediction[output]
        logits[dataset] = array if array.ndim == 3 else array[None]
    return Answers(found, logits)
