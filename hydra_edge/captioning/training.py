"""Training with labels: how a member of an ensemble learns boxes and captions."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from hydra_edge.captioning.networks import Captioner, CaptionNetwork, boxes_of
from hydra_edge.captioning.scenes import Scene, images_of
from hydra_edge.captioning.vocabulary import END_INDEX, MAX_WORDS, PADDING, Vocabulary
from hydra_edge.errors import DistillationError, InputError

_BOX_WEIGHT = 2.0
_CAPTION_WEIGHT = 4.0
Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class TrainingConfig:
    """How a member is trained.

    Attributes:
        epochs: Passes over the scenes.
        batch_size: Scenes per step.
        learning_rate: AdamW's, at its peak; it rises for the first fifth and falls to 0.
        weight_decay: AdamW's.
        seed: Of the order of the scenes.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class Regions:
    """All regions of a set of scenes, one after another.

    Attributes:
        scene: Which scene each is of, ``[R]``.
        cell: The cell of the grid its centre lies in, ``[R]``.
        box: ``[R, 4]``.
        words: ``[R, T]``, as `Vocabulary.encode` gives them.
    """

    scene: torch.Tensor
    cell: torch.Tensor
    box: torch.Tensor
    words: torch.Tensor


def regions_of(
    scenes: Sequence[Scene], vocabulary: Vocabulary, side: int, words: int = MAX_WORDS
) -> Regions:
    """The regions of scenes for a grid of ``side`` × ``side`` cells.

    Of several whose centre lies in one cell the first is kept: a cell has one box.

    Raises:
        InputError: No scene has a region.
    """
    found: list[tuple[int, int, npt.NDArray[np.float64], str]] = []
    for index, scene in enumerate(scenes):
        taken: set[int] = set()
        for box, caption in zip(scene.boxes, scene.captions, strict=True):
            centre = np.clip((box[:2] + box[2:]) / 2, 0, 1 - 1e-9)
            column, row = (centre * side).astype(int)
            cell = int(row * side + column)
            if cell not in taken:
                taken.add(cell)
                found.append((index, cell, box, caption))
    if not found:
        raise InputError(
            f"{len(scenes)} scenes hold no region.",
            "Boxes and captions are learned from regions.",
            "Give scenes with boxes.",
        )
    length = 1 + max(len(caption.split()) for *_, caption in found)
    encoded = vocabulary.encode([caption for *_, caption in found], min(length, words + 1))
    return Regions(
        scene=torch.tensor([index for index, *_ in found]),
        cell=torch.tensor([cell for _, cell, *_ in found]),
        box=torch.from_numpy(np.stack([box for *_, box, _ in found]).astype(np.float32)),
        words=torch.from_numpy(encoded),
    )


def train_captioner(
    network: Captioner,
    scenes: Sequence[Scene],
    config: TrainingConfig = TrainingConfig(),
    on_epoch: Callable[[float], None] = lambda loss: None,
) -> Captioner:
    """Train a member on scenes with labels, in place.

    Args:
        network: With one head of each kind.
        scenes: Of one size.
        config: How.
        on_epoch: Called with the mean loss of every epoch, by another thread than the caller's.

    Returns:
        The network, in eval mode.

    Raises:
        InputError: The scenes hold no region, or the network has several heads.
        DistillationError: The loss is not finite.
    """
    if network.head_count != 1:
        raise InputError(
            f"The network has {network.head_count} heads.",
            "Labels train a member; a student's heads imitate members.",
            "Use distill_captioner, or make it with heads=1.",
        )
    images = torch.from_numpy(images_of(scenes))
    images = images.contiguous(memory_format=torch.channels_last)  # a CPU trains faster so
    side = _side(network, images[:1])
    regions = regions_of(scenes, Vocabulary(network.vocabulary), side)
    network.train()
    without_denormals(_run(network, images, regions, config, on_epoch))
    return network.eval()


