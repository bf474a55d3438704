"""Captions as numbers and back, with DenseCap's preparation of text."""

from __future__ import annotations

import pytest

from hydra_edge.captioning.vocabulary import END, PADDING, UNKNOWN, Vocabulary, words_of
from hydra_edge.errors import InputError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's Hat.", ["a", "mans", "hat"]),
        ("café at 20°, half-open…", ["cafe", "at", "20", "degree", "halfopen"]),
        ("½ of it — ™", ["half", "of", "it"]),
        ("", []),
        ("?!", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_frequent_words_come_first_and_rare_ones_are_unknown() -> None:
    vocabulary = Vocabulary.of(["a red hat", "a red cat", "a dog"], least=2)
    assert vocabulary.words == (END, UNKNOWN, "a", "red")
    rows = vocabulary.encode(["A red dog!", "a"], length=5)
    assert rows.tolist() == [[2, 3, 1, 0, PADDING], [2, 0, PADDING, PADDING, PADDING]]
    assert [vocabulary.decode(row) for row in rows.tolist()] == [f"a red {UNKNOWN}", "a"]


def test_a_caption_that_is_too_long() -> None:
    with pytest.raises(InputError, match="There is room for 2 and the end"):
        Vocabulary.of(["a b c"]).encode(["a b c"], length=3)


def test_no_word_is_frequent() -> None:
    with pytest.raises(InputError, match="Of 2 words none appears 3 times"):
        Vocabulary.of(["a b", "b a"], least=3)


@pytest.mark.parametrize("words", [(), ("a", "b"), (END, UNKNOWN, "a", "a")])
def test_no_vocabulary(words: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="Its first words are '<end>' and '<unk>'"):
        Vocabulary(words)
