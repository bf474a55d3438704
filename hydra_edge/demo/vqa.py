"""Five networks that answer questions about generated scenes become one engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import Graph
from hydra_edge.artifacts.report import Report
from hydra_edge.compilation import compile
from hydra_edge.demo import story
from hydra_edge.demo import vqa_networks as networks
from hydra_edge.demo.story import OPTIONS, Check, Inputs, Training, at_least, at_most, between
from hydra_edge.demo.vqa_networks import Blind, Examples, Member
from hydra_edge.distillation import DistillationConfig, distill
from hydra_edge.ensembles import Ensemble, Hydra, linear_heads, save_weights
from hydra_edge.exporting import export
from hydra_edge.fusion import fuse
from hydra_edge.pipeline import build
from hydra_edge.quantization import CalibrationOptions, quantize
from hydra_edge.runtime import load
from hydra_edge.tasks.vqa import TASK
from hydra_edge.verification import verify
from hydra_edge.vqa import Answerer, DeferRule, Tokenizer, equip, scenes
from hydra_edge.vqa.answers import Vocabulary
from hydra_edge.vqa.scenes import Scenes

Scores = npt.NDArray[np.float32]

DISTILLATION = DistillationConfig(
    epochs_mean=0,  # the student begins as a member
    epochs_heads=7,
    batch_size=128,
    learning_rate_heads=3e-3,
    disagreement_weight=20.0,
    weight_decay=0.0,
)
CALIBRATION = CalibrationOptions("mse", weights="mse")
USUAL_ANSWERS = 3129  # of VQA v2
STUDENT, STUDENT_FP32 = "student int8", "student fp32"
MERGED, MERGED_INT8, SESSIONS = "ensemble, merged", "ensemble int8, merged", "ensemble, 5 sessions"
ENSEMBLES = (MERGED, MERGED_INT8, SESSIONS)


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        train: Scenes that members learn from, with one question each.
        validation: Scenes that the rule for deferring is chosen on.
        test: Scenes that everything is judged on.
        transfer: Scenes that the student learns from.
        epochs: Of members.
        distillation: Of the student.
    """

    train: int = 24000
    validation: int = 1000
    test: int = 2000
    transfer: int = 16000
    epochs: int = 6
    distillation: DistillationConfig = DISTILLATION


def run(folder: Path, console: Console, plan: Plan = Plan()) -> Report:
    """Run or resume the demo in ``folder``; see `hydra_edge.demo.run_demo`."""
    clock = story.Clock(folder, console)
    folder.mkdir(parents=True, exist_ok=True)
    train, validation, test = (
        scenes.generate(count, seed)
        for seed, count in enumerate((plan.train, plan.validation, plan.test))
    )
    vocabulary = Vocabulary.of([question.answers for question in train.questions])
    tokenizer = Tokenizer.train(train.texts, networks.WORDS)
    data, scores = inputs_of(test, tokenizer), scores_of(test, vocabulary)
    sets = shifted(data)
    transfer = transfer_set(tokenizer, plan.transfer)
    calibration = {name: array[-1024:] for name, array in transfer.items()}
    np.savez(folder / "test.npz", labels=scores, **data)  # type: ignore[arg-type]
    np.savez(folder / "calibration.npz", **calibration)  # type: ignore[arg-type]
    save_picture(test.images[0], folder / "scene.png")

    console.print(
        f"[bold]1  Five networks[/] and one that does not look, on {plan.train} questions"
    )
    members, blind = _members(folder, train, vocabulary, tokenizer, plan.epochs, console)
    ensemble = Ensemble(members, task="vqa", labels=vocabulary.answers)

    console.print("[bold]2  One student[/] with five heads, each imitating one network")
    student = distill(
        ensemble,
        networks.student(vocabulary.answers, members[0]),
        (transfer["image"], transfer["question"]),
        plan.distillation,
        workdir=folder / "distillation",
        progress=not console.quiet,
    )
    save_weights(student, folder / "student.safetensors")

    console.print("[bold]3  Export, quantize, fuse, compile, verify[/]")
    graphs = story.exported(folder, student, members, data, "vqa", vocabulary.answers, console)
    engines = _compile(graphs, calibration, data, console)
    int8 = engines[STUDENT]
    assert isinstance(int8, Engine)
    with load(int8, threads=story.THREADS) as session:
        known = session.run(inputs_of(validation, tokenizer))
    rule = DeferRule.fit(known, scores_of(validation, vocabulary))
    ready = equip(int8, tokenizer, defer=rule)
    ready.save(folder / "student.hydra")
    fp32, merged = engines[STUDENT_FP32], engines[MERGED]
    assert isinstance(fp32, Engine)
    assert isinstance(merged, Engine)
    fp32.save(folder / "student-fp32.hydra")
    merged.save(folder / "ensemble.hydra")

    console.print("[bold]4  For GPUs[/]: built here where that needs none, else packed up")
    finish = partial(equip, tokenizer=tokenizer, defer=rule)
    story.for_gpus(folder, graphs["student"], calibration, data, console, finish)

    console.print("[bold]5  Ask[/] the engine about a scene it has not seen")
    _ask(ready, folder / "scene.png", test, console)

    console.print("[bold]6  Measure[/] all of them under one protocol")
    report = story.measure(engines, "vqa", data, scores, sets, MERGED, console)
    with torch.no_grad():
        unseen = blind(*(torch.from_numpy(array) for array in data.values())).numpy()[None]
    checks = [
        at_most("accuracy without looking", TASK.metrics(unseen, scores)["accuracy"], 0.6),
        *_checks(report, graphs, int8, {"test": data, **sets}, scores),
        *_byte_checks(graphs["student"], student, calibration),
        *story.speed_checks(report, STUDENT, ENSEMBLES, {1: 3.0, 32: 3.0}),
    ]
    question = test.questions[0].text
    hint = f"hydra-edge run {folder}/student.hydra {folder}/scene.png --question '{question}'"
    return clock.finish(report, checks, hint)


