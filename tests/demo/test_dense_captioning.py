"""The captioning demo's networks; its whole story on a small scale at night."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("torch")

import torch

from hydra_edge.artifacts.report import Protocol
from hydra_edge.captioning.exporting import export_captioner
from hydra_edge.captioning.networks import Captioner
from hydra_edge.captioning.scenes import images_of
from hydra_edge.demo import caption_members, caption_networks, dense_captioning, scenes
from hydra_edge.demo.story import Training
from hydra_edge.fusion import fuse


def members(count: int = 2) -> list[Captioner]:
    """Untrained."""
    made = [training.build() for training in caption_members.trainings(8, 1).values()]
    return [one.eval() for one in made[:count] if isinstance(one, Captioner)]


@torch.no_grad()
def test_a_student_begins_as_the_member_it_starts_from() -> None:
    start, other = members()
    student = caption_networks.student(start).eval()
    images = torch.from_numpy(images_of(scenes.draw(2, 5)))
    votes, states = start.encode(images)
    their_votes, their_states = student.encode(images)
    torch.testing.assert_close(their_votes, votes.expand_as(their_votes))
    torch.testing.assert_close(their_states, states)
    words, rows = torch.tensor([3, 0, 7]), states[0, :3]
    logits, _ = start.step(words, rows)
    said, _ = student.step(words, rows)
    assert said.shape[0] == caption_networks.HEADS
    torch.testing.assert_close(said, logits.expand_as(said))
    assert not torch.allclose(other.encode(images)[0], votes)


def test_all_heads_fuse_by_the_ordinary_pass() -> None:
    student = caption_networks.student(members()[0])
    with torch.no_grad():  # equal heads would be exported as one
        for heads in (student.heads, student.box_heads):
            for parameter in heads.parameters():
                parameter.normal_()
    graphs = export_captioner(student, scenes.draw(1, 5)[0].image[None])
    for name in ("encode", "step"):
        groups = [group for group in fuse(graphs[name]).fusion if group.fused]
        assert [group.heads for group in groups] == [caption_networks.HEADS], name


def test_members_learn_from_the_same_scenes() -> None:
    trainings = caption_members.trainings(24, 2)
    first, second = list(trainings.values())[:2]

    def learnt(training: Training) -> list[np.ndarray]:
        epochs: list[None] = []
        network = training.train(training.build(), lambda: epochs.append(None))
        assert len(epochs) == training.epochs == 2
        return [value.detach().numpy() for value in network.parameters()]

    one, again, other = learnt(first), learnt(first), learnt(second)
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.nightly
def test_the_whole_story(tmp_path: Path) -> None:
    plan = dense_captioning.Plan(
        train=400,
        epochs=4,
        test=24,
        shifted=16,
        transfer=240,
        distillation=replace(dense_captioning.DISTILLATION, epochs_heads=2),
        calibration=64,
        protocol=Protocol(batches=(1,), max_seconds=1.0, warmup_s=0.05, cold_samples=2),
    )
    report = dense_captioning.run(tmp_path, Console(quiet=True), plan)
    labels = {row.label for row in report.sessions}
    assert labels >= {dense_captioning.STUDENT, *dense_captioning.ENSEMBLES}
    assert all(row.task == "dense_captioning" for row in report.sessions)
    for name in ("report.html", "scene.hydra", "clear-drawn.png", "distillation"):
        assert (tmp_path / name).exists()
