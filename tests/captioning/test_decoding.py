"""Greedy and beam search against plain loops and against trying every caption."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from captioners import Table

from hydra_edge.captioning.decoding import Caption, decode
from hydra_edge.captioning.models import Rows, Said, State
from hydra_edge.errors import InputError

STATES = np.random.default_rng(5).normal(0, 1, (7, 5))


def plain_greedy(model: Table, state: np.ndarray, words: int) -> tuple[list[int], float]:
    """One region, one word at a time."""
    last, memory, said, score = 0, state[None], [], 0.0
    for _ in range(words + 1):
        found = model.step(np.asarray([last]), memory)
        last = int(found.mean_prob[0].argmax())
        score += float(np.log(found.mean_prob[0, last]))
        memory = found.state
        said.append(last)
        if last == 0:
            break
    return said, score


def log_prob(model: Table, state: np.ndarray, words: tuple[int, ...]) -> float:
    memory, before, score = state[None], 0, 0.0
    for word in words:
        found = model.step(np.asarray([before]), memory)
        score += float(np.log(found.mean_prob[0, word]))
        memory, before = found.state, word
    return score


def best_of_all(model: Table, state: np.ndarray, words: int) -> tuple[tuple[int, ...], float]:
    """The likeliest of all captions of up to ``words`` words and an end, or one more word."""
    others = range(1, len(model.words))
    captions = [
        (*body, 0)
        for length in range(words + 1)
        for body in itertools.product(others, repeat=length)
    ]
    captions += list(itertools.product(others, repeat=words + 1))
    return max(((one, log_prob(model, state, one)) for one in captions), key=lambda pair: pair[1])


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_the_plain_loop(seed: int) -> None:
    model = Table(seed=seed)
    for state, found in zip(STATES, decode(model, [STATES], words=6), strict=True):
        words, score = plain_greedy(model, state, 6)
        assert found.words.tolist() == words
        assert found.log_prob == pytest.approx(score)


@pytest.mark.parametrize("seed", range(6))
def test_a_beam_of_everything_finds_the_likeliest_caption(seed: int) -> None:
    model = Table(words=4, seed=seed)
    found = decode(model, [STATES[:3]], beam=80, words=3)
    for state, caption in zip(STATES, found, strict=False):
        words, score = best_of_all(model, state, 3)
        assert tuple(caption.words) == words
        assert caption.log_prob == pytest.approx(score)


def test_a_wider_beam_finds_likelier_captions_somewhere() -> None:
    gains = []
    for seed in range(12):
        model = Table(words=6, seed=seed)
        narrow, wide = (decode(model, [STATES], beam=beam, words=5) for beam in (1, 4))
        gains += [w.log_prob - n.log_prob for n, w in zip(narrow, wide, strict=True)]
    assert max(gains) > 0.1
    assert np.mean(gains) > 0


@pytest.mark.parametrize("beam", [1, 3])
def test_doubts_are_those_at_the_words(beam: int) -> None:
    model = Table(words=5, seed=1)
    for state, caption in zip(STATES, decode(model, [STATES], beam=beam, words=4), strict=True):
        memory, before = state[None], 0
        score = 0.0
        for place, word in enumerate(caption.words):
            found = model.step(np.asarray([before]), memory)
            assert caption.total[place] == pytest.approx(float(found.total[0]))
            assert caption.expected[place] == pytest.approx(float(found.expected[0]))
            assert caption.mutual[place] == pytest.approx(float(found.mutual[0]), abs=1e-12)
            score += float(np.log(found.mean_prob[0, word]))
            memory, before = found.state, int(word)
        assert caption.log_prob == pytest.approx(score)
        assert len(caption.total) == len(caption.words)


def same(a: list[Caption], b: list[Caption]) -> bool:
    return all(
        np.array_equal(x.words, y.words) and np.isclose(x.log_prob, y.log_prob)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("beam", [1, 2])
def test_regions_are_cut_and_padded_to_what_the_program_takes(beam: int) -> None:
    free, narrow = Table(seed=2), Table(seed=2, rows=(4, 6))
    assert same(decode(free, [STATES], beam=beam), decode(narrow, [STATES], beam=beam))
    assert set(narrow.seen) <= {4, 5, 6}


class Endless(Table):
    def step(self, words: Rows, state: State) -> Said:
        said = super().step(words, state)
        said.mean_prob[:, 0] = 0.0
        return said


def test_captions_end_at_the_longest() -> None:
    for caption in decode(Endless(), [STATES], words=4):
        assert len(caption.words) == 5
        assert 0 not in caption.words


@pytest.mark.parametrize(("beam", "words"), [(0, 4), (1, 0), (7, 4)])
def test_beams_that_cannot_be(beam: int, words: int) -> None:
    with pytest.raises(InputError, match="the engine steps 6 rows at once"):
        decode(Table(rows=(1, 6)), [STATES], beam=beam, words=words)
