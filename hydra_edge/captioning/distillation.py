"""`distill_captioner`: a student imitates an ensemble, box by box and word by word.

As in `hydra_edge.distillation`, first one head imitates the members' mean, then it is copied to all
heads and each imitates a member: Tran et al. 2020, arXiv 2001.04694. No labels are used.

What a run keeps in its work folder, so that a kill while it trains costs an epoch at most:

    lessons.safetensors       what the members say of the images
    checkpoint.safetensors    weights, optimizer state, losses and position
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from hydra_edge import checkpoints, tasks
from hydra_edge.artifacts.files import make_folder
from hydra_edge.captioning.lessons import Lessons, identify, prepare
from hydra_edge.captioning.networks import CaptionEnsemble, Captioner, boxes_of
from hydra_edge.captioning.training import unroll, without_denormals
from hydra_edge.captioning.vocabulary import PADDING
from hydra_edge.checkpoints import Checkpoint
from hydra_edge.errors import DistillationError, InputError
from hydra_edge.tasks.dense_captioning import rows_of
from hydra_edge.teachers import digest

_PHASES = ("mean", "heads")
LESSONS = "lessons.safetensors"


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


def distill_captioner(
    ensemble: CaptionEnsemble,
    student: Captioner,
    images: npt.NDArray[np.float32],
    config: CaptionDistillationConfig = CaptionDistillationConfig(),
    on_epoch: Callable[[str, float], None] = lambda phase, loss: None,
    *,
    workdir: Path | str | None = None,
) -> Captioner:
    """Train a copy of ``student`` to imitate ``ensemble`` on images without labels.

    Args:
        ensemble: The members, in eval mode.
        student: With as many heads of each kind as there are members, and their grid.
        images: ``[N, 3, H, W]``.
        config: How.
        on_epoch: Called with the phase, ``mean`` or ``heads``, and the mean loss of every epoch;
            for those of an earlier run, too. Another thread than the caller's does that.
        workdir: Where the run keeps the members' answers and its checkpoint; the same call goes on
            from there, and ends as if it had not been interrupted. None keeps nothing.

    Returns:
        The student in eval mode.

    Raises:
        InputError: The student does not fit the ensemble.
        DistillationError: The ensemble finds nothing on any image, the loss is not finite, or the
            folder belongs to another run.
        ArtifactError: A file of the folder is damaged or cannot be written.
    """
    if student.head_count != ensemble.head_count or student.vocabulary != ensemble.vocabulary:
        raise InputError(
            f"The student has {student.head_count} heads over {len(student.vocabulary)} words.",
            f"The ensemble has {ensemble.head_count} members and {len(ensemble.vocabulary)} words; "
            "each head imitates a member, word by word.",
            "Give both the same vocabulary, and the student a head per member.",
        )
    folder, identity = None, {}
    if workdir is not None:
        folder = make_folder(workdir)
        identity = {"config": repr(config), "student": digest(student)}
        identity |= identify(ensemble, images, score=config.score, most=config.most)
    lessons = prepare(
        ensemble,
        images,
        score=config.score,
        most=config.most,
        batch_size=config.batch_size,
        file=folder and folder / LESSONS,
    )
    pixels = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
    run = _Run(copy.deepcopy(student), pixels, lessons, config, on_epoch, folder, identity)
    with torch.random.fork_rng(devices=[]):
        without_denormals(run.batches())
    return run.student.eval()


@dataclass
class _Run:
    """A student on its way."""

    student: Captioner
    images: torch.Tensor
    lessons: Lessons
    config: CaptionDistillationConfig
    on_epoch: Callable[[str, float], None]
    folder: Path | None
    identity: Mapping[str, str]

    def batches(self) -> Iterator[None]:
        """Train what is left of both phases, batch after batch."""
        config, begin = self.config, self._kept()
        for phase, epochs in enumerate((config.epochs_mean, config.epochs_heads)):
            start = begin if phase == begin.phase else Checkpoint(phase)
            losses = begin.losses[phase]
            for loss in losses:
                self.on_epoch(_PHASES[phase], loss)
            if phase < begin.phase:
                continue
            if phase and not start.epoch and config.epochs_mean:
                for heads in (self.student.heads, self.student.box_heads):
                    for head in list(heads)[1:]:
                        head.load_state_dict(heads[0].state_dict())
            optimizer = torch.optim.AdamW(
                self.student.parameters(), config.learning_rate, weight_decay=1e-4
            )
            if start.optimizer:
                optimizer.load_state_dict(
                    {"state": start.optimizer, "param_groups": start.param_groups}
                )
            self.student.train()
            for epoch in range(start.epoch, epochs):
                losses.append((yield from self._epoch(phase, epoch, epochs, optimizer)))
                if self.folder:
                    position = (phase, epoch + 1, 0)
                    checkpoints.write(
                        *(self.folder, self.identity, position, begin.losses),
                        *(self.student, optimizer, None),
                    )
                self.on_epoch(_PHASES[phase], losses[-1])

    def _kept(self) -> Checkpoint:
        if self.folder is None:
            return Checkpoint()
        kept = checkpoints.read(self.folder, self.identity)
        if kept.started:
            self.student.load_state_dict(dict(kept.student))
        return kept

    def _epoch(
        self, phase: int, epoch: int, epochs: int, optimizer: torch.optim.Optimizer
    ) -> Generator[None, None, float]:
        """Train once on every image; gives the mean loss in the end."""
        images, config = self.images, self.config
        # Everything random, also in the student, hangs on the position alone.
        (word,) = np.random.SeedSequence([config.seed, phase, epoch]).generate_state(1)
        torch.manual_seed(int(word))
        order = torch.randperm(len(images))
        steps = max(1, len(images) // config.batch_size)
        total = 0.0
        for index, batch in enumerate(torch.split(order, -(-len(images) // steps))):
            for group in optimizer.param_groups:
                done = (epoch + index / steps) / epochs
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            optimizer.zero_grad()
            loss = imitation_loss(self.student, images, self.lessons, batch, config, _PHASES[phase])
            if not torch.isfinite(loss):
                raise DistillationError(
                    f"The loss is {loss.item()} in epoch {epoch + 1} of phase '{_PHASES[phase]}'.",
                    "Training cannot go on from there.",
                    "Lower the learning rate.",
                )
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
            optimizer.step()
            total += loss.item() / steps
            yield
        return total


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