def _run(
    network: Captioner,
    images: torch.Tensor,
    regions: Regions,
    config: TrainingConfig,
    on_epoch: Callable[[float], None],
) -> Iterator[None]:
    """Train, batch after batch."""
    steps = max(1, len(images) // config.batch_size)
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.epochs * steps, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        for batch in torch.split(order, -(-len(images) // steps)):
            optimizer.zero_grad()
            loss = labelled_loss(network, images[batch], _within(regions, batch))
            if not torch.isfinite(loss):
                raise DistillationError(
                    f"The loss is {loss.item()}.",
                    "Training cannot go on from there.",
                    "Lower the learning rate.",
                )
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.item() / steps
            yield
        on_epoch(total)


def without_denormals(work: Iterator[object]) -> None:
    """Go through ``work`` in a thread of its own, to which numbers below 1e-38 are 0.

    The averages of AdamW fall there for words that are never said, and a CPU computes with such
    numbers far slower. The threads that torch shares work among take that over from the thread that
    starts them: the caller's may have been started before.

    What torch keeps per thread, such as ``torch.autocast``, is not taken over from the caller.

    Args:
        work: What is done; it ends early, between two items, if the caller is interrupted.
    """
    threads, interrupted = torch.get_num_threads(), threading.Event()

    def go_through() -> None:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        for _ in work:
            if interrupted.is_set():
                break

    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(go_through).result()
        except BaseException:
            interrupted.set()
            raise


def labelled_loss(network: CaptionNetwork, images: torch.Tensor, regions: Regions) -> torch.Tensor:
    """Objectness, boxes and captions of a member on one batch, a scalar."""
    votes, states = network.encode(images)
    votes = votes[0]
    truth = torch.zeros_like(votes[..., 0])
    truth[regions.scene, regions.cell] = 1.0
    objectness = functional.binary_cross_entropy_with_logits(votes[..., 0], truth, reduction="sum")
    loss = objectness / max(1, len(regions.scene))
    if not len(regions.scene):
        return loss
    boxes = boxes_of(votes)[regions.scene, regions.cell]
    loss = loss + _BOX_WEIGHT * box_loss(boxes, regions.box).mean()
    logits = unroll(network, states[regions.scene, regions.cell], regions.words)[0]
    return loss + _CAPTION_WEIGHT * functional.cross_entropy(
        logits.flatten(0, 1), regions.words.flatten(), ignore_index=PADDING
    )


def box_loss(boxes: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """One minus the generalized overlap, ``[…]`` for boxes ``[…, 4]``.

    Source: Rezatofighi et al. 2019, arXiv 1902.09630, algorithm 1.
    """
    low, high = (
        torch.maximum(boxes[..., :2], truth[..., :2]),
        torch.minimum(boxes[..., 2:], truth[..., 2:]),
    )
    shared = (high - low).clamp_min(0).prod(-1)
    union = _area(boxes) + _area(truth) - shared
    hull = torch.cat(
        [
            torch.minimum(boxes[..., :2], truth[..., :2]),
            torch.maximum(boxes[..., 2:], truth[..., 2:]),
        ],
        -1,
    )
    whole = _area(hull)
    return 1 - (shared / (union + 1e-9) - (whole - union) / (whole + 1e-9))


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def unroll(network: CaptionNetwork, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """What a network says at every word of given captions (teacher forcing).

    Args:
        network: A member, a student or an ensemble.
        states: ``[R, S]``, as ``encode`` gives them.
        words: ``[R, T]``; behind the end `PADDING`.

    Returns:
        Logits ``[M, R, T, V]``; those at `PADDING` mean nothing.
    """
    before = torch.cat([torch.full_like(words[:, :1], END_INDEX), words[:, :-1]], 1)
    return network.speak(before.clamp_min(END_INDEX), states)


def _within(regions: Regions, batch: torch.Tensor) -> Regions:
    """The regions of the scenes of a batch, which are numbered by their place in it."""
    place = torch.full((int(max(batch.max(), regions.scene.max())) + 1,), -1)
    place[batch] = torch.arange(len(batch))
    inside = place[regions.scene] >= 0
    return Regions(
        place[regions.scene[inside]],
        regions.cell[inside],
        regions.box[inside],
        regions.words[inside],
    )


def _side(network: CaptionNetwork, image: torch.Tensor) -> int:
    """Cells along one side of the grid."""
    with torch.no_grad():
        votes, _ = network.encode(image)
    side = math.isqrt(votes.shape[2])
    if side * side != votes.shape[2]:
        raise InputError(
            f"The body gives {votes.shape[2]} cells.",
            "They form a square grid.",
            "Give square images to a body that keeps them square.",
        )
    return side
