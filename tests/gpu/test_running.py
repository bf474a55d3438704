"""Any number of callers at once, failures, shortage of memory, and the end."""

from __future__ import annotations

import gc
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from onnx_models import tiny_engine

from gpu.conftest import Start
from gpu.driver.double import ILLEGAL_ADDRESS, LAUNCH_FAILED, OUT_OF_MEMORY, Double
from gpu.engines import HEADS, WIDTH, CopyEngine, check, expected, samples
from hydra_edge.artifacts.engine import Program
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.errors import DeviceMismatchError, ExecutionError, InputError
from hydra_edge.gpu.device import Device
from hydra_edge.gpu.running import EngineRunner, Limits
from hydra_edge.live_programs import LiveProgram

pytestmark = pytest.mark.gpu
X = samples(64)


# callers at once


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_eight_threads(device: Device, start: Start, lanes: int) -> None:
    engine = CopyEngine(device)
    runner = start(engine, lanes=lanes)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            first, size = rng.integers(0, 50), rng.integers(1, 9)
            check(runner, X[first : first + size])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert runner.lanes == lanes


def test_each_caller_has_a_lane_of_its_own(device: Device, start: Start) -> None:
    engine = CopyEngine(device, gate=threading.Event())
    runner = start(engine, lanes=3)
    assert len(engine.log) == 1  # made when they are needed
    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(check, runner, X[i : i + 4]) for i in range(5)]
        engine.wait_for(3)
        assert engine.most_running == 3
        engine.gate.set()  # type: ignore[union-attr]
        for future in futures:
            future.result()
    assert engine.log.count("context in profile 0") >= 3


def test_one_caller_needs_one_lane(device: Device, double: Double, start: Start) -> None:
    runner = start(CopyEngine(device), lanes=4)
    for size in (1, 5, 8):
        check(runner, X[:size])
    assert double.counts().streams == 1


def test_a_run_takes_25_us_at_most(device: Device, double: Double, start: Start) -> None:
    """Of Python: the double's calls cost next to nothing. The best of many, so noise is no part."""
    runner = start(CopyEngine(device))
    for _ in range(3):
        check(runner, X[:1])
    times = []
    for _ in range(3000):
        begun = time.perf_counter()
        runner.run({"x": X[:1]}, ("mean",))
        times.append(time.perf_counter() - begun)
    assert min(times) <= 25e-6


# shortage of memory


