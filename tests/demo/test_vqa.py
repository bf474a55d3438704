"""The VQA demo's data and networks; its whole story on a small scale at night."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("torch")

import torch

from hydra_edge.demo import vqa
from hydra_edge.demo import vqa_networks as networks
from hydra_edge.demo.vqa_networks import Blind, Examples, Member
from hydra_edge.ensembles import Hydra, linear_heads
from hydra_edge.exporting import export
from hydra_edge.fusion import fuse
from hydra_edge.quantization import quantize
from hydra_edge.vqa import Tokenizer, scenes
from hydra_edge.vqa.answers import Vocabulary

DATA = scenes.generate(260, 1)
TOKENIZER = Tokenizer.train(DATA.texts, networks.WORDS)
ANSWERS = Vocabulary.of([question.answers for question in DATA.questions], minimum_count=1)


def test_sets_are_fixed_in_range_and_apart() -> None:
    data = vqa.inputs_of(DATA, TOKENIZER)
    assert data["question"].shape == (260, networks.WORDS)
    for name, one in vqa.shifted(data).items():
        assert one["image"].dtype == np.float32
        assert 0 <= one["image"].min() <= one["image"].max() <= 1
        np.testing.assert_array_equal(one["question"], data["question"])
        np.testing.assert_array_equal(one["image"], vqa.shifted(data)[name]["image"])
        assert np.abs(one["image"] - data["image"]).mean() > 0.1
    transfer = vqa.transfer_set(TOKENIZER, 120)
    np.testing.assert_array_equal(transfer["image"], vqa.transfer_set(TOKENIZER, 120)["image"])
    assert transfer["image"].dtype == np.float32
    assert 0 <= transfer["image"].min() <= transfer["image"].max() <= 1
    clean = {image.tobytes() for image in scenes.generate(120, 100).images}
    kept = sum(image.tobytes() in clean for image in transfer["image"])
    assert kept == 120 - 3 * 10 - 5


def test_every_word_has_a_place_in_the_embedding() -> None:
    large = Tokenizer.train(scenes.generate(1500, 2).texts, networks.WORDS)
    assert large.size <= networks._VOCABULARY
    longest = max(len(text.replace("?", " ?").split()) for text in scenes.generate(1500, 2).texts)
    assert longest <= networks.WORDS


def test_a_student_begins_as_the_member_it_starts_from() -> None:
    member = networks.untrained(Member, len(ANSWERS), 0).eval()
    student = networks.student(ANSWERS.answers, member).eval()
    images = torch.from_numpy(DATA.images[:3])
    questions = torch.from_numpy(TOKENIZER.encode(DATA.texts[:3]))
    with torch.no_grad():
        expected = member(images, questions)
        for logits in student(images, questions):
            torch.testing.assert_close(logits, expected)
    other = networks.untrained(Member, len(ANSWERS), 1).eval()
    assert not torch.allclose(other(images, questions), expected)


def test_training_learns_and_blind_networks_do_not_look() -> None:
    questions = TOKENIZER.encode(DATA.texts)
    examples = Examples(DATA.images, questions, vqa.scores_of(DATA, ANSWERS))
    epochs: list[None] = []
    inputs = torch.from_numpy(DATA.images), torch.from_numpy(questions)
    truth = torch.from_numpy(examples.scores).argmax(1)
    for kind in (Member, Blind):
        before = networks.untrained(kind, len(ANSWERS), 0)
        losses = [torch.nn.functional.cross_entropy(before(*inputs), truth).item()]
        after = networks.train(examples, 0, 3, before, partial(epochs.append, None))
        losses.append(torch.nn.functional.cross_entropy(after(*inputs), truth).item())
        assert losses[1] < 0.97 * losses[0]
        with torch.no_grad():
            seen = torch.equal(after(*inputs), after(1 - inputs[0], inputs[1]))
        assert seen == (kind is Blind)
    assert len(epochs) == 6


def test_heads_of_the_usual_width_fuse_and_shrink() -> None:
    """3129 answers: the five heads are one grouped layer, and int8 saves 74 % of their bytes."""
    questions = TOKENIZER.encode(DATA.texts)
    data = {"image": DATA.images[:64], "question": questions[:64]}
    heads = linear_heads(networks.HEADS, networks.FEATURES, vqa.USUAL_ANSWERS)
    student = Hydra(networks.Body(), heads, task="vqa_sigmoid")
    graph = export(student, tuple(array[:1] for array in data.values()), input_names=tuple(data))
    groups = [group for group in fuse(graph).fusion if group.fused]
    assert [group.heads for group in groups] == [networks.HEADS]
    weights = networks.HEADS * (networks.FEATURES + 1) * vqa.USUAL_ANSWERS
    assert vqa.head_bytes(graph) == 4 * weights
    assert vqa.head_bytes(quantize(graph, "int8", calibration=data)) < 0.27 * 4 * weights


@pytest.mark.nightly
def test_the_whole_story(tmp_path: Path) -> None:
    config = replace(vqa.DISTILLATION, epochs_heads=2)
    plan = vqa.Plan(600, 100, 200, 300, 4, config)
    report = vqa.run(tmp_path, Console(quiet=True), plan)
    assert {row.label for row in report.sessions} >= {vqa.STUDENT, *vqa.ENSEMBLES}
    assert all(row.task == "vqa" for row in report.sessions)
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "student.hydra").exists()
