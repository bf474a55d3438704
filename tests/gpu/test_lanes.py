"""Batches, profiles, buffers and graphs of one caller."""

from __future__ import annotations

import gc
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from gpu.conftest import Start
from gpu.driver.double import INVALID_VALUE, Double
from gpu.engines import HEADS, WIDTH, CopyEngine, check, expected, samples
from hydra_edge.errors import ExecutionError, InputError
from hydra_edge.gpu.capture import UNDISTURBED
from hydra_edge.gpu.device import Device
from hydra_edge.gpu.running import EngineRunner

pytestmark = pytest.mark.gpu
X = samples(64)


def test_batches_again_and_again(device: Device, start: Start) -> None:
    runner = start(CopyEngine(device), graphs=9)
    for turn in range(4):
        for size in (1, 8, 3, 1):
            x = X[turn : turn + size]
            check(runner, x)
            check(runner, x, ("mean",))
            check(runner, x, ("mean", "logits"))
    assert runner.plain_because is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int8, np.bool_, np.int64])
def test_other_types(device: Device, start: Start, dtype: type) -> None:
    x = (X[:4] * 10).astype(dtype)
    runner = start(CopyEngine(device, dtype=dtype))
    for _ in range(3):
        logits, mean = runner.run({"x": x}, ("logits", "mean"))
        assert logits.dtype == mean.dtype == x.dtype
        np.testing.assert_array_equal(logits, np.stack([x] * HEADS))


def test_strided_inputs_and_results_of_ones_own(device: Device, start: Start) -> None:
    runner = start(CopyEngine(device))
    (first,) = runner.run({"x": X[:8:2]}, ("mean",))
    (second,) = runner.run({"x": np.asfortranarray(X[4:8])}, ("mean",))
    first += 1
    np.testing.assert_array_equal(second, X[4:8])
    np.testing.assert_array_equal(first, X[:8:2] + 1)


@pytest.mark.parametrize(
    ("feeds", "outputs", "message"),
    [
        ({"x": X[:9]}, ("mean",), "batch of 9 was to be run. The engine takes 1 to 8 samples"),
        ({"x": X[:0]}, ("mean",), "batch of 0 was to be run"),
        ({}, ("mean",), "batch of 0 was to be run"),
        ({"x": X[:2, :4]}, ("mean",), r"'x' is float32\[2, 4\]. .* x: float32\[batch, 5\]"),
        ({"x": X[:2].astype(float)}, ("mean",), r"'x' is float64\[2, 5\]"),
        ({"x": X[0]}, ("mean",), r"'x' is float32\[5\]"),
        ({"x": np.float32(1)[()]}, ("mean",), "batch of 0 was to be run"),
        ({"y": X[:2]}, ("mean",), r"inputs y were given. .* takes x: float32\[batch, 5\]"),
        ({"x": X[:2], "y": X[:2]}, ("mean",), "inputs x, y were given"),
        ({"x": X[:2]}, ("mean", "variance"), "no output 'variance'. It has: logits, mean"),
    ],
)
def test_what_does_not_fit(
    device: Device, start: Start, feeds: dict[str, object], outputs: tuple[str, ...], message: str
) -> None:
    engine = CopyEngine(device)
    runner = start(engine)
    made = len(engine.log)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            runner.run(feeds, outputs)  # type: ignore[arg-type]
        check(runner, X[:2])
    assert len(engine.log) <= made + 1  # the lane stays; one context is that of a graph


def test_an_output_whose_size_depends_on_the_data(device: Device, start: Start) -> None:
    with pytest.raises(ExecutionError, match=r"'logits' has the shape \[-1, 5\]. Its size depends"):
        start(CopyEngine(device, unknown_sizes=True))


def test_no_scratch_memory(device: Device, start: Start) -> None:
    runner = start(CopyEngine(device, device_memory_bytes=0))
    for _ in range(3):
        check(runner, X[:3])


def test_what_was_refused_leaves_nothing_behind(device: Device, start: Start) -> None:
    """A batch whose dtype is wrong has set the context's shapes before it is refused."""
    runner = start(CopyEngine(device), graphs=0)
    check(runner, X[:8])
    with pytest.raises(InputError, match="float64"):
        runner.run({"x": X[:3].astype(float)}, ("mean", "logits"))
    check(runner, X[8:16])


# profiles


def test_the_profile_that_holds_the_batch(device: Device, start: Start) -> None:
    engine = CopyEngine(device, profiles=((1, 1), (2, 4), (4, 16)))
    runner = start(engine, graphs=0)
    for size in (16, 4, 1, 3, 2, 5, 1):
        check(runner, X[:size])
    assert engine.log == [
        "context in profile 2",  # the largest: buffers are sized in it
        *(f"switch to profile {number}" for number in (1, 0, 1, 2, 0)),
    ]
    with pytest.raises(InputError, match="takes 1 to 1, 2 to 4, 4 to 16 samples"):
        runner.run({"x": X[:17]}, ("mean",))


