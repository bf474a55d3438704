"""CUDA graphs: work that was put on a stream once is launched again with one call.

PyCUDA has none. cuda-python's bindings do, and share contexts and stream handles with it.
"""

from __future__ import annotations

import gc
import importlib
import logging
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra_edge.errors import HydraError

_log = logging.getLogger(__name__)
# Held while a lane is made, is closed or captures: others' calls may disturb a capture, and all who
# use a device share its context. Finalizers may come while it is held, so it is reentrant.
UNDISTURBED = threading.RLock()


class CaptureError(Exception):
    """Why there is no graph, as a sentence. Never leaves a runner."""


class Graph:
    """Captured work. The device's context is current in use."""

    def __init__(self, recorder: Recorder, executable: Any) -> None:
        self._recorder, self._executable = recorder, executable
        self._launch = recorder.driver.cuGraphLaunch

    def launch(self, stream: int) -> None:
        """Put all of it on a stream.

        Raises:
            CaptureError: The driver refused.
        """
        (status,) = self._launch(self._executable, stream)
        if status:
            raise CaptureError(f"cuGraphLaunch says {status.name}.")

    def free(self) -> None:
        """Release it."""
        self._recorder.call("cuGraphExecDestroy", self._executable)


class Recorder:
    """Captures what is put on a stream.

    Attributes:
        driver: The module of cuda-python's bindings.

    Raises:
        CaptureError: The bindings are not installed, or do not load.
    """

    def __init__(self) -> None:
        self.driver = _load_bindings()

    def record(self, stream: int, enqueue: Callable[[], None]) -> Graph:
        """Capture what ``enqueue`` puts on a stream, without running it.

        Raises:
            CaptureError: Something in it cannot be captured; the stream is as before.
        """
        # Other threads go on allocating meanwhile, which the stricter mode would forbid.
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", stream, mode)
        try:
            with _without_collection():
                enqueue()
        except HydraError as exc:
            self._end(stream)
            raise CaptureError(f"While it was captured: {exc}") from exc
        except BaseException:
            self._end(stream)
            raise
        (graph,) = self.call("cuStreamEndCapture", stream)
        try:
            (executable,) = self.call("cuGraphInstantiate", graph, 0)
        finally:
            self.call("cuGraphDestroy", graph)
        return Graph(self, executable)

    def _end(self, stream: int) -> None:
        """Leave capture mode; whatever was captured is of no use."""
        status, graph = self.driver.cuStreamEndCapture(stream)
        if not status:
            self.call("cuGraphDestroy", graph)

    def call(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """Call the driver and judge its status."""
        try:
            status, *results = getattr(self.driver, function)(*arguments)
        except RuntimeError as exc:  # the driver is older than the bindings and lacks the function
            raise CaptureError(f"cuda-python says: {exc}.") from exc
        if status:
            raise CaptureError(f"{function} says {status.name}.")
        return tuple(results)


@contextmanager
def _without_collection() -> Iterator[None]:
    """No finalizer of garbage frees memory meanwhile, which would end the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _load_bindings() -> types.ModuleType:
    try:
        try:
            return importlib.import_module("cuda.bindings.driver")
        except ModuleNotFoundError:
            return importlib.import_module("cuda.cuda")  # before cuda-python 12.6
    except ImportError as exc:
        raise CaptureError(
            f"cuda-python's bindings do not load ({exc}): pip install 'hydra-edge[tensorrt]'."
        ) from exc


class Graphs:
    """Whether runs become graphs, and why not where they do not.

    Args:
        most: Graphs per execution context at most; 0 for none.

    Attributes:
        recorder: What captures them; None if nothing does.
        most: Graphs per execution context at most.
        plain_because: Why some or all runs are launched without a graph; None while none is.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.plain_because: str | None = None
        self.recorder: Recorder | None = None
        self._told: set[str] = set()
        if not most:
            self.plain_because = "Graphs are switched off."
            return
        try:
            self.recorder = Recorder()
        except CaptureError as exc:
            self.explain(str(exc))

    def explain(self, why: str) -> None:
        """Keep the reason for a run without a graph, and log it, once."""
        self.plain_because = why
        if why not in self._told:
            self._told.add(why)
            _log.warning("Runs go without a CUDA graph, which takes longer. %s", why)
