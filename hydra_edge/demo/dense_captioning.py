"""The story of dense captioning: five networks that describe scenes become one student.

Everything is kept in one folder; members that are there already are not trained again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import Graph
from hydra_edge.artifacts.joining import only
from hydra_edge.artifacts.report import Protocol, Report
from hydra_edge.captioning.benchmarking import Answers, Contender, benchmark_captioners
from hydra_edge.captioning.distillation import CaptionDistillationConfig, distill_captioner
from hydra_edge.captioning.drawing import draw
from hydra_edge.captioning.exporting import export_captioner
from hydra_edge.captioning.models import EngineModel
from hydra_edge.captioning.networks import CaptionEnsemble, Captioner
from hydra_edge.captioning.recording import record
from hydra_edge.captioning.scenes import Scene
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.demo import caption_members, caption_networks, scenes, story
from hydra_edge.demo.story import THREADS, Check, at_least, at_most
from hydra_edge.ensembles import save_weights
from hydra_edge.errors import require
from hydra_edge.fusion import fuse
from hydra_edge.quantization import quantize
from hydra_edge.runtime import Session, load
from hydra_edge.verification import verify

PROTOCOL = Protocol(batches=(1, 8), max_seconds=20.0, cold_samples=10)
DISTILLATION = CaptionDistillationConfig(
    epochs_mean=0,  # the student begins as a member
    epochs_heads=7,
    batch_size=24,
    learning_rate=4e-3,
    box_weight=40.0,
    disagreement_weight=10.0,
)


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        train: Scenes that members learn from.
        epochs: Of members.
        test: Scenes that everything is judged on.
        shifted: Further ones of each kind that members have not seen.
        transfer: Images that the student learns from.
        distillation: Of the student.
        calibration: Images that ranges are taken from.
        protocol: Of measuring.
    """

    train: int = 3000
    epochs: int = 5
    test: int = 300
    shifted: int = 150
    transfer: int = 5000
    distillation: CaptionDistillationConfig = DISTILLATION
    calibration: int = 256
    protocol: Protocol = PROTOCOL


STUDENT, STUDENT_FP32, UNFUSED = "student int8", "student fp32", "student fp32, unfused"
MERGED, MERGED_INT8, SESSIONS = "ensemble, merged", "ensemble int8, merged", "ensemble, 5 sessions"
ENSEMBLES = (MERGED, MERGED_INT8, SESSIONS)
# The recurrence is too small to win by int8 what its conversions cost.
PRECISION = {"encode": "int8", "step": "heads=int8"}
# Tuned for one image with its two regions.
_OPTIONS = {
    "encode": CompileOptions(batch=(1, 1, 16), threads=THREADS),
    "step": CompileOptions(batch=(1, 2, 128), threads=THREADS),
    "reorder": CompileOptions(batch=(1, 2, 128), threads=THREADS),
}
Images = npt.NDArray[np.float32]
Graphs = Mapping[str, Graph]


def run(folder: Path, console: Console, plan: Plan = Plan()) -> Report:
    """Run or resume the demo in ``folder``; see `hydra_edge.demo.run_demo`."""
    clock = story.Clock(folder, console)
    folder.mkdir(parents=True, exist_ok=True)
    test = scenes.draw(plan.test, seed=1201)
    shifted = scenes.draw_shifted(plan.shifted, seed=1202)
    transfer = scenes.draw_transfer(plan.transfer, seed=1003)

    console.print(
        "[bold]1  Five networks[/] that find shapes in generated scenes and describe them"
    )
    trainings = caption_members.trainings(plan.train, plan.epochs)
    found = story.trained(folder, trainings, console, workers=2).values()
    members = [member for member in found if isinstance(member, Captioner)]
    ensemble = CaptionEnsemble(members)

    console.print("[bold]2  One student[/] with five heads for boxes and five for words")
    student = _distil(folder, ensemble, members[0], transfer, plan.distillation, console)
    save_weights(student, folder / "student.safetensors")

    console.print("[bold]3  Export, quantize, fuse, compile[/]: programs encode and step, one file")
    graphs = _export(student, ensemble, test, console)
    calibration, unseen = transfer[: plan.calibration], transfer[-plan.calibration :]
    engines = _compile(graphs, calibration, console)
    for label, name in ((STUDENT, "scene"), (STUDENT_FP32, "scene-fp32"), (MERGED, "ensemble")):
        engines[label][0].save(folder / f"{name}.hydra")

    console.print("[bold]4  Measure[/] all of them under one protocol")
    report, answers, checks = _measure(engines, graphs, test, shifted, unseen, plan.protocol)
    _draw(folder, test, shifted, answers)
    hint = f"hydra-edge run {folder / 'scene.hydra'} {folder / 'clear.png'} --draw drawn.png"
    return clock.finish(report, checks, hint)


def _distil(
    folder: Path,
    ensemble: CaptionEnsemble,
    start: Captioner,
    transfer: Images,
    config: CaptionDistillationConfig,
    console: Console,
) -> Captioner:
    with story.progress(console) as bar:
        row = bar.add_task("distilling", total=config.epochs_mean + config.epochs_heads)
        return distill_captioner(
            ensemble,
            caption_networks.student(start),
            transfer,
            config,
            lambda *_: bar.advance(row),
            workdir=folder / "distillation",
        )


