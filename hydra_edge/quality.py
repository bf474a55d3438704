"""How good the answers of sessions are, and how right their doubt is: the figures of a report."""

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
Datasets = Mapping[str, Mapping[str, Array]]
_RELIABILITY_BINS = 15  # as many as the calibration error uses
_HISTOGRAM_BINS = 30
_HISTOGRAM_DECADES = 4.0  # below a ten-thousandth of the largest value nobody tells doubts apart
_NO_TASK = "the engine declares no task"
_NO_HEADS = "the engine returns no per-head output"
_ONE_HEAD = "a single head cannot disagree with itself"


@dataclass(frozen=True)
class Answers:
    """What one session said.

    Attributes:
        task: What the session is for, or None when nobody declared it.
        logits: Per-head outputs ``[M, B, C]`` by data set; empty when the engine has none.
        summaries: The task's outputs by data set; empty without a task.
    """

    task: Task | None
    logits: Mapping[str, Array]
    summaries: Mapping[str, Mapping[str, Array]]

    @property
    def heads(self) -> int | None:
        """M, or None when the engine has no per-head output."""
        return next((len(logits) for logits in self.logits.values()), None)

    def doubt(self, dataset: str) -> Float:
        """The epistemic output ``[B]``; the mean over D where it is ``[B, D]``."""
        assert self.task is not None
        values = np.asarray(self.summaries[dataset][self.task.epistemic], np.float64)
        return np.asarray(values.reshape(len(values), -1).mean(1))


@dataclass(frozen=True)
class Quality:
    """Figures by name, and why others are missing."""

    figures: dict[str, float] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float]) -> None:
        """Take figures over; one that is not finite becomes a reason."""
        for name, value in figures.items():
            if math.isfinite(value):
                self.figures[name] = value
            else:
                self.not_measured[name] = "not defined: one side is 0 or never varies"


def ask_all(
    sessions: Mapping[str, Session | EnsembleSession], datasets: Datasets
) -> dict[str, Answers]:
    """Run every data set through every session.

    A session without a declared task, such as a single member, is judged by the task of the others.
    """
    asked = {
        label: {name: _ask(session, inputs) for name, inputs in datasets.items()}
        for label, session in sessions.items()
    }
    declared = {label: _task_of(session) for label, session in sessions.items()}
    common = next((task for task in declared.values() if task), None)
    return {label: _answers(declared[label] or common, found) for label, found in asked.items()}


def judge(answers: Answers, labels: Array | None, reference: Answers | None) -> Quality:
    """Figures of one session.

    Args:
        answers: What it said.
        labels: The truth for the data in distribution, if known.
        reference: What the session it is compared with said; None to compare with nothing.

    Returns:
        The task's metrics, ``ood_auroc_<set>``, and drift against the reference over all data sets
        together, with ``mi_ratio_<set>`` for each of them.
    """
    quality = Quality()
    if labels is None:
        quality.not_measured["task metrics"] = "no labels were given"
    elif answers.task is None or not answers.logits:
        quality.not_measured["task metrics"] = _NO_HEADS if answers.task else _NO_TASK
    else:
        try:
            found = answers.task.metrics(answers.logits[IN_DISTRIBUTION], labels)
            if answers.heads == 1:
                for name in {answers.task.epistemic, "disagreement"} & set(found):
                    quality.not_measured[name] = _ONE_HEAD
                    del found[name]
            quality.add(found)
        except MissingDependencyError as exc:
            quality.not_measured["task metrics"] = f"{exc.what} {exc.fix}"
    _judge_outliers(quality, answers)
    if reference is not None:
        _judge_drift(quality, answers, reference)
    return quality


def bin_reliability(session: str, answers: Answers, labels: Array | None) -> Reliability | None:
    """The reliability diagram of a classifier; None for another task or without labels.

    Source: Guo et al. 2017, arXiv 1706.04599, section 2.
    """
    summary = answers.summaries.get(IN_DISTRIBUTION, {})
    if labels is None or answers.task is None or "mean_prob" not in summary:
        return None
    prob = np.asarray(summary["mean_prob"], np.float64)
    best = prob.argmax(-1)
    # What people agree on is a score for every answer, and then being right has degrees.
    right = (
        best == labels if labels.ndim == 1 else np.take_along_axis(labels, best[:, None], 1)[:, 0]
    )
    confidence = prob.max(-1)
    index = np.minimum((confidence * _RELIABILITY_BINS).astype(int), _RELIABILITY_BINS - 1)
    groups = [index == i for i in range(_RELIABILITY_BINS) if (index == i).any()]
    bins = tuple(
        ReliabilityBin(float(confidence[g].mean()), float(right[g].mean()), int(g.sum()))
        for g in groups
    )
    return Reliability(session, bins)


