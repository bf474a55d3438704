"""The verbs that make an engine, or change one: `compile` and `refit`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hydra_edge import terminal
from hydra_edge.cli.app import (
    CalibrationFile,
    JsonFlag,
    Method,
    Output,
    PrecisionText,
    Threads,
    verb,
)
from hydra_edge.cli.programs import ProgramName
from hydra_edge.errors import UsageError

if TYPE_CHECKING:
    from hydra_edge.artifacts.engine import Engine

_QDQ = "qdq"
_BATCH = "1,8,32"


@verb
def compile_(
    file: Annotated[
        Path, typer.Argument(help="A graph (.onnx), or an engine (.hydra) to build again here.")
    ],
    output: Output,
    target: Annotated[
        str | None,
        typer.Option(help="See `hydra-edge targets`; `local` is this machine. Default: cpu."),
    ] = None,
    precision: PrecisionText = "fp32",
    calibration: CalibrationFile = None,
    method: Method = "minmax",
    batch: Annotated[
        str | None, typer.Option(help="Smallest, best and largest batch. Default: 1,8,32.")
    ] = None,
    threads: Threads = None,
    lowering: Annotated[
        str | None, typer.Option(help="Keep this one instead of timing all.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Inputs and labels to verify the engine on (.npz).")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="End a foreign graph in this task's summary first.")
    ] = None,
    logits: Annotated[
        str | None, typer.Option(help="Its per-head output [M,B,C], or M outputs with ','.")
    ] = None,
    no_plugin: Annotated[
        bool, typer.Option("--no-plugin", help="TensorRT: heads by its own kernels, not by ours.")
    ] = False,
    profile: Annotated[
        list[str] | None,
        typer.Option(help="TensorRT: a further batch range, e.g. 1,1,1; may be repeated."),
    ] = None,
    workspace_mb: Annotated[
        int | None, typer.Option(help="TensorRT: scratch memory; at most half of what is free.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="TensorRT: file that remembers what was timed.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(help="TensorRT: 0 (fast build) to 5 (fast engine).")
    ] = None,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="TensorRT: fp32 layers with 10 bits of mantissa.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="TensorRT: for every card from Ampere on.")
    ] = False,
    refittable: Annotated[
        bool, typer.Option("--refittable", help="TensorRT: weights can be changed by `refit`.")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="TensorRT: fill in the weights at load.")
    ] = False,
    dla_core: Annotated[
        int | None, typer.Option(help="TensorRT: use this deep-learning accelerator, too.")
    ] = None,
    asset: Annotated[
        list[str] | None,
        typer.Option(help="Store a file in the engine: NAME=FILE; may be repeated."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Quantize (if asked), fuse, lower, build and verify: from an ONNX file to an engine."""
    from hydra_edge import detection, exporting, inspection, pipeline, targets
    from hydra_edge.artifacts.arrays import load_dataset
    from hydra_edge.artifacts.engine import Engine
    from hydra_edge.artifacts.graph import Graph
    from hydra_edge.programs import BuildOptions
    from hydra_edge.quantization import CalibrationOptions

    if no_plugin and lowering not in (None, _QDQ):
        raise UsageError(
            f"--no-plugin was given with --lowering {lowering}.",
            f"Without the plugin heads are lowered as '{_QDQ}'.",
            "Leave one of the two out.",
        )
    build = BuildOptions(
        profiles=tuple(terminal.parse_batch(text, "--profile") for text in profile or ()),
        workspace_mb=workspace_mb,
        timing_cache=timing_cache,
        optimization_level=optimization_level,
        tf32=tf32,
        hardware_compatible=hardware_compatible,
        refittable=refittable,
        strip_weights=strip_weights,
        dla_core=dla_core,
        progress=not as_json,
    )
    lowering = _QDQ if no_plugin else lowering
    assets = _assets(asset or [])
    if target is not None and target.partition("@")[0] == targets.LOCAL:
        terminal.show_step(f"local is {detection.detect().found}")
    if file.suffix == ".hydra":
        given = {
            "--precision": precision != "fp32",
            "--calibration": calibration is not None,
            "--data": data is not None,
            "--task": task is not None,
            "--logits": logits is not None,
            "--method": method != "minmax",
        }
        _require_none_of([name for name, is_given in given.items() if is_given])
        engine = Engine.load(file)
        program = next(iter(engine.programs.values()))
        kept = pipeline.kept_options(engine, program, target or engine.target)
        ranges = batch or ",".join(map(str, kept.batch))
        asked = replace(build.over(kept.build), progress=not as_json)
        options = terminal.parse_compile_options(ranges, threads, lowering or kept.lowering, asked)
        engine = pipeline.rebuild(engine, target, options=options, on_step=terminal.show_step)
    else:
        if logits is not None and task is None:
            raise UsageError(
                "--logits was given without --task.",
                "It names the output that a task's summary is made of.",
                "Add --task, e.g. classification.",
            )
        source = Graph.load(file)
        if task is not None:
            names = logits.split(",") if logits and "," in logits else logits
            source = exporting.summarize(source, task, names)
        inputs, labels = load_dataset(data, source.inputs) if data else (None, None)
        engine = pipeline.build(
            source,
            target or "cpu",
            precision=precision,
            calibration=calibration,
            calibration_options=CalibrationOptions(method=method, progress=not as_json),
            options=terminal.parse_compile_options(batch or _BATCH, threads, lowering, build),
            data=inputs,
            labels=labels,
            on_step=terminal.show_step,
        )
    engine = replace(engine, assets={**engine.assets, **assets})
    engine.save(output)
    terminal.show(inspection.describe_engine(engine), as_json, title=f"wrote {output}")
    if not as_json:
        _advise(engine, output)


