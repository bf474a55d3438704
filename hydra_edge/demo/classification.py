"""Ten networks on scikit-learn's digits become one engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import Graph
from hydra_edge.artifacts.report import Report
from hydra_edge.compilation import compile
from hydra_edge.demo import digits, networks, story
from hydra_edge.demo.digits import Digits, Images
from hydra_edge.demo.story import OPTIONS, Check, Training, at_least, at_most, between
from hydra_edge.distillation import DistillationConfig, distill
from hydra_edge.ensembles import Ensemble, save_weights
from hydra_edge.pipeline import build
from hydra_edge.quantization import quantize
from hydra_edge.verification import verify

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
STUDENT, STUDENT_FP32, UNFUSED = "student int8", "student fp32", "student fp32, unfused"
MERGED, MERGED_INT8, SESSIONS = "ensemble, merged", "ensemble int8, merged", "ensemble, 10 sessions"
ENSEMBLES = (MERGED, MERGED_INT8, SESSIONS)


def run(folder: Path, console: Console) -> Report:
    """Run or resume the demo in ``folder``; see `hydra_edge.demo.run_demo`."""
    clock = story.Clock(folder, console)
    folder.mkdir(parents=True, exist_ok=True)
    data = digits.load()
    shifted = digits.shifted(data.test)
    transfer = digits.transfer_set(data.train)
    np.savez(folder / "test.npz", input=data.test, labels=data.test_labels)
    np.savez(folder / "calibration.npz", input=transfer[:512])
    for name, images in shifted.items():
        np.savez(folder / f"{name}.npz", input=images)

    console.print("[bold]1  Ten networks[/], each trained on 1257 handwritten digits")
    trainings = {
        f"member-{seed}": Training(
            partial(networks.untrained_member, seed),
            partial(networks.train_member, data.train, data.train_labels, seed),
            networks.epochs(),
        )
        for seed in range(networks.HEADS)
    }
    members = list(story.trained(folder, trainings, console).values())
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
    example = {"input": data.test}
    graphs = story.exported(
        folder, student, members, example, "classification", networks.LABELS, console
    )
    engines = _compile(folder, graphs, transfer, data, shifted, console)

    console.print("[bold]4  For GPUs[/]: built here where that needs none, else packed up")
    calibration = {"input": transfer[:512]}
    story.for_gpus(folder, graphs["student"], calibration, {"input": data.test}, console)

    console.print("[bold]5  Measure[/] all of them under one protocol")
    sets = {name: {"input": images} for name, images in shifted.items()}
    report = story.measure(
        engines, "classification", example, data.test_labels, sets, MERGED, console
    )
    checks = _checks(report, graphs, engines, data, shifted)
    hint = f"hydra-edge run {folder / 'student.hydra'} {folder / 'noise.npz'}"
    return clock.finish(report, checks, hint)


def _compile(
    folder: Path,
    graphs: dict[str, Graph],
    transfer: Images,
    data: Digits,
    shifted: dict[str, Images],
    console: Console,
) -> dict[str, Engine | list[Engine]]:
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
            options=OPTIONS,
            data=everything,
            on_step=note,
        ),
        STUDENT_FP32: build(student, options=OPTIONS),
        UNFUSED: compile(student, options=OPTIONS),
        MERGED: build(ensemble, options=OPTIONS),
        MERGED_INT8: compile(quantize(ensemble, "int8", calibration=calibration), options=OPTIONS),
        SESSIONS: [
            compile(graphs[f"member-{index}"], options=OPTIONS) for index in range(networks.HEADS)
        ],
    }
    for label, name in ((STUDENT, "student"), (STUDENT_FP32, "student-fp32"), (MERGED, "ensemble")):
        engine = engines[label]
        assert isinstance(engine, Engine)
        engine.save(folder / f"{name}.hydra")
    return engines


def _checks(
    report: Report,
    graphs: dict[str, Graph],
    engines: dict[str, Engine | list[Engine]],
    data: Digits,
    shifted: dict[str, Images],
) -> list[Check]:
    """The promises of the demo, measured on the engines that were compiled."""
    int8 = engines[STUDENT]
    assert isinstance(int8, Engine)
    rows = {row.label: row for row in report.sessions}
    sets = {"test": data.test, **shifted}
    union = np.concatenate(list(sets.values()))
    own = verify(int8, graphs["student"], union)
    labelled = verify(int8, graphs["student"], data.test, labels=data.test_labels)
    against = verify(int8, graphs["ensemble"], data.test, labels=data.test_labels)
    checks = [
        at_most(
            "accuracy below the ensemble",
            against.reference_metrics["accuracy"] - against.metrics["accuracy"],
            0.01,
        ),
        at_most(
            "NLL above the ensemble",
            against.metrics["nll"] - against.reference_metrics["nll"],
            0.05,
        ),
        at_least(
            "rank correlation of mutual information with the ensemble's",
            verify(int8, graphs["ensemble"], union).drift["mi_rank_correlation"],
            0.8,
        ),
    ]
    for name, images in sets.items():
        ratio = verify(int8, graphs["ensemble"], images).drift["mi_ratio"]
        checks.append(between(f"mutual information over the ensemble's, {name}", ratio, 0.5, 1.5))
    for name in shifted:
        key = f"ood_auroc_{name}"
        gap = abs(rows[STUDENT].quality[key] - rows[MERGED].quality[key])
        checks.append(at_most(f"OOD AUROC away from the ensemble's, {name}", gap, 0.05))
    checks += [
        at_most(
            "int8: accuracy below fp32",
            labelled.reference_metrics["accuracy"] - labelled.metrics["accuracy"],
            0.005,
        ),
        at_least(
            "int8: rank correlation of mutual information with fp32",
            own.drift["mi_rank_correlation"],
            0.95,
        ),
    ]
    return checks + story.speed_checks(
        report, STUDENT, ENSEMBLES, dict.fromkeys(story.BATCHES, 5.0)
    )
