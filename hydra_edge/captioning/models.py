"""What decoding runs on: an engine's programs, or members' engines one after another.

A state is opaque to whoever decodes. On a CPU it is an array of numpy's; on a backend that keeps
outputs on its device it is an array there, which goes back into the next step as it is: only
probabilities and entropies cross to the CPU. That way ran with a stand-in for the GPU only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hydra_edge.captioning import greedy_loop
from hydra_edge.captioning.boxes import LEAST_WEIGHT
from hydra_edge.captioning.greedy_loop import Spoken
from hydra_edge.errors import InputError
from hydra_edge.gpu.arrays import DeviceArray
from hydra_edge.runtime import Session

Array = npt.NDArray[np.generic]
Float = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.int64]
State: TypeAlias = "Array | DeviceArray | list[Array | DeviceArray]"
PROGRAMS = ("encode", "step")


@dataclass(frozen=True)
class Encoding:
    """What ``encode`` says of B images with N cells each; see `networks.summarize_votes`.

    Attributes:
        boxes: ``[B, N, 4]``: left, top, right, bottom as fractions of the image.
        scores: ``[B, N]``: probability of an object.
        score_mi: ``[B, N]``, in nats.
        box_spread: ``[B, N]``, as a fraction of the image.
        states: Per model ``[B, N, S]``: one for an engine, M for M engines.
    """

    boxes: Float
    scores: Float
    score_mi: Float
    box_spread: Float
    states: tuple[Float, ...]


class Said(NamedTuple):
    """What ``step`` says of R captions.

    Attributes:
        mean_prob: ``[R, V]``: the mean of the heads' softmax.
        total: Predictive entropy ``[R]``, in nats.
        expected: Mean entropy of the heads ``[R]``.
        mutual: Mutual information ``[R]``.
        state: Of the next step.
    """

    mean_prob: Float
    total: Float
    expected: Float
    mutual: Float
    state: State


class CaptionModel(Protocol):
    """Something that captions can be decoded with."""

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary."""
        ...

    @property
    def rows(self) -> tuple[int, int]:
        """Fewest and most rows of one step."""
        ...

    def encode(self, images: object) -> Encoding:
        """Look at images ``[B, 3, H, W]``."""
        ...

    def begin(self, states: Sequence[Array]) -> State:
        """The state of R captions, from rows ``[R, S]`` of `Encoding.states`."""
        ...

    def step(self, words: Rows, state: State) -> Said:
        """Say the words ``[R]``, and what may come next."""
        ...

    def reorder(self, state: State, rows: Rows) -> State:
        """The state whose row r was row ``rows[r]``."""
        ...

    def speak(self, states: Sequence[Array], words: int) -> Spoken | None:
        """Greedy captions of up to ``words`` words and an end, or None: step by step, then."""
        ...


