"""`analyze`: what low precision costs an ensemble, part by part.

A part is one head, or one layer of the body. Each is stored and multiplied in low precision while
the rest is not, and what that does to the ensemble's accuracy, calibration and uncertainty is
measured.

Heads do not read each other, so one run with all heads in low precision holds each of them alone:
head m's row of it among the other rows in full precision is what quantizing head m alone gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
HEAD, LAYER = "head.", "layer."


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


def losses(task: Task, logits: Array, reference: Array, labels: Array | None) -> dict[str, float]:
    """By how much every figure of ``logits [M, B, C]`` is worse than the reference's.

    Returns:
        ``mi``, the mean absolute change of the epistemic uncertainty over its mean (a ratio of
        means would let changes up and down cancel), and ``mi_rank``, what its rank correlation
        lacks of 1. With labels also the loss of ``accuracy`` and the rise of each other metric that
        should be small, such as ``nll``, ``ece`` and ``rmse``. Negative where a figure got better.
    """
    doubt, expected = (task.summarize(values)[task.epistemic] for values in (logits, reference))
    mean = float(expected.mean())
    found = {
        "mi": float(np.abs(doubt - expected).mean()) / mean if mean > 0 else math.nan,
        "mi_rank": 1.0 - task.drift(logits, reference)["mi_rank_correlation"],
    }
    if labels is not None:
        ours, theirs = task.metrics(logits, labels), task.metrics(reference, labels)
        found |= {
            name: (theirs[name] - ours[name]) * (1.0 if name == "accuracy" else -1.0)
            for name in ("accuracy", "nll", "ece", "rmse", "crps")
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
) -> Sensitivity:
    """Measure what each head and each layer of the body costs in low precision.

    Args:
        graph: An unfused fp32 graph with a task and a per-head output.
        precision: One of `hydra_edge.quantization.PRECISIONS`.
        data: Inputs to measure on, ``[N, ...]`` or by input name.
        labels: Their ground truth; without it only the uncertainty is measured.
        calibration: See `hydra_edge.quantize`.
        options: See `hydra_edge.quantize`.

    Raises:
        InputError: The data does not fit, or the graph has no task or per-head output.
        QuantizationError: The graph cannot be quantized, or has no heads.
    """
    return Study(graph, data, labels, prepare(graph, calibration, options)).analyze(precision)


class Study:
    """One graph, one data set, and what it says there in any precision.

    Args:
        graph: See `analyze`.
        data: See `analyze`.
        labels: See `analyze`.
        prepared: The same graph, about to be quantized.
        on_step: Called with a line about each step as it begins.

    Raises:
        InputError: The data does not fit, or the graph has no task or per-head output.
        QuantizationError: The graph has no heads.
    """

    def __init__(
        self,
        graph: Graph,
        data: object,
        labels: object | None,
        prepared: Prepared,
        *,
        on_step: Callable[[str], None] = lambda step: None,
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
        self.prepared = prepared
        self.samples = Samples(data, graph.inputs, progress=prepared.options.progress)  # type: ignore[arg-type]
        self.labels = None if labels is None else to_numpy(labels, "labels")
        self.bytes = cost(graph).weight_bytes
        in_heads = frozenset().union(*prepared.heads)
        self.body = [name for name in prepared.layers() if name not in in_heads]
        self.on_step = on_step
        self.reference = self._run(graph)

    def analyze(self, precision: str) -> Sensitivity:
        """What everything together, each head and each layer of the body cost."""
        full = self.reference
        self.on_step("everything at once")
        whole = self.part("all", Precision(precision, precision))
        self.on_step("each head alone")
        rows = self.logits(Precision("fp32", precision))
        self._require_rows_are_heads(precision, rows)
        parts = []
        for head in range(len(full)):
            alone = np.array(full)
            alone[head] = rows[head]
            saved = self.saved(Precision(head_overrides={head: precision}))
            parts.append(Part(f"{HEAD}{head}", saved, self.losses(alone)))
        for layer in self.body:
            self.on_step(f"{layer} alone")
            parts.append(self.part(f"{LAYER}{layer}", Precision(layers={layer: precision})))
        return Sensitivity(
            precision=precision,
            samples=full.shape[1],
            heads=len(full),
            metrics=self.metrics(),
            whole=whole,
            parts=tuple(parts),
        )

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

    def _require_rows_are_heads(self, precision: str, rows: Array) -> None:
        """Every second head in low precision must change every second row, and no other."""
        even = dict.fromkeys(range(0, len(rows), 2), precision)
        expected = np.array(self.reference)
        expected[::2] = rows[::2]
        alike = len(rows) == len(self.prepared.heads) and np.allclose(
            self.logits(Precision(head_overrides=even)), expected, 1e-4, 1e-5
        )
        if not alike:
            raise QuantizationError(
                f"The rows of '{self.output}' are not one head each, in order.",
                "What single heads cost cannot be told from it.",
                "Export the heads side by side, stacked along axis 0.",
            )