def test_a_profile_for_one_size_inside_another(device: Device, start: Start) -> None:
    engine = CopyEngine(device, profiles=((1, 32), (1, 1), (8, 8)))
    runner = start(engine, graphs=0)
    for size in (1, 1, 7, 8, 9, 32):
        check(runner, X[:size])
    assert engine.log[1:] == [f"switch to profile {number}" for number in (1, 0, 2, 0)]


def test_graphs_in_several_profiles(device: Device, start: Start) -> None:
    engine = CopyEngine(device, profiles=((1, 2), (3, 16)))
    runner = start(engine)
    for _ in range(4):
        for size in (1, 16, 2, 3):
            check(runner, X[:size])
    assert engine.log.count("context in profile 0") == 2
    assert engine.log.count("context in profile 1") == 3
    assert runner.plain_because is None


# buffers


def test_nothing_is_copied_through_pageable_memory(
    device: Device, double: Double, start: Start
) -> None:
    runner = start(CopyEngine(device))
    before = double.counts().pageable
    for _ in range(3):
        check(runner, X[:8])
    assert double.counts().pageable == before


@pytest.mark.parametrize("graphs", [0, 8])
def test_nothing_is_copied_where_memory_is_shared(
    device: Device, double: Double, start: Start, graphs: int
) -> None:
    def copies() -> list[int]:
        return [double.calls(f"cuMemcpy{way}Async") for way in ("HtoD", "DtoH")]

    with double.having(integrated=1):
        runner = start(CopyEngine(device), graphs=graphs)
        before = copies()
        for size in (1, 8, 1, 8, 1, 8):
            check(runner, X[:size])
        assert copies() == before
        assert double.counts().device_bytes == 1024  # the engine's scratch memory alone


@pytest.mark.parametrize("graphs", [0, 8])
def test_large_buffers_are_copied_where_memory_is_shared(
    device: Device, double: Double, start: Start, graphs: int
) -> None:
    size = 8 * WIDTH * 4  # of x and mean; logits are larger
    with double.having(integrated=1):
        runner = start(CopyEngine(device), graphs=graphs, mapped_bytes=size)
        copied = [double.calls(f"cuMemcpy{way}Async") for way in ("HtoD", "DtoH")]
        check(runner, X[:8])
        assert double.calls("cuMemcpyHtoDAsync") == copied[0]
        assert double.calls("cuMemcpyDtoHAsync") == copied[1] + 1
        assert double.counts().device_bytes == 1024 + HEADS * size
        for batch in (1, 8, 1, 8, 1):
            check(runner, X[:batch])


# graphs


def test_a_graph_from_the_third_run_on(device: Device, double: Double, start: Start) -> None:
    engine = CopyEngine(device)
    runner = start(engine)
    launched = double.calls("cuGraphLaunch")
    for _ in range(5):
        check(runner, X[:4])
    assert double.calls("cuGraphLaunch") == launched + 3
    # One to run plainly, one that is captured: a graph belongs to the state of its context.
    assert engine.log == ["context in profile 0"] * 2
    for size in (1, 2, 3, 5):  # what comes once gets none
        check(runner, X[:size])
    assert engine.log == ["context in profile 0"] * 2


