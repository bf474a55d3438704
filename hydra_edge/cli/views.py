"""The verbs that only tell something: about files, targets, plans and this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hydra_edge import terminal
from hydra_edge.cli.app import JsonFlag, verb


@verb
def inspect(
    file: Annotated[Path, typer.Argument(help="A .hydra engine or an .onnx graph.")],
    as_json: JsonFlag = False,
) -> None:
    """Show what a file holds: inputs, outputs, heads, precision, lowering, provenance."""
    from hydra_edge import inspection

    terminal.show(inspection.describe_file(file), as_json, title=str(file))


@verb
def targets(as_json: JsonFlag = False) -> None:
    """List the devices: what engines can be compiled for, or planned for."""
    from hydra_edge import backends, inspection
    from hydra_edge.targets import TARGETS

    if not as_json:
        terminal.console_on(stderr=False).print(inspection.targets_table())
        return
    terminal.echo_json({t.name: asdict(t) | {"buildable": backends.build_for(t)} for t in TARGETS})


@verb
def plan(
    graph: Annotated[Path, typer.Argument(help="A float graph (.onnx), fused or not.")],
    target: Annotated[str, typer.Option(help="See `hydra-edge targets`.")],
    batch: Annotated[str, typer.Option(help="Batch sizes to plan for, e.g. 1,8,32.")] = "1,8,32",
    as_json: JsonFlag = False,
) -> None:
    """Tell what a graph would be on a target: fusion, precisions, bytes and the least time."""
    from hydra_edge import inspection, planning
    from hydra_edge.artifacts.graph import Graph

    found = planning.plan(
        Graph.load(graph), target, batches=terminal.parse_integers(batch, "--batch")
    )
    if as_json:
        terminal.echo_json(asdict(found))
        return
    terminal.show(inspection.describe_plan(found), as_json, title=f"{graph} on {target}")
    terminal.console_on(stderr=False).print(inspection.plan_table(found))


@verb
def doctor(as_json: JsonFlag = False) -> None:
    """Tell what this machine can do, and what to install for the rest."""
    from hydra_edge import inspection

    rows, healthy = inspection.describe_environment()
    terminal.show(rows, as_json, title="this machine")
    if not healthy:
        raise typer.Exit(6)
