"""The application: options that verbs share, and errors that become exit codes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from hydra_edge.errors import HydraError

app = typer.Typer(
    name="hydra-edge",
    help="Uncertainty-aware models on the edge: compile, prove and serve Hydra students.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Verb = TypeVar("Verb", bound=Callable[..., None])
INTERRUPTED = 130

Output = Annotated[Path, typer.Option("-o", "--output", help="File to write.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; one per core by default.")]
Batch = Annotated[str, typer.Option(help="Smallest, best and largest batch, e.g. 1,8,32.")]
PrecisionText = Annotated[
    str,
    typer.Option(
        help="fp32, fp16, int8, int8-weight-only, int4-weight-only, fp8, or parts: "
        "body=int8,heads=fp16,head.3=fp32,layer.NODE=fp16."
    ),
]
CalibrationFile = Annotated[
    Path | None, typer.Option(help="Representative inputs (.npz or .npy), needed for int8 and fp8.")
]
Method = Annotated[str, typer.Option("--method", help="minmax, percentile, entropy or mse.")]
DataFile = Annotated[Path, typer.Option(help="Inputs, and labels under 'labels' (.npz).")]


def verb(function: Verb) -> Verb:
    """Register a verb; deliberate errors become a message and an exit code, never a traceback."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> None:
        try:
            function(*args, **kwargs)
        except HydraError as exc:
            if kwargs.get("as_json"):
                parts = {"what": exc.what, "why": exc.why, "fix": exc.fix}
                typer.echo(json.dumps({"error": {"type": type(exc).__name__, **parts}}))
            raise exit_with(exc) from exc
        except KeyboardInterrupt as exc:
            typer.echo("\ninterrupted: no file was half written; run the command again.", err=True)
            raise typer.Exit(INTERRUPTED) from exc

    app.command(name=function.__name__.rstrip("_"))(run)
    return function


def exit_with(exc: HydraError) -> typer.Exit:
    """Say on stderr what failed; the exit to raise."""
    typer.echo(f"error: {exc.what}\n  why: {exc.why}\n  fix: {exc.fix}", err=True)
    return typer.Exit(exc.exit_code)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from hydra_edge import __version__

        typer.echo(f"hydra-edge {__version__}")
        raise typer.Exit
