"""What an ensemble of captioners says of images: `prepare` runs it once, and may keep it in a file.

The words before each word are the ensemble's own (teacher forcing), so no labels are used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch.nn.functional import pad

from hydra_edge.artifacts.files import write_atomic
from hydra_edge.captioning.boxes import suppress
from hydra_edge.captioning.networks import (
    CaptionEnsemble,
    CaptionNetwork,
    for_steps,
    summarize_votes,
)
from hydra_edge.captioning.vocabulary import END_INDEX, MAX_WORDS, PADDING
from hydra_edge.errors import ArtifactError, DistillationError
from hydra_edge.teachers import digest

_OVERLAP = 0.4


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


@torch.no_grad()
def prepare(
    ensemble: CaptionEnsemble,
    images: npt.NDArray[np.float32],
    *,
    score: float,
    most: int,
    batch_size: int = 32,
    file: Path | None = None,
) -> Lessons:
    """Run the members once, or read what they said before.

    Args:
        ensemble: The members, in eval mode.
        images: ``[N, 3, H, W]``.
        score: Regions are described that the ensemble gives a higher probability of an object.
        most: Regions per image at most.
        batch_size: Images that the members see at once.
        file: Where the lessons are kept; read again if it is of the same members and images.

    Raises:
        DistillationError: They find nothing on any image, or the file is of others.
        ArtifactError: The file is damaged or cannot be written.
    """
    if file is None:
        return _taught(ensemble, images, score, most, batch_size)
    identity = identify(ensemble, images, score=score, most=most)
    if file.exists():
        return _read(file, identity)
    lessons = _taught(ensemble, images, score, most, batch_size)
    tensors = {field.name: getattr(lessons, field.name).contiguous() for field in fields(Lessons)}
    write_atomic(file, safetensors.torch.save(tensors, identity))
    return lessons


def identify(
    ensemble: CaptionEnsemble, images: npt.NDArray[np.float32], *, score: float, most: int
) -> dict[str, str]:
    """What lessons depend on, by name."""
    pixels = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    return {
        "images": f"{pixels} {images.shape}",
        "ensemble": digest(ensemble),
        "choice of regions": f"score > {score}, {most} at most, overlap {_OVERLAP}",
    }


def _taught(
    ensemble: CaptionEnsemble,
    images: npt.NDArray[np.float32],
    score: float,
    most: int,
    batch_size: int,
) -> Lessons:
    parts = []
    stepping = for_steps(ensemble)
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size])
        batch = batch.contiguous(memory_format=torch.channels_last)  # a CPU is faster so
        votes, states = ensemble.encode(batch)
        boxes, scores, *_ = summarize_votes(votes)
        kept = [
            suppress(b, s, overlap=_OVERLAP, score=score, most=most)
            for b, s in zip(boxes.numpy(), scores.numpy(), strict=True)
        ]
        image = torch.from_numpy(np.repeat(np.arange(len(kept)), [len(cells) for cells in kept]))
        cell = torch.from_numpy(np.concatenate(kept))
        words, logits = _speak(stepping, states[image, cell])  # type: ignore[arg-type]
        parts.append(Lessons(votes, image + start, cell, words, logits))
    if not sum(len(part.cell) for part in parts):
        raise DistillationError(
            f"The ensemble finds nothing on {len(images)} images.",
            f"No cell has a probability above {score}, so there are no captions to learn.",
            "Check the members, or lower the score.",
        )
    length = max(part.words.shape[1] for part in parts)
    spoken = [pad(part.words, (0, length - part.words.shape[1]), value=PADDING) for part in parts]
    said = [pad(part.logits, (0, 0, 0, length - part.logits.shape[2])) for part in parts]
    return Lessons(
        votes=torch.cat([part.votes for part in parts], 1),
        image=torch.cat([part.image for part in parts]),
        cell=torch.cat([part.cell for part in parts]),
        words=torch.cat(spoken),
        logits=torch.cat(said, 1),
    )


def _read(file: Path, identity: dict[str, str]) -> Lessons:
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            known = stored.metadata() or {}
            tensors = {field.name: stored.get_tensor(field.name) for field in fields(Lessons)}
    except (safetensors.SafetensorError, OSError) as exc:
        raise ArtifactError(
            f"'{file}' cannot be read: {exc}.",
            "It is damaged, or holds no lessons.",
            "Delete it, and the members are run again.",
        ) from exc
    if changed := [name for name, value in identity.items() if known.get(name) != value]:
        raise DistillationError(
            f"'{file}' holds lessons of other {' and other '.join(changed)}.",
            "A student would learn what these members never said.",
            "Choose another folder, or delete the file.",
        )
    return Lessons(**tensors)


def _speak(ensemble: CaptionNetwork, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy captions ``[R, T]`` of the mean, and members' logits ``[M, R, T, V]`` along them."""
    last = torch.full((len(states),), END_INDEX)
    ended = torch.zeros(len(states), dtype=torch.bool)
    words: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    while not words or (len(words) <= MAX_WORDS and not ended.all()):
        said, states = ensemble.step(last, states)
        last = said.softmax(-1).mean(0).argmax(-1)
        words.append(torch.where(ended, PADDING, last))
        logits.append(said)
        ended = ended | (last == END_INDEX)
    return torch.stack(words, 1), torch.stack(logits, 2)
