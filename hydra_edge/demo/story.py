"""What the demos share: members that are trained once, measuring, promises, the report."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.files import write_atomic
from hydra_edge.artifacts.graph import Graph
from hydra_edge.artifacts.report import Report
from hydra_edge.compilation import CompileOptions
from hydra_edge.ensembles import load_weights, save_weights
from hydra_edge.errors import ArtifactError, MissingDependencyError
from hydra_edge.exporting import export, merge
from hydra_edge.measurement import Protocol, benchmark, speedup
from hydra_edge.pipeline import build
from hydra_edge.reporting import to_html, to_markdown, to_table
from hydra_edge.runtime import EnsembleSession, Session, load

Array = npt.NDArray[np.generic]
Inputs = Mapping[str, Array]  # one data set: arrays by input name
Engines = Mapping[str, Engine | list[Engine]]

# One thread: the least noisy comparison, and what a busy device has to give.
THREADS = 1
BATCHES = (1, 32)
OPTIONS = CompileOptions(batch=(1, 8, 32), threads=THREADS)
GPUS = {"rtx": "rtx-3090,rtx-4090,rtx-5090", "jetson": "jetson-agx-orin"}


@dataclass(frozen=True)
class Check:
    """One promise of a demo and what was measured."""

    name: str
    value: float
    target: str
    passed: bool


def at_most(name: str, value: float, limit: float) -> Check:
    """The promise that a figure is small."""
    return Check(name, value, f"≤ {limit:g}", value <= limit)


def at_least(name: str, value: float, limit: float) -> Check:
    """The promise that a figure is large."""
    return Check(name, value, f"≥ {limit:g}", value >= limit)


def between(name: str, value: float, low: float, high: float) -> Check:
    """The promise that a figure lies in a range."""
    return Check(name, value, f"{low:g} to {high:g}", low <= value <= high)


@dataclass(frozen=True)
class Training:
    """How one network is trained.

    Attributes:
        build: Gives it untrained.
        train: Trains it, in place, and calls its argument after every epoch.
        epochs: How often that is.
    """

    build: Callable[[], nn.Module]
    train: Callable[[nn.Module, Callable[[], None]], nn.Module]
    epochs: int


def trained(
    folder: Path, trainings: Mapping[str, Training], console: Console, workers: int = 1
) -> dict[str, nn.Module]:
    """Networks by name, in eval mode; those whose weights are in the folder are not trained again.

    Args:
        folder: Holds ``<name>.safetensors``.
        trainings: How each is trained.
        console: Shows the progress.
        workers: Networks that are trained at once, each on one CPU thread if there are several.
    """

    def one(name: str, network: nn.Module, training: Training) -> nn.Module:
        path = folder / f"{name}.safetensors"

        def on_epoch() -> None:
            if interrupted.is_set():
                raise KeyboardInterrupt
            bar.advance(row)

        try:
            found = load_weights(network, path).eval()
            bar.advance(row, training.epochs)
        except ArtifactError:  # not trained yet, or by another version of the demo
            if workers > 1:
                torch.set_num_threads(1)  # of this thread
            found = training.train(network, on_epoch).eval()
            save_weights(found, path)
        return found

    # Here and not in the threads, which share torch's random state.
    networks = [training.build() for training in trainings.values()]
    threads, interrupted = torch.get_num_threads(), threading.Event()
    with progress(console) as bar, ThreadPoolExecutor(workers) as pool:
        row = bar.add_task("training", total=sum(one.epochs for one in trainings.values()))
        try:
            done = pool.map(one, trainings, networks, trainings.values())
            return dict(zip(trainings, done, strict=True))
        except BaseException:  # also Ctrl-C, which the threads do not see
            interrupted.set()
            raise
        finally:
            # A thread that has not computed yet takes the number that was set last.
            torch.set_num_threads(threads)


def exported(
    folder: Path,
    student: nn.Module,
    members: Sequence[nn.Module],
    example: Inputs,
    task: str,
    labels: Sequence[str],
    console: Console,
) -> dict[str, Graph]:
    """Graphs of the student, of each member (``member-0``, …) and of the ensemble, all saved."""
    modules = {"student": student} | {f"member-{i}": one for i, one in enumerate(members)}
    first = tuple(array[:1] for array in example.values())
    graphs = {}
    with progress(console) as bar:
        row = bar.add_task("exporting", total=len(modules))
        for name, module in modules.items():
            graphs[name] = export(module, first, input_names=list(example))
            bar.advance(row)
    parts = [graph for name, graph in graphs.items() if name != "student"]
    graphs["ensemble"] = merge(parts, task=task, labels=labels)
    for name, graph in graphs.items():
        graph.save(folder / f"{name}.onnx")
    return graphs


def for_gpus(
    folder: Path,
    student: Graph,
    calibration: Inputs,
    data: Inputs,
    console: Console,
    finish: Callable[[Engine], Engine] = lambda engine: engine,
) -> None:
    """Engines of the student that this machine cannot run, as far as it can build them."""
    for name, target in GPUS.items():
        path = folder / f"student-{name}.hydra"
        try:
            engine = build(student, target, precision="int8", calibration=calibration, data=data)
        except MissingDependencyError as missing:
            console.print(f"   {target}: [dim]{missing.what} {missing.fix}[/]", highlight=False)
            continue
        finish(engine).save(path)
        made = "built, never run" if engine.is_built else "to be built on the device"
        console.print(f"   {target}: {made}: {path}", highlight=False)


def measure(
    engines: Engines,
    task: str,
    data: Inputs,
    labels: Array,
    shifted: Mapping[str, Inputs],
    reference: str,
    console: Console,
) -> Report:
    """All engines under one protocol; a list of engines is an ensemble run one by one."""
    sessions: dict[str, Session | EnsembleSession] = {
        label: EnsembleSession([load(one, threads=THREADS) for one in engine], task)
        if isinstance(engine, list)
        else load(engine, threads=THREADS)
        for label, engine in engines.items()
    }
    try:
        return benchmark(
            sessions,
            data,
            labels=labels,
            shifted=shifted,
            reference=reference,
            protocol=Protocol(batches=BATCHES, max_seconds=20.0),
            progress=not console.quiet,
        )
    finally:
        for session in sessions.values():
            session.close()


def speed_checks(
    report: Report, student: str, ensembles: Sequence[str], most: Mapping[int, float]
) -> list[Check]:
    """The student against the strongest of the ensembles.

    Args:
        report: A report of all of them.
        student: Its label.
        ensembles: Theirs; the first gives the ratio of FLOP.
        most: By batch, the times as fast that are enough where the FLOP ratio would ask for more.
    """
    rows = {row.label: row for row in report.sessions}
    flops = [float(str(rows[label].flops_per_sample)) for label in (ensembles[0], student)]
    ratio = flops[0] / flops[1]
    return [
        at_least(
            f"times as fast as the strongest ensemble, batch {batch} (FLOP ratio {ratio:.1f})",
            min(speedup(report, student, label, batch) for label in ensembles),
            min(limit, 0.8 * ratio),
        )
        for batch, limit in most.items()
    ]


@dataclass
class Clock:
    """Prints the steps of a demo, and in the end what came out."""

    folder: Path
    console: Console
    started: float = field(default_factory=time.perf_counter)

    def finish(self, report: Report, checks: Sequence[Check], hint: str) -> Report:
        """Print table and promises, and write the report with both in three formats."""
        self.console.print(to_table(report))
        notes = []
        for check in checks:
            words = f"{check.name}: {check.value:.3f} (target {check.target})"
            self.console.print(f"{'[green]✓[/]' if check.passed else '[red]✗[/]'} {words}")
            notes.append(f"{'passed' if check.passed else 'failed'}: {words}")
        report = replace(report, notes=(*report.notes, *notes))
        write_atomic(self.folder / "report.json", report.to_json().encode())
        write_atomic(self.folder / "report.md", to_markdown(report).encode())
        write_atomic(self.folder / "report.html", to_html(report).encode())
        seconds = time.perf_counter() - self.started
        self.console.print(
            f"Done in {seconds:.0f} s. Open {self.folder / 'report.html'}, or try: {hint}"
        )
        return report


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A bar with a description, a count and the time left."""
    columns = (
        TextColumn("   {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield bar
