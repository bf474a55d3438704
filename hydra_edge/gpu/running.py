"""`EngineRunner`: an engine on a GPU, for any number of callers at once."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import DeviceMismatchError, ExecutionError, InputError
from hydra_edge.gpu.arrays import DeviceArray
from hydra_edge.gpu.buffers import MAPPED_BYTES
from hydra_edge.gpu.capture import Graphs
from hydra_edge.gpu.device import Device, leave_to_parent
from hydra_edge.gpu.engines import Engine, OutOfMemoryError
from hydra_edge.gpu.lanes import Feeds, Lane

Array = npt.NDArray[np.generic]
_T = TypeVar("_T")
_RETRY_SECONDS = 30.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much a runner may set up.

    Attributes:
        lanes: Callers that run at once; further ones wait. Each costs the engine's scratch memory
            and buffers for its largest batch.
        graphs: CUDA graphs per lane; 0 for none.
        mapped_bytes: Largest buffer that a GPU which shares memory with the CPU, as on a Jetson,
            reads and writes where it is. Larger ones are copied: several passes over them cost
            more than that.
    """

    lanes: int = 4
    graphs: int = 8
    mapped_bytes: int = MAPPED_BYTES


class EngineRunner:
    """Runs an engine; implements `hydra_edge.programs.Runner`. It owns engine and device.

    There is a lane per concurrent caller, made when it is first needed. Where memory is too short
    for another one, callers wait for those there are; later it is tried again.

    Args:
        engine: The program.
        device: The GPU it is on.
        limits: How much to set up.
        clock: Seconds, of which only differences count.

    Attributes:
        threads: CPU threads that one run takes.

    Raises:
        DeviceMismatchError: There is not even memory for one lane.
    """

    threads = 1

    def __init__(
        self,
        engine: Engine,
        device: Device,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = _Pool(engine, device, limits or Limits(), clock)
        # A runner that nobody closed has no caller any more, so this waits for none. At exit one
        # may be left, in a daemon's thread.
        self._close = weakref.finalize(self, self._pool.close)
        self._close.atexit = False

    @property
    def lanes(self) -> int:
        """Callers that may run at once: the limit, or less where memory was short."""
        return self._pool.lanes

    @property
    def plain_because(self) -> str | None:
        """Why some or all runs are launched without a CUDA graph; None while none is."""
        return self._pool.graphs.plain_because

    def run(self, feeds: Feeds, outputs: Sequence[str]) -> list[Array]:
        """Run once.

        Args:
            feeds: Arrays by input name: of numpy, or `Foreign` ones on the GPU.
            outputs: Which outputs to return.

        Returns:
            Arrays on the CPU.

        Raises:
            InputError: Names, shapes or dtypes do not fit, or the runner is closed.
            ExecutionError: The device failed. There is no result then; the next run may work,
                unless the error says otherwise.
        """
        return self._pool.lend(lambda lane: lane.run(feeds, tuple(outputs)))

    def run_on_device(self, feeds: Feeds, outputs: Sequence[str]) -> list[DeviceArray]:
        """Run once and leave the outputs on the GPU; see `run`."""
        return self._pool.lend(lambda lane: lane.run_on_device(feeds, tuple(outputs)))

    def close(self) -> None:
        """Wait for runs under way, refuse further ones, and release everything."""
        self._close()


class _Pool:
    """The lanes of a runner, which it does not know: so it can outlive one that nobody closed."""

    def __init__(
        self, engine: Engine, device: Device, limits: Limits, clock: Callable[[], float]
    ) -> None:
        self.lanes = limits.lanes
        self.graphs = Graphs(limits.graphs)
        self._engine, self._device, self._limits, self._clock = engine, device, limits, clock
        self._changed = threading.Condition()
        self._idle: list[Lane] = []
        self._made = 0
        self._making = False
        self._closed = False
        self._lost: str | None = None  # why the device does nothing any more
        self._retry_at = 0.0  # when there may be memory for more lanes again
        self._told: set[int] = set()
        try:
            self._give_back(self._borrow())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See `EngineRunner.close`."""
        if self._device.is_forked:
            leave_to_parent(self)
            return
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            while self._making or len(self._idle) < self._made:
                self._changed.wait()
        with self._device.current():
            for lane in self._idle:
                lane.close()
            self._idle.clear()
            self._engine.close()
        self._device.close()

    def lend(self, work: Callable[[Lane], _T]) -> _T:
        """Do something with a lane, in the device's context."""
        self._device.require_own_process()
        lane = self._borrow()
        try:
            with self._device.current():
                result = work(lane)
        except InputError:  # found before anything ran
            self._give_back(lane)
            raise
        except BaseException as exc:
            self._discard(lane, exc)
            raise
        self._give_back(lane)
        return result

    def _borrow(self) -> Lane:
        """A lane that nobody else uses, a new one if there may be one more."""
        while True:
            with self._changed:
                while not (self._closed or self._lost or self._idle or self._may_make()):
                    self._changed.wait()
                if self._closed:
                    raise InputError(
                        "The session is closed.",
                        "Its program was released.",
                        "Load the engine again.",
                    )
                if self._lost:
                    raise ExecutionError(
                        "The GPU is lost to this process.",
                        f"After this, CUDA refuses everything: {self._lost}",
                        "Restart the process. If it happens again, see what `dmesg` says.",
                    )
                if self._idle:
                    return self._idle.pop()
                self._making = True
            lane = self._make()
            if lane is not None:
                return lane

    def _may_make(self) -> bool:
        """One at a time: where memory is short, the second would only fail, too."""
        return self._made < self.lanes and not self._making

    def _make(self) -> Lane | None:
        """A new lane; None where there is no memory for it, but others to wait for."""
        lane, short = None, None
        try:
            with self._device.current():
                lane = Lane(self._device, self._engine, self.graphs, self._limits.mapped_bytes)
        except OutOfMemoryError as exc:
            short = exc
        except ExecutionError as exc:
            self._note_loss(exc)
            raise
        finally:
            with self._changed:
                self._making = False
                self._made += lane is not None
                made = self._made
                self._changed.notify_all()
        if short is not None:
            if not made:
                raise self._too_large(short) from short
            self.lanes, self._retry_at = made, self._clock() + _RETRY_SECONDS
            _log.log(
                logging.DEBUG if made in self._told else logging.WARNING,
                "%s has no memory for more than %d concurrent runs (%s); further callers wait.",
                *(self._device.name, made, short),
            )
            self._told.add(made)
        return lane

    def _too_large(self, exc: OutOfMemoryError) -> DeviceMismatchError:
        free, total = self._device.free_bytes() / 2**20, self._device.total_bytes / 2**20
        needed = self._engine.device_memory_bytes / 2**20
        return DeviceMismatchError(
            f"The engine finds no memory on {self._device.name}: {exc}.",
            f"It needs {needed:.0f} MiB to work in and buffers for its largest batch; "
            f"{free:.0f} of {total:.0f} MiB are free.",
            "Free some, or compile the engine for a smaller largest batch.",
        )

    def _give_back(self, lane: Lane) -> None:
        with self._changed:
            self._idle.append(lane)
            self._changed.notify()
            if self.lanes < self._limits.lanes and self._clock() >= self._retry_at:
                self.lanes = self._limits.lanes
                self._changed.notify_all()
            if self._closed:
                self._changed.notify_all()

    def _note_loss(self, failure: BaseException) -> None:
        with self._device.current():
            if not self._device.answers():
                self._lost = self._lost or str(failure)

    def _discard(self, lane: Lane, failure: BaseException) -> None:
        """A failed run may have left anything behind: the next caller gets a new lane."""
        try:
            with self._device.current():
                lane.close()
            self._note_loss(failure)
        finally:
            with self._changed:
                self._made -= 1
                self._changed.notify_all()
