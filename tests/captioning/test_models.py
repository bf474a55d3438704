"""States stay where a program leaves them: a stand-in for a GPU says when they are copied."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from captioners import engine, images

import hydra_edge as he
from hydra_edge.captioning.captioner import CaptionOptions, Describer
from hydra_edge.captioning.decoding import decode
from hydra_edge.captioning.models import EngineModel
from hydra_edge.errors import InputError
from hydra_edge.gpu.arrays import DeviceArray, Foreign
from hydra_edge.runtime import Session


class Kept(DeviceArray):
    """An array of the stand-in: on the CPU, but whoever wants it there has to ask."""

    copies: list[tuple[int, ...]] = []  # noqa: RUF012

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.ascontiguousarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype
        self.address = self.array.ctypes.data

    def numpy(self) -> np.ndarray:
        self.copies.append(self.shape)
        return self.array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # CUDA, the first


class OnDevice:
    """Runs on the CPU, and takes and leaves arrays as a GPU's runner does."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.threads, self.taken = runner, 1, 0

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        found: list[np.ndarray] = self.runner.run(feeds, outputs)
        return found

    def run_on_device(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Kept]:
        return [Kept(one) for one in self.run({n: self._at(v) for n, v in feeds.items()}, outputs)]

    def _at(self, value: np.ndarray | Foreign) -> np.ndarray:
        if isinstance(value, np.ndarray):
            return value
        self.taken += 1
        size = int(np.prod(value.shape)) * value.dtype.itemsize
        memory = (ctypes.c_uint8 * size).from_address(value.address)
        return np.frombuffer(memory, value.dtype).reshape(value.shape).copy()

    def close(self) -> None:
        self.runner.close()


@pytest.fixture
def session() -> Iterator[Session]:
    with he.load(engine(), threads=1) as opened:
        for live in opened._programs.values():
            live.runner = live._device_runner = OnDevice(live.runner)
        Kept.copies.clear()
        yield opened


@pytest.mark.parametrize("beam", [1, 3])
def test_states_stay_on_the_device(session: Session, beam: int) -> None:
    model = EngineModel(session)
    states = np.random.default_rng(0).normal(0, 6, (4, model.encode(images()).states[0].shape[-1]))
    rows = [states.astype(np.float32)]
    assert model.speak(rows, 6) is None
    found = decode(model, rows, beam=beam, words=6)
    assert max(len(caption.words) for caption in found) > 2
    step = session._programs["step"].runner
    assert isinstance(step, OnDevice)
    assert step.taken > 1  # every state but the first came from the step before
    width = states.shape[1]
    assert Kept.copies
    assert not [shape for shape in Kept.copies if shape[-1] == width]
    with he.load(engine(), threads=1) as plain:
        wanted = decode(EngineModel(plain), rows, beam=beam, words=6)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.words, other.words)
        assert one.log_prob == pytest.approx(other.log_prob, rel=1e-5)
        np.testing.assert_allclose(one.mutual, other.mutual, atol=1e-5)


def test_describing_with_states_on_the_device(session: Session) -> None:
    options = CaptionOptions(score=0.01, most=3, words=5)
    found = Describer(EngineModel(session), options).describe(images())
    with he.load(engine(), threads=1) as plain:
        wanted = Describer(EngineModel(plain), options).describe(images())
    assert [[r.text for r in one] for one in found] == [[r.text for r in one] for one in wanted]


def test_beams_on_a_device_need_a_program_that_gathers(session: Session) -> None:
    model = EngineModel(session)
    model._reorder = None
    with pytest.raises(InputError, match="no program 'reorder'"):
        model.reorder(Kept(np.zeros((2, 3), np.float32)), np.asarray([1, 0]))
