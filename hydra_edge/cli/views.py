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
    from rich.markup import escape

    from hydra_edge import backends, detection, plan_views

    here = detection.detect()
    if as_json:
        terminal.echo_json(
            {
                target.name: asdict(target)
                | {
                    "buildable": backends.build_for(target),
                    "here": target.name == here.target.name,
                }
                for target in plan_views.known_targets(here)
            }
        )
        return
    console = terminal.console_on(stderr=False)
    console.print(plan_views.targets_table(here))
    console.print(f"* this machine, which 'local' stands for: {escape(here.found)}")


@verb
def plan(
    graph: Annotated[Path, typer.Argument(help="A float graph (.onnx), fused or not.")],
    target: Annotated[str, typer.Option(help="See `hydra-edge targets`; local: this machine.")],
    against: Annotated[
        Path | None, typer.Option(help="The ensemble's graph (.onnx), to compare with.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes to plan for, e.g. 1,8,32.")] = "1,8,32",
    precision: Annotated[str, typer.Option(help="What the commands build in.")] = "fp16",
    as_json: JsonFlag = False,
) -> None:
    """Tell what a graph would be on a target: fusion, bytes, the least time, what to do."""
    from hydra_edge import deployment, detection, plan_views, planning
    from hydra_edge.artifacts.graph import Graph
    from hydra_edge.targets import LOCAL

    batches = terminal.parse_integers(batch, "--batch")
    row = detection.find(target)
    local = target.partition("@")[0] == LOCAL
    here = {"found": detection.detect().found} if local else {}
    found = planning.plan(
        Graph.load(graph),
        row,
        against=None if against is None else Graph.load(against),
        batches=batches,
    )
    steps = deployment.steps(row, target, graph, precision, batches)
    if as_json:
        terminal.echo_json(asdict(found) | {"steps": [asdict(step) for step in steps]} | here)
        return
    rows = here | plan_views.describe_plan(found)
    terminal.show(rows, as_json, title=f"{graph} on {target}")
    console = terminal.console_on(stderr=False)
    console.print(plan_views.plan_table(found))
    for line in plan_views.plan_lines(found, steps):
        console.print(line, soft_wrap=True)


@verb
def doctor(as_json: JsonFlag = False) -> None:
    """Tell what this machine can do, and what to install for the rest."""
    from hydra_edge import inspection

    rows, healthy = inspection.describe_environment()
    terminal.show(rows, as_json, title="this machine")
    if not healthy:
        raise typer.Exit(6)