def test_callers_take_turns_where_memory_is_short(
    device: Device, double: Double, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine = CopyEngine(device, context_bytes=1 << 20)
    runner = start(engine, lanes=4, graphs=0)
    free = double.get("memory_bytes") - double.counts().device_bytes
    with double.having(elsewhere_bytes=free - (1 << 19)), ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: check(runner, X[i : i + 4]), range(48)))
    assert runner.lanes == engine.most_running == 1
    assert double.counts().streams == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no memory for more than 1 concurrent runs (no room for a context" in caplog.text


def run_out_of_memory(double: Double, engine: CopyEngine, runner: EngineRunner) -> None:
    """Two callers at once, and memory for one."""
    engine.gate = threading.Event()
    with (
        ThreadPoolExecutor(2) as pool,
        double.having(elsewhere_bytes=double.get("memory_bytes")),
    ):
        first = pool.submit(check, runner, X[:4])
        engine.wait_for(1)
        second = pool.submit(check, runner, X[4:8])
        for _ in range(1000):
            if runner.lanes == 1:  # the second settles for the first one's lane
                break
            threading.Event().wait(0.01)
        engine.gate.set()
        first.result()
        second.result()
        engine.wait_for(1)
    assert runner.lanes == 1


def test_more_lanes_once_there_is_memory_again(
    device: Device, double: Double, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    engine = CopyEngine(device)
    runner = EngineRunner(engine, Device(), Limits(lanes=2, graphs=0), lambda: now)
    with caplog.at_level(logging.DEBUG, "hydra_edge.gpu.running"):
        for _ in range(2):
            run_out_of_memory(double, engine, runner)
            now += 29
            check(runner, X[:4])
            assert runner.lanes == 1
            now += 1
            check(runner, X[:4])
            assert runner.lanes == 2
            engine.wait_for(2)
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG"]
    engine.gate = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(check, runner, X[:4]) for _ in range(2)]
        engine.wait_for(2)
        engine.gate.set()
        for future in futures:
            future.result()
    runner.close()


@pytest.mark.parametrize("function", ["cuMemAlloc", "cuMemHostAlloc"])
def test_buffers_that_find_no_memory(
    device: Device, double: Double, start: Start, function: str
) -> None:
    """PyCUDA asks again after it has collected garbage, so one refusal is not enough."""
    engine = CopyEngine(device, gate=threading.Event())
    runner = start(engine, lanes=2, graphs=0)
    size = double.get("memory_bytes") if function == "cuMemAlloc" else 0
    with ThreadPoolExecutor(2) as pool, double.having(elsewhere_bytes=size):
        first = pool.submit(check, runner, X[:4])
        engine.wait_for(1)
        if not size:
            double.fail(function, OUT_OF_MEMORY)
        second = pool.submit(check, runner, X[4:8])
        for _ in range(1000):
            if runner.lanes == 1:  # the second settles for the first one's lane
                break
            threading.Event().wait(0.01)
        engine.gate.set()  # type: ignore[union-attr]
        first.result()
        second.result()
    assert double.counts().streams == 1


def test_no_memory_at_all(device: Device, double: Double) -> None:
    engine = CopyEngine(device, device_memory_bytes=1 << 20)
    with (
        double.having(elsewhere_bytes=double.get("memory_bytes") - (1 << 18)),
        pytest.raises(
            DeviceMismatchError,
            match=r"no memory on Driver double: cuMemAlloc failed: out of memory. "
            r"It needs 1 MiB to work in .*; 0 of 256 MiB are free. Free some, or",
        ),
    ):
        EngineRunner(engine, Device())
    assert engine.closed


# failures


@pytest.mark.parametrize("method", ["execute_async", "set_input_shape", "set_tensor_address"])
def test_a_refusal_gives_no_result(device: Device, start: Start, method: str) -> None:
    engine = CopyEngine(device)
    runner = start(engine)
    check(runner, X[:4])
    engine.refuse = method
    for _ in range(2):
        with pytest.raises(
            ExecutionError, match=r"did not run the engine.* The copy engine was told to\. There is"
        ):
            check(runner, X[4:8])
    engine.refuse = ""
    for turn in range(4):
        check(runner, X[turn : turn + 4])


def test_a_profile_that_is_refused(device: Device, start: Start) -> None:
    engine = CopyEngine(device, profiles=((1, 4), (5, 8)))
    runner = start(engine)
    engine.refuse = "set_profile"
    with pytest.raises(ExecutionError, match="does not switch to profile 0"):
        check(runner, X[:4])
    engine.refuse = ""
    check(runner, X[:4])


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_an_exception_leaves_a_usable_pool(
    device: Device, start: Start, error: BaseException
) -> None:
    engine = CopyEngine(device)
    runner = start(engine, lanes=1)
    check(runner, X[:4])
    engine.raising = error
    with pytest.raises(type(error)):
        check(runner, X[:4])
    engine.raising = None
    for _ in range(4):
        check(runner, X[:4])


@pytest.mark.parametrize("graphs", [0, 8])
@pytest.mark.parametrize(
    "function", ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuStreamSynchronize"]
)
def test_a_driver_that_fails(
    device: Device, double: Double, start: Start, function: str, graphs: int
) -> None:
    runner = start(CopyEngine(device), graphs=graphs)
    check(runner, X[:4])
    double.fail(function, LAUNCH_FAILED)
    with pytest.raises(
        ExecutionError, match=rf"It says: {function}.* failed: unspecified launch failure. There is"
    ):
        check(runner, X[4:8])
    for _ in range(4):
        check(runner, X[8:12])


def test_a_failure_while_a_graph_is_captured(device: Device, double: Double, start: Start) -> None:
    runner = start(CopyEngine(device))
    check(runner, X[:4])
    for _ in range(3):
        double.fail("cuMemcpyDtoHAsync", LAUNCH_FAILED, after=2)  # two outputs have run before
        check(runner, X[:4])
    assert "was captured" in str(runner.plain_because)


def test_a_gpu_that_is_lost(device: Device, double: Double, start: Start) -> None:
    """After an illegal address everything fails until the process ends: it must not hang."""
    engine = CopyEngine(device)
    runner = start(engine)
    check(runner, X[:4])
    double.stick(ILLEGAL_ADDRESS)
    with pytest.raises(ExecutionError, match=r"did not run the engine.*illegal memory access"):
        check(runner, X[:4])
    made = len(engine.log)
    for call in (runner.run, runner.run_on_device):
        with pytest.raises(
            ExecutionError,
            match=r"GPU is lost to this process\. After this, CUDA .*illegal memory access.* "
            r"Restart the process",
        ):
            call({"x": X[:4]}, ("mean",))
    assert len(engine.log) == made  # nothing is tried any more


def test_a_gpu_that_is_lost_to_another_runner(device: Device, double: Double, start: Start) -> None:
    """It learns of it when it makes a lane."""
    engine = CopyEngine(device, refuse="execute_async")
    runner = start(engine)
    with pytest.raises(ExecutionError, match="was told to"):
        check(runner, X[:4])
    double.stick(ILLEGAL_ADDRESS)
    with pytest.raises(ExecutionError, match=r"did not run the engine.*illegal memory access"):
        check(runner, X[:4])
    with pytest.raises(ExecutionError, match=r"lost to this process.*illegal memory access"):
        check(runner, X[:4])


def test_contexts_are_closed_although_an_error_is_kept(device: Device, start: Start) -> None:
    engine = CopyEngine(device)
    runner = start(engine)
    for _ in range(3):
        check(runner, X[:4])
    assert engine.contexts == 2
    engine.refuse = "execute_async"
    with pytest.raises(ExecutionError) as caught:
        check(runner, X[:3])
    assert caught.tb is not None
    assert engine.contexts == 0


def test_the_others_go_on(device: Device, start: Start) -> None:
    """One caller's failure is not the others'."""
    engine = CopyEngine(device)
    runner = start(engine, lanes=3)
    failures = 0

    def work(seed: int) -> int:
        failed = 0
        for i in range(40):
            if seed == 0 and i % 5 == 0:
                engine.refuse_after = 0
            try:
                check(runner, X[seed : seed + 4])
            except ExecutionError:
                failed += 1
        return failed

    with ThreadPoolExecutor(4) as pool:
        failures = sum(pool.map(work, range(4)))
    assert 1 <= failures <= 8
    check(runner, X[:4])


# the end


def test_closed(device: Device, double: Double) -> None:
    engine = CopyEngine(device)
    before = double.counts()
    runner = EngineRunner(engine, Device())
    for _ in range(4):
        check(runner, X[:4])
    runner.close()
    runner.close()
    assert engine.closed
    assert double.counts().left_over() == before.left_over()
    for call in (runner.run, runner.run_on_device):
        with pytest.raises(InputError, match=r"session is closed. .* Load the engine again"):
            call({"x": X[:4]}, ("mean",))


def test_closing_waits_for_runs_and_turns_away_who_waits(device: Device) -> None:
    engine = CopyEngine(device, gate=threading.Event())
    runner = EngineRunner(engine, Device(), Limits(lanes=2))
    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(runner.run, {"x": X[i : i + 2]}, ("mean",)) for i in range(2)]
        engine.wait_for(2)
        waiting = [pool.submit(runner.run, {"x": X[:1]}, ("mean",)) for _ in range(2)]
        closing = pool.submit(runner.close)
        for future in waiting:
            with pytest.raises(InputError, match="session is closed"):
                future.result(10)
        assert not closing.done()
        assert not engine.closed
        engine.gate.set()  # type: ignore[union-attr]
        closing.result(10)
        for i, future in enumerate(running):
            np.testing.assert_array_equal(future.result()[0], expected(X[i : i + 2])["mean"])
    assert engine.closed


