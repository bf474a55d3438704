"""Runs in other threads, arrays on a GPU, and programs that do not open."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx_models import feeds_for, student, tiny_engine

from hydra_edge import compilation
from hydra_edge.artifacts.engine import Engine
from hydra_edge.backends import onnxruntime
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.errors import CompilationError, InputError
from hydra_edge.fusion import fuse
from hydra_edge.runtime import Session, load

GRAPH = fuse(student(m=3, k=6, c=4))
X = feeds_for(GRAPH, 23)["x"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "_TIMING_SECONDS", 0.0)
        return compile(GRAPH, options=CompileOptions(batch=(1, 2, 8), lowering="wide"))


@pytest.fixture(scope="module")
def session(engine: Engine) -> Iterator[Session]:
    with load(engine) as opened:
        yield opened


def test_submitted_runs_give_what_runs_give(session: Session) -> None:
    sizes = [1, 3, 8, 11, 23] * 8
    wanted = {size: session.run(X[:size], head_logits=True) for size in set(sizes)}
    futures = [session.submit(X[:size], head_logits=True) for size in sizes]
    for size, future in zip(sizes, futures, strict=True):
        for name, array in wanted[size].items():
            np.testing.assert_array_equal(future.result()[name], array)


class Own(np.ndarray):
    """Some other library's array."""


def test_arrays_that_fit_and_such_that_are_made_to(session: Session) -> None:
    wanted = session.run({"x": X})
    ways = [X, X.copy("F"), X[::-1][::-1], X.view(Own), torch.from_numpy(X), X.tolist()]
    for given in [{"x": way} for way in ways[:-1]] + [X]:
        for name, array in session.run(given).items():
            np.testing.assert_array_equal(array, wanted[name])
    for bad, words in (
        ({"x": X[:0]}, "The batch is empty"),
        ({"x": X.astype(">f4")}, "has dtype >f4"),
        ({"x": X[:, :5]}, r"has shape \[23, 5\]"),
        ({"x": X[0]}, r"has shape \[6\]"),
        ({"x": np.float32(1)}, r"has shape \[\]"),
        ({"x": X, "y": X}, "There is no input 'y'"),
        ({"y": X}, "There is no input 'y'"),
        ({}, "The input 'x' is missing"),
        ({"x": ways[-1]}, "has dtype float64"),
    ):
        with pytest.raises(InputError, match=words):
            session.run(bad)


def test_what_is_wrong_with_a_submitted_run_comes_with_its_result(session: Session) -> None:
    with pytest.raises(InputError, match=r"dtype float64. The engine takes float32"):
        session.submit(X.astype(np.float64)).result()
    with pytest.raises(InputError, match="has no program 'step'"):
        session.submit(X, program="step").result()


class Slow:
    """A runner that runs when it is told to."""

    threads = 1

    def __init__(self) -> None:
        self.go, self.begun, self.closed = threading.Event(), threading.Semaphore(0), False

    def run(self, feeds: object, outputs: object) -> list[np.ndarray]:
        self.begun.release()
        self.go.wait(10)
        assert not self.closed
        return [np.zeros((1, 2), np.float32)]

    def close(self) -> None:
        self.closed = True


def test_closing_waits_for_what_has_begun_and_cancels_the_rest() -> None:
    session, runner = load(tiny_engine()), Slow()
    session._programs["main"].runner.close()
    session._programs["main"].runner = runner
    futures = [session.submit(np.zeros((1, 2), np.float32)) for _ in range(6)]
    for _ in range(4):
        assert runner.begun.acquire(timeout=10)
    with ThreadPoolExecutor(2) as pool:
        closing = pool.submit(session.close)
        for future in futures[4:]:
            with pytest.raises(CancelledError):
                future.result(10)
        assert not runner.closed
        runner.go.set()
        closing.result(10)
    assert runner.closed
    for future in futures[:4]:
        assert future.result()["logits"].shape == (1, 2)
    with pytest.raises(InputError, match="The session is closed"):
        session.submit(X)


class OnAGpu:
    """An array that says it lies on one."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **kwargs: object) -> object:
        raise AssertionError("nobody here can read it")


def test_arrays_on_a_gpu_do_not_fit_an_engine_on_the_cpu(session: Session) -> None:
    with pytest.raises(InputError, match=r"'x' lies on a GPU. .* on the CPU. .* tensor.cpu\(\)"):
        session.run(OnAGpu())
    with pytest.raises(InputError, match=r"stay on the GPU. This engine runs on the CPU. Use run"):
        session.run_on_device(X)


@pytest.mark.parametrize("inputs", [OnAGpu(), {"x": OnAGpu()}])
def test_arrays_on_a_gpu_are_not_submitted(session: Session, inputs: object) -> None:
    """Another thread has another current stream, and would read them too early."""
    with pytest.raises(
        InputError, match=r"on a GPU was submitted\. .*another would run it\. Call run or run_on"
    ):
        session.submit(inputs)


def test_a_program_that_does_not_open_closes_those_that_did(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = onnxruntime.open

    def noting(*arguments: object) -> object:
        opened.append(real(*arguments))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(onnxruntime, "open", noting)
    programs = {"main": engine.programs["main"]}
    programs["step"] = replace(programs["main"], payload=b"hello")
    with pytest.raises(CompilationError, match="cannot load the model"):
        load(replace(engine, programs=programs))
    assert not hasattr(opened[0], "_session")  # what `close` drops
