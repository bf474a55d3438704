"""`plan`: what a graph would be on a target, told on any machine, before anything is built.

The floor of a run is the longer of two times that no program undercuts: that of reading its weights
once from memory, and that of its multiply-adds at the target's highest rate. A real program reads
activations, launches kernels and waits; how far it stays above the floor is what `bench` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra_edge import backends, costs, fusion, targets
from hydra_edge.artifacts.graph import FusionGroup, Graph
from hydra_edge.errors import InputError
from hydra_edge.targets import Target

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int8-weight-only": 8, "int4-weight-only": 4, "fp8": 8}
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Floor:
    """The least time of one run.

    Attributes:
        batch: Rows of a run.
        student_ms: Of the graph.
        ensemble_ms: Of M members, each the body and one head; None without heads.
        bound: "memory" or "compute": what the student's floor is made of.
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
        ensemble_bytes: Of M members; None without heads.
        fits: Whether the ensemble's, or else the student's, weights fit the device's memory.
        floors: Per batch; none where the target's figures are not published.
    """

    precision: str
    weight_bytes: int
    ensemble_bytes: int | None
    fits: bool
    floors: tuple[Floor, ...]


@dataclass(frozen=True)
class Plan:
    """What a graph would be on a target.

    Attributes:
        target: The row of the table.
        heads: M, or None where nothing is parallel.
        fusion: What would be fused, and what not and why.
        flops_per_sample: Of the student at batch 1, two per multiply-add.
        ensemble_flops_per_sample: Of M members; None without heads.
        precisions: The target's, the most exact first.
        buildable: Whether this version builds engines for the target.
    """

    target: Target
    heads: int | None
    fusion: tuple[FusionGroup, ...]
    flops_per_sample: int
    ensemble_flops_per_sample: int | None
    precisions: tuple[PrecisionPlan, ...]
    buildable: bool


def plan(graph: Graph, target: str, *, batches: Sequence[int] = BATCHES) -> Plan:
    """Tell what ``graph`` would be on ``target``.

    Args:
        graph: A float graph, fused or not.
        target: A name from `hydra-edge targets`.
        batches: Batch sizes to tell the floor of.

    Raises:
        InputError: Unknown target, a batch below 1, or a graph that is quantized already.
        DeviceMismatchError: The device is too old.
        GraphError: A shape that decides the count is unknown.
    """
    row = targets.find(target)
    if not batches or min(batches) < 1:
        raise InputError(
            f"Batches {list(batches)} were asked for.", "Each is at least 1.", "Write e.g. 1,8,32."
        )
    if graph.metadata.precision != "fp32":
        raise InputError(
            f"The graph is stored in {graph.metadata.precision}.",
            "A plan compares the precisions of a target, starting from floats.",
            "Plan with the graph before it was quantized.",
        )
    total = costs.cost(graph)
    groups = graph.metadata.fusion or fusion.explain(graph)
    fused = [group for group in groups if group.fused]
    heads = max((group.heads for group in fused), default=None)
    of_heads = [group for group in fused if group.heads == heads]
    head_flops = sum(group.flops_per_sample for group in of_heads)
    head_bytes = sum(group.weight_bytes for group in of_heads)

    def of_ensemble(whole: int, of_heads: int) -> int | None:
        return None if heads is None else heads * (whole - of_heads) + of_heads

    flops = of_ensemble(total.flops_per_sample, head_flops)
    plans = []
    for precision in row.precisions:
        student = total.weight_bytes * BITS[precision] // 32
        ensemble = of_ensemble(total.weight_bytes, head_bytes)
        members = None if ensemble is None else ensemble * BITS[precision] // 32
        largest = student if members is None else members
        floors = (
            _floor(row, precision, batch, (total.flops_per_sample, student), (flops, members))
            for batch in batches
        )
        plans.append(
            PrecisionPlan(
                precision=precision,
                weight_bytes=student,
                ensemble_bytes=members,
                fits=row.gpu is None or largest <= row.gpu.memory_gb * 1e9,
                floors=tuple(floor for floor in floors if floor is not None),
            )
        )
    return Plan(
        target=row,
        heads=heads,
        fusion=tuple(groups),
        flops_per_sample=total.flops_per_sample,
        ensemble_flops_per_sample=flops,
        precisions=tuple(plans),
        buildable=backends.build_for(row),
    )


def _floor(
    target: Target,
    precision: str,
    batch: int,
    student: tuple[int, int],
    ensemble: tuple[int | None, int | None],
) -> Floor | None:
    gpu = target.gpu
    rate = gpu.operations_per_s(precision) if gpu else 0
    if gpu is None or not rate:
        return None

    def milliseconds(flops: int, weight_bytes: int) -> tuple[float, float]:
        return weight_bytes / gpu.bandwidth_gb_s / 1e6, batch * flops / rate * 1e3

    memory, arithmetic = milliseconds(*student)
    flops, weight_bytes = ensemble
    return Floor(
        batch=batch,
        student_ms=max(memory, arithmetic),
        ensemble_ms=(
            None
            if flops is None or weight_bytes is None
            else max(milliseconds(flops, weight_bytes))
        ),
        bound="memory" if memory >= arithmetic else "compute",
    )
