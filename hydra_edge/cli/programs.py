"""Engines of several programs on the command line: the verb `join`, and what `--program` means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hydra_edge import terminal
from hydra_edge.cli.app import JsonFlag, Output, verb
from hydra_edge.errors import UsageError

if TYPE_CHECKING:
    from hydra_edge.artifacts.engine import Engine

ProgramName = Annotated[
    str | None, typer.Option("--program", help="Of an engine of several programs: which one.")
]


@verb
def join(
    engines: Annotated[
        list[str], typer.Argument(help="NAME=FILE.hydra, one program each, e.g. encode=e.hydra.")
    ],
    output: Output,
    as_json: JsonFlag = False,
) -> None:
    """Put engines of one program each into one file."""
    from hydra_edge import inspection
    from hydra_edge.artifacts import joining
    from hydra_edge.artifacts.engine import Engine

    pairs = [text.partition("=") for text in engines]
    if odd := [text for text, (_, _, file) in zip(engines, pairs, strict=True) if not file]:
        raise UsageError(
            f"'{odd[0]}' names no program.",
            "join takes NAME=FILE.hydra.",
            f"Write encode={odd[0]}.",
        )
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UsageError(
            "Two programs have the same name.", "They are found by it.", "Rename one of them."
        )
    joined = joining.join({name: Engine.load(file) for name, _, file in pairs})
    joined.save(output)
    terminal.show(inspection.describe_engine(joined), as_json, title=f"wrote {output}")


def load_program(path: Path, program: str | None) -> Engine:
    """An engine, or one of its programs as an engine of its own."""
    from hydra_edge.artifacts import joining
    from hydra_edge.artifacts.engine import MAIN, Engine

    engine = Engine.load(path)
    if program is None and len(engine.programs) == 1:
        return engine
    return joining.only(engine, program or MAIN)
