"""`verify`: does one model still answer, and still doubt, like another?

Accuracy alone hides the loss that matters here: heads can collapse onto their mean without a single
prediction changing. So the gates cover the disagreement between heads as well, and the summary a
user reads is recomputed from what the heads say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hydra_edge import equivalence, tasks
from hydra_edge.artifacts.arrays import to_numpy
from hydra_edge.artifacts.engine import MAIN, Engine, Golden, Program
from hydra_edge.artifacts.graph import Graph
from hydra_edge.errors import GateError, InputError
from hydra_edge.runtime import Session, load
from hydra_edge.tasks import Float, Task

Array = npt.NDArray[np.generic]
Model = Graph | Engine | Session
_BATCH = 64
# Summary ops compute in fp32 whatever the precision is, so that 1e-3 is far above their rounding,
# and far below any summary that is wrong.
_SUMMARY_TOLERANCE = 1e-3
# Entropies are sums of C terms up to ln C, about 10, of which fp32 keeps 1e-5; mutual information
# is a small difference of two.
_ENTROPY_ROUNDING = 1e-4


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
        prediction_error: Largest relative RMS difference of what is predicted: the mean
            probabilities; means, relative to the reference's total standard deviation; aleatoric
            variances.
        top1_agreement: Smallest share of samples with the same winning class.
        head_error: Largest relative RMS difference of a head's raw output; head counts must match.
            Off by default: distilled and pruned models may say the same with other logits.
    """

    accuracy_drop: float | None = 0.01
    nll_increase: float | None = 0.05
    ece_increase: float | None = 0.02
    rmse_increase: float | None = 0.05
    mi_rank_correlation: float | None = 0.8
    mi_ratio: tuple[float, float] | None = (0.5, 1.5)
    disagreement_ratio: tuple[float, float] | None = (0.5, 2.0)
    prediction_error: float | None = 0.5
    top1_agreement: float | None = 0.9
    head_error: float | None = None


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
        labels: Ground truth ``[N]``; without it accuracy and calibration are not judged.
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
    if not _heads_of(model) and not _heads_of(reference):
        return _compare_outputs(model, reference, inputs, gates)
    found, summary = _answers(model, inputs, task, "model")
    expected, reference_summary = _answers(reference, inputs, task, "reference")
    if found.shape[1:] != expected.shape[1:]:
        raise InputError(
            f"The model gives per-head outputs {list(found.shape)}.",
            f"The reference gives {list(expected.shape)} ([M, B, C]).",
            "Compare models with the same outputs.",
        )
    broken = _broken_head(expected, task)
    if broken is not None:
        raise InputError(
            f"Head {broken} of the reference gives NaN or infinity.",
            "Nothing can be compared with it.",
            "Check the reference's precision and the inputs.",
        )
    broken = _broken_head(found, task)
    if broken is not None:
        failure = f"head {broken} gives NaN or infinity"
        return Verification(found.shape[1], (), {}, {}, {}, (failure,), ("nothing else checked",))
    notes = []
    head_errors: tuple[float, ...] = ()
    if len(found) == len(expected):
        head_errors = tuple(
            equivalence.difference(ours, theirs)
            for ours, theirs in zip(found, expected, strict=True)
        )
    elif gates.head_error is not None:
        notes.append("the head counts differ: head errors were not checked")
    metrics: Mapping[str, float] = {}
    reference_metrics: Mapping[str, float] = {}
    if labels is None:
        notes.append("no labels: accuracy and calibration were not checked")
    else:
        target = to_numpy(labels, "labels")
        metrics = task.metrics(found, target)
        reference_metrics = task.metrics(expected, target)
    errors = _prediction_errors(task, found, expected)
    drift = {
        **task.drift(found, expected),
        **{f"{name}_error": error for name, error in errors.items()},
    }
    if len(expected) == 1:
        notes.append("the reference has one head: uncertainty was not checked")
    failures = [
        *_quality_failures(metrics, reference_metrics, gates),
        *_prediction_failures(errors, drift.get("top1_agreement"), head_errors, gates),
        *(_diversity_failures(drift, gates) if len(expected) > 1 else ()),
        *_summary_failures("model", summary, found, task),
        *_summary_failures("reference", reference_summary, expected, task),
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


def _heads_of(model: Model) -> int | None:
    if isinstance(model, Graph):
        return model.metadata.heads
    engine = model.engine if isinstance(model, Session) else model
    return next(iter(engine.programs.values())).graph.metadata.heads


def _compare_outputs(model: Model, reference: Model, inputs: object, gates: Gates) -> Verification:
    """Programs without heads, such as an encoder: every output of numbers is compared."""
    found, expected = (_outputs_of(one, inputs) for one in (model, reference))
    if set(found) != set(expected):
        raise InputError(
            f"The model gives {', '.join(found)}.",
            f"The reference gives {', '.join(expected)}.",
            "Compare programs with the same outputs.",
        )
    errors = {name: equivalence.error_of(name, found[name], expected) for name in found}
    limit = gates.prediction_error
    failures = [
        f"{name} differs by {error:.3g} (relative RMS; allowed: {limit:g})"
        for name, error in errors.items()
        if limit is not None and not error <= limit
    ]
    return Verification(
        samples=len(next(iter(found.values()))),
        head_errors=(),
        metrics={},
        reference_metrics={},
        drift={f"{name}_error": error for name, error in errors.items()},
        failures=tuple(failures),
        notes=("a program without heads: its outputs were compared",),
    )


def _outputs_of(model: Model, inputs: object) -> dict[str, Array]:
    if isinstance(model, Graph):
        model = _engine_of(model, tuple(spec.name for spec in model.outputs), ())
    if isinstance(model, Engine):
        with load(model) as session:
            return dict(session.run(inputs))
    return dict(model.run(inputs))


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


def _prediction_errors(task: Task, found: Array, expected: Array) -> dict[str, float]:
    """Relative error per vector output but the epistemic one, which has gates of its own.

    RMS over samples, over the reference's RMS. Values of a regression have units of their own, so
    each is measured by itself and the worst counts. Its mean is measured against the standard
    deviation of the reference's predictions over the data, by the law of total variance: an RMS
    would hide any error behind a large offset, and the spread over samples alone is 0 for one.
    """
    ours, theirs = task.summarize(found), task.summarize(expected)
    errors = {}
    for name in task.vector_outputs:
        if name == task.epistemic:
            continue
        base = theirs[name]
        axis = None if name == "mean_prob" else 0  # probabilities share one scale
        error = np.sqrt(np.mean((ours[name] - base) ** 2, axis=axis))
        scale = np.sqrt(np.mean(base**2, axis=axis))
        if name == "mean":
            within = theirs["aleatoric_variance"] + theirs["epistemic_variance"]
            scale = np.sqrt(base.var(axis=0) + within.mean(axis=0))
        same = np.where(error == 0, 0.0, np.inf)  # what error over a scale of 0 counts as
        errors[name] = float(np.max(np.divide(error, scale, out=same, where=scale > 0)))
    return errors


def _prediction_failures(
    errors: Mapping[str, float],
    agreement: float | None,
    head_errors: tuple[float, ...],
    gates: Gates,
) -> list[str]:
    failures = []
    for name, error in errors.items():
        if gates.prediction_error is not None and not error <= gates.prediction_error:
            failures.append(
                f"{name} differs by {error:.3g} (relative; allowed: {gates.prediction_error:g})"
            )
    needed = gates.top1_agreement
    if agreement is not None and needed is not None and not agreement >= needed:
        failures.append(
            f"the winning class is the same on {agreement:.1%} of the samples "
            f"(needed: {needed:.1%})"
        )
    if gates.head_error is not None and head_errors and not max(head_errors) <= gates.head_error:
        worst = int(np.argmax(head_errors))
        failures.append(
            f"head {worst} differs by {head_errors[worst]:.3g} "
            f"(relative RMS; allowed: {gates.head_error:g})"
        )
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


def _summary_failures(
    role: str, summary: Mapping[str, Array], logits: Array, task: Task
) -> list[str]:
    """Outputs of one model that do not follow from its own heads."""
    failures = []
    expected = task.summarize(logits)
    for name, value in summary.items():
        wanted = expected[name]
        origin = f"the {role}'s {name} does not follow from its heads"
        if value.shape != wanted.shape:
            failures.append(f"{origin}: it is {list(value.shape)}, not {list(wanted.shape)}")
            continue
        error = np.abs(np.asarray(value, np.float64) - wanted)
        wrong = ~(error <= _summary_tolerance(name, expected))  # so that NaN is wrong
        if name == "variation_ratio":
            wrong &= _votes_are_clear(logits, expected["mean_prob"], task)
        if wrong.any():
            worst = float(error[wrong].max())
            failures.append(f"{origin}: {wrong.mean():.1%} of it is wrong, by up to {worst:.3g}")
    return failures


def _summary_tolerance(name: str, expected: Mapping[str, Float]) -> Float:
    """What a faithful summary may differ by: relative to each value and to the whole output."""
    values = expected[name]
    axis = None if values.ndim == 1 or name == "mean_prob" else 0
    level = np.sqrt(np.mean(values**2, axis=axis))
    if values.ndim == 1:
        level = np.minimum(level, 1.0)
    tolerance = np.asarray(_SUMMARY_TOLERANCE * (np.abs(values) + level))
    if values.ndim == 1:
        tolerance += _ENTROPY_ROUNDING
    if name == "epistemic_variance":
        # fp32 means are off by e = 1e-6·|mean|, and s² then by 2se + e² ≤ 1e-3·s² + 1e3·e².
        tolerance += 1e-9 * expected["mean"] ** 2
    return tolerance


def _votes_are_clear(logits: Array, mean_prob: Float, task: Task) -> npt.NDArray[np.bool_]:
    """``[N]``: samples without a tie that rounding may break either way, which moves the votes."""
    if task.summary_op == "SigmoidSummary":
        close = np.abs(np.asarray(logits, np.float64)) <= 1e-6  # fp32 keeps 1e-7
        return np.asarray(~close.any(axis=(0, 2)) & (np.abs(mean_prob - 0.5) > 1e-6).all(axis=-1))

    def clear(values: Float) -> npt.NDArray[np.bool_]:
        second, first = np.moveaxis(np.partition(values, -2, axis=-1)[..., -2:], -1, 0)
        return np.asarray(first - second > 1e-4 * np.abs(first))  # fp32 keeps 1e-7

    return np.asarray(clear(np.asarray(logits, np.float64)).all(axis=0) & clear(mean_prob))


def _broken_head(logits: Array, task: Task) -> int | None:
    """The first head with an output that means nothing, or None.

    A logit of -inf masks its class, which is fine while another class is left: then the largest
    logit is finite. Means and log variances have no such use.
    """
    softmax = task.summary_op == "EnsembleSummary"
    finite = np.isfinite(logits.max(axis=-1) if softmax else logits)
    healthy = finite.reshape(len(logits), -1).all(axis=1)
    return None if healthy.all() else int(np.argmin(healthy))


def _answers(model: Model, inputs: object, task: Task, role: str) -> tuple[Array, dict[str, Array]]:
    """Per-head outputs ``[M, N, C]`` on all of the data, and the outputs of the task's summary."""
    if isinstance(model, Graph):
        model = _as_engine(model, task, role)
    if isinstance(model, Engine):
        with load(model) as session:
            return _answers(session, inputs, task, role)
    prediction = model.run(inputs, head_logits=True)
    optional = model.engine.programs[MAIN].optional
    name = optional[0] if optional else "head_logits"
    logits = prediction.get(name)
    if logits is None or logits.ndim != 3:
        found = "missing" if logits is None else str(list(logits.shape))
        raise InputError(
            f"The {role}'s per-head output '{name}' is {found}.",
            "Heads are compared one by one: it is an output with three axes, [M, B, C].",
            "Export the model again with head_logits=True, or stack its heads along axis 0.",
        )
    return logits, {name: prediction[name] for name in task.outputs if name in prediction}


def _as_engine(graph: Graph, task: Task, role: str) -> Engine:
    """The graph just as it is, as an engine: a session splits and pads its batches."""
    metadata = graph.metadata
    if metadata.logits is None or metadata.logits not in {spec.name for spec in graph.outputs}:
        raise InputError(
            f"The {role} gives no per-head output.",
            "Diversity is judged on what every head says.",
            "Export it with head_logits=True.",
        )
    return _engine_of(graph, (metadata.logits, *task.outputs), (metadata.logits,))


def _engine_of(graph: Graph, wanted: tuple[str, ...], optional: tuple[str, ...]) -> Engine:
    """The graph, as it is, with some of its outputs."""
    metadata = graph.metadata
    fixed = [spec.shape[0] for spec in graph.inputs if spec.shape]
    size = next((size for size in fixed if isinstance(size, int)), None)
    program = Program(
        inputs=graph.inputs,
        outputs=tuple(spec for spec in graph.outputs if spec.name in wanted),
        batch=(size, size, size) if size is not None else (1, _BATCH, _BATCH),
        optional=optional,
        lowering="",
        lowering_ms={},
        graph=graph,
        payload=graph.model.SerializeToString(),
        golden=Golden({}, {}, 0.0),
    )
    return Engine(
        target="cpu",
        backend="onnxruntime",
        task=metadata.task,
        kind=metadata.kind,
        heads=metadata.heads,
        labels=metadata.labels,
        precision=metadata.precision,
        source_sha256="",  # it is never saved
        calibration_sha256=None,
        metrics={},
        tools={},
        programs={MAIN: program},
    )
