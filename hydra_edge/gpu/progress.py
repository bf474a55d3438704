"""Progress of a build, and a way to stop it.

TensorRT builds for minutes inside one call. It runs on a thread of its own here, so that Python
sees Ctrl-C; the monitor then tells TensorRT to stop at the next step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

if TYPE_CHECKING:
    import types

_Result = TypeVar("_Result")
_POLL_SECONDS = 0.1


class Watch:
    """A progress monitor.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        shown: Whether to draw bars on stderr, where that is a terminal.

    Attributes:
        monitor: What TensorRT's builder configuration wants.
        phases: The phases that began, in order.
    """

    def __init__(self, trt: types.ModuleType, *, shown: bool = False) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._tasks: dict[str, TaskID] = {}
        self._stop = threading.Event()
        self.phases: list[str] = []
        watch = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                watch._start(phase, parent, steps)

            def step_complete(self, phase: str, step: int) -> bool:
                return watch._step(phase, step)

            def phase_finish(self, phase: str) -> None:
                watch._finish(phase)

        self.monitor: Any = Monitor()

    def run(self, build: Callable[[], _Result]) -> _Result:
        """Call ``build`` on a thread; returns what it returns, raises what it raises.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the build has ended.
        """
        results: list[_Result] = []
        failures: list[BaseException] = []

        done = threading.Event()  # an interrupted join would take the thread for ended

        def call() -> None:
            try:
                results.append(build())
            except BaseException as exc:  # it is raised again, on the caller's thread
                failures.append(exc)
            finally:
                done.set()

        thread = threading.Thread(target=call, name="build")
        with self._bars:
            thread.start()
            try:
                while not done.wait(_POLL_SECONDS):
                    pass
            except KeyboardInterrupt:
                self._stop.set()
                done.wait()
                thread.join()
                raise
        thread.join()
        if failures:
            raise failures[0]
        return results[0]

    def _start(self, phase: str, parent: str | None, steps: int) -> None:
        self.phases.append(phase)
        indent = "  " if parent else ""
        self._tasks[phase] = self._bars.add_task(indent + phase, total=steps)

    def _step(self, phase: str, step: int) -> bool:
        if phase in self._tasks:
            self._bars.update(self._tasks[phase], completed=step + 1)
        return not self._stop.is_set()

    def _finish(self, phase: str) -> None:
        if phase in self._tasks:
            self._bars.remove_task(self._tasks.pop(phase))
