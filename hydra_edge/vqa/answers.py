"""Answers of people: made comparable, scored by their agreement, and numbered.

Everything follows the official evaluation of VQA, Antol et al. 2015, arXiv 1505.00468: an answer is
right to the degree ``min(people who gave it / 3, 1)``, averaged over all subsets of nine people.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import InputError

ENOUGH = 3  # people who make an answer right
MINIMUM_COUNT = 9  # questions an answer must occur in; of VQA v2 this leaves 3129 answers

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(\d)(,)(\d)")
_PERIOD = re.compile(r"\.(?!\d)")
# Contractions that people write without their apostrophe, from the words they are made of. The
# official list also has those of two apostrophes, such as "couldn't've", which no answer is.
_NEGATED = (
    *("aint", "arent", "cant", "couldnt", "didnt", "doesnt", "dont", "hadnt", "hasnt", "havent"),
    *("isnt", "mightnt", "mustnt", "neednt", "shant", "shouldnt", "wasnt", "werent", "wont"),
    *("wouldnt", "oughtnt"),
)
_SUFFIXED = {
    "'d": ("he", "how", "i", "it", "she", "somebody", "someone", "something", "they", "who", "you"),
    "'ll": ("how", "it", "somebody", "someone", "something", "they", "what", "who", "why", "you"),
    "'re": ("they", "what", "where", "why", "you"),
    "'s": ("he", "how", "that", "there", "what", "when", "where", "who", "why", "somebody"),
    "'ve": ("could", "i", "might", "must", "should", "they", "we", "what", "who", "would", "you"),
}
_CONTRACTIONS = {
    **{word: f"{word[:-1]}'t" for word in _NEGATED},
    **{
        f"{word}{suffix[1:]}": f"{word}{suffix}"
        for suffix, words in _SUFFIXED.items()
        for word in words
        if f"{word}{suffix[1:]}" not in {"id", "hed", "shell", "whore"}
    },
    **{"im": "i'm", "maam": "ma'am", "oclock": "o'clock", "yall": "y'all"},
}


def normalize(answer: str) -> str:
    """An answer as the official evaluation compares it.

    Lower case, without punctuation and articles, numbers up to ten as digits, contractions with
    their apostrophes.

    Args:
        answer: What somebody wrote.

    Example:
        >>> normalize("The two  dogs."), normalize("dont"), normalize("1,000")
        ('2 dogs', "don't", '1000')

    Source: the evaluation code of visualqa.org, `processPunctuation` and `processDigitArticle`.
    """
    given = answer.replace("\n", " ").replace("\t", " ").strip()
    text, inside_number = given, _COMMA_IN_NUMBER.search(given) is not None
    for sign in _PUNCTUATION:
        touches_space = f"{sign} " in given or f" {sign}" in given
        text = text.replace(sign, "" if touches_space or inside_number else " ")
    text = _PERIOD.sub("", text).lower()
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def consensus(answers: Sequence[str]) -> dict[str, float]:
    """How right each answer is, by what people said.

    For each person left out, an answer counts ``min(others who gave it / 3, 1)``; the score is the
    mean. Of ten people: 0.3 for one, 0.6 for two, 0.9 for three, 1 for four and more.

    Args:
        answers: One per person, normalized or not.

    Returns:
        Scores in (0, 1] by normalized answer. Any other answer has 0.

    Raises:
        InputError: There are fewer than two people.
    """
    people = len(answers)
    if people < 2:
        raise InputError(
            f"There are {people} answers.",
            "Agreement is that of an answer with other people's.",
            "Give the answers of all people, usually ten.",
        )
    scores = {}
    for answer, count in Counter(map(normalize, answers)).items():
        given = count * min((count - 1) / ENOUGH, 1.0)
        others = (people - count) * min(count / ENOUGH, 1.0)
        scores[answer] = (given + others) / people
    return scores


def accuracy(answer: str, answers: Sequence[str]) -> float:
    """The official VQA accuracy of one answer.

    Args:
        answer: What the model says.
        answers: What people said.

    Raises:
        InputError: There are fewer than two people.
    """
    return consensus(answers).get(normalize(answer), 0.0)


@dataclass(frozen=True)
class Vocabulary:
    """The C answers that a model can give.

    Attributes:
        answers: Normalized answers; their order is that of the heads' outputs.

    Raises:
        InputError: There is none, or one twice.
    """

    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        repeated = [answer for answer, count in Counter(self.answers).items() if count > 1]
        if not self.answers or repeated:
            raise InputError(
                f"The vocabulary has {len(self.answers)} answers"
                + (f", '{repeated[0]}' more than once." if repeated else "."),
                "Every output of a head stands for one answer.",
                "List each answer once.",
            )

    @classmethod
    def of(cls, people: Iterable[Sequence[str]], minimum_count: int = MINIMUM_COUNT) -> Vocabulary:
        """The most agreed answers of a training set, most frequent first.

        Args:
            people: For each question what people said. Its most frequent answer counts, the first
                of equally frequent ones.
            minimum_count: Questions an answer must be the most frequent one of.

        Raises:
            InputError: No answer is that frequent.
        """
        counts = Counter(
            Counter(map(normalize, answers)).most_common(1)[0][0] for answers in people
        )
        kept = [answer for answer, count in counts.items() if count >= minimum_count]
        if not kept:
            raise InputError(
                f"None of {len(counts)} answers occurs {minimum_count} times.",
                "Rare answers cannot be learned, and are left out.",
                "Pass more questions, or a smaller minimum_count.",
            )
        return cls(tuple(sorted(kept, key=lambda answer: (-counts[answer], answer))))

    def __len__(self) -> int:
        return len(self.answers)

    def scores(self, people: Sequence[Sequence[str]]) -> npt.NDArray[np.float32]:
        """Soft targets.

        Args:
            people: For each of N questions what people said.

        Returns:
            ``[N, C]`` in [0, 1]: see `consensus`. A row is 0 where no answer is in the vocabulary.
        """
        position = {answer: index for index, answer in enumerate(self.answers)}
        table = np.zeros((len(people), len(self)), np.float32)
        for row, answers in zip(table, people, strict=True):
            for answer, score in consensus(answers).items():
                if answer in position:
                    row[position[answer]] = score
        return table
