"""`Describer`: from an image to its regions, each with a caption and its doubts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hydra_edge.artifacts.graph import Json
from hydra_edge.captioning.boxes import suppress
from hydra_edge.captioning.decoding import Caption, decode
from hydra_edge.captioning.models import CaptionModel
from hydra_edge.captioning.vocabulary import MAX_WORDS, Vocabulary
from hydra_edge.errors import InputError


@dataclass(frozen=True)
class CaptionOptions:
    """Which boxes are described, and how captions are searched.

    Attributes:
        score: A box needs a higher probability of an object.
        overlap: Of boxes that overlap by more than this, the best is kept.
        most: Boxes per image at most.
        beam: Hypotheses per caption; 1 is greedy.
        words: Words per caption at most.
    """

    score: float = 0.3
    overlap: float = 0.4
    most: int = 16
    beam: int = 1
    words: int = MAX_WORDS

    def __post_init__(self) -> None:
        if not (0 <= self.score < 1 and 0 <= self.overlap <= 1) or min(self.most, self.beam) < 1:
            raise InputError(
                f"Boxes above {self.score} were asked for, {self.most} at most, that overlap up to "
                f"{self.overlap}, and a beam of {self.beam}.",
                "The first and third lie in 0..1, the others are at least 1.",
                "Leave them out for sound defaults.",
            )


@dataclass(frozen=True)
class Region:
    """One box, its caption, and how sure both are.

    Attributes:
        box: Left, top, right, bottom as fractions of the image.
        score: Probability that there is an object.
        score_mi: How much the heads disagree on that, in nats.
        box_spread: Standard deviation of a side over the heads, as a fraction of the image.
        cell: Which cell of the grid found it.
        text: The caption.
        words: Its words, then the end, if it was reached: one for each doubt of ``caption``.
        caption: Numbers, probability and doubts, word by word.
    """

    box: tuple[float, float, float, float]
    score: float
    score_mi: float
    box_spread: float
    cell: int
    text: str
    words: tuple[str, ...]
    caption: Caption

    @property
    def total(self) -> float:
        """Predictive entropy of the whole caption: its words' sum, in nats."""
        return float(self.caption.total.sum())

    @property
    def expected(self) -> float:
        """The aleatoric part of `total`."""
        return float(self.caption.expected.sum())

    @property
    def mutual(self) -> float:
        """The epistemic part of `total`."""
        return float(self.caption.mutual.sum())

    @property
    def per_word(self) -> dict[str, float]:
        """The three sums over the number of words."""
        count = max(1, len(self.caption.words))
        sums = {"total": self.total, "expected": self.expected, "mutual": self.mutual}
        return {name: value / count for name, value in sums.items()}

    def to_json(self) -> dict[str, Json]:
        """All of it, by name."""
        return {
            "box": list(self.box),
            "score": self.score,
            "score_mi": self.score_mi,
            "box_spread": self.box_spread,
            "caption": self.text,
            "log_prob": self.caption.log_prob,
            "total": self.total,
            "expected": self.expected,
            "mutual": self.mutual,
            "per_word": dict(self.per_word),
            "words": [
                {"word": word, "total": float(t), "expected": float(e), "mutual": float(m)}
                for word, t, e, m in zip(
                    self.words,
                    self.caption.total,
                    self.caption.expected,
                    self.caption.mutual,
                    strict=True,
                )
            ],
        }


class Describer:
    """Describes images with the programs of an engine, or of several.

    Args:
        model: What runs them.
        options: Which boxes, and how captions are searched.

    Example:
        >>> with load("scene.hydra") as session:  # doctest: +SKIP
        ...     describer = Describer(EngineModel(session))
        ...     for region in describer.describe(images)[0]:
        ...         print(region.text, region.mutual)
    """

    def __init__(self, model: CaptionModel, options: CaptionOptions = CaptionOptions()) -> None:
        self.model = model
        self.options = options
        self.vocabulary = Vocabulary(model.words)

    def describe(self, images: npt.NDArray[np.float32]) -> list[list[Region]]:
        """Find and describe the regions of images.

        Args:
            images: ``[B, 3, H, W]``, RGB in 0..1.

        Returns:
            Per image its regions, the best first.
        """
        options = self.options
        found = self.model.encode(images)
        kept = [
            suppress(boxes, scores, overlap=options.overlap, score=options.score, most=options.most)
            for boxes, scores in zip(found.boxes, found.scores, strict=True)
        ]
        image = np.repeat(np.arange(len(kept)), [len(cells) for cells in kept])
        cell = np.concatenate(kept) if kept else np.zeros(0, np.int64)
        if not len(cell):
            return [[] for _ in kept]
        states = [rows[image, cell] for rows in found.states]
        captions = decode(self.model, states, beam=options.beam, words=options.words)
        regions: list[list[Region]] = [[] for _ in kept]
        for i, c, caption in zip(image, cell, captions, strict=True):
            left, top, right, bottom = map(float, np.clip(found.boxes[i, c], 0, 1))
            regions[i].append(
                Region(
                    box=(left, top, right, bottom),
                    score=float(found.scores[i, c]),
                    score_mi=float(found.score_mi[i, c]),
                    box_spread=float(found.box_spread[i, c]),
                    cell=int(c),
                    text=self.vocabulary.decode(caption.words.tolist()),
                    words=tuple(self.vocabulary.words[word] for word in caption.words),
                    caption=caption,
                )
            )
        return regions