def inputs_of(data: Scenes, tokenizer: Tokenizer) -> dict[str, npt.NDArray[np.generic]]:
    """What the networks take."""
    return {"image": data.images, "question": tokenizer.encode(data.texts)}


def scores_of(data: Scenes, vocabulary: Vocabulary) -> Scores:
    """How right each answer is, ``[N, C]``."""
    return vocabulary.scores([question.answers for question in data.questions])


def shifted(data: Inputs) -> dict[str, dict[str, npt.NDArray[np.generic]]]:
    """Out of distribution: images with their colours inverted, and uniform noise."""
    noise = np.random.default_rng(12345).uniform(0, 1, data["image"].shape)
    inverted = 1 - np.asarray(data["image"], np.float32)
    return {
        name: {"image": images.astype(np.float32), "question": data["question"]}
        for name, images in (("inverted", inverted), ("noise", noise))
    }


def transfer_set(tokenizer: Tokenizer, count: int) -> dict[str, npt.NDArray[np.generic]]:
    """What the student learns from: scenes nobody answered, a quarter of them spoiled.

    The ensemble's doubt can be seen where members disagree, which is seldom on clean scenes: some
    are mixed with another, some lie under noise, and some have colours that do not occur.
    """
    found = scenes.generate(count, 100)
    rng = np.random.default_rng(100)
    images = found.images.copy()
    part = count // 12
    mixed, veiled, tinted = (slice(start * part, (start + 1) * part) for start in (0, 1, 2))
    pure = slice(3 * part, 3 * part + part // 2)

    def share() -> npt.NDArray[np.float32]:
        return rng.uniform(0.1, 0.9, (part, 1, 1, 1)).astype(np.float32)

    weight = share()
    images[mixed] = weight * images[mixed] + (1 - weight) * images[-part:]
    weight = share()
    grain = rng.uniform(0, 1, images[veiled].shape).astype(np.float32)
    images[veiled] = weight * images[veiled] + (1 - weight) * grain
    weight = rng.uniform(0, 1, (part, 3, 1, 1)).astype(np.float32)
    images[tinted] = weight * images[tinted] + (1 - weight) * (1 - images[tinted])
    images[pure] = rng.uniform(0, 1, images[pure].shape)
    order = rng.permutation(count)
    return {"image": images[order], "question": tokenizer.encode(found.texts)[order]}


def save_picture(image: npt.NDArray[np.float32], path: Path) -> None:
    """Write an image ``[3, height, width]`` in 0..1 as a file."""
    from PIL import Image

    Image.fromarray((image.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(path)


def _members(
    folder: Path,
    train: Scenes,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    epochs: int,
    console: Console,
) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    examples = Examples(train.images, tokenizer.encode(train.texts), scores_of(train, vocabulary))
    answers = len(vocabulary)
    trainings = {
        f"member-{seed}": Training(
            partial(networks.untrained, Member, answers, seed),
            partial(networks.train, examples, seed, epochs),
            epochs,
        )
        for seed in range(networks.HEADS)
    }
    trainings["blind"] = Training(
        partial(networks.untrained, Blind, answers, 0),
        partial(networks.train, examples, 0, epochs),
        epochs,
    )
    *members, blind = story.trained(folder, trainings, console, workers=2).values()
    return members, blind


def _compile(
    graphs: dict[str, Graph], calibration: Inputs, test: Inputs, console: Console
) -> dict[str, Engine | list[Engine]]:
    def note(step: str) -> None:
        console.print(f"   [dim]student int8: {step}[/]")

    student, ensemble = graphs["student"], graphs["ensemble"]
    return {
        STUDENT: build(
            student,
            precision="int8",
            calibration=calibration,
            calibration_options=CALIBRATION,
            options=OPTIONS,
            data=test,
            on_step=note,
        ),
        STUDENT_FP32: build(student, options=OPTIONS),
        MERGED: build(ensemble, options=OPTIONS),
        MERGED_INT8: build(
            quantize(ensemble, "int8", calibration=calibration, options=CALIBRATION),
            options=OPTIONS,
        ),
        SESSIONS: [
            compile(graphs[f"member-{index}"], options=OPTIONS) for index in range(networks.HEADS)
        ],
    }


def _ask(engine: Engine, picture: Path, test: Scenes, console: Console) -> None:
    with load(engine, threads=story.THREADS) as session:
        reply = Answerer(session).ask(picture, test.questions[0].text, top=3)
    said = ", ".join(f"{answer.text} {answer.probability:.2f}" for answer in reply.answers)
    console.print(
        f"   {reply.question} {said} [dim](mutual information {reply.mutual_information:.3f}, "
        f"defer {'yes' if reply.defer else 'no'}; people say {test.questions[0].answer})[/]",
        highlight=False,
    )


def _checks(
    report: Report, graphs: dict[str, Graph], int8: Engine, sets: dict[str, Inputs], scores: Scores
) -> list[Check]:
    """Quality and doubt of the engine that was compiled, against the ensemble and against fp32."""
    rows = {row.label: row for row in report.sessions}
    union = _union(sets)
    against = verify(int8, graphs["ensemble"], sets["test"], labels=scores)
    own = verify(int8, graphs["student"], sets["test"], labels=scores)
    checks = [
        at_least("accuracy of the ensemble", against.reference_metrics["accuracy"], 0.9),
        at_most(
            "accuracy below the ensemble",
            against.reference_metrics["accuracy"] - against.metrics["accuracy"],
            0.01,
        ),
        at_least(
            "rank correlation of mutual information with the ensemble's",
            verify(int8, graphs["ensemble"], union).drift["mi_rank_correlation"],
            0.8,
        ),
    ]
    for name, data in sets.items():
        ratio = verify(int8, graphs["ensemble"], data).drift["mi_ratio"]
        checks.append(between(f"mutual information over the ensemble's, {name}", ratio, 0.5, 1.5))
    gap = abs(
        rows[STUDENT].quality["effective_reliability"]
        - rows[MERGED].quality["effective_reliability"]
    )
    return [
        *checks,
        at_most("effective reliability away from the ensemble's", gap, 0.02),
        at_most(
            "int8: accuracy below fp32",
            own.reference_metrics["accuracy"] - own.metrics["accuracy"],
            0.005,
        ),
        at_least(
            "int8: rank correlation of mutual information with fp32",
            verify(int8, graphs["student"], union).drift["mi_rank_correlation"],
            0.95,
        ),
    ]


def _byte_checks(student: Graph, trained: Hydra, calibration: Inputs) -> list[Check]:
    """Bytes of int8 heads over those of fp32: of the demo's, and of as many answers as is usual."""
    wide = Hydra(
        trained.body,
        linear_heads(networks.HEADS, networks.FEATURES, USUAL_ANSWERS),
        task="vqa",
    )
    example = tuple(array[:1] for array in calibration.values())
    checks = []
    for graph in (student, export(wide, example, input_names=list(calibration))):
        few = {name: array[:128] for name, array in calibration.items()}
        before, after = head_bytes(graph), head_bytes(quantize(graph, "int8", calibration=few))
        width = graph.outputs[0].shape[-1]
        name = f"bytes of {networks.HEADS} heads for {width} answers, {after} of {before}"
        checks.append(at_most(name, after / before, 0.3))
    return checks


def head_bytes(graph: Graph) -> int:
    """Bytes of the weights of heads that fuse."""
    return sum(group.weight_bytes for group in fuse(graph).fusion if group.fused)


def _union(sets: dict[str, Inputs]) -> dict[str, npt.NDArray[np.generic]]:
    names = next(iter(sets.values()))
    return {name: np.concatenate([data[name] for data in sets.values()]) for name in names}
