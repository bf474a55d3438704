"""What a file, a prediction or this machine holds, as rows for people and for JSON."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.markup import escape
from rich.table import Table

from hydra_edge import backends, kernels, targets
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import FusionGroup, Graph
from hydra_edge.artifacts.prediction import Prediction
from hydra_edge.costs import cost
from hydra_edge.errors import GraphError, HydraError
from hydra_edge.fusion import explain

if TYPE_CHECKING:
    from hydra_edge.artifacts.graph import Json
    from hydra_edge.mixed_precision import Mix
    from hydra_edge.planning import Plan
    from hydra_edge.sensitivity import Sensitivity
    from hydra_edge.verification import Verification

Rows = dict[str, "Json"]
_PREDICTION_ROWS = 20
_LONGEST_BRANCH = 12
_MEETING = {
    "stack": "a stack",
    "concat": "a concatenation",
    "sum": "a sum",
    "mean": "a mean",
    "max": "a maximum",
    "min": "a minimum",
    "tensors": "no node: each is needed on its own",
    "": "one node",
}
NOTHING_PARALLEL = "nothing parallel: no two branches with weights leave one tensor and meet again"
_DIGEST = re.compile("[0-9a-f]{64}")

# Import name, distribution, extra that brings it (None: base install), what it is for.
_LIBRARIES = (
    ("numpy", "numpy", None, "everything"),
    ("onnx", "onnx", None, "reading and writing graphs"),
    ("onnx_graphsurgeon", "onnx-graphsurgeon", None, "rewriting graphs"),
    ("onnxruntime", "onnxruntime", None, "quantizing, and engines for 'cpu'"),
    ("torch", "torch", "train", "ensembles, distillation, export"),
    ("accelerate", "accelerate", "train", "distillation"),
    ("safetensors", "safetensors", "train", "checkpoints"),
    ("onnxscript", "onnxscript", "train", "export"),
    ("sklearn", "scikit-learn", "metrics", "quality figures in verify and bench"),
    ("scipy", "scipy", "metrics", "quality figures of regressors"),
    ("torchmetrics", "torchmetrics", "metrics", "calibration error"),
    ("matplotlib", "matplotlib", "report", "plots in HTML reports"),
    ("tensorrt_rtx", "tensorrt-rtx", "rtx", "engines for GeForce RTX cards"),
)


def describe_graph(graph: Graph) -> Rows:
    """Rows about a graph."""
    metadata = graph.metadata
    rows: Rows = {
        "kind": metadata.kind,
        "task": metadata.task,
        "heads": metadata.heads,
        "precision": metadata.precision,
        "inputs": [str(spec) for spec in graph.inputs],
        "outputs": [str(spec) for spec in graph.outputs],
        "nodes": len(graph.model.graph.node),
        "labels": list(metadata.labels),
        "provenance": list(metadata.provenance),
        "sha256": graph.sha256,
    }
    try:
        figures = cost(graph)
        rows["flops per sample"] = figures.flops_per_sample
        rows["weight bytes"] = figures.weight_bytes
    except GraphError as exc:
        rows["flops per sample"] = f"not counted: {exc.what}"
    if metadata.fusion is not None:
        rows["fusion"] = describe_fusion(metadata.fusion)
    else:
        rows["fuse would do"] = describe_fusion(explain(graph))
    return rows


def describe_fusion(groups: Sequence[FusionGroup]) -> list[str]:
    """One line per group of parallel branches, and what follows from it."""
    lines = []
    for group in groups:
        source = f" from '{group.source}'" if group.source else ""
        lines.append(f"{group.heads} branches{source} that meet in {_MEETING[group.join]}")
        if group.ops:
            lines.append(f"    {_abridged(group.ops)}")
            figures = f"{_quantity(group.weight_bytes)}B of weights"
            lines.append(f"    {figures}, {_quantity(group.flops_per_sample)}FLOP per sample")
        lines.append("    fused" if group.fused else f"    left alone: {group.reason}")
    return lines or [NOTHING_PARALLEL]


def fusion_rows(groups: Sequence[FusionGroup]) -> list[Rows]:
    """The same for programs."""
    return [
        {**asdict(group), "ops": list(group.ops), "members": list(group.members)}
        for group in groups
    ]


def _abridged(operators: Sequence[str]) -> str:
    """Operators in order, repetitions counted, the middle of long branches left out."""
    runs = [(op, len(list(same))) for op, same in itertools.groupby(operators)]
    texts = [op if count == 1 else f"{count}x {op}" for op, count in runs]
    if len(texts) > _LONGEST_BRANCH:
        kept = _LONGEST_BRANCH // 2
        texts = [*texts[:kept], f"({len(texts) - 2 * kept} more)", *texts[-kept:]]
    return " → ".join(texts)


def _quantity(number: int) -> str:
    """Three digits and a prefix."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {prefix}"
    return f"{number} "