def bin_doubts(answers: Mapping[str, Answers]) -> tuple[Histogram, ...]:
    """Epistemic uncertainty per session and data set, all over the same logarithmic bins."""
    doubts = {
        (label, name): (found.task.epistemic, found.doubt(name))
        for label, found in answers.items()
        if found.task is not None and found.heads != 1
        for name in found.summaries
    }
    peak = max((float(values.max()) for _, values in doubts.values()), default=0.0)
    if peak <= 0:
        return ()
    top = math.log10(peak)
    edges = np.logspace(top - _HISTOGRAM_DECADES, top, _HISTOGRAM_BINS + 1)
    return tuple(
        Histogram(
            session=label,
            dataset=name,
            quantity=quantity,
            edges=tuple(map(float, edges)),
            counts=tuple(map(int, np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0])),
        )
        for (label, name), (quantity, values) in doubts.items()
    )


def _ask(session: Session | EnsembleSession, inputs: Mapping[str, Array]) -> Prediction:
    if isinstance(session, Session) and not session.engine.programs[MAIN].optional:
        return session.run(inputs)
    return session.run(inputs, head_logits=True)


def _task_of(session: Session | EnsembleSession) -> Task | None:
    name = session.engine.task if isinstance(session, Session) else session.task
    return tasks.find(name) if name else None


def _answers(task: Task | None, predictions: Mapping[str, Prediction]) -> Answers:
    logits = {}
    for name, prediction in predictions.items():
        array = _per_head(task, prediction)
        if array is not None:
            logits[name] = array
    if task is None:
        return Answers(None, logits, {})
    summaries: dict[str, Mapping[str, Array]] = {}
    for name, prediction in predictions.items():
        given = {output: prediction[output] for output in task.outputs if output in prediction}
        if {*task.vector_outputs, task.epistemic} <= set(given):  # a graph may omit others
            summaries[name] = given
        elif name in logits:
            summaries[name] = task.summarize(logits[name])
    return Answers(task, logits, summaries)


def _per_head(task: Task | None, prediction: Prediction) -> Array | None:
    """The one output that is no summary; ``[B, C]`` is one head."""
    others = [array for name, array in prediction.items() if not task or name not in task.outputs]
    if len(others) != 1 or others[0].ndim not in (2, 3):
        return None
    return others[0] if others[0].ndim == 3 else others[0][None]


def _judge_outliers(quality: Quality, answers: Answers) -> None:
    shifted = [name for name in answers.summaries if name != IN_DISTRIBUTION]
    if answers.heads == 1:
        quality.not_measured.update({f"ood_auroc_{name}": _ONE_HEAD for name in shifted})
        return
    try:
        for name in shifted:
            auroc = ood_auroc(answers.doubt(IN_DISTRIBUTION), answers.doubt(name))
            quality.add({f"ood_auroc_{name}": auroc})
    except MissingDependencyError as exc:
        quality.not_measured["ood_auroc"] = f"{exc.what} {exc.fix}"


def _judge_drift(quality: Quality, answers: Answers, reference: Answers) -> None:
    task = answers.task
    if task is None or not answers.logits or answers.heads == 1:
        reason = _NO_TASK if task is None else _ONE_HEAD if answers.heads else _NO_HEADS
        quality.not_measured["drift"] = reason
        return
    if reference.task is not task or not reference.logits:
        quality.not_measured["drift"] = "the reference has another task or no per-head output"
        return
    names = list(answers.logits)
    quality.add(
        task.drift(
            np.concatenate([answers.logits[name] for name in names], axis=1),
            np.concatenate([reference.logits[name] for name in names], axis=1),
        )
    )
    for name in names:
        base = float(reference.doubt(name).mean())
        ratio = float(answers.doubt(name).mean()) / base if base > 0 else math.nan
        quality.add({f"mi_ratio_{name}": ratio})
