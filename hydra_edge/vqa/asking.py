"""A question to a live engine: image and text in, answers and their doubt out.

What that takes besides the programs travels in the engine file: the answers are its labels, the
tokenizer and how to treat images are its assets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from hydra_edge.artifacts.arrays import load_arrays, to_numpy
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.artifacts.prediction import Prediction
from hydra_edge.errors import ArtifactError, InputError
from hydra_edge.runtime import Session
from hydra_edge.tasks.vqa import COST, best_threshold
from hydra_edge.vqa.images import ImageFormat, read_image
from hydra_edge.vqa.tokens import Tokenizer

Array = npt.NDArray[np.generic]
TOKENIZER, SETTINGS = "tokenizer.json", "asking.json"  # assets of an engine
DOUBTS = ("probability", "predictive_entropy", "mutual_information")
_ARRAYS = (".npy", ".npz")
_COLORS = 3


@dataclass(frozen=True)
class DeferRule:
    """When an answer is left to somebody else.

    Attributes:
        by: What tells: the probability of the answer, or an entropy in nats.
        limit: A probability below it, or an entropy above it, defers.

    Raises:
        InputError: There is no such quantity, or the limit is not finite.
    """

    by: Literal["probability", "predictive_entropy", "mutual_information"]
    limit: float

    def __post_init__(self) -> None:
        if self.by not in DOUBTS or not math.isfinite(self.limit):
            raise InputError(
                f"The rule defers by '{self.by}' with the limit {self.limit}.",
                f"It needs one of {', '.join(DOUBTS)} and a finite number.",
                "Correct it, e.g. mutual_information=0.1.",
            )

    @classmethod
    def parse(cls, text: str) -> DeferRule:
        """Read ``NAME=LIMIT``, e.g. ``mutual_information=0.1``.

        Raises:
            InputError: It is something else.
        """
        name, _, number = text.partition("=")
        try:
            return cls(name, float(number))  # type: ignore[arg-type]
        except ValueError as exc:
            raise InputError(
                f"'{text}' is no rule for deferring.",
                f"It is written NAME=LIMIT, NAME being one of {', '.join(DOUBTS)}.",
                "Write e.g. mutual_information=0.1.",
            ) from exc

    @classmethod
    def fit(
        cls,
        prediction: Prediction,
        scores: npt.ArrayLike,
        by: Literal["probability", "predictive_entropy", "mutual_information"] = "probability",
        cost: float = COST,
    ) -> DeferRule:
        """The rule that gives the largest effective reliability on questions with known answers.

        Args:
            prediction: Of N questions that the model was not trained on.
            scores: How right each answer is, ``[N, C]``.
            by: What shall tell.
            cost: Of a wrong answer, against 1 for a right one.

        Source: Whitehead et al. 2022, arXiv 2204.13631, section 4.2.
        """
        best = prediction.mean_prob.argmax(-1)[:, None]
        right = np.take_along_axis(np.asarray(scores, np.float64), best, 1)[:, 0]
        sign = 1.0 if by == "probability" else -1.0
        threshold = best_threshold(sign * _doubt(prediction, by), right, cost)
        nothing = 2.0 if by == "probability" else -1.0  # no value there is: defer everything
        return cls(by, sign * threshold if math.isfinite(threshold) else nothing)

    def defers(self, prediction: Prediction) -> npt.NDArray[np.bool_]:
        """Which of the B answers are left to somebody else, ``[B]``."""
        value = _doubt(prediction, self.by)
        return np.asarray(value < self.limit if self.by == "probability" else value > self.limit)


@dataclass(frozen=True)
class Answer:
    """One possible answer and its probability."""

    text: str
    probability: float


@dataclass(frozen=True)
class Reply:
    """What an engine says to one question.

    Attributes:
        question: The question.
        answers: The most probable answers, best first.
        predictive_entropy: Total uncertainty in nats.
        expected_entropy: The part that is in the question or the data.
        mutual_information: The part that is in the model: the heads disagree.
        variation_ratio: Share of heads that vote against the answer.
        defer: Whether to ask somebody else; None without a rule.
        unknown_words: Words of the question that did not occur in training.
    """

    question: str
    answers: tuple[Answer, ...]
    predictive_entropy: float
    expected_entropy: float
    mutual_information: float
    variation_ratio: float
    defer: bool | None
    unknown_words: tuple[str, ...] = ()


def equip(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    defer: DeferRule | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Engine:
    """An engine that can be asked in words.

    Args:
        engine: Of a model that takes an image or features, and a row of tokens; its labels are the
            answers.
        tokenizer: That of training.
        defer: When to ask somebody else.
        mean: Taken off each of red, green and blue in 0..1.
        std: Divides what is left.

    Returns:
        The engine with both in its assets.

    Raises:
        InputError: The engine has other inputs, or no labels.
    """
    _roles(engine)
    settings = {
        "defer": None if defer is None else asdict(defer),
        "mean": list(map(float, mean)),
        "std": list(map(float, std)),
    }
    text = json.dumps(settings, sort_keys=True)
    assets = {**engine.assets, TOKENIZER: tokenizer.to_bytes(), SETTINGS: text.encode()}
    return replace(engine, assets=assets)


class Answerer:
    """Asks a live session in words.

    Args:
        session: Of an engine that was equipped; see `equip`.
        defer: A rule in place of the engine's own.

    Attributes:
        session: It.
        tokenizer: The engine's.
        defer: When to ask somebody else, or None.
        form: How images are read; None where the engine takes features.

    Raises:
        InputError: The engine has other inputs, no labels or no tokenizer.
        ArtifactError: Its assets cannot be read.
        MissingDependencyError: `tokenizers` is not installed.

    Example:
        >>> with load("student.hydra") as session:  # doctest: +SKIP
        ...     reply = Answerer(session).ask("image.png", "how many red circles are there?")
        ...     reply.answers[0].text, reply.mutual_information, reply.defer
    """

    def __init__(self, session: Session, defer: DeferRule | None = None) -> None:
        engine = session.engine
        self._picture, self._tokens = _roles(engine)
        if TOKENIZER not in engine.assets:
            raise InputError(
                "The engine holds no tokenizer.",
                "Its second input is a row of token numbers, and words must become those.",
                f"Add one with hydra_edge.vqa.equip, or compile with --asset {TOKENIZER}=FILE.",
            )
        self.session = session
        self.tokenizer = Tokenizer(engine.assets[TOKENIZER])
        own, mean, std = _settings(engine.assets.get(SETTINGS, b"{}"))
        self.defer = defer or own
        self.form: ImageFormat | None = None
        shape = self._picture.shape
        if len(shape) == 4 and shape[1] == _COLORS:
            height, width = shape[2:]
            if isinstance(height, int) and isinstance(width, int):
                self.form = ImageFormat(height, width, mean, std)

    def ask(self, picture: str | Path | object, question: str, top: int = 5) -> Reply:
        """Ask about one image.

        Args:
            picture: An image file, an .npy or .npz file, or an array without a batch axis; arrays
                go into the engine as they are.
            question: The question.
            top: How many answers to list.

        Raises:
            InputError: The picture does not fit the engine.
            ArtifactError: The file cannot be read.
        """
        array = self._read(Path(picture)) if isinstance(picture, str | Path) else picture
        return self.ask_all(to_numpy(array, self._picture.name)[None], [question], top)[0]

    def ask_all(self, pictures: object, questions: Sequence[str], top: int = 5) -> list[Reply]:
        """Ask about several images at once.

        Args:
            pictures: ``[N, …]``, as the engine takes them.
            questions: One for each.
            top: How many answers to list.

        Raises:
            InputError: They do not fit each other or the engine.
        """
        prediction = self.session.run(
            {self._picture.name: pictures, self._tokens.name: self._encode(questions)}
        )
        return self.replies(prediction, questions, top)

    def replies(
        self, prediction: Prediction, questions: Sequence[str], top: int = 5
    ) -> list[Reply]:
        """A prediction in words; ``questions`` are those it answers."""
        if top < 1:
            raise InputError(
                f"{top} answers were asked for.", "The best one is listed.", "Give 1 or more."
            )
        deferred = None if self.defer is None else self.defer.defers(prediction)
        labels = self.session.engine.labels
        found = []
        for index, question in enumerate(questions):
            prob = prediction.mean_prob[index]
            best = np.argsort(-prob, kind="stable")[:top]
            found.append(
                Reply(
                    question=question,
                    answers=tuple(Answer(labels[i], float(prob[i])) for i in best),
                    predictive_entropy=float(prediction.predictive_entropy[index]),
                    expected_entropy=float(prediction.expected_entropy[index]),
                    mutual_information=float(prediction.mutual_information[index]),
                    variation_ratio=float(prediction.variation_ratio[index]),
                    defer=None if deferred is None else bool(deferred[index]),
                    unknown_words=self.tokenizer.unknown(question),
                )
            )
        return found

    def _encode(self, questions: Sequence[str]) -> Array:
        tokens = self.tokenizer.encode(questions)
        return tokens.astype(self._tokens.dtype)

    def _read(self, path: Path) -> Array:
        if path.suffix in _ARRAYS:
            arrays = load_arrays(path)
            if len(arrays) == 1:
                return next(iter(arrays.values()))
            if self._picture.name in arrays:
                return arrays[self._picture.name]
            raise InputError(
                f"'{path}' holds {', '.join(sorted(arrays))}.",
                f"The engine's input is called '{self._picture.name}'.",
                "Save that array alone, or under that name.",
            )
        if self.form is None:
            raise InputError(
                f"'{path}' cannot be shown to the engine.",
                f"It takes {self._picture}, which is no image [B, 3, height, width] of known size.",
                "Pass the features as an .npy file.",
            )
        return read_image(path, self.form)


def _doubt(prediction: Prediction, by: str) -> npt.NDArray[np.float64]:
    found = prediction.mean_prob.max(-1) if by == "probability" else prediction[by]
    return np.asarray(found, np.float64)


def _roles(engine: Engine) -> tuple[TensorSpec, TensorSpec]:
    """The inputs that are the image or its features, and the question."""
    questions = [spec for spec in engine.inputs if np.dtype(spec.dtype).kind in "iu"]
    pictures = [spec for spec in engine.inputs if np.dtype(spec.dtype).kind == "f"]
    if len(questions) != 1 or len(pictures) != 1 or len(engine.inputs) != 2:
        raise InputError(
            f"The engine takes {'; '.join(map(str, engine.inputs))}.",
            "A question takes an image or features in floats, and token numbers in integers.",
            "Use an engine of a model for visual question answering.",
        )
    if not engine.labels:
        raise InputError(
            "The engine does not name its answers.",
            "Its outputs are numbered, and a reply is in words.",
            "Export the student with labels=…, the vocabulary of answers in order.",
        )
    return pictures[0], questions[0]


def _settings(
    data: bytes,
) -> tuple[DeferRule | None, tuple[float, float, float], tuple[float, float, float]]:
    try:
        found: Mapping[str, object] = json.loads(data)
        rule = found.get("defer")
        defer = DeferRule(str(rule["by"]), float(rule["limit"])) if isinstance(rule, dict) else None  # type: ignore[arg-type]
        mean, std = (_three(found.get(name, (value,) * 3)) for name, value in _PLAIN)
        return defer, mean, std
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ArtifactError(
            f"The engine's asset '{SETTINGS}' cannot be read.",
            f"It is not what hydra_edge.vqa.equip writes: {exc!r}.",
            "Equip the engine again.",
        ) from exc


_PLAIN = (("mean", 0.0), ("std", 1.0))


def _three(values: object) -> tuple[float, float, float]:
    red, green, blue = map(float, values)  # type: ignore[call-overload]
    return red, green, blue
