"""Training with labels, then distillation: on scenes so plain that seconds are enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from captioners import GRID, WORDS, images, network, painted
from torch.nn import functional

from hydra_edge.captioning.distillation import (
    LESSONS,
    CaptionDistillationConfig,
    distill_captioner,
)
from hydra_edge.captioning.lessons import prepare
from hydra_edge.captioning.networks import CaptionEnsemble, Captioner, summarize_votes
from hydra_edge.captioning.scenes import Scene, images_of
from hydra_edge.captioning.training import (
    TrainingConfig,
    box_loss,
    labelled_loss,
    regions_of,
    train_captioner,
    unroll,
)
from hydra_edge.captioning.vocabulary import PADDING, Vocabulary
from hydra_edge.errors import ArtifactError, DistillationError, InputError
from hydra_edge.tasks.dense_captioning import rows_of

SCENES = painted(64, seed=0)
CONFIG = TrainingConfig(epochs=50, batch_size=16, learning_rate=2e-2)
DISTILLATION = CaptionDistillationConfig(
    epochs_mean=20, epochs_heads=30, batch_size=16, learning_rate=2e-2
)


@pytest.fixture(scope="module")
def members() -> list[Captioner]:
    return [train_captioner(network(1, seed), SCENES, CONFIG) for seed in range(2)]


def right_words(made: object, scenes: list[Scene]) -> float:
    """Share of words that the mean says right, given those before."""
    with torch.no_grad():
        regions = regions_of(scenes, Vocabulary(WORDS), GRID)
        _, states = made.encode(torch.from_numpy(images_of(scenes)))  # type: ignore[attr-defined]
        logits = unroll(made, states[regions.scene, regions.cell], regions.words)  # type: ignore[arg-type]
    said = logits.softmax(-1).mean(0).argmax(-1)
    return float((said == regions.words)[regions.words != PADDING].float().mean())


def test_a_member_learns_boxes_and_words(members: list[Captioner]) -> None:
    unseen = painted(40, seed=1)
    assert right_words(network(1, 0), unseen) < 0.6
    assert right_words(members[0], unseen) == 1.0
    votes, _ = members[0].encode(torch.from_numpy(images_of(unseen)))
    boxes, scores, *_ = summarize_votes(votes)
    best = scores.argmax(1)
    found = boxes[torch.arange(len(unseen)), best].detach().numpy()
    truth = np.concatenate([scene.boxes for scene in unseen])
    near = np.abs(found - truth).max(1) < 0.1
    assert near.mean() >= 0.9


def test_a_student_imitates_each_member(members: list[Captioner]) -> None:
    ensemble = CaptionEnsemble(members)
    pixels = images_of(SCENES)
    untrained = network(2, 11)
    before = {name: value.clone() for name, value in untrained.state_dict().items()}
    losses: list[tuple[str, float]] = []
    student = distill_captioner(
        ensemble, untrained, pixels, DISTILLATION, lambda *loss: losses.append(loss)
    )
    assert [phase for phase, _ in losses] == ["mean"] * 20 + ["heads"] * 30
    assert losses[-1][1] < losses[20][1]
    assert all(torch.equal(value, untrained.state_dict()[name]) for name, value in before.items())
    assert right_words(student, painted(40, seed=2)) == 1.0
    lessons = prepare(ensemble, pixels, score=0.15, most=6)
    with torch.no_grad():
        _, states = student.encode(torch.from_numpy(pixels))
        said = rows_of(
            unroll(student, states[lessons.image, lessons.cell], lessons.words), lessons.words
        )
    taught = rows_of(lessons.logits, lessons.words)
    apart = torch.stack(
        [torch.stack([_divergence(ours, theirs) for theirs in taught]) for ours in said]
    )
    assert float(apart.diag().mean()) < 0.05  # nats per word


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
    )


@torch.no_grad()
def test_lessons_are_what_the_members_say_along_the_mean(members: list[Captioner]) -> None:
    ensemble = CaptionEnsemble(members)
    pixels = images_of(SCENES[:20])
    lessons = prepare(ensemble, pixels, score=0.15, most=6)
    votes, states = ensemble.encode(torch.from_numpy(pixels))
    torch.testing.assert_close(lessons.votes, votes)
    spoken = unroll(ensemble, states[lessons.image, lessons.cell], lessons.words)
    taught = rows_of(lessons.logits, lessons.words)
    torch.testing.assert_close(taught, rows_of(spoken, lessons.words))
    greedy = spoken.softmax(-1).mean(0).argmax(-1)
    said = lessons.words != PADDING
    assert torch.equal(greedy[said], lessons.words[said])


class KilledError(Exception):
    pass


class Log(list[tuple[str, float]]):
    """Losses, until the run is killed in epoch ``last``."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def __call__(self, phase: str, loss: float) -> None:
        self.append((phase, loss))
        if len(self) > self.last:
            raise KilledError