def _export(
    student: Captioner, ensemble: CaptionEnsemble, test: list[Scene], console: Console
) -> dict[str, dict[str, Graph]]:
    networks: dict[str, torch.nn.Module] = {"student": student, "ensemble": ensemble}
    networks |= {f"member-{index}": member for index, member in enumerate(ensemble.members)}
    found = {}
    with story.progress(console) as bar:
        row = bar.add_task("exporting", total=len(networks))
        for name, network in networks.items():
            found[name] = export_captioner(network, test[0].image[None])
            bar.advance(row)
    return found


def _compile(
    graphs: Mapping[str, Graphs], images: Images, console: Console
) -> dict[str, list[Engine]]:
    """Engines by label: one, or those of the members."""
    engines: dict[str, list[Engine]] = {}
    for name, fp32, int8 in (
        ("student", STUDENT_FP32, STUDENT),
        ("ensemble", MERGED, MERGED_INT8),
    ):
        engines[fp32] = [_built(graphs[name])]
        with load(engines[fp32][0], threads=THREADS) as session:
            fed = record(EngineModel(session), images)
        stored = {
            program: quantize(graph, PRECISION[program], calibration=fed[program])
            if program in fed
            else graph
            for program, graph in graphs[name].items()
        }
        engines[int8] = [_built(stored)]
        kept = {p: one.lowering for p, one in engines[int8][0].programs.items() if p in fed}
        console.print(f"   [dim]{int8}: {kept}[/]", highlight=False)
    engines[UNFUSED] = [compile(graphs["student"], options=_OPTIONS)]
    own = [name for name in graphs if name.startswith("member")]
    engines[SESSIONS] = [compile(graphs[name], options=_OPTIONS) for name in own]
    return engines


def _built(graphs: Graphs) -> Engine:
    fused = {name: fuse(graph) for name, graph in graphs.items()}
    return compile(fused, options=_OPTIONS, unfused=graphs)


def _measure(
    engines: Mapping[str, list[Engine]],
    graphs: Mapping[str, Graphs],
    test: list[Scene],
    shifted: dict[str, list[Scene]],
    unseen: Images,
    protocol: Protocol,
) -> tuple[Report, Mapping[str, Answers], list[Check]]:
    sessions: list[Session] = []
    contenders = {}
    try:
        for label, group in engines.items():
            opened = [load(engine, threads=THREADS) for engine in group]
            sessions += opened
            contenders[label] = Contender(tuple(opened))
        report, answers = benchmark_captioners(
            contenders,
            test,
            reference=MERGED,
            shifted=shifted,
            protocol=protocol,
        )
        fp32 = EngineModel(contenders[STUDENT_FP32].sessions[0])
        fed = record(fp32, unseen)
    finally:
        for session in sessions:
            session.close()
    steps = verify(only(engines[STUDENT][0], "step"), graphs["student"]["step"], fed["step"])
    checks = [*_checks(report), *_head_checks(engines, steps.drift["mi_rank_correlation"])]
    return report, answers, checks


def _checks(report: Report) -> list[Check]:
    """The promises on whole images."""
    rows = {row.label: row for row in report.sessions}
    student, ensemble = rows[STUDENT].quality, rows[MERGED].quality
    return [
        at_least("mAP of the ensemble", ensemble["map"], 0.5),
        at_most("mAP below the ensemble's", ensemble["map"] - student["map"], 0.02),
        at_least(
            "rank correlation of captions' mutual information with the ensemble's",
            student.get("mi_rank_correlation", 0.0),
            0.8,
        ),
        *story.speed_checks(report, STUDENT, ENSEMBLES, {1: 3.0}),
    ]


def _head_checks(engines: Mapping[str, list[Engine]], correlation: float) -> list[Check]:
    """The promises on the vocabulary heads."""
    int8, fp32 = (_head_bytes(engines[label][0]) for label in (STUDENT, STUDENT_FP32))
    return [
        at_least(
            "int8: rank correlation of words' mutual information with fp32", correlation, 0.95
        ),
        at_most(
            f"vocabulary heads in int8 over fp32, {int8} of {fp32} bytes", int8 / max(1, fp32), 0.35
        ),
    ]


def _head_bytes(engine: Engine) -> int:
    """Bytes of the fused vocabulary heads."""
    fused = fuse(engine.programs["step"].graph).fusion
    groups = fused or engine.programs["step"].graph.fusion
    return max((group.weight_bytes for group in groups if group.fused), default=0)


def _draw(
    folder: Path,
    test: list[Scene],
    shifted: Mapping[str, list[Scene]],
    answers: Mapping[str, Answers],
) -> None:
    """A clear scene and one of each shifted set, as files and drawn on by the student."""
    pillow = require("PIL.Image", "captioning")
    place = 0
    for name, group in (("clear", test), *shifted.items()):
        best = max(range(len(group)), key=lambda i: (len(group[i].boxes), -i))
        pixels = (group[best].image.transpose(1, 2, 0) * 255).round().astype(np.uint8)
        picture = pillow.fromarray(pixels)
        picture.save(folder / f"{name}.png")
        draw(picture, answers[STUDENT][place + best], folder / f"{name}-drawn.png")
        place += len(group)