def test_a_runner_that_nobody_closed(device: Device, double: Double) -> None:
    engine = CopyEngine(device)
    before = double.counts()
    runner = EngineRunner(engine, Device())
    for _ in range(4):
        check(runner, X[:4])
    del runner
    gc.collect()
    assert engine.closed
    assert double.counts().left_over() == before.left_over()


def test_closing_in_another_thread_than_opening(device: Device, double: Double) -> None:
    before = double.counts()
    with ThreadPoolExecutor(1) as pool:
        runner = pool.submit(lambda: EngineRunner(CopyEngine(device), Device())).result()
    check(runner, X[:4])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(runner.close).result()
    assert double.counts().left_over() == before.left_over()


def test_a_context_of_somebody_else_stays_where_it_is(device: Device, double: Double) -> None:
    """Its stack, in this thread, must be as it was: also where a runner is closed on top of it."""
    with device.current():
        before = double.counts().pushed
        current = device.driver.Context.get_current()
        runner = EngineRunner(CopyEngine(device), Device())
        check(runner, X[:4])
        with pytest.raises(InputError):
            runner.run({}, ("mean",))
        runner.close()
        assert double.counts().pushed == before
        assert device.driver.Context.get_current() == current
        device.driver.mem_alloc(16).free()


# as a session's program


