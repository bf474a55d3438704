"""`plan`: what a graph would be on a target, told on any machine, before anything is built.

The floor of a run is the longer of two times: that of reading its weights once from memory, and
that of its multiply-adds at the target's highest rate with 32-bit sums. A real program reads
activations, launches kernels and waits; how far it stays above the floor is what `bench` measures.
Only weights that are still in a cache from the run before take less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hydra_edge import backends, costs, detection, features, fusion
from hydra_edge.artifacts.graph import FusionGroup, Graph
from hydra_edge.costs import Cost
from hydra_edge.errors import InputError
from hydra_edge.features import Feature
from hydra_edge.targets import Gpu, Target

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int8-weight-only": 8, "int4-weight-only": 4, "fp8": 8}
BATCHES = (1, 8, 32)
_LAUNCH_MS = 0.005  # of one kernel in a stream; 2 to 5 µs are usual


@dataclass(frozen=True)
class Floor:
    """The least time of one run.

    Attributes:
        batch: Rows of a run.
        student_ms: Of the graph.
        ensemble_ms: Of its ensemble; None without heads.
        bound: "memory" or "compute": what the student's floor is made of; "unknown" where no rate
            is published, and only the time of reading weights is told.
    """

    batch: int
    student_ms: float
    ensemble_ms: float | None
    bound: str


@dataclass(frozen=True)
class PrecisionPlan:
    """The graph in one precision.

    Attributes:
        precision: Of body and heads alike.
        weight_bytes: Of the student.
        ensemble_bytes: Of its ensemble; None without heads.
        fits: Whether the student's weights fit the device's memory.
        ensemble_fits: Whether the ensemble's do.
        compute_bound_from: The smallest batch whose arithmetic takes longer than its weights; None
            where no rate is published.
        floors: Per batch; none where the target's bandwidth is not published.
    """

    precision: str
    weight_bytes: int
    ensemble_bytes: int | None
    fits: bool
    ensemble_fits: bool
    compute_bound_from: int | None
    floors: tuple[Floor, ...]


@dataclass(frozen=True)
class Ensemble:
    """What the student is compared with.

    Attributes:
        what: Where its figures are from.
        flops_per_sample: Two per multiply-add.
        weight_bytes: In fp32.
    """

    what: str
    flops_per_sample: int
    weight_bytes: int


@dataclass(frozen=True)
class Note:
    """Something to mind.

    Attributes:
        code: For programs: "memory", "no-rate", "int8", "launches", "compute" or "ensemble".
        text: For people.
    """

    code: str
    text: str


@dataclass(frozen=True)
class Plan:
    """What a graph would be on a target.

    Attributes:
        target: The row of the table.
        heads: M, or None where nothing is parallel.
        fusion: What would be fused, and what not and why.
        flops_per_sample: Of the student at batch 1, two per multiply-add.
        ensemble: What it is compared with; None without heads.
        precisions: The target's, the most exact first.
        features: What the target has, and what not.
        notes: What to mind.
        buildable: Whether this version builds engines for the target.
    """

    target: Target
    heads: int | None
    fusion: tuple[FusionGroup, ...]
    flops_per_sample: int
    ensemble: Ensemble | None
    precisions: tuple[PrecisionPlan, ...]
    features: tuple[Feature, ...]
    notes: tuple[Note, ...]
    buildable: bool


def plan(
    graph: Graph,
    target: str | Target,
    *,
    against: Graph | None = None,
    batches: Sequence[int] = BATCHES,
) -> Plan:
    """Tell what ``graph`` would be on ``target``.

    Args:
        graph: A float graph, fused or not.
        target: A name from `hydra-edge targets`, or a row.
        against: The ensemble's float graph; without it, an ensemble of M members is assumed that
            have the graph's body and one of its heads each.
        batches: Batch sizes to tell the floor of.

    Raises:
        InputError: Unknown target, a batch below 1, a graph that is quantized already, or an
            ensemble with other inputs.
        DeviceMismatchError: The device is too old.
        GraphError: A shape that decides the count is unknown.
    """
    row = detection.find(target) if isinstance(target, str) else target
    if not batches or min(batches) < 1:
        raise InputError(
            f"Batches {list(batches)} were asked for.", "Each is at least 1.", "Write e.g. 1,8,32."
        )
    for one in filter(None, (graph, against)):
        _check_float(one)
    total = costs.cost(graph)
    groups = graph.metadata.fusion or fusion.explain(graph)
    fused = [group for group in groups if group.fused]
    heads = max((group.heads for group in fused), default=None)
    ensemble = _counted(graph, against) if against is not None else _assumed(total, heads, fused)
    precisions = tuple(
        _in_precision(precision, row, total, ensemble, batches) for precision in row.precisions
    )
    found = Plan(
        target=row,
        heads=heads,
        fusion=tuple(groups),
        flops_per_sample=total.flops_per_sample,
        ensemble=ensemble,
        precisions=precisions,
        features=features.of(row),
        notes=(),
        buildable=backends.build_for(row),
    )
    return replace(found, notes=tuple(_notes(found)))


def _check_float(graph: Graph) -> None:
    if graph.metadata.precision != "fp32":
        raise InputError(
            f"The graph is stored in {graph.metadata.precision}.",
            "A plan compares the precisions of a target, starting from floats.",
            "Plan with the graph before it was quantized.",
        )


def _counted(graph: Graph, against: Graph) -> Ensemble:
    ours, theirs = (sorted(s.shape[1:] for s in one.inputs) for one in (graph, against))
    if ours != theirs:
        raise InputError(
            f"The ensemble's inputs are {'; '.join(map(str, against.inputs))}.",
            f"The student's are {'; '.join(map(str, graph.inputs))}: they do not do the same.",
            "Name the ensemble that the student was distilled from.",
        )
    cost = costs.cost(against)
    return Ensemble("as in its graph", cost.flops_per_sample, cost.weight_bytes)


def _assumed(total: Cost, heads: int | None, fused: Sequence[FusionGroup]) -> Ensemble | None:
    """M members, each the body and one head."""
    if heads is None:
        return None
    of_heads = [group for group in fused if group.heads == heads]
    head_flops = sum(group.flops_per_sample for group in of_heads)
    head_bytes = sum(group.weight_bytes for group in of_heads)
    return Ensemble(
        f"{heads} members of one body and one head each",
        heads * (total.flops_per_sample - head_flops) + head_flops,
        heads * (total.weight_bytes - head_bytes) + head_bytes,
    )


def _in_precision(
    precision: str, row: Target, total: Cost, ensemble: Ensemble | None, batches: Sequence[int]
) -> PrecisionPlan:
    def stored(bytes_in_fp32: int) -> int:
        return bytes_in_fp32 * BITS[precision] // 32

    weight_bytes = stored(total.weight_bytes)
    ensemble_bytes = None if ensemble is None else stored(ensemble.weight_bytes)
    roof = _Roof(row.gpu, precision)
    floors = []
    for batch in batches if roof.bandwidth else ():
        memory, compute = roof.times_ms(weight_bytes, batch * total.flops_per_sample)
        members = None
        if ensemble is not None:
            members = max(
                roof.times_ms(stored(ensemble.weight_bytes), batch * ensemble.flops_per_sample)
            )
        bound = "compute" if compute > memory else "memory"
        floors.append(
            Floor(batch, max(memory, compute), members, bound if roof.rate else "unknown")
        )
    return PrecisionPlan(
        precision=precision,
        weight_bytes=weight_bytes,
        ensemble_bytes=ensemble_bytes,
        fits=weight_bytes <= roof.memory_bytes,
        ensemble_fits=(ensemble_bytes or 0) <= roof.memory_bytes,
        compute_bound_from=roof.compute_bound_from(weight_bytes, total.flops_per_sample),
        floors=tuple(floors),
    )


class _Roof:
    """What a GPU can do per second at most in one precision; 0 where that is not published."""

    def __init__(self, gpu: Gpu | None, precision: str) -> None:
        self.bandwidth = gpu.bandwidth_gb_s * 1e9 if gpu else 0.0
        self.rate = gpu.operations_per_s(precision) if gpu else 0.0
        self.memory_bytes = gpu.memory_gb * 1e9 if gpu else math.inf

    def times_ms(self, weight_bytes: int, flops: int) -> tuple[float, float]:
        """Of reading weights, and of arithmetic."""
        return weight_bytes / self.bandwidth * 1e3, flops / self.rate * 1e3 if self.rate else 0.0

    def compute_bound_from(self, weight_bytes: int, flops_per_sample: int) -> int | None:
        if not self.bandwidth or not self.rate or not flops_per_sample:
            return None
        return int(weight_bytes / self.bandwidth * self.rate / flops_per_sample) + 1


def _notes(plan: Plan) -> Iterator[Note]:
    """What to mind, the most important first."""
    if plan.ensemble is not None and plan.ensemble.flops_per_sample < plan.flops_per_sample:
        yield Note("ensemble", "The ensemble takes fewer operations than the student.")
    if plan.target.gpu is not None:
        yield from _memory_notes(plan, plan.target.gpu)
        yield from _rate_notes(plan, plan.target.gpu)
        yield from _time_notes(plan)


def _memory_notes(plan: Plan, gpu: Gpu) -> Iterator[Note]:
    shared = ", shared with the system" if plan.target.is_jetson else ""
    for who, left_out in (
        ("student", [row.precision for row in plan.precisions if not row.fits]),
        ("ensemble", [row.precision for row in plan.precisions if not row.ensemble_fits]),
    ):
        if left_out:
            yield Note(
                "memory",
                f"The {who}'s weights alone are more than the {gpu.memory_gb:g} GB of memory"
                f"{shared}, in {', '.join(left_out)}.",
            )


def _rate_notes(plan: Plan, gpu: Gpu) -> Iterator[Note]:
    rates = {row.precision: gpu.operations_per_s(row.precision) for row in plan.precisions}
    silent = ", ".join(name for name, rate in rates.items() if not rate)
    if not gpu.bandwidth_gb_s:
        yield Note("no-rate", f"The bandwidth of {plan.target.name} is not known: no floors.")
    elif silent:
        yield Note(
            "no-rate",
            f"No tensor rate of {silent} is published for {plan.target.name}: the floor is the "
            "time of reading weights alone, and whether it is faster than others where arithmetic "
            "takes longer has to be measured.",
        )
    if 0 < rates["int8"] <= rates["fp16"]:
        yield Note("int8", "int8 multiplies no faster than fp16 here: it only saves bytes.")


def _time_notes(plan: Plan) -> Iterator[Note]:
    half = next(row.floors for row in plan.precisions if row.precision == "fp16")
    short = [str(floor.batch) for floor in half if floor.student_ms < _LAUNCH_MS]
    if short:
        yield Note(
            "launches",
            f"At batch {', '.join(short)} the floor in fp16 is below the 5 µs that the launch of "
            "one kernel may take: fewer launches make it faster there, fewer bits do not.",
        )
    bound = [
        f"{row.precision} from batch {row.compute_bound_from}"
        for row in plan.precisions
        if any(floor.bound == "compute" and floor.student_ms >= _LAUNCH_MS for floor in row.floors)
    ]
    if bound:
        yield Note(
            "compute",
            "Bound by arithmetic, so that a larger batch takes longer in proportion: "
            f"{', '.join(bound)}.",
        )