def test_an_interrupted_run_goes_on(tmp_path: Path, members: list[Captioner]) -> None:
    ensemble, pixels = CaptionEnsemble(members), images_of(SCENES[:16])
    config = replace(DISTILLATION, epochs_mean=2, epochs_heads=3, batch_size=8)
    untrained = network(2, 11)
    untrained.body = torch.nn.Sequential(untrained.body, torch.nn.Dropout(0.1))
    whole: list[tuple[str, float]] = []
    wanted = distill_captioner(
        ensemble, untrained, pixels, config, lambda *loss: whole.append(loss)
    )
    for last in range(5):  # killed after every epoch
        seen = Log(last)
        with pytest.raises(KilledError):
            distill_captioner(ensemble, untrained, pixels, config, seen, workdir=tmp_path / "run")
        assert [phase for phase, _ in seen] == [phase for phase, _ in whole[: last + 1]]
        np.testing.assert_allclose([v for _, v in seen], [v for _, v in whole[: last + 1]])
    ended: list[tuple[str, float]] = []
    found = distill_captioner(
        ensemble,
        untrained,
        pixels,
        config,
        lambda *loss: ended.append(loss),
        workdir=tmp_path / "run",
    )
    assert len(ended) == 5
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_a_work_folder_belongs_to_one_run(tmp_path: Path, members: list[Captioner]) -> None:
    ensemble, pixels = CaptionEnsemble(members), images_of(SCENES[:16])
    config = replace(DISTILLATION, epochs_mean=1, epochs_heads=1)

    def again(
        of: CaptionEnsemble = ensemble,
        student: int = 11,
        images: np.ndarray = pixels,
        how: CaptionDistillationConfig = config,
    ) -> None:
        distill_captioner(of, network(2, student), images, how, workdir=tmp_path)

    again()
    with pytest.raises(DistillationError, match="a run with another config"):
        again(how=replace(config, learning_rate=1e-3))
    with pytest.raises(DistillationError, match="a run with another student"):
        again(student=12)
    with pytest.raises(DistillationError, match="holds lessons of other images"):
        again(images=pixels[::-1].copy())
    with pytest.raises(DistillationError, match="lessons of other choice of regions"):
        again(how=replace(config, most=1))
    with pytest.raises(DistillationError, match="holds lessons of other ensemble"):
        again(CaptionEnsemble(members[::-1]))
    (tmp_path / LESSONS).unlink()  # as the message says
    with pytest.raises(DistillationError, match="a run with another images"):
        again(images=pixels[::-1].copy())
    (tmp_path / LESSONS).write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="Delete it, and the members are run again"):
        again()


def test_padding_teaches_nothing() -> None:
    made = network(1, 0)
    regions = regions_of(SCENES[:4], Vocabulary(WORDS), GRID)
    pixels = torch.from_numpy(images_of(SCENES[:4]))
    longer = functional.pad(regions.words, (0, 5), value=PADDING)
    padded = type(regions)(regions.scene, regions.cell, regions.box, longer)
    found = labelled_loss(made, pixels, padded)
    torch.testing.assert_close(found, labelled_loss(made, pixels, regions))


def test_a_cell_has_one_box() -> None:
    boxes = np.asarray([[0, 0, 0.2, 0.2], [0.05, 0.05, 0.2, 0.2], [0.5, 0.5, 1, 1]])
    scene = Scene(images(1)[0], boxes, ("a", "red", "blue"))
    regions = regions_of([scene], Vocabulary(WORDS), GRID)
    assert regions.cell.tolist() == [0, 15]
    with pytest.raises(InputError, match="1 scenes hold no region"):
        regions_of([Scene(images(1)[0], np.zeros((0, 4)), ())], Vocabulary(WORDS), GRID)


def test_generalized_overlap() -> None:
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    apart = torch.tensor([[2.0, 0.0, 3.0, 1.0]])
    assert float(box_loss(a, a)) == pytest.approx(0, abs=1e-6)
    assert float(box_loss(a, apart)) == pytest.approx(1 + 1 / 3)  # a hull of 3, a third of it empty


def test_what_cannot_be_trained(members: list[Captioner]) -> None:
    with pytest.raises(InputError, match="The network has 3 heads"):
        train_captioner(network(3, 0), SCENES, CONFIG)
    ensemble = CaptionEnsemble(members)
    with pytest.raises(InputError, match="each head imitates a member"):
        distill_captioner(ensemble, network(3, 0), images())
    nothing = CaptionDistillationConfig(score=0.999999)
    with pytest.raises(DistillationError, match="The ensemble finds nothing on 2 images"):
        distill_captioner(ensemble, network(2, 0), images(), nothing)
    with pytest.raises(InputError, match="Distillation of 4 and 0 epochs"):
        CaptionDistillationConfig(epochs_heads=0)
    broken = network(1, 0)
    with torch.no_grad():
        broken.start.weight.fill_(float("nan"))
    with pytest.raises(DistillationError, match="The loss is nan"):
        train_captioner(broken, SCENES, CONFIG)
