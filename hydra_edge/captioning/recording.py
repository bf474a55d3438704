"""What a captioner's programs are fed while it describes images: calibration and test data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hydra_edge.captioning.captioner import CaptionOptions, Describer
from hydra_edge.captioning.models import CaptionModel, Encoding, EngineModel, Rows, Said, State
from hydra_edge.errors import InputError

Array = npt.NDArray[np.generic]


def record(
    model: EngineModel,
    images: npt.NDArray[np.float32],
    options: CaptionOptions | None = None,
    batch: int = 32,
) -> dict[str, dict[str, Array]]:
    """Describe images, and keep what goes into the programs.

    Args:
        model: A captioner's engine, e.g. the fp32 student's.
        images: ``[N, 3, H, W]``.
        options: What is described.
        batch: Images at once.

    Returns:
        Inputs by name, by program: what `quantize` takes as calibration data, and `verify` as data.

    Raises:
        InputError: Nothing was found on any image, so that no word was said.
    """
    options = options or CaptionOptions()
    recorder = _Recorder(model)
    describer = Describer(recorder, options)
    for start in range(0, len(images), batch):
        describer.describe(images[start : start + batch])
    if not recorder.words_said:
        raise InputError(
            f"Nothing was found on {len(images)} images.",
            f"No box scores above {options.score}, so that no word was said.",
            "Give images with something on them, or lower the score.",
        )
    image = model.session.programs["encode"].inputs[0].name
    return {
        "encode": {image: images},
        "step": {
            "word": np.concatenate(recorder.words_said),
            "state": np.concatenate(recorder.states),
        },
    }


class _Recorder:
    """A model that remembers what it was fed."""

    def __init__(self, model: CaptionModel) -> None:
        self._model = model
        self.words_said: list[Array] = []
        self.states: list[Array] = []

    @property
    def words(self) -> tuple[str, ...]:
        return self._model.words

    @property
    def rows(self) -> tuple[int, int]:
        return self._model.rows

    def encode(self, images: object) -> Encoding:
        return self._model.encode(images)

    def begin(self, states: Sequence[npt.NDArray[Any]]) -> State:
        return self._model.begin(states)

    def step(self, words: Rows, state: State) -> Said:
        self.words_said.append(words)
        self.states.append(state if isinstance(state, np.ndarray) else state.numpy())  # type: ignore[union-attr]
        return self._model.step(words, state)

    def reorder(self, state: State, rows: Rows) -> State:
        return self._model.reorder(state, rows)

    def speak(self, states: Sequence[npt.NDArray[Any]], words: int) -> None:
        """None: what goes on between steps is what is recorded."""
