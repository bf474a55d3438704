"""Captions as numbers: normalized words, and which of them a captioner knows."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import InputError

END, UNKNOWN = "<end>", "<unk>"
END_INDEX, UNKNOWN_INDEX = 0, 1
PADDING = -1  # in the rows of `Vocabulary.encode` behind the end
MAX_WORDS = 15
# Signs of the annotations of Visual Genome, as DenseCap spells them out.
_SPELLED = {"½": "half", "—": "-", "™": "", "¢": "cent", "ç": "c", "û": "u"} | {
    "é": "e",
    "è": "e",
    "°": " degree",
    "…": "",
}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words_of(text: str) -> list[str]:
    """The words of a caption: lower case, some signs spelled out, without punctuation.

    Source: ``words_preprocess`` of DenseCap (Johnson et al. 2016, arXiv 1511.07571).

    Example:
        >>> words_of("A man's café, 20° warm.")
        ['a', 'mans', 'cafe', '20', 'degree', 'warm']
    """
    for sign, spelled in _SPELLED.items():
        text = text.replace(sign, spelled)
    return text.lower().translate(_NO_PUNCTUATION).split()


@dataclass(frozen=True)
class Vocabulary:
    """The words of a captioner by number; in an engine they are the labels of program ``step``.

    Attributes:
        words: Word 0 begins and ends every caption, word 1 stands for all that are not known.

    Raises:
        InputError: The first two are not those, or a word appears twice.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.words[:2] != (END, UNKNOWN) or len(set(self.words)) < len(self.words):
            raise InputError(
                f"A vocabulary begins with {', '.join(map(repr, self.words[:2])) or 'nothing'}.",
                f"Its first words are '{END}' and '{UNKNOWN}', and no word appears twice.",
                "Make it with Vocabulary.of(captions).",
            )

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, captions: Iterable[str], least: int = 1) -> Vocabulary:
        """The words of captions that appear ``least`` times or more, the most frequent first.

        Raises:
            InputError: No word is frequent enough.
        """
        counts = Counter(word for caption in captions for word in words_of(caption))
        kept = sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w))
        if not kept:
            raise InputError(
                f"Of {len(counts)} words none appears {least} times.",
                "A captioner has to know some.",
                "Lower the least count, or give more captions.",
            )
        return cls((END, UNKNOWN, *kept))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def encode(self, captions: Sequence[str], length: int = MAX_WORDS + 1) -> npt.NDArray[np.int64]:
        """Captions as numbers ``[R, length]``, each with its end, then `PADDING`.

        Raises:
            InputError: A caption does not fit.
        """
        rows = np.full((len(captions), length), PADDING, np.int64)
        for row, caption in zip(rows, captions, strict=True):
            numbers = [self._numbers.get(word, UNKNOWN_INDEX) for word in words_of(caption)]
            if len(numbers) >= length:
                raise InputError(
                    f"'{caption}' has {len(numbers)} words.",
                    f"There is room for {length - 1} and the end.",
                    "Leave such captions out, or give more room.",
                )
            row[: len(numbers) + 1] = [*numbers, END_INDEX]
        return rows

    def decode(self, numbers: Iterable[int]) -> str:
        """The caption up to its end."""
        words = []
        for number in numbers:
            if number in (END_INDEX, PADDING):
                break
            words.append(self.words[number])
        return " ".join(words)
