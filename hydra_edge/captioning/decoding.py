"""Greedy and beam search over a captioner's ``step``, for many regions at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hydra_edge.captioning.greedy_loop import Spoken
from hydra_edge.captioning.models import CaptionModel, Rows
from hydra_edge.captioning.vocabulary import END_INDEX, MAX_WORDS
from hydra_edge.errors import InputError

Float = npt.NDArray[np.floating[Any]]


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
        padded = [
            np.concatenate([rows, np.repeat(rows[-1:], short, 0)]) if short else rows
            for rows in part
        ]
        captions = (
            _search(model, padded, beam, words) if beam > 1 else _greedy(model, padded, words)
        )
        found += captions[:count]
    return found


def _greedy(model: CaptionModel, states: Sequence[npt.NDArray[Any]], words: int) -> list[Caption]:
    """The likeliest word at every step: in one run where the model can do that."""
    spoken = model.speak(states, words)
    if spoken is None:
        spoken = _step_by_step(model, states, words)
    log = _log(spoken.prob)
    captions = []
    for region, own in enumerate(spoken.words.T):
        length = _length(own)
        doubts = spoken.doubts[:length, :, region].T.astype(np.float64)
        captions.append(Caption(own[:length], float(log[:length, region].sum()), *doubts))
    return captions


def _step_by_step(model: CaptionModel, states: Sequence[npt.NDArray[Any]], words: int) -> Spoken:
    """See `CaptionModel.speak`."""
    regions = np.arange(len(states[0]))
    state = model.begin(states)
    last = np.full(len(regions), END_INDEX, np.int64)
    ended = np.zeros(len(regions), bool)
    # Of each step only this is kept: probabilities of a large vocabulary would add up.
    spoken: list[Rows] = []
    chosen: list[Float] = []
    doubts: list[tuple[Float, ...]] = []
    while len(spoken) <= words and not ended.all():
        said = model.step(last, state)
        last = said.mean_prob.argmax(1)
        last[ended] = END_INDEX
        ended |= last == END_INDEX
        state = said.state
        spoken.append(last)
        chosen.append(said.mean_prob[regions, last])
        doubts.append((said.total, said.expected, said.mutual))
    return Spoken(np.array(spoken), np.array(chosen), np.array(doubts))


def _search(
    model: CaptionModel, states: Sequence[npt.NDArray[Any]], beam: int, words: int
) -> list[Caption]:
    """Beam search for R regions, whose hypotheses lie side by side: row ``region * beam + place``.

    An ended hypothesis stays in the beam as it is, and is what the region says once it is the best.
    The beam holds parents, not whole captions: those are read from the last step to the first.
    """
    regions = len(states[0])
    in_place = parents = np.arange(regions * beam)
    state = model.begin([np.repeat(rows, beam, 0) for rows in states])
    last = np.full(regions * beam, END_INDEX, np.int64)
    scores = np.full((regions, beam), -np.inf)
    scores[:, 0] = 0.0  # all hypotheses begin as the same one
    ended = np.zeros(regions * beam, bool)
    steps: list[tuple[tuple[Float, ...], Rows, Rows]] = []
    while len(steps) <= words and not ended.all():
        if not np.array_equal(parents, in_place):
            state = model.reorder(state, parents)
        said = model.step(last, state)
        scores, parents, last = _extend(np.asarray(said.mean_prob), scores, ended)
        steps.append(((said.total, said.expected, said.mutual), parents, last))
        ended = ended[parents] | (last == END_INDEX)
        state = said.state
    rows = in_place[::beam]  # the best come first
    spoken = np.empty((regions, len(steps)), np.int64)
    doubts = np.empty((3, regions, len(steps)))
    for place, (found, parents, chosen) in reversed(list(enumerate(steps))):
        spoken[:, place] = chosen[rows]
        rows = parents[rows]
        doubts[:, :, place] = [values[rows] for values in found]
    captions = []
    for region, own in enumerate(spoken):
        length = _length(own)
        score = float(scores[region, 0])
        captions.append(Caption(own[:length], score, *doubts[:, region, :length]))
    return captions


def _extend(prob: Float, scores: Float, ended: npt.NDArray[np.bool_]) -> tuple[Float, Rows, Rows]:
    """The best continuations of each region's hypotheses.

    Args:
        prob: Of what may come next, ``[R * beam, V]``.
        scores: Of the hypotheses ``[R, beam]``.
        ended: Behind an end comes only the end, at no cost.

    Returns:
        Their scores ``[R, beam]``, which hypothesis each continues, and its word, both
        ``[R * beam]``.
    """
    regions, beam = scores.shape
    options = _log(prob)
    options[ended] = -np.inf
    options[ended, END_INDEX] = 0.0
    options += scores.reshape(-1, 1)
    size = options.shape[1]
    flat = options.reshape(regions, -1)
    best = np.argsort(-flat, axis=1, kind="stable")[:, :beam]  # of equal ones the first
    parents = best // size + np.arange(regions)[:, None] * beam
    return np.take_along_axis(flat, best, 1), parents.reshape(-1), (best % size).reshape(-1)


def _log(prob: Float) -> Float:
    return np.log(np.maximum(prob, np.finfo(np.float64).tiny, dtype=np.float64))


def _length(words: Rows) -> int:
    """Words up to the first end."""
    ends = np.flatnonzero(words == END_INDEX)
    return int(ends[0]) + 1 if len(ends) else len(words)
