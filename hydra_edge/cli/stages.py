"""The verbs that make something: from members to an engine, its measurements and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hydra_edge import terminal
from hydra_edge.cli.app import (
    CalibrationFile,
    DataFile,
    JsonFlag,
    Method,
    Output,
    PrecisionText,
    Threads,
    exit_with,
    verb,
)
from hydra_edge.cli.captions import describe_picture
from hydra_edge.cli.programs import ProgramName, load_program
from hydra_edge.errors import GateError, InputError, PerformanceGateError, UsageError


@verb
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for everything.")] = Path(
        "demo"
    ),
    task: Annotated[
        str, typer.Option(help="classification, vqa or dense-captioning.")
    ] = "classification",
    as_json: JsonFlag = False,
) -> None:
    """Tell the whole story: train, distil, quantize, fuse, compile, compare."""
    from hydra_edge.errors import require

    for module in ("torch", "accelerate", "safetensors", "onnxscript", "sklearn", "torchmetrics"):
        require(module, "demo")
    require("matplotlib", "demo")
    from hydra_edge.demo import run_demo

    report = run_demo(output, terminal.console_on(), task)
    if as_json:
        typer.echo(report.to_json())


@verb
def export(
    factory: Annotated[str, typer.Argument(help="pkg.module:function that returns the module.")],
    example: Annotated[str, typer.Option(help="Input shape, e.g. 1x3x224x224; several with ','.")],
    output: Output,
    weights: Annotated[Path | None, typer.Option(help="A safetensors checkpoint.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Turn a torch module into an ONNX graph with its uncertainty in it."""
    from hydra_edge.errors import require

    torch = require("torch", "train")
    from hydra_edge import ensembles, exporting

    module = ensembles.load_factory(factory)
    if weights is not None:
        ensembles.load_weights(module, weights)
    inputs = tuple(torch.zeros(shape) for shape in terminal.parse_shapes(example))
    terminal.save_graph(exporting.export(module, inputs), output, as_json)


