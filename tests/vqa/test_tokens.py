"""Questions as numbers."""

from __future__ import annotations

import numpy as np
import pytest

from hydra_edge.errors import ArtifactError, InputError
from hydra_edge.vqa.tokens import Tokenizer

TEXTS = ["what color is the circle?", "how many are there?"]


def test_rows_have_one_length_and_words_one_number() -> None:
    tokenizer = Tokenizer.train(TEXTS, 7)
    rows = tokenizer.encode(["How MANY circle", "what color is the circle? there there there"])
    assert rows.shape == (2, 7)
    assert rows.dtype == np.int64
    assert (rows[0, 3:] == 0).all()
    assert (rows[0, :3] > 1).all()
    assert rows[0, 2] == rows[1, 4]
    assert rows.max() < tokenizer.size == 2 + 10  # padding, unknown; nine words and a question mark


def test_unknown_words_are_one_token_and_named() -> None:
    tokenizer = Tokenizer.train(TEXTS, 7)
    assert (tokenizer.encode(["zebra"])[0] == [1, 0, 0, 0, 0, 0, 0]).all()
    assert tokenizer.unknown("what Zebra is the zoo") == ("Zebra", "zoo")


def test_it_travels_as_json_and_training_repeats() -> None:
    first, second = Tokenizer.train(TEXTS, 7), Tokenizer.train(TEXTS, 7)
    assert first.to_bytes() == second.to_bytes()
    again = Tokenizer(first.to_bytes())
    assert again.to_bytes() == first.to_bytes()
    np.testing.assert_array_equal(again.encode(TEXTS), first.encode(TEXTS))


@pytest.mark.parametrize("data", [b"", b"{}", b'{"model": 3}', b"\xff"])
def test_other_data(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="tokenizer cannot be read"):
        Tokenizer(data)


def test_texts_of_different_lengths_without_padding() -> None:
    import tokenizers

    bare = tokenizers.Tokenizer.from_str(Tokenizer.train(TEXTS, 7).to_bytes().decode())
    bare.no_padding()
    tokenizer = Tokenizer(bare.to_str().encode())
    with pytest.raises(InputError, match=r"2 texts have \[1, 2\] tokens"):
        tokenizer.encode(["what", "what color"])
    with pytest.raises(InputError, match="0 texts"):
        tokenizer.encode([])
    with pytest.raises(InputError, match="length is 0"):
        Tokenizer.train(TEXTS, 0)
