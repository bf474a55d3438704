"""`verify`: does one model still answer, and still doubt, like another?

Accuracy alone hides the loss that matters here: heads can collapse onto their mean without a single
prediction changing. So the gates cover the disagreement between heads as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hydra_edge import equivalence, tasks
from hydra_edge.artifacts.arrays import check_arrays, to_numpy
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.errors import GateError, InputError
from hydra_edge.runtime import Session, load

Array = npt.NDArray[np.generic]
Model = Graph | Engine | Session
_BATCH = 64


@dataclass(frozen=True)
class Gates:
    """How far a model may drift from its reference; None switches a gate off.

    Attributes:
        accuracy_drop: Largest loss of accuracy, as a fraction.
        nll_increase: Largest rise of the negative log likelihood, in nats.
        ece_increase: Largest rise of the expected calibration error.
        rmse_increase: Largest rise of the root mean squared error, relative.
        mi_rank_correlation: Smallest Spearman correlation of the epistemic uncertainty.
        mi_ratio: Bounds on mean epistemic uncertainty over the reference's.
        disagreement_ratio: Bounds on the heads' disagreement over the reference's.
    """

    accuracy_drop: float | None = 0.01
    nll_increase: float | None = 0.05
    ece_increase: float | None = 0.02
    rmse_increase: float | None = 0.05
    mi_rank_correlation: float | None = 0.8
    mi_ratio: tuple[float, float] | None = (0.5, 1.5)
    disagreement_ratio: tuple[float, float] | None = (0.5, 2.0)


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        samples: Number of samples compared.
        head_errors: Relative RMS error per head; empty when head counts differ.
        metrics: Quality of the model; empty without labels.
        reference_metrics: Quality of the reference; empty without labels.
        drift: Drift of predictions and uncertainty, by name.
        failures: The gates that failed, in words; empty when all passed.
        notes: What was not checked, and why.
    """

    samples: int
    head_errors: tuple[float, ...]
    metrics: Mapping[str, float]
    reference_metrics: Mapping[str, float]
    drift: Mapping[str, float]
    failures: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return not self.failures

    def require(self) -> Verification:
        """Return self, or raise.

        Raises:
            GateError: A gate failed.
        """
        if self.failures:
            raise GateError(
                f"Verification failed: {'; '.join(self.failures)}.",
                "The model no longer answers or doubts like its reference.",
                "Calibrate with more or better data, keep the heads in fp16 "
                "(--precision body=int8,heads=fp16), or loosen a gate on purpose.",
            )
        return self


def verify(
    model: Model,
    reference: Model,
    inputs: object,
    *,
    labels: object | None = None,
    gates: Gates | None = None,
) -> Verification:
    """Compare a model with its reference on data.

    Args:
        model: What to judge: an engine, an open session or a graph.
        reference: What it must resemble, e.g. the fp32 graph, or the ensemble behind it.
        inputs: An array, or arrays by input name; axis 0 is the sample.
        labels: Ground truth ``[N]``; without it only drift is judged.
        gates: Limits; sensible ones by default.

    Returns:
        All figures, and the gates that failed. Nothing is raised for those: see
        `Verification.require`.

    Raises:
        InputError: The data does not fit, or a model gives no per-head output or has no task.
    """
    gates = gates or Gates()
    name = _task_of(model) or _task_of(reference)
    if name is None:
        raise InputError(
            "Neither model has a task.",
            "Without one it is not known what their outputs mean.",
            "Export or merge them with a task, e.g. --task classification.",
        )
    task = tasks.find(name)
    found = _head_logits(model, inputs, "model")
    expected = _head_logits(reference, inputs, "reference")
    if found.shape[1:] != expected.shape[1:]:
        raise InputError(
            f"The model gives per-head outputs {list(found.shape)}.",
            f"The reference gives {list(expected.shape)} ([M, B, C]).",
            "Compare models with the same outputs.",
        )
    if not np.all(np.isfinite(found)):
        broken = int(np.argmin(np.isfinite(found).all(axis=(1, 2))))
        failure = f"head {broken} gives NaN or infinity"
        return Verification(found.shape[1], (), {}, {}, {}, (failure,), ("nothing else checked",))
    notes = []
    head_errors: tuple[float, ...] = ()
    if len(found) == len(expected):
        head_errors = tuple(
            equivalence.difference(ours, theirs)
            for ours, theirs in zip(found, expected, strict=True)
        )
    metrics: Mapping[str, float] = {}
    reference_metrics: Mapping[str, float] = {}
    if labels is None:
        notes.append("no labels: accuracy and calibration were not checked")
    else:
        target = to_numpy(labels, "labels")
        metrics = task.metrics(found, target)
        reference_metrics = task.metrics(expected, target)
    drift = task.drift(found, expected)
    if len(expected) == 1:
        notes.append("the reference has one head: uncertainty was not checked")
    failures = [
        *_quality_failures(metrics, reference_metrics, gates),
        *(_diversity_failures(drift, gates) if len(expected) > 1 else ()),
    ]
    return Verification(
        samples=found.shape[1],
        head_errors=head_errors,
        metrics=metrics,
        reference_metrics=reference_metrics,
        drift=drift,
        failures=tuple(failures),
        notes=tuple(notes),
    )


