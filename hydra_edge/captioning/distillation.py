"""`distill_captioner`: a student imitates an ensemble, box by box and word by word.

As in `hydra_edge.distillation`, first one head imitates the members' mean, then it is copied to all
heads and each imitates a member: Tran et al. 2020, arXiv 2001.04694. The words before each word are
the ensemble's own (teacher forcing), so no labels are used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from hydra_edge import tasks
from hydra_edge.captioning.boxes import suppress
from hydra_edge.captioning.networks import (
    CaptionEnsemble,
    Captioner,
    boxes_of,
    summarize_votes,
)
from hydra_edge.captioning.training import unroll, without_denormals
from hydra_edge.captioning.vocabulary import END_INDEX, MAX_WORDS, PADDING
from hydra_edge.errors import DistillationError, InputError
from hydra_edge.tasks.dense_captioning import rows_of

_OVERLAP = 0.4


@dataclass(frozen=True)
class CaptionDistillationConfig:
    """How a captioner is distilled.

    Attributes:
        epochs_mean: Epochs in which head 0 imitates the mean of the members.
        epochs_heads: Epochs in which every head imitates its member.
        batch_size: Images per step.
        learning_rate: AdamW's at the start of each phase; a cosine takes it to 0.
        temperatures: Of the words' softmax; the loss is the mean over them.
        box_weight: Of the mean distance of a box's sides, as a fraction of the image, against the
            cross entropy of there being an object, in nats.
        caption_weight: Of the words' loss, in nats per word.
        disagreement_weight: Of how far the size of the heads' disagreement on words is from the
            members', in the second phase; see `Task.disagreement_loss`.
        score: Regions are described that the ensemble gives a higher probability of an object.
        most: Regions per image at most.
        seed: Of the order of the images.
    """

    epochs_mean: int = 4
    epochs_heads: int = 8
    batch_size: int = 32
    learning_rate: float = 3e-3
    temperatures: tuple[float, ...] = (1.0,)
    box_weight: float = 20.0
    caption_weight: float = 4.0
    disagreement_weight: float = 1.0
    score: float = 0.15
    most: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.epochs_mean + 1, self.epochs_heads, self.batch_size, self.most)
        if min(counts) < 1 or not self.temperatures or min(self.temperatures) <= 0:
            raise InputError(
                f"Distillation of {self.epochs_mean} and {self.epochs_heads} epochs, in batches of "
                f"{self.batch_size} images of {self.most} regions, at temperatures "
                f"{self.temperatures}.",
                "The first may be 0; the others are at least 1, and temperatures above 0.",
                "Leave them out for a start.",
            )


@dataclass(frozen=True)
class Lessons:
    """What an ensemble says of images: what its student learns.

    Attributes:
        votes: ``[M, N, cells, 5]``.
        image: Which image each of R regions is of, ``[R]``.
        cell: ``[R]``.
        words: What the ensemble says of it, ``[R, T]``.
        logits: What its members would say at each word, ``[M, R, T, V]``.
    """

    votes: torch.Tensor
    image: torch.Tensor
    cell: torch.Tensor
    words: torch.Tensor
    logits: torch.Tensor


def distill_captioner(
    ensemble: CaptionEnsemble,
    student: Captioner,
    images: npt.NDArray[np.float32],
    config: CaptionDistillationConfig = CaptionDistillationConfig(),
    on_epoch: Callable[[str, float], None] = lambda phase, loss: None,
) -> Captioner:
    """Train a copy of ``student`` to imitate ``ensemble`` on images without labels.

    Args:
        ensemble: The members, in eval mode.
        student: With as many heads of each kind as there are members, and their grid.
        images: ``[N, 3, H, W]``.
        config: How.
        on_epoch: Called with the phase, ``mean`` or ``heads``, and the mean loss of every epoch.

    Returns:
        The student in eval mode.

    Raises:
        InputError: The student does not fit the ensemble.
        DistillationError: The ensemble finds nothing on any image, or the loss is not finite.
    """
    if student.head_count != ensemble.head_count or student.vocabulary != ensemble.vocabulary:
        raise InputError(
            f"The student has {student.head_count} heads over {len(student.vocabulary)} words.",
            f"The ensemble has {ensemble.head_count} members and {len(ensemble.vocabulary)} words; "
            "each head imitates a member, word by word.",
            "Give both the same vocabulary, and the student a head per member.",
        )
    student = copy.deepcopy(student)
    lessons = prepare(ensemble, images, config)
    pixels = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
    for phase, epochs in (("mean", config.epochs_mean), ("heads", config.epochs_heads)):
        if phase == "heads" and config.epochs_mean:
            for heads in (student.heads, student.box_heads):
                for head in list(heads)[1:]:
                    head.load_state_dict(heads[0].state_dict())
        with without_denormals():
            _train(student, pixels, lessons, config, phase, epochs, on_epoch)
    return student.eval()


@torch.no_grad()
def prepare(
    ensemble: CaptionEnsemble, images: npt.NDArray[np.float32], config: CaptionDistillationConfig
) -> Lessons:
    """Run the members once.

    Raises:
        DistillationError: They find nothing on any image.
    """
    parts = []
    for start in range(0, len(images), config.batch_size):
        batch = torch.from_numpy(images[start : start + config.batch_size])
        votes, states = ensemble.encode(batch)
        boxes, scores, *_ = summarize_votes(votes)
        kept = [
            suppress(b, s, overlap=_OVERLAP, score=config.score, most=config.most)
            for b, s in zip(boxes.numpy(), scores.numpy(), strict=True)
        ]
        image = torch.from_numpy(np.repeat(np.arange(len(kept)), [len(cells) for cells in kept]))
        cell = torch.from_numpy(np.concatenate(kept))
        words, logits = _speak(ensemble, states[image, cell])
        parts.append(Lessons(votes, image + start, cell, words, logits))
    regions = sum(len(part.cell) for part in parts)
    if not regions:
        raise DistillationError(
            f"The ensemble finds nothing on {len(images)} images.",
            f"No cell has a probability above {config.score}, so there are no captions to learn.",
            "Check the members, or lower the score.",
        )
    return Lessons(
        votes=torch.cat([part.votes for part in parts], 1),
        image=torch.cat([part.image for part in parts]),
        cell=torch.cat([part.cell for part in parts]),
        words=torch.cat([part.words for part in parts]),
        logits=torch.cat([part.logits for part in parts], 1),
    )


def _speak(ensemble: CaptionEnsemble, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy captions ``[R, T]`` of the mean, and members' logits ``[M, R, T, V]`` along them."""
    last = torch.full((len(states),), END_INDEX)
    ended = torch.zeros(len(states), dtype=torch.bool)
    words, logits = [], []
    for _ in range(MAX_WORDS + 1):
        said, states = ensemble.step(last, states)
        last = said.softmax(-1).mean(0).argmax(-1)
        words.append(torch.where(ended, PADDING, last))
        logits.append(said)
        ended = ended | (last == END_INDEX)
    return torch.stack(words, 1), torch.stack(logits, 2)


