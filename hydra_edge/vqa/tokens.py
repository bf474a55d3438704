"""Questions as numbers: a word-level tokenizer of Hugging Face's `tokenizers`, one JSON file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import ArtifactError, InputError, require

PADDING, UNKNOWN = "[PAD]", "[UNK]"  # tokens 0 and 1


class Tokenizer:
    """Turns texts into rows of token numbers, all of one length.

    Args:
        data: The JSON of any tokenizer of Hugging Face's `tokenizers`.

    Raises:
        ArtifactError: It is none.
        MissingDependencyError: `tokenizers` is not installed.
    """

    def __init__(self, data: bytes) -> None:
        library = require("tokenizers", "vqa")
        try:
            self._tokenizer: Any = library.Tokenizer.from_str(data.decode())
        except Exception as exc:  # it raises Exception itself
            raise ArtifactError(
                "The tokenizer cannot be read.",
                f"tokenizers says: {str(exc).rstrip('.')}.",
                "Store what Tokenizer.to_bytes or tokenizer.json of the model holds.",
            ) from exc

    @classmethod
    def train(cls, texts: Iterable[str], length: int) -> Tokenizer:
        """Learn the words of texts: lower case, split at spaces and punctuation.

        Args:
            texts: All that occurs in training.
            length: Tokens of every row; longer texts are cut, shorter ones padded with token 0.

        Raises:
            InputError: The length is not positive.
            MissingDependencyError: `tokenizers` is not installed.
        """
        if length < 1:
            raise InputError(
                f"The length is {length}.", "A row has at least one token.", "Give 1 or more."
            )
        library = require("tokenizers", "vqa")
        tokenizer = library.Tokenizer(library.models.WordLevel(unk_token=UNKNOWN))
        tokenizer.normalizer = library.normalizers.Lowercase()
        tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
        trainer = library.trainers.WordLevelTrainer(
            special_tokens=[PADDING, UNKNOWN], show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.enable_padding(length=length, pad_id=0, pad_token=PADDING)
        tokenizer.enable_truncation(max_length=length)
        return cls(tokenizer.to_str().encode())

    @property
    def size(self) -> int:
        """Number of different tokens."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Token numbers ``[N, length]``.

        Args:
            texts: N texts.

        Raises:
            InputError: There is none, or they have different numbers of tokens.
        """
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        lengths = {len(row) for row in rows}
        if len(lengths) != 1:
            raise InputError(
                f"{len(rows)} texts have {sorted(lengths)} tokens.",
                "A batch is one array, so all rows have one length.",
                "Store a tokenizer with padding and truncation, and pass at least one text.",
            )
        return np.asarray(rows, np.int64)

    def unknown(self, text: str) -> tuple[str, ...]:
        """Words of a text that did not occur in training."""
        encoding = self._tokenizer.encode(text)
        number = self._tokenizer.token_to_id(UNKNOWN)
        return tuple(
            text[start:end]
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token == number
        )

    def to_bytes(self) -> bytes:
        """The tokenizer as JSON."""
        return str(self._tokenizer.to_str()).encode()