def program() -> Program:
    """One that `CopyEngine` could have been built from."""
    outputs = (
        TensorSpec("mean", "float32", ("batch", WIDTH)),
        TensorSpec("logits", "float32", (HEADS, "batch", WIDTH)),
    )
    return replace(
        tiny_engine().programs["main"],
        inputs=(TensorSpec("x", "float32", ("batch", WIDTH)),),
        outputs=outputs,
        batch=(2, 4, 8),
        optional=("logits",),
    )


@pytest.mark.parametrize("size", [1, 2, 8, 9, 23])
def test_batches_are_split_and_padded(device: Device, start: Start, size: int) -> None:
    live = LiveProgram("main", program(), start(CopyEngine(device)))
    found = live.run(X[:size], True)
    for name, array in expected(X[:size]).items():
        np.testing.assert_array_equal(found[name], array)
    assert list(live.run(X[:size], False)) == ["mean"]


def test_arrays_on_the_gpu_go_in_and_come_out(device: Device, start: Start) -> None:
    live = LiveProgram("main", program(), start(CopyEngine(device)))
    first = live.run_on_device(X[:4], True)
    np.testing.assert_array_equal(first["logits"].numpy(), expected(X[:4])["logits"])
    second = live.run_on_device({"x": first["mean"]}, False)
    assert list(second) == ["mean"]
    np.testing.assert_array_equal(second["mean"].numpy(), X[:4])
    np.testing.assert_array_equal(live.run(second["mean"], False)["mean"], X[:4])
    with pytest.raises(InputError, match=r"'x' has shape \[3, 4, 5\]"):
        live.run(first["logits"], False)


@pytest.mark.parametrize("size", [1, 9])
def test_arrays_on_the_gpu_are_not_split_or_padded(device: Device, start: Start, size: int) -> None:
    live = LiveProgram("main", program(), start(CopyEngine(device, profiles=((1, 16),))))
    (x,) = live.runner.run_on_device({"x": X[:size]}, ("mean",))  # type: ignore[attr-defined]
    message = (
        rf"A batch of {size} was given on the GPU.* takes 2 to 8 samples; .* of the CPU to run"
    )
    for call in (live.run, live.run_on_device):
        with pytest.raises(InputError, match=message):
            call(x, False)
    with pytest.raises(InputError, match=message):
        live.run_on_device(X[:size], False)
