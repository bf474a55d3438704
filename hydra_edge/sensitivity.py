"""What low precision costs an ensemble, part by part, and the cheapest mix inside a budget.

A part is one head, or one layer of the body. `analyze` stores and multiplies one part at a time in
low precision and measures what that does to the ensemble's accuracy, calibration and uncertainty;
`fit` finds the mix of two precisions that stays inside a budget on those figures.

Heads do not read each other, so one run with all heads in low precision holds each of them alone:
head m's row of it among the other rows in full precision is what quantizing head m alone gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hydra_edge import tasks
from hydra_edge.artifacts.arrays import to_numpy
from hydra_edge.artifacts.graph import Graph
from hydra_edge.calibration import Calibration, CalibrationOptions, Samples
from hydra_edge.costs import cost
from hydra_edge.errors import InputError, QuantizationError
from hydra_edge.precision import Precision
from hydra_edge.quantization import Prepared, prepare
from hydra_edge.tasks import Task

Array = npt.NDArray[np.generic]
Progress = Callable[[str], None]
HEAD, LAYER = "head.", "layer."
# By how much each figure got worse: what falls, what rises, and what should stay at 1.
_FALLS = ("accuracy", "mi_rank_correlation")
_RATIOS = {"mi": "mi_ratio"}


@dataclass(frozen=True)
class Part:
    """What one part costs in low precision while everything else is in full precision.

    Attributes:
        name: ``"head.3"`` or ``"layer.NODE"``, as `Precision.parse` reads it.
        saved_bytes: By how much smaller it makes the graph.
        losses: By how much each figure gets worse; see `losses`.
    """

    name: str
    saved_bytes: int
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """What `analyze` found.

    Attributes:
        precision: The low precision.
        samples: Number of samples the figures are measured on.
        heads: M.
        metrics: Quality in full precision.
        whole: Everything in low precision at once.
        parts: One by one: heads first, then layers of the body, both in order.
    """

    precision: str
    samples: int
    heads: int
    metrics: Mapping[str, float]
    whole: Part
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Budget:
    """How much worse each figure may become; the names are those of `losses`.

    Attributes:
        limits: Largest loss by figure, e.g. ``{"accuracy": 0.005, "mi": 0.1}``.
    """

    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        bad = next((n for n, limit in self.limits.items() if not 0 <= limit < math.inf), None)
        if not self.limits or bad is not None:
            raise InputError(
                "The budget is empty."
                if bad is None
                else f"The budget allows {bad} {self.limits[bad]}.",
                "It says by how much figures may become worse, each a number from 0 up.",
                "Write for example 'accuracy=0.005,nll=0.01,mi=0.1'.",
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"accuracy=0.005,nll=0.01,ece=0.01,mi=0.1"``.

        Raises:
            InputError: It says something else.
        """
        limits: dict[str, float] = {}
        for item in text.split(","):
            name, _, value = item.partition("=")
            try:
                limits[name.strip()] = float(value)
            except ValueError as exc:
                raise InputError(
                    f"'{item.strip()}' in the budget '{text}' is not NAME=NUMBER.",
                    "A budget says by how much figures may become worse.",
                    "Write for example 'accuracy=0.005,nll=0.01,mi=0.1'.",
                ) from exc
        return cls(limits)

    def excess(self, found: Mapping[str, float]) -> dict[str, float]:
        """The losses that are too large, by figure. NaN is too large."""
        unknown = sorted(set(self.limits) - set(found))
        if unknown:
            raise InputError(
                f"There is no figure '{unknown[0]}' to keep inside a budget.",
                f"There are: {', '.join(sorted(found))}.",
                "Those of a task need labels; mi and mi_rank_correlation do not.",
            )
        return {n: found[n] for n, limit in self.limits.items() if not found[n] <= limit}


@dataclass(frozen=True)
class Mix:
    """What `fit` found.

    Attributes:
        graph: The quantized graph.
        precision: Which part is stored and multiplied in what.
        kept: Names of the parts that stay in the fallback precision.
        losses: Measured on the whole mix.
        saved_bytes: By how much smaller it is than the graph in full precision.
        tried: Number of mixes that were measured.
    """

    graph: Graph
    precision: Precision
    kept: tuple[str, ...]
    losses: Mapping[str, float]
    saved_bytes: int
    tried: int = field(compare=False, default=0)


def losses(task: Task, logits: Array, reference: Array, labels: Array | None) -> dict[str, float]:
    """By how much every figure of ``logits [M, B, C]`` is worse than the reference's.

    Returns:
        ``mi``, the relative change of the mean epistemic uncertainty, and ``mi_rank_correlation``,
        what its rank correlation lacks of 1. With labels also the loss of ``accuracy`` and the rise
        of each other metric that should be small, such as ``nll``, ``ece`` and ``rmse``. Negative
        where a figure got better.
    """
    drift = task.drift(logits, reference)
    found = {"mi": abs(drift["mi_ratio"] - 1.0)}
    found["mi_rank_correlation"] = 1.0 - drift["mi_rank_correlation"]
    if labels is not None:
        ours, theirs = task.metrics(logits, labels), task.metrics(reference, labels)
        found |= {
            name: (theirs[name] - ours[name]) * (1.0 if name in _FALLS else -1.0)
            for name in ("accuracy", "nll", "brier", "ece", "rmse", "crps")
            if name in ours
        }
    return found


