"""The primary context is found, used from any thread and given back; what is missing is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from gpu.driver import double as driver_double
from gpu.driver.double import OUT_OF_MEMORY, Double
from hydra_edge.errors import ExecutionError, MissingDependencyError
from hydra_edge.gpu.device import Device, Stream


@pytest.mark.gpu
def test_what_it_is(device: Device) -> None:
    assert device.name
    assert device.compute_capability >= 50
    assert 0 < device.free_bytes() <= device.total_bytes
    assert float(device.driver_version) >= 12
    assert repr(device) == f"Device(0, {device.name}, sm_{device.compute_capability})"


@pytest.mark.gpu
def test_what_the_driver_says(double: Double) -> None:
    with double.having(major=11, minor=0, integrated=1, driver_version=12060):
        device = Device()
        assert device.compute_capability == 110
        assert device.integrated
        assert device.driver_version == "12.6"
        with double.having(elsewhere_bytes=1 << 20):
            assert device.free_bytes() == device.total_bytes - (1 << 20)
        device.close()


@pytest.mark.gpu
def test_a_scope_ends_with_an_error(device: Device, double: Double) -> None:
    with device.current(), pytest.raises(ZeroDivisionError), device.current():
        _ = 1 / 0
    assert double.counts().pushed == 0


@pytest.mark.gpu
def test_any_thread(device: Device, double: Double) -> None:
    def use() -> None:
        with device.current():
            device.driver.mem_alloc(16).free()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert double.counts().pushed == 0
    with pytest.raises(device.driver.LogicError):  # nothing stayed behind in this one
        device.driver.mem_alloc(16)


@pytest.mark.gpu
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_context_is_given_back(double: Double, elsewhere: bool) -> None:
    """By any thread, once, and off the driver's stack."""
    device = Device()
    released = double.calls("cuDevicePrimaryCtxRelease")

    def close() -> None:
        device.close()
        device.close()

    if elsewhere:
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()
    else:
        close()
    assert double.calls("cuDevicePrimaryCtxRelease") == released + 1
    assert double.counts().pushed == 0
    with pytest.raises(ExecutionError, match=r"was used after it was closed. .* Open the engine"):
        device.current()


@pytest.mark.gpu
def test_who_holds_it_keeps_it(double: Double) -> None:
    device = Device()
    released = double.calls("cuDevicePrimaryCtxRelease")
    scope = device.hold()
    device.close()
    assert double.calls("cuDevicePrimaryCtxRelease") == released
    with scope:
        device.driver.mem_alloc(16).free()
    device.release()
    assert double.calls("cuDevicePrimaryCtxRelease") == released + 1


@pytest.mark.gpu
def test_two_devices_are_one_context(device: Device) -> None:
    other = Device()
    with device.current():
        memory = device.driver.mem_alloc(16)
    with other.current():
        other.driver.memcpy_htod(int(memory), b"0123456789abcdef")
    other.close()
    with device.current():
        found = bytearray(16)
        device.driver.memcpy_dtoh(found, memory)
        memory.free()
    assert found == b"0123456789abcdef"


@pytest.mark.gpu
def test_a_stream_is_destroyed_where_it_is_told_to(device: Device, double: Double) -> None:
    """And not with its last reference, which may be the traceback of an error."""
    with device.current():
        stream = Stream(device)
        assert stream.handle
        stream.synchronize()
        stream.destroy()
    assert double.counts().streams == 0
    assert stream is not None


@pytest.mark.gpu
def test_a_stream_waits_for_no_other(device: Device, double: Double) -> None:
    with device.current():
        stream, memory = Stream(device), device.driver.mem_alloc(1)
        device.driver.memset_d8_async(int(memory), 1, 1, None)  # on the default stream
        device.driver.memset_d8_async(int(memory), 2, 1, stream.raw)
        stream.synchronize()
        found = bytearray(1)
        device.driver.memcpy_dtoh(found, memory)  # which lets the default stream go on
        assert found == b"\1"
        memory.free()
        stream.destroy()


@pytest.mark.gpu
def test_a_gpu_that_is_not_there(double: Double) -> None:
    with pytest.raises(MissingDependencyError, match=r"GPU 7 cannot be used. The CUDA driver says"):
        Device(7)
    double.fail("cuDevicePrimaryCtxRetain", OUT_OF_MEMORY)
    with pytest.raises(
        MissingDependencyError, match=r"says: .*out of memory. See whether `nvidia-"
    ):
        Device()


@pytest.mark.gpu
@pytest.mark.parametrize("last", ["pass", "raise ValueError", "device.close()", "del device"])
def test_a_process_may_just_end(double: Double, last: str) -> None:
    """PyCUDA would complain of a context that is still there, and end the process by a signal."""
    script = f"""
        from gpu.engines import CopyEngine, check, samples
        from hydra_edge.gpu.device import Device
        from hydra_edge.gpu.running import EngineRunner

        device = Device()
        runner = EngineRunner(CopyEngine(device), Device())
        check(runner, samples(4))
        (mean,) = runner.run_on_device({{"x": samples(4)}}, ("mean",))
        {last}
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == ("raise" in last), done.stderr
    assert "PyCUDA" not in done.stderr + done.stdout


@pytest.mark.gpu
def test_a_fork(double: Double) -> None:
    """Says that it cannot work, and leaves what belongs to its parent alone."""
    script = """
        import gc, os
        from gpu.driver.double import Double
        from gpu.engines import CopyEngine, check, samples
        from hydra_edge.errors import ExecutionError
        from hydra_edge.gpu.device import Device
        from hydra_edge.gpu.running import EngineRunner

        device = Device()
        runner = EngineRunner(CopyEngine(device), Device())
        kept = runner.run_on_device({"x": samples(4)}, ("mean",))
        child = os.fork()
        if child == 0:
            before = Double().counts()
            for use in (device.current, lambda: check(runner, samples(4))):
                try:
                    use()
                except ExecutionError as error:
                    print(error, flush=True)
            device.close()
            runner.close()
            del kept, device, runner
            gc.collect()
            os._exit(Double().counts() != before)
        assert os.waitpid(child, 0)[1] == 0
        check(runner, samples(4))
        runner.close()
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert re.search(r"was used in process \d+, a fork of \d+\. CUDA does not", first)
    assert "'spawn', and load the engine in each." in first


def failing_import(setup: str) -> str:
    """What `Device()` says in a fresh process."""
    script = f"""
        import sys
        {setup}
        from hydra_edge.errors import MissingDependencyError
        from hydra_edge.gpu.device import Device
        try:
            Device()
        except MissingDependencyError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_without_pycuda() -> None:
    said = failing_import("sys.modules['pycuda'] = None")
    assert "'pycuda" in said
    assert "Run: pip install 'hydra-edge[tensorrt]'" in said


@pytest.mark.skipif(driver_double.missing() is not None, reason=str(driver_double.missing()))
@pytest.mark.skipif(driver_double.is_driver_here(), reason="NVIDIA's driver is installed")
def test_without_a_driver() -> None:
    said = failing_import("")
    assert "PyCUDA cannot load NVIDIA's driver. It says: libcuda.so.1: cannot open" in said
    assert "compile for 'cpu'" in said


def test_importing_loads_nothing() -> None:
    script = (
        "import sys, hydra_edge.gpu.running, hydra_edge.gpu.tensorrt_engine, hydra_edge.gpu.fit; "
        "print(sorted({'pycuda', 'cuda', 'tensorrt', 'tensorrt_rtx', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