def test_the_number_of_graphs_is_bounded(
    device: Device, double: Double, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    runner = start(CopyEngine(device), graphs=2)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            for size in (1, 2, 3, 4):
                check(runner, X[:size])
    assert double.counts().executables == 2
    assert runner.plain_because is not None
    assert "There are 2 graphs already" in runner.plain_because
    assert len(caplog.records) == 1
    assert "Runs go without a CUDA graph" in caplog.text


def test_graphs_switched_off(device: Device, double: Double, start: Start) -> None:
    before = double.calls("cuStreamBeginCapture")
    runner = start(CopyEngine(device), graphs=0)
    for _ in range(4):
        check(runner, X[:4])
    assert runner.plain_because == "Graphs are switched off."
    assert double.calls("cuStreamBeginCapture") == before


def test_without_the_bindings(
    device: Device,
    start: Start,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("cuda.bindings.driver", "cuda.cuda"):
        monkeypatch.setitem(sys.modules, module, None)
    runner = start(CopyEngine(device))
    for _ in range(4):
        check(runner, X[:4])
    assert runner.plain_because is not None
    assert "pip install 'hydra-edge[tensorrt]'" in runner.plain_because
    assert len(caplog.records) == 1


@pytest.mark.parametrize("function", ["cuStreamBeginCapture", "cuGraphInstantiateWithFlags"])
def test_a_capture_that_fails(
    device: Device,
    double: Double,
    start: Start,
    caplog: pytest.LogCaptureFixture,
    function: str,
) -> None:
    runner = start(CopyEngine(device))
    check(runner, X[:4])
    for _ in range(3):
        assert runner.plain_because is None
        double.fail(function, INVALID_VALUE)
        check(runner, X[:4])
    tried = double.calls(function)
    check(runner, X[:4])
    assert double.calls(function) == tried
    said = function.removesuffix("WithFlags")
    assert runner.plain_because == f"{said} says CUDA_ERROR_INVALID_VALUE."
    assert len(caplog.records) == 1
    for _ in range(3):  # others are not given up
        check(runner, X[:5])
    assert double.counts().executables >= 1


@pytest.mark.parametrize(
    ("waits", "message"),
    [
        ("and tells", "was captured: The GPU did not run the engine"),
        ("silently", "cuStreamEndCapture says CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"),
    ],
)
def test_an_engine_that_cannot_be_captured(
    device: Device, double: Double, start: Start, waits: str, message: str
) -> None:
    """It waits for the stream, as plugins do that were not made for it."""
    engine = CopyEngine(device, waits=waits)
    runner = start(engine)
    for _ in range(6):
        check(runner, X[:4])
    assert len(engine.log) == 4  # it is tried three times
    assert runner.plain_because is not None
    assert message in runner.plain_because
    assert double.counts().graphs == double.counts().executables == 0


def test_an_engine_that_refuses_while_it_is_captured(device: Device, start: Start) -> None:
    engine = CopyEngine(device)
    runner = start(engine)
    check(runner, X[:4])
    for _ in range(3):
        engine.refuse_after = 1
        check(runner, X[:4])
    assert runner.plain_because is not None
    assert "The copy engine was told to." in runner.plain_because


def test_an_interrupt_while_an_engine_is_captured(
    device: Device, double: Double, start: Start
) -> None:
    engine = CopyEngine(device)
    runner = start(engine)
    check(runner, X[:4])
    engine.raising, engine.raising_after = KeyboardInterrupt(), 1
    with pytest.raises(KeyboardInterrupt):
        check(runner, X[:4])
    assert double.counts().graphs == 0
    engine.raising = None
    for _ in range(4):
        check(runner, X[:4])


def test_an_engine_that_can_be_captured_later(device: Device, double: Double, start: Start) -> None:
    engine = CopyEngine(device, capturable=False)
    runner = start(engine)
    for _ in range(4):
        check(runner, X[:4])
    assert double.counts().executables == 0
    assert runner.plain_because == "The engine says that it cannot be captured yet."
    engine.capturable = True
    for _ in range(2):
        check(runner, X[:4])
    assert double.counts().executables == 1
    assert len(engine.log) == 2


def test_a_capture_that_was_disturbed_is_tried_again(
    device: Device, double: Double, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    runner = start(CopyEngine(device))
    check(runner, X[:4])
    double.fail("cuGraphInstantiateWithFlags", INVALID_VALUE)
    check(runner, X[:4])
    assert double.counts().executables == 0
    check(runner, X[:4])
    assert double.counts().executables == 1
    assert runner.plain_because is None
    assert not caplog.records


def test_lanes_do_not_disturb_a_capture(device: Device) -> None:
    """Contexts are made and closed, and runs captured, by whoever has the lock."""
    held: list[tuple[str, bool]] = []
    engine = CopyEngine(device)
    with ThreadPoolExecutor(1) as pool:

        def note(name: str) -> None:
            is_free = pool.submit(lambda: UNDISTURBED.acquire(False) and not UNDISTURBED.release())
            held.append((name, not is_free.result()))

        engine.on_call = note
        runner = EngineRunner(engine, Device())
        for _ in range(2):
            check(runner, X[:4])
        runner.close()
    assert held == [
        ("create_context", True),
        ("execute_async", False),
        ("create_context", True),
        ("execute_async", False),
        ("execute_async", True),  # the capture
        ("close", True),
        ("close", True),
    ]


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_no_garbage_is_collected_in_a_capture(
    device: Device, start: Start, is_enabled: bool, fails: bool
) -> None:
    collecting: list[bool] = []
    engine = CopyEngine(device)
    runner = start(engine)
    check(runner, X[:4])
    engine.on_call = lambda name: collecting.append(gc.isenabled())
    if fails:
        engine.refuse_after = 1
    try:
        if not is_enabled:
            gc.disable()
        check(runner, X[:4])
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()
    made, ran, captured = collecting[:3]
    assert made == ran == is_enabled
    assert not captured


def test_no_memory_for_the_context_of_a_graph(device: Device, double: Double, start: Start) -> None:
    engine = CopyEngine(device, context_bytes=4096)
    runner = start(engine)
    check(runner, X[:4])
    with double.having(elsewhere_bytes=double.get("memory_bytes") - double.counts().device_bytes):
        for _ in range(3):
            check(runner, X[:4])
    assert runner.plain_because is not None
    assert "no memory for the context of a graph: no room for a context" in runner.plain_because
    assert double.counts().executables == 0


def test_a_graph_that_does_not_launch(device: Device, double: Double, start: Start) -> None:
    runner = start(CopyEngine(device))
    for _ in range(3):
        check(runner, X[:4])
    double.fail("cuGraphLaunch", INVALID_VALUE)
    with pytest.raises(ExecutionError, match="cuGraphLaunch says CUDA_ERROR_INVALID_VALUE"):
        check(runner, X[:4])
    for _ in range(3):
        check(runner, X[:4])


def test_many_batch_sizes(device: Device, start: Start) -> None:
    runner = start(CopyEngine(device, profiles=((1, 600),)))
    x = samples(600)
    for size in range(1, 601):
        np.testing.assert_array_equal(
            runner.run({"x": x[:size]}, ("mean",))[0], expected(x[:size])["mean"]
        )