def _train(
    student: Captioner,
    images: torch.Tensor,
    lessons: Lessons,
    config: CaptionDistillationConfig,
    phase: str,
    epochs: int,
    on_epoch: Callable[[str, float], None],
) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(config.seed)
    student.train()
    steps = max(1, len(images) // config.batch_size)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        for index, batch in enumerate(torch.split(order, -(-len(images) // steps))):
            for group in optimizer.param_groups:
                done = (epoch + index / steps) / epochs
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            optimizer.zero_grad()
            loss = imitation_loss(student, images, lessons, batch, config, phase)
            if not torch.isfinite(loss):
                raise DistillationError(
                    f"The loss is {loss.item()} in epoch {epoch + 1} of phase '{phase}'.",
                    "Training cannot go on from there.",
                    "Lower the learning rate.",
                )
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            optimizer.step()
            total += loss.item() / steps
        on_epoch(phase, total)


def imitation_loss(
    student: Captioner,
    images: torch.Tensor,
    lessons: Lessons,
    batch: torch.Tensor,
    config: CaptionDistillationConfig,
    phase: str,
) -> torch.Tensor:
    """How far a student is from its lessons on the images ``batch``, a scalar."""
    votes, states = student.encode(images[batch])
    target = lessons.votes[:, batch]
    if phase == "mean":
        votes = votes[:1]
    loss = _votes_loss(votes, target, phase, config.box_weight)
    place = torch.full((len(images),), -1)
    place[batch] = torch.arange(len(batch))
    chosen = (place[lessons.image] >= 0).nonzero()[:, 0]
    if not len(chosen):
        return loss
    words = lessons.words[chosen]
    length = int((words != PADDING).sum(1).max())
    words = words[:, :length]
    said = unroll(student, states[place[lessons.image[chosen]], lessons.cell[chosen]], words)
    teacher = rows_of(lessons.logits[:, chosen, :length], words)
    rows = rows_of(said, words)
    task = tasks.find("dense_captioning")
    for temperature in config.temperatures:
        part = (
            task.mean_loss(rows[0], teacher, temperature)
            if phase == "mean"
            else task.head_loss(rows, teacher, temperature)
        )
        loss = loss + config.caption_weight * part / len(config.temperatures)
    if phase == "heads" and config.disagreement_weight:
        loss = loss + config.disagreement_weight * task.disagreement_loss(rows, teacher)
    return loss


def _votes_loss(
    votes: torch.Tensor, target: torch.Tensor, phase: str, box_weight: float
) -> torch.Tensor:
    """Objectness and boxes: cross entropy per likely object, and distance where one is likely."""
    probability = torch.sigmoid(target[..., 0])
    boxes = boxes_of(target)
    if phase == "mean":
        weights = (probability / probability.sum(0)).unsqueeze(-1)
        boxes = (weights * boxes).sum(0, keepdim=True)
        probability = probability.mean(0, keepdim=True)
    objects = probability.sum().clamp_min(1.0)
    entropy = functional.binary_cross_entropy_with_logits(
        votes[..., 0], probability, reduction="sum"
    )
    apart = (boxes_of(votes) - boxes).abs().mean(-1) * probability
    return (entropy + box_weight * apart.sum()) / objects
