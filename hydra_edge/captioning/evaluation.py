"""How good dense captions are: average precision over boxes and words together, as DenseCap has it.

Source: Johnson et al. 2016, arXiv 1511.07571, section 5.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hydra_edge.captioning.boxes import overlaps
from hydra_edge.captioning.scenes import Scene
from hydra_edge.errors import InputError, require
from hydra_edge.tasks import rank_correlation

Float = npt.NDArray[np.float64]
OVERLAPS = (0.3, 0.4, 0.5, 0.6, 0.7)
METEORS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
METEOR_NAME = "METEOR, exact and stem matches"
_ANY = -1.0  # a threshold that every caption passes: detection alone
_MERGED = 0.7  # true boxes that overlap by this much are one, with several captions
_RECALLS = np.linspace(0, 1, 101)


class Described(Protocol):
    """What is judged: `hydra_edge.captioning.captioner.Region`, or anything like it."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        ...

    @property
    def score(self) -> float:
        """How sure the box is."""
        ...

    @property
    def text(self) -> str:
        """The caption."""
        ...


@dataclass(frozen=True)
class CaptionScores:
    """What `judge` found, all in 0..1.

    Attributes:
        map: Mean of ``table``.
        detection_map: The same over boxes alone, whatever their captions say.
        meteor: Mean METEOR of the boxes that overlap a true one of their own by 0.5.
        table: Average precision by (overlap, METEOR).
    """

    map: float
    detection_map: float
    meteor: float
    table: Mapping[tuple[float, float], float]


@dataclass(frozen=True)
class _Match:
    """One box that was found, and the true one it overlaps most."""

    score: float
    overlap: float
    first: bool  # no better box took that true one before
    meteor: float


def judge(found: Sequence[Sequence[Described]], scenes: Sequence[Scene]) -> CaptionScores:
    """Average precision over pairs of thresholds: a box is right where both overlap and METEOR are.

    Boxes are matched in order of their scores, each with the true box it overlaps most, which can
    be matched once. True boxes that overlap by 0.7 are merged into their mean, with all of their
    captions. Precision is interpolated at 101 recalls.

    Args:
        found: Regions per scene.
        scenes: The truth.

    Raises:
        InputError: Their numbers differ, or the scenes have no box.
        MissingDependencyError: NLTK is not installed.
    """
    count = sum(len(scene.boxes) for scene in scenes)
    if len(found) != len(scenes) or not count:
        raise InputError(
            f"There are regions for {len(found)} images, and {len(scenes)} scenes with {count} "
            "boxes.",
            "Regions are judged scene by scene.",
            "Give what was found in each of the scenes, of which one has a box at least.",
        )
    matches: list[_Match] = []
    positives = 0
    for regions, scene in zip(found, scenes, strict=True):
        boxes, captions = _merged(scene)
        positives += len(boxes)
        matches += _matched(regions, boxes, captions)
    matches.sort(key=lambda match: -match.score)
    table = {(o, m): _precision(matches, positives, o, m) for o in OVERLAPS for m in METEORS}
    alone = [_precision(matches, positives, o, _ANY) for o in OVERLAPS]
    good = [match.meteor for match in matches if match.first and match.overlap >= 0.5]
    return CaptionScores(
        map=float(np.mean(list(table.values()))),
        detection_map=float(np.mean(alone)),
        meteor=float(np.mean(good)) if good else 0.0,
        table=table,
    )


def meteor(caption: str, references: Sequence[str]) -> float:
    """METEOR of a caption, the best over its references, in 0..1.

    It is that of NLTK, with its parameters. Words match if they or their stems are equal; synonyms
    would need WordNet's data, which is no library. DenseCap's own figures are of METEOR 1.5, which
    weighs words otherwise and knows paraphrases: do not compare with them.

    Args:
        caption: Words with spaces between them.
        references: True captions, one or more.

    Raises:
        MissingDependencyError: NLTK is not installed.

    Source: Banerjee and Lavie 2005, METEOR, section 2.
    """
    return max(map(_meteor(), [caption] * len(references), references), default=0.0)


