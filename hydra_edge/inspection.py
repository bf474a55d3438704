"""What a file, a prediction or this machine holds, as rows for people and for JSON."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.markup import escape
from rich.table import Table

from hydra_edge import detection, fusion, kernels, targets
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import FusionGroup, Graph
from hydra_edge.artifacts.prediction import Prediction
from hydra_edge.costs import cost
from hydra_edge.errors import GraphError, HydraError
from hydra_edge.fusion import explain
from hydra_edge.gpu import plugin

if TYPE_CHECKING:
    from hydra_edge.artifacts.graph import Json
    from hydra_edge.mixed_precision import Mix
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
    ("tokenizers", "tokenizers", "vqa", "questions in words"),
    ("PIL", "pillow", "vqa", "image files"),
    ("tensorrt", "tensorrt", "tensorrt", "engines for Jetson and data-center GPUs"),
    ("pycuda.driver", "pycuda", "tensorrt", "building and running them"),
)
_UNSEEN = "it is in {}, which this virtual environment does not see: make one that sees it with "
_UNSEEN += "`python3 -m venv --system-site-packages`"


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
            figures = f"{quantity(group.weight_bytes)}B of weights"
            lines.append(f"    {figures}, {quantity(group.flops_per_sample)}FLOP per sample")
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


def quantity(number: int) -> str:
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
        "assets": [f"{name}, {len(data)} bytes" for name, data in engine.assets.items()],
        "source sha256": engine.source_sha256,
        "calibration sha256": engine.calibration_sha256,
    }
    for name, program in engine.programs.items():
        timings = ", ".join(f"{k} {v:.3f} ms" for k, v in program.lowering_ms.items())
        rows[f"program {name}"] = [
            *(f"in  {spec}" for spec in program.inputs),
            *(f"out {spec}" for spec in program.outputs),
            f"batch {program.batch[0]} to {program.batch[2]}, best {program.batch[1]}",
            (
                f"lowering {program.lowering} "
                + (f"(p50 at batch {program.batch[1]}: {timings})" if timings else "(not run)")
                if program.payload
                else "not built yet"
            ),
            *program.notes,
            *(
                describe_fusion(program.graph.fusion)
                if program.payload
                else ("would be fused:", *describe_fusion(fusion.explain(program.graph)))
            ),
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


def describe_environment(root: Path = Path("/")) -> tuple[Rows, bool]:
    """Rows about this machine, and whether the base install works.

    Args:
        root: Where its files begin.
    """
    here = detection.detect(root)
    rows: Rows = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "gpu": here.found,
        "system": here.system or "no NVIDIA driver",
        "local target": here.target.name,
    }
    healthy = True
    missing: dict[str, list[str]] = {}
    for module, distribution, extra, purpose in _LIBRARIES:
        problem = _import_problem(module)
        if not problem:
            rows[distribution] = f"{_version(module, distribution)} ({purpose})"
            continue
        healthy = healthy and extra is not None
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            rows[distribution] = f"installed, but does not load ({problem}): for {purpose}"
            continue
        rows[distribution] = f"missing ({problem}): needed for {purpose}"
        if unseen := next(root.glob(f"usr/lib/python3*/dist-packages/{module}"), None):
            rows[distribution] = f"{rows[distribution]}; {_UNSEEN.format(unseen.parent)}"
            continue
        command = _installation(distribution, extra, here.target.is_jetson)
        missing.setdefault(command, []).append(distribution)
    rows["cuda kernels"] = _kernels()
    rows["tensorrt plugin"] = _plugins()
    rows["to install"] = [f"{command}  (for {', '.join(n)})" for command, n in missing.items()] or (
        "nothing is missing"
    )
    return rows, healthy


def _installation(distribution: str, extra: str | None, on_jetson: bool) -> str:
    """The command that brings a library; a Jetson's TensorRT is that of its JetPack."""
    if on_jetson and extra == "tensorrt":
        is_tensorrt = distribution == "tensorrt"
        return "sudo apt install nvidia-jetpack" if is_tensorrt else f"pip install {distribution}"
    return f"pip install 'hydra-edge[{extra}]'" if extra else "pip install hydra-edge"


def _version(module: str, distribution: str) -> str:
    """Of an installed library; a package of the system may be known to Python alone."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(module), "__version__", "of unknown version"))


def _plugins() -> str:
    """For which versions of TensorRT our plugin is installed."""
    releases = [
        one for target in targets.TARGETS if target.backend == "tensorrt" for one in target.software
    ]
    majors = sorted({int(one.tensorrt.split(".")[0]) for one in releases})
    there = [str(major) for major in majors if plugin.path_for(str(major)).exists()]
    if not there:
        return "not there: heads are MatMuls of TensorRT without it; see kernels/README.md"
    return f"for TensorRT {' and '.join(there)}"


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
    except (ImportError, OSError) as exc:  # the latter of a library that it loads
        return str(exc)
    return ""


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