@verb
def quantize(
    graph: Path,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write.")] = None,
    precision: PrecisionText = "int8",
    calibration: CalibrationFile = None,
    method: Method = "minmax",
    weights: Annotated[str, typer.Option(help="Scales of weights: minmax or mse.")] = "minmax",
    equalize: Annotated[
        bool, typer.Option("--equalize", help="Balance the channels of neighbouring layers.")
    ] = False,
    correct_bias: Annotated[
        bool, typer.Option("--correct-bias", help="Put the mean error of layers into biases.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="File that remembers what calibration measured.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Inputs, and labels under 'labels', to measure on (.npz).")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Say what each head and body layer costs alone.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="Keep what is too sensitive in --fallback: accuracy=0.005,nll=0.01,…"),
    ] = None,
    fallback: Annotated[str, typer.Option(help="fp16 or fp32.")] = "fp16",
    as_json: JsonFlag = False,
) -> None:
    """Store and multiply body and heads in lower precision, explicitly in the graph."""
    from hydra_edge import mixed_precision, sensitivity
    from hydra_edge.artifacts.arrays import load_dataset
    from hydra_edge.artifacts.graph import Graph
    from hydra_edge.quantization import CalibrationOptions, Precision, prepare
    from hydra_edge.quantization import quantize as quantize_graph

    if output is None and not report:
        raise UsageError(
            "No output file was named.", "quantize writes a graph.", "Add -o FILE, or --report."
        )
    limits = None if budget is None else mixed_precision.Budget.parse(budget)
    options = CalibrationOptions(
        method=method,
        weights=weights,
        equalize=equalize,
        correct_bias=correct_bias,
        cache=cache,
        progress=not as_json,
    )
    source = Graph.load(graph)
    if not report and limits is None:
        assert output is not None
        result = quantize_graph(source, precision, calibration=calibration, options=options)
        terminal.save_graph(result, output, as_json)
        return
    if data is None:
        raise UsageError(
            "There is nothing to measure on.",
            "--report and --budget measure what low precision costs on data.",
            "Add --data FILE.npz, with labels if accuracy matters.",
        )
    inputs, labels = load_dataset(data, source.inputs)
    study = sensitivity.Study(
        source,
        inputs,
        labels,
        prepare(source, calibration, options),
        on_step=terminal.show_step,
    )
    if limits is None:
        found = study.analyze(precision)
        if output is not None:
            study.prepared.apply(Precision(precision, precision)).save(output)
        terminal.show_sensitivity(found, None, as_json)
        return
    mix = mixed_precision.fit(study, precision, limits, fallback)
    if output is not None:
        mix.graph.save(output)
    terminal.show_sensitivity(mix.sensitivity, mix, as_json)


@verb
def fuse(
    graph: Path,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only say what would be fused, and what not and why.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Fuse parallel heads into grouped ops, and say what was fused and what not."""
    from hydra_edge import fusion
    from hydra_edge.artifacts.graph import Graph

    if output is None and not explain:
        raise UsageError(
            "No output file was named.", "fuse writes a graph.", "Add -o FILE, or --explain."
        )
    source = Graph.load(graph)
    if output is None:
        terminal.show_fusion(fusion.explain(source), as_json, title=f"{graph} would be fused so")
        return
    result = fusion.fuse(source)
    if not explain:
        terminal.save_graph(result, output, as_json)
        return
    result.save(output)
    terminal.show_fusion(result.fusion, as_json, title=f"wrote {output}")


@verb
def merge(
    members: list[Path],
    output: Output,
    task: Annotated[str, typer.Option(help="What the members are for.")] = "classification",
    logits: Annotated[str | None, typer.Option(help="Name of the members' logits output.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Join M member files into one ensemble graph."""
    from hydra_edge import exporting
    from hydra_edge.artifacts.graph import Graph

    graphs = [Graph.load(path) for path in members]
    terminal.save_graph(exporting.merge(graphs, task=task, logits=logits), output, as_json)


@verb
def verify(
    model: Annotated[Path, typer.Argument(help="An engine (.hydra) or a graph (.onnx).")],
    against: Annotated[Path, typer.Option(help="The reference: .onnx or .hydra.")],
    data: DataFile,
    mi_correlation: Annotated[
        float, typer.Option(help="Smallest rank correlation of the epistemic uncertainty.")
    ] = 0.8,
    accuracy_drop: Annotated[float, typer.Option(help="Largest loss of accuracy.")] = 0.01,
    program: ProgramName = None,
    as_json: JsonFlag = False,
) -> None:
    """Check that a model still answers, and still doubts, like its reference (exit 3 if not)."""
    from dataclasses import asdict

    from hydra_edge import inspection, verification
    from hydra_edge.artifacts.arrays import load_dataset

    gates = verification.Gates(mi_rank_correlation=mi_correlation, accuracy_drop=accuracy_drop)
    left, right = (
        load_program(path, program) if path.suffix == ".hydra" else terminal.load_model(path)
        for path in (model, against)
    )
    inputs, labels = load_dataset(data, left.inputs)
    result = verification.verify(left, right, inputs, labels=labels, gates=gates)
    if as_json:
        terminal.echo_json(asdict(result))
    else:
        console = terminal.console_on(stderr=False)
        console.print(inspection.verification_table(result))
        for note in result.notes:
            console.print(f"[dim]{note}[/]")
        if result.passed:
            console.print(f"[green]passed[/] on {result.samples} samples")
    try:
        result.require()
    except GateError as exc:  # what was printed above says it already; one document per call
        raise exit_with(exc) from exc


@verb
def bench(
    engine: Path,
    data: DataFile,
    against: Annotated[
        list[Path] | None, typer.Option(help="Baseline engines; the option may be repeated.")
    ] = None,
    shifted: Annotated[
        list[str] | None, typer.Option(help="Out-of-distribution inputs: NAME=FILE.npz.")
    ] = None,
    report: Annotated[
        list[Path] | None, typer.Option(help="Write .html, .md or .json; may be repeated.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes to time, e.g. 1,32.")] = "1,32",
    threads: Threads = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Fail (exit 5) unless this much faster than each baseline.")
    ] = None,
    program: ProgramName = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure an engine, and its baselines under the same protocol."""
    from hydra_edge import measurement, reporting, runtime
    from hydra_edge.artifacts.arrays import load_dataset

    paths = {path.stem: path for path in [engine, *(against or [])]}
    if len(paths) != 1 + len(against or []):
        raise InputError(
            "Two engines have the same file name.",
            "The report names engines by it.",
            "Rename one of the files.",
        )
    if min_speedup is not None and not against:
        raise InputError(
            "--min-speedup was given without --against.",
            "There is no baseline to be faster than.",
            "Name a baseline engine with --against.",
        )
    for path in report or []:
        terminal.check_report_path(path)
    sessions = {
        label: runtime.load(load_program(path, program), threads=threads)
        for label, path in paths.items()
    }
    try:
        specs = sessions[engine.stem].inputs
        inputs, labels = load_dataset(data, specs)
        sets = {}
        for item in shifted or []:
            name, _, file = item.partition("=")
            if not file:
                raise InputError(
                    f"'{item}' names no file.", "--shifted takes NAME=FILE.", "Add '=FILE.npz'."
                )
            sets[name] = load_dataset(file, specs)[0]
        result = measurement.benchmark(
            sessions,
            inputs,
            labels=labels,
            shifted=sets,
            reference=next(iter(p.stem for p in against), None) if against else None,
            protocol=measurement.Protocol(batches=terminal.parse_integers(batches, "--batches")),
            progress=not as_json,
        )
    finally:
        for session in sessions.values():
            session.close()
    for path in report or []:
        terminal.write_report(result, path)
    if as_json:
        typer.echo(result.to_json())
    else:
        terminal.console_on().print(reporting.to_table(result))
    for path in against or []:
        for batch in result.protocol.batches:
            ratio = measurement.speedup(result, engine.stem, path.stem, batch)
            if min_speedup is not None and not ratio >= min_speedup:
                error = PerformanceGateError(
                    f"'{engine.stem}' is {ratio:.2f} times as fast as '{path.stem}' at batch "
                    f"{batch}.",
                    f"At least {min_speedup:g} times was asked for.",
                    "Check the FLOP ratio in the report: it bounds what can be gained.",
                )
                raise exit_with(error)


@verb
def run(
    engine: Path,
    inputs: Annotated[
        Path,
        typer.Argument(
            help="Inputs: .npy, or .npz by input name; an image to describe, or with --question."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help=".npz to write; of an image, .json.")
    ] = None,
    head_logits: Annotated[bool, typer.Option(help="Every head's raw output too.")] = False,
    question: Annotated[
        str | None, typer.Option(help="Ask this about the image, and answer in words.")
    ] = None,
    defer: Annotated[
        str | None,
        typer.Option(help="With --question: when to ask somebody else, NAME=LIMIT."),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(help="Of an image: draw boxes, captions and doubts (.png).")
    ] = None,
    beam: Annotated[int, typer.Option(help="Of an image: hypotheses per caption.")] = 1,
    program: ProgramName = None,
    threads: Threads = None,
    as_json: JsonFlag = False,
) -> None:
    """Predict, with uncertainty."""
    if question is not None:
        if output is not None or head_logits:
            raise UsageError(
                "--output or --head-logits was given with --question.",
                "A question is answered in words.",
                "Use --json, or pass the tokens in an .npz file.",
            )
        from hydra_edge.cli import asking

        asking.ask(engine, inputs, question, defer, threads, as_json)
        return
    import io

    import numpy as np

    from hydra_edge import inspection, runtime
    from hydra_edge.artifacts.arrays import load_dataset
    from hydra_edge.artifacts.files import write_atomic
    from hydra_edge.captioning.pictures import SUFFIXES

    if inputs.suffix.lower() in SUFFIXES:
        describe_picture(
            engine, inputs, output=output, draw=draw, beam=beam, threads=threads, as_json=as_json
        )
        return
    if draw is not None or beam != 1:
        raise UsageError(
            "--draw or --beam was given for arrays.",
            f"They are for image files: {', '.join(SUFFIXES)}.",
            "Leave them out, or name an image.",
        )
    with runtime.load(load_program(engine, program), threads=threads) as session:
        prediction = session.run(load_dataset(inputs, session.inputs)[0], head_logits=head_logits)
        rows = inspection.describe_prediction(prediction, session.engine)
    if output is not None:
        stream = io.BytesIO()
        np.savez(stream, **dict(prediction))  # type: ignore[arg-type]
        write_atomic(output, stream.getvalue())
    if as_json:
        terminal.echo_json({name: array.tolist() for name, array in prediction.items()})
    else:
        terminal.console_on(stderr=False).print(inspection.table(rows))