def analyze(
    graph: Graph,
    precision: str,
    data: object,
    *,
    labels: object | None = None,
    calibration: Calibration | None = None,
    options: CalibrationOptions | None = None,
    on_step: Progress = lambda step: None,
) -> Sensitivity:
    """Measure what each head and each layer of the body costs in low precision.

    Args:
        graph: An unfused fp32 graph with a task and a per-head output.
        precision: One of `hydra_edge.quantization.PRECISIONS`.
        data: Inputs to measure on, ``[N, ...]`` or by input name.
        labels: Their ground truth; without it only the uncertainty is measured.
        calibration: See `hydra_edge.quantize`.
        options: See `hydra_edge.quantize`.
        on_step: Called with a line about each step as it begins.

    Raises:
        InputError: The data does not fit, or the graph has no task or per-head output.
        QuantizationError: The graph cannot be quantized, or has no heads.
    """
    study = _Study(graph, data, labels, prepare(graph, calibration, options))
    return _analyze(study, precision, on_step)


def _analyze(study: _Study, precision: str, on_step: Progress) -> Sensitivity:
    full = study.reference
    on_step("everything at once")
    whole = study.part("all", Precision(precision, precision))
    on_step("each head alone")
    rows = study.logits(Precision("fp32", precision))
    _require_rows_are_heads(study, precision, rows)
    parts = []
    for head in range(len(full)):
        alone = np.array(full)
        alone[head] = rows[head]
        saved = study.saved(Precision(head_overrides={head: precision}))
        parts.append(Part(f"{HEAD}{head}", saved, study.losses(alone)))
    for layer in study.body:
        on_step(f"{layer} alone")
        parts.append(study.part(f"{LAYER}{layer}", Precision(layers={layer: precision})))
    return Sensitivity(
        precision=precision,
        samples=full.shape[1],
        heads=len(full),
        metrics=study.metrics(),
        whole=whole,
        parts=tuple(parts),
    )


def fit(
    graph: Graph,
    precision: str,
    budget: Budget,
    data: object,
    *,
    labels: object | None = None,
    fallback: str = "fp16",
    calibration: Calibration | None = None,
    options: CalibrationOptions | None = None,
    on_step: Progress = lambda step: None,
) -> Mix:
    """Find the smallest mix of two precisions that stays inside a budget.

    Starts with everything in ``precision`` and gives parts to ``fallback``, those first whose loss
    takes the largest share of the budget for the bytes they save, until what is measured on the
    whole mix fits; then takes back every part that turns out not to be needed, the largest first.

    Args:
        graph: See `analyze`.
        precision: The low precision.
        budget: How much worse each figure may become.
        data: See `analyze`. Choose other samples than for reporting the result: the mix is fitted
            to these.
        labels: Their ground truth.
        fallback: The precision of parts that are too sensitive; ``"fp16"`` or ``"fp32"``.
        calibration: See `hydra_edge.quantize`.
        options: See `hydra_edge.quantize`.
        on_step: Called with a line about each step as it begins.

    Raises:
        InputError: See `analyze`; or the budget names an unknown figure.
        QuantizationError: Not even the fallback precision for everything is inside the budget.
    """
    study = _Study(graph, data, labels, prepare(graph, calibration, options))
    found = _analyze(study, precision, on_step)
    return _Search(study, found, budget, fallback, on_step).run()


class _Study:
    """One graph, one data set, and what it says there in any precision."""

    def __init__(
        self, graph: Graph, data: object, labels: object | None, prepared: Prepared
    ) -> None:
        if graph.metadata.task is None or graph.metadata.logits is None:
            raise InputError(
                "The graph has no task or no per-head output.",
                "Without them it is not known what low precision does to its uncertainty.",
                "Give it a task first, with `summarize` or --task.",
            )
        if not prepared.heads:
            raise QuantizationError(
                "The graph has no heads to tell from its body.",
                "Heads are layers side by side whose results one Concat joins, or are outputs.",
                "Check what it holds with `hydra-edge inspect`.",
            )
        self.task = tasks.find(graph.metadata.task)
        self.output = graph.metadata.logits
        self.graph = graph
        self.prepared = prepared
        self.samples = Samples(data, graph.inputs, progress=prepared.options.progress)  # type: ignore[arg-type]
        self.labels = None if labels is None else to_numpy(labels, "labels")
        self.bytes = cost(graph).weight_bytes
        in_heads = frozenset().union(*prepared.heads)
        self.body = [name for name in prepared.layers() if name not in in_heads]
        self.reference = self._run(graph)

    def _run(self, graph: Graph) -> Array:
        batches = self.samples.run(graph.model, [self.output], "measuring")
        return np.concatenate([values[self.output] for values in batches], axis=1)

    def logits(self, precision: Precision) -> Array:
        """``[M, B, C]`` in some precision."""
        return self._run(self.prepared.apply(precision))

    def saved(self, precision: Precision) -> int:
        """Bytes of weights that it saves."""
        return self.bytes - cost(self.prepared.apply(precision)).weight_bytes

    def losses(self, logits: Array) -> dict[str, float]:
        """See `losses`."""
        return losses(self.task, logits, self.reference, self.labels)

    def metrics(self) -> dict[str, float]:
        """Quality in full precision; without labels nothing is known of it."""
        return {} if self.labels is None else self.task.metrics(self.reference, self.labels)

    def part(self, name: str, precision: Precision) -> Part:
        """What a precision costs."""
        return Part(name, self.saved(precision), self.losses(self.logits(precision)))