def describe_engine(engine: Engine) -> Rows:
    """Rows about an engine."""
    rows: Rows = {
        "kind": engine.kind,
        "task": engine.task,
        "heads": engine.heads,
        "target": engine.target,
        "backend": engine.backend,
        "precision": engine.precision,
        "size bytes": engine.size_bytes,
        "labels": list(engine.labels),
        "metrics": dict(engine.metrics),
        "tools": dict(engine.tools),
        "source sha256": engine.source_sha256,
        "calibration sha256": engine.calibration_sha256,
    }
    for name, program in engine.programs.items():
        timings = ", ".join(f"{k} {v:.3f} ms" for k, v in program.lowering_ms.items())
        rows[f"program {name}"] = [
            *(f"in  {spec}" for spec in program.inputs),
            *(f"out {spec}" for spec in program.outputs),
            f"batch {program.batch[0]} to {program.batch[2]}, best {program.batch[1]}",
            f"lowering {program.lowering} "
            + (f"(p50 at batch {program.batch[1]}: {timings})" if timings else "(not run)"),
            *describe_fusion(program.graph.fusion),
        ]
    return rows


def describe_file(path: Path) -> Rows:
    """Rows about a ``.hydra`` or ``.onnx`` file.

    Raises:
        ArtifactError: It is neither.
    """
    if path.suffix == ".hydra":
        return describe_engine(Engine.load(path))
    return describe_graph(Graph.load(path))


def describe_prediction(prediction: Prediction, engine: Engine) -> list[Rows]:
    """One row per sample, for the first 20; the last row then says how many more there are.

    Without a task it is not known what the outputs mean, and only their shapes are shown.
    """
    if engine.task is None:
        return [{name: f"{array.dtype} {list(array.shape)}" for name, array in prediction.items()}]
    labels = engine.labels
    size = next((len(array) for name, array in prediction.items() if name != "head_logits"), 0)
    rows: list[Rows] = []
    for index in range(min(size, _PREDICTION_ROWS)):
        row: Rows = {"sample": index}
        for name, array in prediction.items():
            if name == "mean_prob":
                best = int(np.argmax(array[index]))
                row["answer"] = labels[best] if labels else str(best)
                row["probability"] = round(float(array[index][best]), 4)
            elif name != "head_logits" and array[index].size == 1:
                row[name] = round(float(array[index].reshape(-1)[0]), 4)
            elif name != "head_logits":
                row[name] = str(np.round(array[index], 4).tolist())
        rows.append(row)
    if size > _PREDICTION_ROWS:
        rows.append({"sample": "…", "answer": f"{size - _PREDICTION_ROWS} more"})
    return rows


def describe_environment() -> tuple[Rows, bool]:
    """Rows about this machine, and whether the base install works."""
    rows: Rows = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "compiles for": [
            f"{t.name} ({', '.join(t.precisions)})"
            for t in targets.TARGETS
            if backends.build_for(t)
        ],
    }
    healthy = True
    missing: dict[str, list[str]] = {}
    for module, distribution, extra, purpose in _LIBRARIES:
        problem = _import_problem(module)
        if not problem:
            rows[distribution] = f"{importlib.metadata.version(distribution)} ({purpose})"
            continue
        healthy = healthy and extra is not None
        package = f"hydra-edge[{extra}]" if extra else "hydra-edge"
        rows[distribution] = f"missing ({problem}): needed for {purpose}"
        missing.setdefault(f"pip install '{package}'", []).append(distribution)
    rows["gpu"] = (
        "nvidia-smi found; this version compiles for the CPU only"
        if shutil.which("nvidia-smi")
        else "no NVIDIA driver found"
    )
    rows["cuda kernels"] = _kernels()
    rows["to install"] = [f"{command}  (for {', '.join(n)})" for command, n in missing.items()] or (
        "nothing: all of it is here"
    )
    return rows, healthy


def _kernels() -> str:
    """Whether libhydra_kernels is there and finds its GPU."""
    try:
        library = kernels.load()
    except HydraError as error:
        return f"not there: {error.why} {error.fix}"
    try:
        device = library.device()
    except HydraError as error:
        return f"built, weights as {library.weight_layout}; {error.what}"
    sm = f"sm_{device.compute_capability}"
    return f"on this GPU: {sm}, {device.sm_count} SMs, weights as {library.weight_layout}"


def _import_problem(module: str) -> str:
    """Why a library cannot be imported; empty when it can."""
    try:
        importlib.import_module(module)
    except ImportError as exc:
        return str(exc)
    return ""


def describe_plan(plan: Plan) -> Rows:
    """Rows about the target and the graph; `plan_table` has the precisions."""
    target, gpu = plan.target, plan.target.gpu
    rows: Rows = {"target": target.description}
    if gpu is not None:
        sm = f"sm_{gpu.compute_capability}, {gpu.sm_count} SMs at {gpu.clock_ghz:g} GHz"
        dla = f", {gpu.dla} DLA" if gpu.dla else ""
        rows["gpu"] = f"{sm}, {gpu.memory_gb:g} GB at {gpu.bandwidth_gb_s:g} GB/s{dla}"
        rows["power"] = gpu.power
        rows["source"] = gpu.source
    rows["software"] = [
        f"{target.name}@{one.name}: TensorRT{'-RTX' if 'rtx' in target.backend else ''} "
        f"{one.tensorrt}, CUDA {one.cuda}" + (f", Python {one.python}" if one.python else "")
        for one in target.software
    ] or ["ONNX Runtime"]
    rows["fusion"] = describe_fusion(plan.fusion)
    flops = plan.flops_per_sample
    rows["flops per sample"] = f"{_quantity(flops)}FLOP"
    if plan.ensemble_flops_per_sample is not None and flops:
        ratio = plan.ensemble_flops_per_sample / flops
        rows["its ensemble"] = (
            f"{plan.heads} members of one body and one head each: "
            f"{_quantity(plan.ensemble_flops_per_sample)}FLOP per sample, {ratio:.3g} times as many"
        )
    rows["engine"] = (
        "is built on this machine"
        if plan.buildable
        else f"not built by this version, which has no backend '{target.backend}'"
    )
    return rows


