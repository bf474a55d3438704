"""The whole story on real data: ten networks become one engine that knows when it does not know.

Everything is kept in one folder; what is there already is not trained again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.files import write_atomic
from hydra_edge.artifacts.graph import Graph
from hydra_edge.artifacts.report import Report
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.demo import digits, networks
from hydra_edge.demo.digits import Digits, Images
from hydra_edge.distillation import DistillationConfig, distill
from hydra_edge.ensembles import Ensemble, Hydra, load_weights, save_weights
from hydra_edge.errors import ArtifactError, InputError, MissingDependencyError
from hydra_edge.exporting import export, merge
from hydra_edge.measurement import Protocol, benchmark, speedup
from hydra_edge.pipeline import build
from hydra_edge.quantization import quantize
from hydra_edge.reporting import to_html, to_markdown, to_table
from hydra_edge.runtime import EnsembleSession, Session, load
from hydra_edge.verification import verify

TASKS = ("classification", "dense-captioning")
# One thread: the least noisy comparison, and what a busy device has to give.
THREADS = 1
BATCHES = (1, 32)
DISTILLATION = DistillationConfig(
    epochs_mean=4,
    epochs_heads=14,
    batch_size=256,
    learning_rate=3e-3,
    learning_rate_heads=3e-3,
    temperature=(1.0, 4.0),
    disagreement_weight=20.0,
    weight_decay=0.0,
)
GPUS = {"rtx": "rtx-3090,rtx-4090,rtx-5090", "jetson": "jetson-agx-orin"}
STUDENT, STUDENT_FP32, UNFUSED = "student int8", "student fp32", "student fp32, unfused"
MERGED, MERGED_INT8, SESSIONS = "ensemble, merged", "ensemble int8, merged", "ensemble, 10 sessions"


@dataclass(frozen=True)
class Check:
    """One promise of the demo and what was measured."""

    name: str
    value: float
    target: str
    passed: bool


def run_demo(folder: Path, console: Console, task: str = "classification") -> Report:
    """Run or resume the demo in ``folder``.

    Args:
        folder: Where networks, graphs, engines and reports are kept.
        console: Where progress goes.
        task: One of `TASKS`.

    Returns:
        The report, also written as ``report.json``, ``report.md`` and ``report.html``.

    Raises:
        InputError: There is no demo of that task.
    """
    if task not in TASKS:
        raise InputError(
            f"There is no demo of the task '{task}'.",
            f"There are: {', '.join(TASKS)}.",
            "Pick one of those.",
        )
    if task != "classification":
        from hydra_edge.demo import dense_captioning

        return dense_captioning.run(folder, console)
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    data = digits.load()
    shifted = digits.shifted(data.test)
    transfer = digits.transfer_set(data.train)
    np.savez(folder / "test.npz", input=data.test, labels=data.test_labels)
    np.savez(folder / "calibration.npz", input=transfer[:512])
    for name, images in shifted.items():
        np.savez(folder / f"{name}.npz", input=images)

    console.print("[bold]1  Ten networks[/], each trained on 1257 handwritten digits")
    members = _members(folder, data, console)
    ensemble = Ensemble(members, task="classification", labels=networks.LABELS)

    console.print("[bold]2  One student[/] with ten heads, each imitating one network")
    student = distill(
        ensemble,
        networks.student(),
        transfer,
        DISTILLATION,
        workdir=folder / "distillation",
        progress=not console.quiet,
    )
    save_weights(student, folder / "student.safetensors")

    console.print("[bold]3  Export, quantize, fuse, compile, verify[/]")
    graphs = _export(folder, student, members, data.test[:1], console)
    engines = _compile(folder, graphs, transfer, data, shifted, console)

    console.print("[bold]4  For GPUs[/]: built here where that needs none, else packed up")
    _for_gpus(folder, graphs["student"], transfer[:512], data, console)

    console.print("[bold]5  Measure[/] all of them under one protocol")
    report = _measure(engines, data, shifted, console)
    checks = _checks(report, graphs, engines, data, shifted)
    write_atomic(folder / "report.json", report.to_json().encode())
    write_atomic(folder / "report.md", to_markdown(report).encode())
    write_atomic(folder / "report.html", to_html(report).encode())
    console.print(to_table(report))
    for check in checks:
        mark = "[green]✓[/]" if check.passed else "[red]✗[/]"
        console.print(f"{mark} {check.name}: {check.value:.3f} (target {check.target})")
    console.print(
        f"Done in {time.perf_counter() - started:.0f} s. "
        f"Open {folder / 'report.html'}, or try: hydra-edge run {folder / 'student.hydra'} "
        f"{folder / 'noise.npz'}"
    )
    return report


def _members(folder: Path, data: Digits, console: Console) -> list[nn.Module]:
    members: list[nn.Module] = []
    with _progress(console) as bar:
        row = bar.add_task("training", total=networks.HEADS * networks.epochs())
        for index in range(networks.HEADS):
            path = folder / f"member-{index}.safetensors"
            try:
                members.append(load_weights(networks.member(), path).eval())
                bar.advance(row, networks.epochs())
            except ArtifactError:  # not trained yet, or by another version of the demo
                trained = networks.train_member(
                    data.train, data.train_labels, index, lambda: bar.advance(row)
                )
                save_weights(trained, path)
                members.append(trained)
    return members


def _export(
    folder: Path, student: Hydra, members: list[nn.Module], example: Images, console: Console
) -> dict[str, Graph]:
    with _progress(console) as bar:
        row = bar.add_task("exporting", total=len(members) + 1)
        graphs = {"student": export(student, example)}
        bar.advance(row)
        for index, module in enumerate(members):
            graphs[f"member-{index}"] = export(module, example)
            bar.advance(row)
    parts = [graphs[f"member-{index}"] for index in range(len(members))]
    graphs["ensemble"] = merge(parts, task="classification", labels=networks.LABELS)
    for name, graph in graphs.items():
        graph.save(folder / f"{name}.onnx")
    return graphs


def _compile(
    folder: Path,
    graphs: dict[str, Graph],
    transfer: Images,
    data: Digits,
    shifted: dict[str, Images],
    console: Console,
) -> dict[str, Engine | list[Engine]]:
    options = CompileOptions(batch=(1, 8, 32), threads=THREADS)
    calibration = transfer[:512]
    everything = np.concatenate([data.test, *shifted.values()])

    def note(step: str) -> None:
        console.print(f"   [dim]student int8: {step}[/]")

    student, ensemble = graphs["student"], graphs["ensemble"]
    engines: dict[str, Engine | list[Engine]] = {
        STUDENT: build(
            student,
            precision="int8",
            calibration=calibration,
            options=options,
            data=everything,
            on_step=note,
        ),
        STUDENT_FP32: build(student, options=options),
        UNFUSED: compile(student, options=options),
        MERGED: build(ensemble, options=options),
        MERGED_INT8: compile(quantize(ensemble, "int8", calibration=calibration), options=options),
        SESSIONS: [
            compile(graphs[f"member-{index}"], options=options) for index in range(networks.HEADS)
        ],
    }
    for label, name in ((STUDENT, "student"), (STUDENT_FP32, "student-fp32"), (MERGED, "ensemble")):
        engine = engines[label]
        assert isinstance(engine, Engine)
        engine.save(folder / f"{name}.hydra")
    return engines


def _for_gpus(
    folder: Path, student: Graph, calibration: Images, data: Digits, console: Console
) -> None:
    """Engines of the student that this machine cannot run, as far as it can build them."""
    for name, target in GPUS.items():
        path = folder / f"student-{name}.hydra"
        try:
            engine = build(
                student, target, precision="int8", calibration=calibration, data=data.test
            )
        except MissingDependencyError as missing:
            console.print(f"   {target}: [dim]{missing.what} {missing.fix}[/]", highlight=False)
            continue
        engine.save(path)
        made = "built, never run" if engine.is_built else "to be built on the device"
        console.print(f"   {target}: {made}: {path}", highlight=False)


def _measure(
    engines: dict[str, Engine | list[Engine]],
    data: Digits,
    shifted: dict[str, Images],
    console: Console,
) -> Report:
    sessions: dict[str, Session | EnsembleSession] = {
        label: EnsembleSession([load(one, threads=THREADS) for one in engine])
        if isinstance(engine, list)
        else load(engine, threads=THREADS)
        for label, engine in engines.items()
    }
    try:
        return benchmark(
            sessions,
            data.test,
            labels=data.test_labels,
            shifted=shifted,
            reference=MERGED,
            protocol=Protocol(batches=BATCHES, max_seconds=20.0),
            progress=not console.quiet,
        )
    finally:
        for session in sessions.values():
            session.close()


def _checks(
    report: Report,
    graphs: dict[str, Graph],
    engines: dict[str, Engine | list[Engine]],
    data: Digits,
    shifted: dict[str, Images],
) -> list[Check]:
    """The promises of the demo, measured on the engines that were compiled."""
    int8, fp32 = engines[STUDENT], engines[STUDENT_FP32]
    assert isinstance(int8, Engine)
    assert isinstance(fp32, Engine)
    rows = {row.label: row for row in report.sessions}
    sets = {"test": data.test, **shifted}
    union = np.concatenate(list(sets.values()))
    own = verify(int8, graphs["student"], union)
    labelled = verify(int8, graphs["student"], data.test, labels=data.test_labels)
    against = verify(int8, graphs["ensemble"], data.test, labels=data.test_labels)
    checks = [
        _at_most(
            "accuracy below the ensemble",
            against.reference_metrics["accuracy"] - against.metrics["accuracy"],
            0.01,
        ),
        _at_most(
            "NLL above the ensemble",
            against.metrics["nll"] - against.reference_metrics["nll"],
            0.05,
        ),
        _at_least(
            "rank correlation of mutual information with the ensemble's",
            verify(int8, graphs["ensemble"], union).drift["mi_rank_correlation"],
            0.8,
        ),
    ]
    for name, images in sets.items():
        ratio = verify(int8, graphs["ensemble"], images).drift["mi_ratio"]
        passed = 0.5 <= ratio <= 1.5
        title = f"mutual information over the ensemble's, {name}"
        checks.append(Check(title, ratio, "0.5 to 1.5", passed))
    for name in shifted:
        key = f"ood_auroc_{name}"
        gap = abs(rows[STUDENT].quality[key] - rows[MERGED].quality[key])
        checks.append(_at_most(f"OOD AUROC away from the ensemble's, {name}", gap, 0.05))
    checks += [
        _at_most(
            "int8: accuracy below fp32",
            labelled.reference_metrics["accuracy"] - labelled.metrics["accuracy"],
            0.005,
        ),
        _at_least(
            "int8: rank correlation of mutual information with fp32",
            own.drift["mi_rank_correlation"],
            0.95,
        ),
    ]
    ratio = float(str(rows[MERGED].flops_per_sample)) / float(str(rows[STUDENT].flops_per_sample))
    for batch in report.protocol.batches:
        strongest = min(
            speedup(report, STUDENT, label, batch) for label in (MERGED, MERGED_INT8, SESSIONS)
        )
        checks.append(
            _at_least(
                f"times as fast as the strongest ensemble, batch {batch} (FLOP ratio {ratio:.1f})",
                strongest,
                min(5.0, 0.8 * ratio),
            )
        )
    return checks


def _at_most(name: str, value: float, limit: float) -> Check:
    return Check(name, value, f"≤ {limit:g}", value <= limit)


def _at_least(name: str, value: float, limit: float) -> Check:
    return Check(name, value, f"≥ {limit:g}", value >= limit)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("   {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield bar