def _require_rows_are_heads(study: _Study, precision: str, rows: Array) -> None:
    """Every second head in low precision must change every second row, and no other."""
    even = dict.fromkeys(range(0, len(rows), 2), precision)
    mixed = study.logits(Precision(head_overrides=even))
    expected = np.array(study.reference)
    expected[::2] = rows[::2]
    if len(rows) != len(study.prepared.heads) or not np.allclose(mixed, expected, 1e-4, 1e-5):
        raise QuantizationError(
            f"The rows of '{study.output}' are not one head each, in order.",
            "What single heads cost cannot be told from it.",
            "Export the heads side by side, stacked along axis 0.",
        )


class _Search:
    """Looks for the cheapest mix; every candidate is measured as a whole."""

    def __init__(
        self, study: _Study, found: Sensitivity, budget: Budget, fallback: str, on_step: Progress
    ) -> None:
        budget.excess(found.whole.losses)  # unknown figures are named before the search
        self.study = study
        self.low = found.precision
        self.fallback = fallback
        self.budget = budget
        self.on_step = on_step
        self.parts = sorted(found.parts, key=self._cheapness, reverse=True)
        self.heads = found.heads
        self.measured: dict[frozenset[str], Mapping[str, float]] = {frozenset(): found.whole.losses}

    def _cheapness(self, part: Part) -> float:
        """How much of the budget a part takes for each byte that it saves."""
        shares = [
            max(part.losses[name], 0.0) / limit if limit else math.inf * (part.losses[name] > 0)
            for name, limit in self.budget.limits.items()
        ]
        worst = max((0.0 if math.isnan(share) else share for share in shares), default=0.0)
        return worst / max(part.saved_bytes, 1)

    def run(self) -> Mix:
        """Give parts to the fallback until the mix fits, then take back what need not be there."""
        names = [part.name for part in self.parts]
        count = self._first_that_fits(names)
        kept = list(names[:count])
        sizes = {part.name: part.saved_bytes for part in self.parts}
        for name in sorted(kept[:-1], key=lambda n: -sizes[n]):
            fewer = [other for other in kept if other != name]
            if self.fits(fewer):
                kept = fewer
        chosen = tuple(name for name in names if name in kept)
        precision = self.mix(chosen)
        graph = self.study.prepared.apply(precision)
        return Mix(
            graph=graph,
            precision=precision,
            kept=chosen,
            losses=self.measured[frozenset(chosen)],
            saved_bytes=self.study.saved(precision),
            tried=len(self.measured),
        )

    def _first_that_fits(self, names: Sequence[str]) -> int:
        """How many of ``names``, from the first on, the fallback needs: doubled, then bisected."""
        if self.fits([]):
            return 0
        low, high = 0, 1
        while high < len(names) and not self.fits(names[:high]):
            low, high = high, 2 * high
        high = min(high, len(names))
        if not self.fits(names[:high]):
            excess = self.budget.excess(self.measured[frozenset(names[:high])])
            raise QuantizationError(
                f"Even with every layer in {self.fallback} the budget is exceeded: "
                + ", ".join(f"{name} by {value:.3g}" for name, value in excess.items())
                + ".",
                f"Allowed are {_text(self.budget.limits)}.",
                "Loosen the budget, or choose fp32 as the fallback.",
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(names[:middle]) else (middle, high)
        return high

    def fits(self, kept: Sequence[str]) -> bool:
        """Whether the mix with ``kept`` in the fallback precision is inside the budget."""
        key = frozenset(kept)
        if key not in self.measured:
            self.on_step(f"{len(kept)} of {len(self.parts)} parts in {self.fallback}")
            self.measured[key] = self.study.losses(self.study.logits(self.mix(kept)))
        return not self.budget.excess(self.measured[key])

    def mix(self, kept: Sequence[str]) -> Precision:
        """Everything low but ``kept``."""
        if len(kept) == len(self.parts):
            return Precision(self.fallback, self.fallback)
        everything = Precision(self.low, self.low)
        heads = {
            int(name.removeprefix(HEAD)): self.fallback for name in kept if name.startswith(HEAD)
        }
        layers = {
            name.removeprefix(LAYER): self.fallback for name in kept if name.startswith(LAYER)
        }
        if len(heads) == self.heads:  # said shorter
            return replace(everything, heads=self.fallback, layers=layers)
        return replace(everything, head_overrides=heads, layers=layers)


def _text(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