def targets_table() -> Table:
    """A line per target; those that this version cannot build for say so."""
    lines = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("target", "device", "sm", "memory", "precisions", "releases", ""):
        lines.add_column(name)
    for target in targets.TARGETS:
        gpu = target.gpu
        lines.add_row(
            target.name,
            target.description.rstrip(".").split(". ")[0],
            f"{gpu.compute_capability}" if gpu else "",
            f"{gpu.memory_gb:g} GB, {gpu.bandwidth_gb_s:g} GB/s" if gpu else "",
            ", ".join(target.precisions),
            ", ".join(one.name for one in target.software),
            "compile" if backends.build_for(target) else "plan only",
        )
    return lines


def plan_table(plan: Plan) -> Table:
    """A block per precision: bytes, and the least time of student and ensemble per batch."""
    lines = Table(box=None, padding=(0, 2, 0, 0))
    lines.add_column("precision", no_wrap=True)
    for name in ("weights", "ensemble's", "batch", "floor, ms", "ensemble's"):
        lines.add_column(name, justify="right")
    lines.add_column("bound by")
    for row in plan.precisions:
        ensemble = "" if row.ensemble_bytes is None else f"{_quantity(row.ensemble_bytes)}B"
        head = [row.precision, f"{_quantity(row.weight_bytes)}B", ensemble]
        for floor in row.floors:
            members = "" if floor.ensemble_ms is None else f"{floor.ensemble_ms:.3g}"
            cells = [f"{floor.batch}", f"{floor.student_ms:.3g}", members, floor.bound]
            lines.add_row(*head, *cells)
            head = ["", "", ""]
        if not row.floors:
            unknown = "no rate" if plan.target.gpu else ""
            lines.add_row(*head, "", "", "", unknown)
        if not row.fits:
            lines.add_row("", "", "more than the memory")
    return lines


def verification_table(result: Verification) -> Table:
    """Quality of model and reference side by side, and how far the uncertainty drifted."""
    lines = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "model", "reference"):
        lines.add_column(name, justify="right" if name else "left")
    for name, value in result.metrics.items():
        expected = result.reference_metrics[name]
        lines.add_row(name.replace("_", " "), f"{value:.4f}", f"{expected:.4f}")
    for name, value in result.drift.items():
        lines.add_row(name.replace("_", " "), f"{value:.4f}", "")
    if result.head_errors:
        worst = int(np.argmax(result.head_errors))
        error = result.head_errors[worst]
        lines.add_row("largest head error", f"{error:.4f}", f"head {worst}, relative RMS")
    return lines


def sensitivity_table(found: Sensitivity, mix: Mix | None) -> Table:
    """One line per part; those that the mix keeps in more bits have a star."""
    lines = Table(box=None, padding=(0, 2, 0, 0))
    names = list(found.whole.losses)
    lines.add_column("part", no_wrap=True)
    for name in ("saved kB", *names):
        lines.add_column(name, justify="right", no_wrap=True)
    for part in (*found.parts, found.whole):
        figures = [f"{part.losses[name]:+.2g}" for name in names]
        kept = mix is not None and part.name in mix.kept
        title = f"[yellow]{escape(part.name)}[/] *" if kept else escape(part.name)
        lines.add_row(title, f"{part.saved_bytes / 1e3:,.0f}", *figures)
    if mix is not None:
        figures = [f"{mix.losses[name]:+.2g}" for name in names]
        lines.add_row("[bold]the mix[/]", f"{mix.saved_bytes / 1e3:,.0f}", *figures)
    return lines


def table(rows: Sequence[Mapping[str, object]]) -> Table:
    """One mapping as name and value lines; several as a table with a column per key."""
    if len(rows) == 1:
        result = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        result.add_column(no_wrap=True)
        result.add_column(overflow="fold")
        for name, value in rows[0].items():
            result.add_row(f"[dim]{escape(name)}[/]", escape(_text(value)))
        return result
    result = Table(box=None, padding=(0, 2, 0, 0))
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        result.add_column(name.replace("_", " "), justify="right" if name != "answer" else "left")
    for row in rows:
        result.add_row(*(escape(_text(row.get(name, ""))) for name in names))
    return result


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return f"{value[:16]}…"  # in full with --json
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {_text(item)}" for name, item in value.items()) or "–"
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value)) or "–"
    return str(value)