@verb
def refit(
    engine: Annotated[Path, typer.Argument(help="A built engine (.hydra).")],
    weights: Annotated[
        Path, typer.Option(help="The new student (.onnx), unfused, in the engine's precision.")
    ],
    output: Output,
    program: ProgramName = None,
    as_json: JsonFlag = False,
) -> None:
    """Give an engine the weights of a new student with the same layers, without a build."""
    from hydra_edge import refitting
    from hydra_edge.artifacts.engine import Engine
    from hydra_edge.artifacts.graph import Graph

    graph = Graph.load(weights)
    graphs = graph if program is None else {program: graph}
    found = refitting.refit(Engine.load(engine), graphs)
    found.engine.save(output)
    rows = {f"replaced in {name}": list(names) for name, names in found.changed.items()}
    terminal.show(rows, as_json, title=f"wrote {output}")


def _assets(given: list[str]) -> dict[str, bytes]:
    from hydra_edge.artifacts.files import read_bytes

    found = {}
    for item in given:
        name, _, file = item.partition("=")
        if not file:
            raise UsageError(
                f"'{item}' names no file.",
                "--asset takes NAME=FILE.",
                "Write e.g. --asset tokenizer.json=tokenizer.json.",
            )
        found[name] = read_bytes(file, "a file to store in the engine")
    return found


def _require_none_of(given: list[str]) -> None:
    if given:
        raise UsageError(
            f"{', '.join(given)} was given for an engine.",
            "Its graph is quantized already, and its data recorded.",
            "Leave it out, or compile the .onnx file anew.",
        )


def _advise(engine: Engine, output: Path) -> None:
    """What the user should do or know now."""
    from rich.markup import escape

    from hydra_edge import pipeline

    console = terminal.console_on()
    if not engine.is_built:
        note = " ".join(next(iter(engine.programs.values())).notes)
        name = output.name
        console.print(
            f"[yellow]not built yet:[/] {escape(note)}\n"
            f"On the device: hydra-edge compile {escape(name)} -o {escape(name)}",
            soft_wrap=True,
        )
    if pipeline.pays(engine) is False:
        precision, twin_ms = pipeline.twin_of(engine) or ("", 0.0)
        console.print(
            f"[yellow]{escape(engine.precision)} does not pay here:[/] "
            f"{engine.metrics['p50_ms']:.3f} ms against {twin_ms:.3f} ms in {precision}. "
            "It is smaller, not faster."
        )