class EngineModel:
    """A captioner's engine.

    Args:
        session: Its open session, which stays the caller's.

    Raises:
        InputError: The engine has no programs ``encode`` and ``step``.
    """

    def __init__(self, session: Session) -> None:
        if missing := sorted(set(PROGRAMS) - set(session.programs)):
            raise InputError(
                f"The engine has no program '{missing[0]}'.",
                f"A captioner has {' and '.join(PROGRAMS)}; this engine has "
                f"{', '.join(session.programs)}.",
                "Export it with export_captioner, and join the programs.",
            )
        self.session = session
        self._encode, self._step = (session.programs[name] for name in PROGRAMS)
        self._run_step = self._step.run_on_device if self._step.on_device else self._step.run
        self._reorder = session.programs.get("reorder")

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary: the labels of ``step``."""
        return self._step.program.graph.metadata.labels

    @property
    def rows(self) -> tuple[int, int]:
        """Fewest and most rows of one step."""
        low, _, high = self._step.program.batch
        return low, high

    def encode(self, images: object) -> Encoding:
        """See `CaptionModel.encode`."""
        found = self._encode.run(images)
        names = ("boxes", "scores", "score_mi", "box_spread", "state")
        boxes, scores, score_mi, box_spread, state = (_on_host(found[name]) for name in names)
        return Encoding(boxes, scores, score_mi, box_spread, (state,))

    def begin(self, states: Sequence[Array]) -> State:
        """See `CaptionModel.begin`."""
        (rows,) = states
        return np.ascontiguousarray(rows)

    def step(self, words: Rows, state: State) -> Said:
        """See `CaptionModel.step`."""
        outputs: Mapping[str, Any] = self._run_step({"word": words, "state": state})
        return Said(
            _on_host(outputs["mean_prob"]),
            _on_host(outputs["predictive_entropy"]),
            _on_host(outputs["expected_entropy"]),
            _on_host(outputs["mutual_information"]),
            outputs["next_state"],
        )

    def reorder(self, state: State, rows: Rows) -> State:
        """See `CaptionModel.reorder`."""
        if isinstance(state, np.ndarray):
            return state[rows]
        if self._reorder is None:
            raise InputError(
                "The engine has no program 'reorder'.",
                "Beam search gathers rows of the state, which lies on a device.",
                "Export the captioner again, or decode with a beam of 1.",
            )
        return self._reorder.run_on_device({"state": state, "row": rows})["picked"]

    def speak(self, states: Sequence[Array], words: int) -> Spoken | None:
        """See `CaptionModel.speak`."""
        if self._step.on_device or self.session.engine.backend != "onnxruntime":
            return None
        (rows,) = states
        most = np.asarray(words + 1, np.int64)
        feeds = {greedy_loop.START: np.ascontiguousarray(rows), greedy_loop.MOST: most}
        loop = self.session.derived("greedy", self._loop)
        said, chosen, *doubts = loop.run(feeds, greedy_loop.OUTPUTS)
        return Spoken(said, chosen, np.stack(doubts, 1))  # type: ignore[arg-type]

    def _loop(self) -> bytes:
        return greedy_loop.looped(self._step.program.payload)


class MembersModel:
    """M members' engines, one after another: an ensemble without any of our work.

    Args:
        members: Their models, of one vocabulary and grid.

    Raises:
        InputError: There is no member, or vocabularies differ.
    """

    def __init__(self, members: Sequence[EngineModel]) -> None:
        if len({member.words for member in members}) != 1:
            raise InputError(
                f"{len(members)} members have no common vocabulary.",
                "Their probabilities are averaged word by word.",
                "Give members trained with one vocabulary.",
            )
        self.members = tuple(members)

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary."""
        return self.members[0].words

    @property
    def rows(self) -> tuple[int, int]:
        """Fewest and most rows of one step."""
        ranges = [member.rows for member in self.members]
        return max(low for low, _ in ranges), min(high for _, high in ranges)

    def encode(self, images: object) -> Encoding:
        """See `CaptionModel.encode`."""
        found = [member.encode(images) for member in self.members]
        scores = np.stack([one.scores for one in found])
        boxes = np.stack([one.boxes for one in found])
        weights = scores + LEAST_WEIGHT
        weights = (weights / weights.sum(0))[..., None]
        mean = (weights * boxes).sum(0)
        spread = np.sqrt((weights * np.square(boxes - mean)).sum(0).mean(-1))
        doubt = _binary_entropy(scores.mean(0)) - _binary_entropy(scores).mean(0)
        states = tuple(state for one in found for state in one.states)
        return Encoding(mean, scores.mean(0), np.maximum(doubt, 0), spread, states)

    def begin(self, states: Sequence[Array]) -> State:
        """See `CaptionModel.begin`."""
        return [np.ascontiguousarray(rows) for rows in states]

    def step(self, words: Rows, state: State) -> Said:
        """See `CaptionModel.step`."""
        assert isinstance(state, list)
        said = [m.step(words, own) for m, own in zip(self.members, state, strict=True)]
        mean = np.mean([one.mean_prob for one in said], axis=0)
        total = -(mean * np.log(np.maximum(mean, np.finfo(mean.dtype).tiny))).sum(-1)
        expected = np.mean([one.total for one in said], axis=0)
        mutual = np.maximum(total - expected, 0)
        states: list[Any] = [one.state for one in said]
        return Said(mean, total, expected, mutual, states)

    def reorder(self, state: State, rows: Rows) -> State:
        """See `CaptionModel.reorder`."""
        assert isinstance(state, list)
        pairs = zip(self.members, state, strict=True)
        picked: list[Any] = [member.reorder(own, rows) for member, own in pairs]
        return picked

    def speak(self, states: Sequence[Array], words: int) -> Spoken | None:
        """Members are averaged after every word."""
        return None


def _on_host(value: Any) -> Float:
    return value.numpy() if isinstance(value, DeviceArray) else value  # type: ignore[return-value]


def _binary_entropy(probability: Float) -> Float:
    p = np.clip(probability, 1e-6, 1 - 1e-6)
    return np.asarray(-(p * np.log(p) + (1 - p) * np.log(1 - p)))
