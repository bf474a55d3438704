"""Engines for the tests of what runs engines: one that copies, and our kernels' library as one.

`CopyEngine` takes ``x [B, C]`` and gives ``logits [M, B, C]``, which is x M times, and
``mean [B, C]``, which is x. It is done by copies on the GPU, so it runs on any driver.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hydra_edge.gpu.device import Device
from hydra_edge.gpu.engines import Context, OutOfMemoryError, Tensor
from hydra_edge.gpu.running import EngineRunner

HEADS, WIDTH = 3, 5
Array = npt.NDArray[np.float32]


def samples(count: int) -> Array:
    """Inputs that differ."""
    return np.random.default_rng(count).standard_normal((count, WIDTH)).astype(np.float32)


def check(runner: EngineRunner, x: Array, outputs: tuple[str, ...] = ("logits", "mean")) -> None:
    """A run of a `CopyEngine` gives what it should."""
    for name, found in zip(outputs, runner.run({"x": x}, outputs), strict=True):
        np.testing.assert_array_equal(found, expected(x)[name], err_msg=name)


def expected(x: Array) -> dict[str, Array]:
    """What `CopyEngine` gives for x."""
    return {"logits": np.stack([x] * HEADS), "mean": x}


@dataclass
class CopyEngine:
    """An engine that does what a test tells it to.

    Attributes:
        device: The GPU.
        profiles: Smallest and largest batch of each.
        device_memory_bytes: Scratch memory of a context.
        context_bytes: What each context takes besides.
        refuse: Method of a context that is refused from now on, e.g. ``"execute_async"``.
        raising: What `execute_async` raises from now on, after `raising_after` further runs.
        capturable: What contexts answer.
        waits: Whether runs wait for the stream, which spoils a capture: "and tells", "silently".
        refuse_after: So many further runs, and then one that is refused.
        unknown_sizes: Whether nobody knows how large outputs are.
        on_call: Called where a context is made, runs or is closed, with the name of that.
        gate: Where runs wait.
        arrived: Released by each run that gets there.
        log: What happened.
        contexts: Those that are not closed.
    """

    device: Device
    profiles: tuple[tuple[int, int], ...] = ((1, 8),)
    device_memory_bytes: int = 1024
    context_bytes: int = 0
    dtype: npt.DTypeLike = np.float32
    refuse: str = ""
    raising: BaseException | None = None
    raising_after: int = 0
    capturable: bool = True
    waits: str = ""
    refuse_after: int = -2
    unknown_sizes: bool = False
    on_call: Callable[[str], None] = lambda name: None
    gate: threading.Event | None = None
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    log: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    contexts: int = 0
    closed: bool = False

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (Tensor("x", (-1, WIDTH), np.dtype(self.dtype)),)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        dtype = np.dtype(self.dtype)
        return Tensor("logits", (HEADS, -1, WIDTH), dtype), Tensor("mean", (-1, WIDTH), dtype)

    def create_context(self, profile: int, stream: int, memory: int) -> Context:
        self.on_call("create_context")
        assert (memory != 0) == (self.device_memory_bytes != 0)
        driver = self.device.driver
        if self.context_bytes:
            try:
                held = driver.mem_alloc(self.context_bytes)
            except driver.MemoryError as exc:
                raise OutOfMemoryError(f"no room for a context ({exc})") from exc
        else:
            held = None
        self.log.append(f"context in profile {profile}")
        self.contexts += 1
        return CopyContext(self, profile, held)

    def wait_for(self, runs: int) -> None:
        """Until so many further runs have arrived at the gate."""
        for _ in range(runs):
            assert self.arrived.acquire(timeout=10)

    def words(self) -> str:
        return "The copy engine was told to."

    def close(self) -> None:
        assert not self.contexts
        self.closed = True


class CopyContext:
    """A context of `CopyEngine`. It forgets shapes when the profile changes, as TensorRT does."""

    def __init__(self, engine: CopyEngine, profile: int, held: Any) -> None:
        self.engine, self.profile = engine, profile
        self.held = held
        self.batch: int | None = None
        self.addresses: dict[str, int] = {}

    def set_profile(self, profile: int, stream: int) -> bool:
        self.engine.log.append(f"switch to profile {profile}")
        self.profile, self.batch = profile, None
        return self.engine.refuse != "set_profile"

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, high = self.engine.profiles[self.profile]
        assert name == "x"
        assert tuple(shape[1:]) == (WIDTH,)
        assert low <= shape[0] <= high
        self.batch = shape[0]
        return self.engine.refuse != "set_input_shape"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.batch is not None
        if self.engine.unknown_sizes:
            return (-1, WIDTH)
        return {"logits": (HEADS, self.batch, WIDTH), "mean": (self.batch, WIDTH)}[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self.addresses[name] = address
        return self.engine.refuse != "set_tensor_address"

    def execute_async(self, stream: int) -> bool:
        engine = self.engine
        engine.on_call("execute_async")
        assert self.batch is not None
        if engine.raising is not None:
            if engine.raising_after <= 0:
                raise engine.raising
            engine.raising_after -= 1
        engine.refuse_after -= 1
        if engine.refuse == "execute_async" or engine.refuse_after == -1:
            return False
        engine.running += 1
        engine.most_running = max(engine.most_running, engine.running)
        engine.arrived.release()
        if engine.gate is not None:
            engine.gate.wait(10)
        size = self.batch * WIDTH * np.dtype(engine.dtype).itemsize
        x, logits, mean = (self.addresses[name] for name in ("x", "logits", "mean"))
        for to in (mean, *(logits + head * size for head in range(HEADS))):
            copy_on_stream(to, x, size, stream)
        engine.running -= 1
        if engine.waits:
            status = _library().cuStreamSynchronize(ctypes.c_void_p(stream))
            if status and engine.waits == "and tells":
                raise engine.device.driver.LogicError("cuStreamSynchronize failed")
        return True

    def is_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def close(self) -> None:
        self.engine.on_call("close")
        self.engine.contexts -= 1
        if self.held is not None:
            self.held.free()


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def copy_on_stream(to: int, start: int, size: int, stream: int) -> None:
    """A copy on the GPU, on a stream that is known by its handle alone."""
    arguments = (ctypes.c_uint64(to), ctypes.c_uint64(start), ctypes.c_size_t(size))
    status = _library().cuMemcpyDtoDAsync_v2(*arguments, ctypes.c_void_p(stream))
    assert status == 0, status
