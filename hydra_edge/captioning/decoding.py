"""Greedy and beam search over a captioner's ``step``, for many regions at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hydra_edge.captioning.models import CaptionModel, Said
from hydra_edge.captioning.vocabulary import END_INDEX, MAX_WORDS
from hydra_edge.errors import InputError

Float = npt.NDArray[np.float64]
_DOUBTS = ("total", "expected", "mutual")


@dataclass(frozen=True)
class Caption:
    """One caption with the doubt at each of its L words; the end counts as a word, if reached.

    Attributes:
        words: Numbers ``[L]``.
        log_prob: Sum of the words' logarithms of the mean probability, in nats.
        total: Predictive entropy ``[L]`` of the heads' mean, in nats.
        expected: Mean entropy of the heads ``[L]``: the aleatoric part.
        mutual: Mutual information ``[L]``: the epistemic part.
    """

    words: npt.NDArray[np.int64]
    log_prob: float
    total: Float
    expected: Float
    mutual: Float


def decode(
    model: CaptionModel,
    states: Sequence[npt.NDArray[Any]],
    *,
    beam: int = 1,
    words: int = MAX_WORDS,
) -> list[Caption]:
    """The likeliest captions that greedy (``beam=1``) or beam search finds.

    Args:
        model: What says the next word.
        states: Rows ``[R, S]`` of `Encoding.states`.
        beam: Hypotheses per region. Whatever was found with fewer may not be found with more, but
            its probability is nearly always higher.
        words: Words of a caption at most, without its end.

    Returns:
        One caption per region. The probability of a caption is the product of the mean of the
        heads' probabilities at each word; nothing is added for its length.

    Raises:
        InputError: Beam or words are below 1, or the beam is wider than one step of the engine.
    """
    least, most = model.rows
    if beam < 1 or words < 1 or beam > most:
        raise InputError(
            f"A beam of {beam} and captions of {words} words were asked for.",
            f"Both are at least 1, and the engine steps {most} rows at once.",
            "Choose others, or compile 'step' for more rows.",
        )
    found: list[Caption] = []
    size = most // beam
    for start in range(0, len(states[0]), size):
        part = [rows[start : start + size] for rows in states]
        count = len(part[0])
        short = max(0, -(-least // beam) - count)  # a program may need a few rows at least
        padded = [np.concatenate([rows, np.repeat(rows[-1:], short, 0)]) for rows in part]
        found += _search(model, padded, beam, words)[:count]
    return found


def _search(
    model: CaptionModel, states: Sequence[npt.NDArray[Any]], beam: int, words: int
) -> list[Caption]:
    """Beam search for R regions, whose hypotheses lie side by side: row ``region * beam + place``.

    An ended hypothesis stays in the beam as it is, and is what the region says once it is the best.
    """
    regions = len(states[0])
    state = model.begin([np.repeat(rows, beam, 0) for rows in states])
    last = np.full(regions * beam, END_INDEX, np.int64)
    spoken = np.zeros((regions * beam, 0), np.int64)
    doubts = np.zeros((regions * beam, 0, len(_DOUBTS)))
    scores = np.full((regions, beam), -np.inf)
    scores[:, 0] = 0.0  # all hypotheses begin as the same one
    ended = np.zeros(regions * beam, bool)
    for place in range(words + 1):
        said = model.step(last, state)
        options = scores.reshape(-1, 1) + _log(said, ended)
        size = options.shape[1]
        flat = options.reshape(regions, -1)
        best = _best(flat, beam)
        scores = np.take_along_axis(flat, best, 1)
        parents = (best // size + np.arange(regions)[:, None] * beam).reshape(-1)
        last = (best % size).reshape(-1)
        new = np.stack([np.asarray(getattr(said, name), np.float64) for name in _DOUBTS], -1)
        new[ended] = np.nan  # said nothing more
        spoken = np.concatenate([spoken[parents], np.where(ended[parents], -1, last)[:, None]], 1)
        doubts = np.concatenate([doubts[parents], new[parents, None]], 1)
        ended = ended[parents] | (last == END_INDEX)
        if ended.all() or place == words:
            break
        in_place = beam == 1 or np.array_equal(parents, np.arange(len(parents)))
        state = said.state if in_place else model.reorder(said.state, parents)
    winners = np.arange(regions) * beam  # the best come first
    return [
        _caption(spoken[row], doubts[row], float(scores[index, 0]))
        for index, row in enumerate(winners)
    ]


def _log(said: Said, ended: npt.NDArray[np.bool_]) -> Float:
    """Logarithms of what may come next ``[R, V]``; behind an end only the end, at no cost."""
    prob = np.asarray(said.mean_prob, np.float64)
    log = np.log(np.maximum(prob, np.finfo(np.float64).tiny))
    log[ended] = -np.inf
    log[ended, END_INDEX] = 0.0
    return np.asarray(log)


def _best(options: Float, beam: int) -> npt.NDArray[np.int64]:
    """Indices of the ``beam`` largest of each row, the largest first; of equal ones the first."""
    if beam == 1:
        return np.asarray(options.argmax(1)[:, None])
    return np.asarray(np.argsort(-options, axis=1, kind="stable")[:, :beam])


def _caption(spoken: npt.NDArray[np.int64], doubts: Float, score: float) -> Caption:
    said = spoken >= 0
    return Caption(spoken[said], score, *(doubts[said, i] for i in range(len(_DOUBTS))))
