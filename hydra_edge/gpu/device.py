"""A GPU through PyCUDA: its primary context, which other libraries share, and what it is.

PyCUDA keeps a stack of contexts per thread, so the context is pushed and popped around each use and
nothing is left behind in a caller's thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import types
import weakref
from typing import Any

from hydra_edge.errors import ExecutionError, MissingDependencyError, require

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def load_driver() -> types.ModuleType:
    """PyCUDA's interface to the CUDA driver.

    Raises:
        MissingDependencyError: PyCUDA or NVIDIA's driver is not installed.
    """
    try:
        return require("pycuda.driver", "tensorrt")
    except ImportError as exc:
        raise MissingDependencyError(
            "PyCUDA cannot load NVIDIA's driver.",
            f"It says: {exc}.",
            "Install the driver (on a Jetson it comes with JetPack), or compile for 'cpu'.",
        ) from exc


class Device:
    """A GPU, held until it is closed and the last array on it is gone.

    Args:
        ordinal: Which GPU.

    Attributes:
        driver: The module ``pycuda.driver``.
        ordinal: Which GPU.
        name: What it is called.
        compute_capability: 87 for 8.7.
        total_bytes: Its memory.
        integrated: Whether it shares memory with the CPU, as on a Jetson.
        driver_version: The CUDA version that the driver speaks, e.g. ``"13.0"``.

    Raises:
        MissingDependencyError: PyCUDA, the driver or the GPU is not there.

    Example:
        >>> device = Device()  # doctest: +SKIP
        >>> with device.current():  # doctest: +SKIP
        ...     memory = device.driver.mem_alloc(16)
    """

    def __init__(self, ordinal: int = 0) -> None:
        self.driver: Any = load_driver()
        self.ordinal = ordinal
        try:
            self.driver.init()
            handle = self.driver.Device(ordinal)
            version = self.driver.get_driver_version()
            self._context = handle.retain_primary_context()
        except self.driver.Error as exc:
            raise MissingDependencyError(
                f"GPU {ordinal} cannot be used.",
                f"The CUDA driver says: {exc}.",
                "See whether `nvidia-smi` finds it, and whether the driver is newer than CUDA.",
            ) from exc
        attribute = self.driver.device_attribute
        self.name = str(handle.name())
        major, minor = handle.compute_capability()
        self.compute_capability = 10 * int(major) + int(minor)
        self.total_bytes = int(handle.total_memory())
        self.integrated = bool(handle.get_attribute(attribute.INTEGRATED)) and bool(
            handle.get_attribute(attribute.CAN_MAP_HOST_MEMORY)
        )
        self.driver_version = f"{version // 1000}.{version % 1000 // 10}"
        self._scope = _Scope(self._context, self.driver.Context.pop)
        self._process = os.getpid()
        self._give_back = weakref.finalize(self, _give_back, self._context, self._process)
        # Popping from a list is atomic: the finalizer of an array may come at any time.
        self._holders = [None]
        self._open = [None]

    def current(self) -> _Scope:
        """A scope in which this device's context is the calling thread's.

        Raises:
            ExecutionError: The device is closed, or this is a fork of the process that opened it.
        """
        self.require_own_process()
        if not self._open:
            raise ExecutionError(
                f"{self.name} was used after it was closed.",
                "Its context was given back.",
                "Open the engine again.",
            )
        return self._scope

    @property
    def is_forked(self) -> bool:
        """Whether this is a fork of the process that opened it, where CUDA does not work."""
        return os.getpid() != self._process

    def require_own_process(self) -> None:
        """Check that this process opened it.

        Raises:
            ExecutionError: This is a fork of the process that did.
        """
        if self.is_forked:
            raise ExecutionError(
                f"{self.name} was used in process {os.getpid()}, a fork of {self._process}.",
                "CUDA does not work in a fork of a process that has used it.",
                "Start processes with multiprocessing's 'spawn', and load the engine in each.",
            )

    def answers(self) -> bool:
        """Whether the driver still works; its context is current.

        After an illegal address, say, it refuses everything until the process ends.
        """
        try:
            self.driver.mem_get_info()
        except self.driver.Error:
            return False
        return True

    def free_bytes(self) -> int:
        """Memory that is free now."""
        with self.current():
            free, _ = self.driver.mem_get_info()
        return int(free)

    def hold(self) -> _Scope:
        """Keep the context alive past `close`, until as many calls of `release`.

        Returns:
            A scope like that of `current`, for use after `close`.
        """
        self._holders.append(None)
        return self._scope

    def release(self) -> None:
        """Undo one `hold`."""
        self._holders.pop()
        if not self._holders:
            self._give_back()  # once, whoever comes first

    def close(self) -> None:
        """Give the context back. Closing twice is fine."""
        with contextlib.suppress(IndexError):
            self._open.pop()
            self.release()

    def __repr__(self) -> str:
        return f"Device({self.ordinal}, {self.name}, sm_{self.compute_capability})"


def _give_back(context: Any, process: int) -> None:
    if os.getpid() != process:
        leave_to_parent(context)
        return
    # PyCUDA lets go of a context only in the thread that retained it, or where it is current;
    # and it leaves it on the driver's stack, where the next user of CUDA would find it dead.
    context.push()
    ctypes.CDLL(_LIBRARY).cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    context.detach()


def leave_to_parent(owner: object) -> None:
    """In a fork, keep what belongs to the parent for ever: PyCUDA would destroy it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


class Stream:
    """A stream of its own, which waits for no other and destroys itself where it is told to.

    PyCUDA destroys its streams with their last reference, which may be the traceback of an error,
    in a thread where it cannot: so the only reference is here.
    """

    def __init__(self, device: Device) -> None:
        self.raw = device.driver.Stream(_NON_BLOCKING)
        self.handle = int(self.raw.handle)

    def synchronize(self) -> None:
        """Wait until everything on it is done."""
        self.raw.synchronize()

    def destroy(self) -> None:
        """Destroy it; the device's context is current."""
        self.raw = None


class _Scope:
    """Pushes a context and pops it: a class, because a generator costs a microsecond more."""

    __slots__ = ("_pop", "_push")

    def __init__(self, context: Any, pop: Any) -> None:
        self._push, self._pop = context.push, pop

    def __enter__(self) -> None:
        self._push()

    def __exit__(self, *raised: object) -> None:
        self._pop()
