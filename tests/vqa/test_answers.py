"""Answers of people against the official evaluation, written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hydra_edge.errors import InputError
from hydra_edge.vqa.answers import Vocabulary, accuracy, consensus, normalize


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The two  dogs.", "2 dogs"),
        ("a cat", "cat"),
        ("dont know", "don't know"),
        ("it's", "it's"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("Mr. Smith", "mr smith"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("black & white", "black & white"),
        ("none", "0"),
        ("ten", "10"),
        ("twenty", "twenty"),
        (" YES\n", "yes"),
        ("what?!", "what"),
        ("the", ""),
    ],
)
def test_normalization(given: str, expected: str) -> None:
    assert normalize(given) == expected
    assert normalize(expected) == expected


def leave_one_out(answer: str, people: list[str]) -> float:
    """The definition: the mean over all subsets that leave one person out."""
    scores = []
    for others in itertools.combinations(range(len(people)), len(people) - 1):
        agreeing = sum(people[i] == answer for i in others)
        scores.append(min(agreeing / 3, 1))
    return float(np.mean(scores))


@pytest.mark.parametrize("count", range(11))
def test_consensus_is_the_mean_over_subsets_of_nine(count: int) -> None:
    people = ["yes"] * count + [f"other {i}" for i in range(10 - count)]
    assert accuracy("yes", people) == pytest.approx(leave_one_out("yes", people))
    table = {0: 0, 1: 0.3, 2: 0.6, 3: 0.9}  # what everybody uses for ten people
    assert accuracy("yes", people) == pytest.approx(table.get(count, 1))


def test_answers_are_compared_normalized() -> None:
    people = ["Two.", "2", "two", "the two"] + ["three"] * 6
    assert accuracy("TWO", people) == 1
    assert consensus(people) == {"2": 1, "3": 1}


@pytest.mark.parametrize("people", [[], ["yes"]])
def test_one_person_agrees_with_nobody(people: list[str]) -> None:
    with pytest.raises(InputError, match=rf"There are {len(people)} answers") as caught:
        consensus(people)
    assert "ten" in caught.value.fix


def test_a_vocabulary_holds_frequent_answers_most_frequent_first() -> None:
    people = [["yes"] * 10] * 12 + [["No"] * 6 + ["yes"] * 4] * 15 + [["rare"] * 10] * 8
    vocabulary = Vocabulary.of(people)
    assert vocabulary.answers == ("no", "yes")
    assert len(vocabulary) == 2
    assert Vocabulary.of(people, minimum_count=8).answers == ("no", "yes", "rare")
    scores = vocabulary.scores([people[12], people[-1], ["yes"] * 2 + ["x"] * 8])
    np.testing.assert_allclose(scores, [[1, 1], [0, 0], [0, 0.6]])
    assert scores.dtype == np.float32


def test_vocabularies_that_are_none() -> None:
    with pytest.raises(InputError, match="None of 1 answers occurs 9 times"):
        Vocabulary.of([["yes"] * 10] * 3)
    with pytest.raises(InputError, match="'a' more than once"):
        Vocabulary(("a", "b", "a"))
    with pytest.raises(InputError, match="has 0 answers"):
        Vocabulary(())
