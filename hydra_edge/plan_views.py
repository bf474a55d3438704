"""Targets and plans as people read them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from hydra_edge import backends, targets
from hydra_edge.deployment import HERE, Step
from hydra_edge.detection import Detection
from hydra_edge.inspection import Rows, describe_fusion, quantity
from hydra_edge.planning import Floor, Plan, PrecisionPlan
from hydra_edge.precision import PRECISIONS
from hydra_edge.targets import Gpu, Target

_FLOORS = (
    "A floor is the least time of one run that reads its weights from memory. Launches and "
    "activations come on top; weights that are still in a cache take less."
)


def describe_plan(plan: Plan) -> Rows:
    """Rows about the target and the graph; `plan_table` has the precisions."""
    target, gpu = plan.target, plan.target.gpu
    rows: Rows = {"target": target.description}
    if gpu is not None:
        rows["gpu"] = _gpu(gpu)
        rows["power"] = gpu.power
        if gpu.modes:
            rows["power modes"] = ", ".join(f"{mode.name} ({mode.number})" for mode in gpu.modes)
        rows["source"] = gpu.source
    rows["software"] = [_release(target, one) for one in target.software] or ["ONNX Runtime"]
    rows["features"] = [
        f"{'yes' if feature.there else 'no':4}{feature.name}"
        + (f": {feature.note}" if feature.note else "")
        for feature in plan.features
    ]
    rows["fusion"] = describe_fusion(plan.fusion)
    flops = plan.flops_per_sample
    rows["flops per sample"] = f"{quantity(flops)}FLOP"
    if plan.ensemble is not None and flops:
        members = plan.ensemble.flops_per_sample
        rows["its ensemble"] = (
            f"{plan.ensemble.what}: {quantity(members)}FLOP per sample, "
            f"{members / flops:.3g} times as many"
        )
    if not plan.buildable:
        rows["engine"] = f"not built by this version, which has no backend '{target.backend}'"
    return rows


def _gpu(gpu: Gpu) -> str:
    """What is known of it."""
    sms = f", {gpu.sm_count} SMs" if gpu.sm_count else ""
    clock = f" at {gpu.clock_ghz:g} GHz" if gpu.clock_ghz else ""
    bandwidth = f" at {gpu.bandwidth_gb_s:g} GB/s" if gpu.bandwidth_gb_s else ""
    dla = f", {gpu.dla} DLA" if gpu.dla else ""
    return f"sm_{gpu.compute_capability}{sms}{clock}, {gpu.memory_gb:g} GB{bandwidth}{dla}"


def _release(target: Target, release: targets.Software) -> str:
    product = "TensorRT-RTX" if target.backend == "tensorrt_rtx" else "TensorRT"
    python = f", Python {release.python}" if release.python else ""
    return (
        f"{target.name}@{release.name}: {product} {release.tensorrt}, CUDA {release.cuda}{python}"
    )


def plan_table(plan: Plan) -> Table:
    """A block per precision: bytes, and the least time of student and ensemble per batch."""
    lines = Table(box=None, padding=(0, 2, 0, 0))
    lines.add_column("precision", no_wrap=True)
    for name in ("weights", "ensemble's", "batch", "floor, ms", "ensemble's"):
        lines.add_column(name, justify="right")
    for name in ("bound by", "compute-bound from"):
        lines.add_column(name)
    for row in plan.precisions:
        ensemble = "" if row.ensemble_bytes is None else f"{quantity(row.ensemble_bytes)}B"
        head = [row.precision, f"{quantity(row.weight_bytes)}B", ensemble]
        start = "" if row.compute_bound_from is None else f"batch {row.compute_bound_from}"
        times = list(_times(row))
        for cells in times or [("", "", "", "")]:
            lines.add_row(*head, *cells, start)
            head, start = ["", "", ""], ""
    return lines


def _times(row: PrecisionPlan) -> Iterator[tuple[str, ...]]:
    """Batches, floors and bound; batches that take the same time stand together."""

    def cells(floor: Floor) -> tuple[str, ...]:
        members = "" if floor.ensemble_ms is None else _milliseconds(floor.ensemble_ms)
        bound = "no rate" if floor.bound == "unknown" else floor.bound
        return _milliseconds(floor.student_ms), members, bound

    for same, floors in itertools.groupby(row.floors, key=cells):
        yield ", ".join(str(floor.batch) for floor in floors), *same


def _milliseconds(time: float) -> str:
    """Three digits; below a microsecond they would say nothing, as a launch takes longer."""
    return f"{time:.3g}" if time >= 0.001 else "<0.001"


def plan_lines(plan: Plan, steps: Sequence[Step]) -> Iterator[str]:
    """What to mind, and what to do: markup, a line each."""
    if any(row.floors for row in plan.precisions):
        yield f"[dim]{_FLOORS}[/]"
    for note in plan.notes:
        yield f"[yellow]mind:[/] {escape(note.text)}"
    if not plan.buildable:
        return
    yield "[bold]to do[/]"
    for step in steps:
        place = "on this machine" if step.where == HERE else "on the device"
        yield f"  [dim]{place}: {escape(step.why)}[/]"
        yield f"    {escape(step.command)}"


def targets_table(here: Detection) -> Table:
    """A line per target; that of this machine has a star, and a line if the table has none."""
    lines = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("", "target", "device", "sm", "GB", "GB/s", "precisions", "releases", ""):
        right = name.startswith("GB")
        lines.add_column(name, justify="right" if right else "left", no_wrap=name == "target")
    for target in known_targets(here):
        gpu = target.gpu
        lines.add_row(
            "*" if target.name == here.target.name else "",
            target.name,
            target.description.rstrip(".").split(". ")[0],
            f"{gpu.compute_capability}" if gpu else "",
            f"{gpu.memory_gb:g}" if gpu else "",
            f"{gpu.bandwidth_gb_s:g}" if gpu and gpu.bandwidth_gb_s else "",
            _abridged(target.precisions),
            ", ".join(one.name for one in target.software),
            "" if backends.build_for(target) else "plan only",
        )
    return lines


def _abridged(precisions: Sequence[str]) -> str:
    """In few words: most targets have all precisions, or all but one."""
    lacking = [precision for precision in PRECISIONS if precision not in precisions]
    return (
        f"all but {lacking[0]}"
        if len(lacking) == 1
        else ", ".join(precisions if lacking else ["all"])
    )


def known_targets(here: Detection) -> tuple[Target, ...]:
    """The table, and this machine if it is not in it."""
    names = {target.name for target in targets.TARGETS}
    return (*targets.TARGETS, *([] if here.target.name in names else [here.target]))