def _quality_failures(
    metrics: Mapping[str, float], reference: Mapping[str, float], gates: Gates
) -> list[str]:
    failures = []

    def check(name: str, change: float, limit: float | None, text: str) -> None:
        # `not <=` so that NaN fails.
        if limit is not None and not change <= limit:
            failures.append(
                f"{name} {text} from {reference[name]:.4f} to {metrics[name]:.4f} "
                f"(allowed: {limit:g})"
            )

    if "accuracy" in metrics:
        drop = reference["accuracy"] - metrics["accuracy"]
        check("accuracy", drop, gates.accuracy_drop, "fell")
    for name, limit in (("nll", gates.nll_increase), ("ece", gates.ece_increase)):
        if name in metrics:
            check(name, metrics[name] - reference[name], limit, "rose")
    if "rmse" in metrics and reference["rmse"] > 0:
        check("rmse", metrics["rmse"] / reference["rmse"] - 1, gates.rmse_increase, "rose")
    return failures


def _diversity_failures(drift: Mapping[str, float], gates: Gates) -> list[str]:
    failures = []
    value = drift["mi_rank_correlation"]
    if gates.mi_rank_correlation is not None and not value >= gates.mi_rank_correlation:
        failures.append(
            f"rank correlation of the epistemic uncertainty is {_number(value)} "
            f"(needed: {gates.mi_rank_correlation:g})"
        )
    for name, bounds, text in (
        ("mi_ratio", gates.mi_ratio, "mean epistemic uncertainty"),
        ("disagreement_ratio", gates.disagreement_ratio, "disagreement of the heads"),
    ):
        value = drift[name]
        # A reference whose heads never disagree gives 0/0: there is nothing to keep.
        if bounds is not None and not math.isnan(value) and not bounds[0] <= value <= bounds[1]:
            failures.append(
                f"{text} is {value:.3g} of the reference's (allowed: {bounds[0]:g} to "
                f"{bounds[1]:g})"
            )
    return failures


def _number(value: float) -> str:
    return "undefined (one side is constant)" if math.isnan(value) else f"{value:.3f}"


def _task_of(model: Model) -> str | None:
    if isinstance(model, Graph):
        return model.metadata.task
    return model.engine.task if isinstance(model, Session) else model.task


def _head_logits(model: Model, inputs: object, role: str) -> Array:
    """``[M, N, C]`` on all of the data, in batches."""
    if isinstance(model, Engine):
        with load(model) as session:
            return _head_logits(session, inputs, role)
    if isinstance(model, Session):
        return model.run(inputs, head_logits=True)["head_logits"]
    logits = model.metadata.logits
    if logits is None:
        raise InputError(
            f"The {role} gives no per-head output.",
            "Diversity is judged on what every head says.",
            "Export it with head_logits=True.",
        )
    if isinstance(inputs, Mapping):
        given = {str(name): to_numpy(value, str(name)) for name, value in inputs.items()}
    else:
        given = {model.inputs[0].name: to_numpy(inputs, model.inputs[0].name)}
    feeds = check_arrays(given, model.inputs)
    size = len(next(iter(feeds.values())))
    parts = [
        evaluate(model.model, {n: a[i : i + _BATCH] for n, a in feeds.items()}, [logits])[logits]
        for i in range(0, size, _BATCH)
    ]
    return np.concatenate(parts, axis=1)