@cache
def _meteor() -> _Scorer:
    return _Scorer()


class _Scorer:
    """METEOR of one caption and one reference; remembers what it has seen."""

    def __init__(self) -> None:
        self._score = require("nltk.translate.meteor_score", "captioning").single_meteor_score
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, caption: str, reference: str) -> float:
        key = (caption, reference)
        if key not in self._known:
            words = (reference.split(), caption.split())
            # Without a shared word NLTK divides by none.
            self._known[key] = (
                float(self._score(*words, wordnet=_NoSynonyms())) if all(words) else 0.0
            )
        return self._known[key]


class _NoSynonyms:
    """Stands for a WordNet that knows no word."""

    def synsets(self, word: str) -> list[object]:
        """No meaning of a word is known."""
        return []


def mutual_rank_correlation(
    found: Sequence[Sequence[Described]],
    reference: Sequence[Sequence[Described]],
    measure: str = "mutual",
    overlap: float = 0.5,
) -> tuple[float, int]:
    """Do two captioners doubt the same captions?

    Args:
        found: Regions per image.
        reference: Those of the other, of the same images.
        measure: Which figure of a region is ranked.
        overlap: Boxes are the same region where they overlap by this much.

    Returns:
        Spearman's rank correlation over the regions that both found, and their number.
    """
    ours: list[float] = []
    theirs: list[float] = []
    for left, right in zip(found, reference, strict=True):
        if not left or not right:
            continue
        matrix = overlaps([one.box for one in right], [one.box for one in left])
        for index, row in enumerate(matrix):
            best = int(row.argmax())
            if row[best] >= overlap and int(matrix[:, best].argmax()) == index:
                ours.append(float(getattr(left[best], measure)))
                theirs.append(float(getattr(right[index], measure)))
    return (rank_correlation(ours, theirs) if ours else float("nan")), len(ours)


def _merged(scene: Scene) -> tuple[Float, list[list[str]]]:
    """True boxes that overlap much as one, the best connected first."""
    if not len(scene.boxes):
        return np.zeros((0, 4)), []
    close = overlaps(scene.boxes, scene.boxes) >= _MERGED
    np.fill_diagonal(close, True)  # of an empty box, too
    boxes, captions = [], []
    while close.any():
        group = np.flatnonzero(close[close.sum(0).argmax()])
        boxes.append(scene.boxes[group].mean(0))
        captions.append([scene.captions[index] for index in group])
        close[group] = False
        close[:, group] = False
    return np.stack(boxes), captions


def _matched(regions: Sequence[Described], boxes: Float, captions: list[list[str]]) -> list[_Match]:
    if not regions:
        return []
    if not len(boxes):
        return [_Match(region.score, 0.0, False, 0.0) for region in regions]
    matrix = overlaps([region.box for region in regions], boxes)
    used: set[int] = set()
    matches = []
    for index in np.argsort([-region.score for region in regions], kind="stable"):
        best = int(matrix[index].argmax())
        overlap = float(matrix[index, best])
        first = overlap > 0 and best not in used
        used |= {best} if overlap > 0 else set()
        words = meteor(regions[index].text, captions[best]) if first else 0.0
        matches.append(_Match(regions[index].score, overlap, first, words))
    return matches


def _precision(matches: Sequence[_Match], positives: int, overlap: float, words: float) -> float:
    """Average precision at one pair of thresholds."""
    right = np.asarray([m.first and m.overlap >= overlap and m.meteor > words for m in matches])
    if not right.any():
        return 0.0
    hits = np.cumsum(right)
    recall, precision = hits / positives, hits / np.arange(1, len(right) + 1)
    reached = recall[None] >= _RECALLS[:, None]
    return float(np.where(reached, precision[None], 0.0).max(1).mean())
