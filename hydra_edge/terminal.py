"""What the command line reads and prints: options, tables, JSON, reports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hydra_edge.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from hydra_edge.artifacts.engine import Engine
    from hydra_edge.artifacts.graph import FusionGroup, Graph
    from hydra_edge.artifacts.report import Report
    from hydra_edge.compilation import CompileOptions
    from hydra_edge.mixed_precision import Mix
    from hydra_edge.programs import BuildOptions
    from hydra_edge.sensitivity import Sensitivity


def console_on(stderr: bool = True) -> Console:
    """Progress and notes go to stderr, so that stdout holds only results."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def show_step(step: str) -> None:
    """One dim line about what is being done; names in it are text, not markup."""
    from rich.markup import escape

    console_on().print(f"[dim]{escape(step)} …[/]")


def show(rows: Mapping[str, object], as_json: bool, title: str) -> None:
    """Print rows, as a table under a title or as JSON."""
    if as_json:
        echo_json(rows)
        return
    from rich.markup import escape

    from hydra_edge import inspection

    console = console_on(stderr=False)
    console.print(f"[bold]{escape(title)}[/]")
    console.print(inspection.table([rows]))


def show_fusion(groups: Sequence[FusionGroup], as_json: bool, title: str) -> None:
    """Print what was or would be fused."""
    from hydra_edge import inspection

    if as_json:
        echo_json({"fusion": inspection.fusion_rows(groups)})
    else:
        show({"branches": inspection.describe_fusion(groups)}, as_json, title)


def show_sensitivity(found: Sensitivity, mix: Mix | None, as_json: bool) -> None:
    """Print what parts cost in low precision, and the mix inside a budget if one was wanted."""
    from rich.markup import escape

    from hydra_edge import inspection

    if as_json:
        rows: dict[str, object] = {"sensitivity": asdict(found)}
        if mix is not None:
            rows["mix"] = {
                "precision": str(mix.precision),
                "kept": list(mix.kept),
                "losses": dict(mix.losses),
                "saved_bytes": mix.saved_bytes,
                "tried": mix.tried,
            }
        echo_json(rows)
        return
    console = console_on(stderr=False)
    console.print(
        f"By how much figures get worse when a part alone is {found.precision}, on "
        f"{found.samples} samples:"
    )
    console.print(inspection.sensitivity_table(found, mix))
    if mix is not None:
        count = f"{len(mix.kept)} of {len(found.parts)} parts kept (*)"
        console.print(f"[bold]{count}[/]: {escape(str(mix.precision))}")


def echo_json(data: object) -> None:
    """One strict JSON document: NaN and infinity, which JSON lacks, become null."""

    def strict(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {str(name): strict(item) for name, item in value.items()}
        return [strict(item) for item in value] if isinstance(value, list | tuple) else value

    typer.echo(json.dumps(strict(data), default=str))


def save_graph(graph: Graph, path: Path, as_json: bool) -> None:
    """Write a graph and print what it is."""
    from hydra_edge import inspection

    graph.save(path)
    show(inspection.describe_graph(graph), as_json, title=f"wrote {path}")


def load_model(path: Path) -> Graph | Engine:
    """An engine or a graph, by the ending of its name."""
    from hydra_edge.artifacts.engine import Engine
    from hydra_edge.artifacts.graph import Graph

    return Engine.load(path) if path.suffix == ".hydra" else Graph.load(path)


def parse_integers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as exc:
        raise InputError(
            f"{option} is '{text}'.", "It takes whole numbers with commas.", "Write e.g. 1,8,32."
        ) from exc


def parse_batch(text: str, option: str) -> tuple[int, int, int]:
    """Read a smallest, a best and a largest batch."""
    sizes = parse_integers(text, option)
    if len(sizes) != 3:
        raise InputError(
            f"{option} names {len(sizes)} sizes.",
            "An engine has a smallest, a best and a largest batch.",
            "Write e.g. 1,8,32.",
        )
    return sizes[0], sizes[1], sizes[2]


def parse_compile_options(
    batch: str, threads: int | None, lowering: str | None, build: BuildOptions
) -> CompileOptions:
    """The options of `compile` that the command line spells its own way."""
    from hydra_edge.compilation import CompileOptions

    return CompileOptions(parse_batch(batch, "--batch"), threads, lowering, build)


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """Read shapes such as ``1x3x224x224``, with commas between them."""
    shapes = [shape.split("x") for shape in text.split(",")]
    if not all(size.isdecimal() and int(size) for shape in shapes for size in shape):
        raise InputError(
            f"--example is '{text}'.",
            "It takes sizes of 1 and more with 'x' between them, one shape per input.",
            "Write e.g. 1x3x224x224.",
        )
    return [tuple(map(int, shape)) for shape in shapes]


def check_report_path(path: Path) -> str:
    """The format a report file asks for by its ending."""
    if path.suffix not in (".html", ".md", ".json"):
        raise InputError(
            f"'{path}' has no known report format.",
            "Its ending decides: .html, .md or .json.",
            "Choose one of those endings.",
        )
    return path.suffix


def write_report(report: Report, path: Path) -> None:
    """Write a report in the format its file name asks for."""
    from hydra_edge import reporting
    from hydra_edge.artifacts.files import write_atomic

    kind = check_report_path(path)
    if kind == ".json":
        text = report.to_json()
    else:
        text = reporting.to_html(report) if kind == ".html" else reporting.to_markdown(report)
    write_atomic(path, text.encode())
