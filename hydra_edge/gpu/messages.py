"""What TensorRT says while it works, kept: for exceptions, and for notes about an engine."""

from __future__ import annotations

import functools
import logging
import re
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import types

_log = logging.getLogger(__name__)
_MOST = 2000  # characters in an exception
_KEPT = 500  # messages of a kind: a session may live for weeks
_SKIPPED = re.compile(r"skipping tactic|insufficient memory", re.IGNORECASE)
_ON_THE_GPU = re.compile(
    r"[Ll]ayer (.+?) is not supported on DLA|DLA Layer (.+?) does not support|"
    r"[Ll]ayer '?(.+?)'?:? [Uu]nsupported on DLA|Switching (.+?) device type to GPU"
)


class Messages:
    """What TensorRT says from now on, while this object lives.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.

    Attributes:
        logger: What TensorRT's factories want.
        errors: What it called errors, the newest last, as far as there is room.
        warnings: What it called warnings.
    """

    def __init__(self, trt: types.ModuleType) -> None:
        self.errors: deque[str] = deque(maxlen=_KEPT)
        self.warnings: deque[str] = deque(maxlen=_KEPT)
        speaker = _speaker(trt)
        self.logger = speaker.logger
        speaker.add(self)

    def words(self) -> str:
        """Its last errors, or where it named none its warnings, short enough for a message."""
        said = dict.fromkeys(reversed(self.errors or self.warnings))
        return " ".join(reversed(said))[-_MOST:] or "It gave no reason."

    def skipped_tactics(self) -> int:
        """How many ways to compute a layer were left out for want of memory."""
        return sum(1 for text in (*self.warnings, *self.errors) if _SKIPPED.search(text))

    def left_to_the_gpu(self) -> tuple[str, ...]:
        """Layers that were meant for a DLA and run on the GPU."""
        found = (_ON_THE_GPU.search(text) for text in self.warnings)
        return tuple(dict.fromkeys(next(filter(None, match.groups())) for match in found if match))


class _Speaker:
    """The one logger of a module. TensorRT keeps the first that it is given, for all that follows.

    So it outlives every engine, and tells all that listen.
    """

    def __init__(self, trt: types.ModuleType) -> None:
        self._listeners: weakref.WeakSet[Messages] = weakref.WeakSet()
        self._lock = threading.Lock()
        Severity = trt.ILogger.Severity  # noqa: N806
        severe = {int(Severity.INTERNAL_ERROR), int(Severity.ERROR)}
        warning = int(Severity.WARNING)
        hear = self._hear

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                text = message.strip()
                _log.debug("%s", text)
                if int(severity) in severe:
                    hear(text, is_error=True)
                elif int(severity) == warning:
                    hear(text, is_error=False)

        self.logger: Any = Logger()

    def add(self, listener: Messages) -> None:
        with self._lock:
            self._listeners.add(listener)

    def _hear(self, text: str, *, is_error: bool) -> None:
        with self._lock:
            for listener in self._listeners:
                (listener.errors if is_error else listener.warnings).append(text)


@functools.cache
def _speaker(trt: types.ModuleType) -> _Speaker:
    return _Speaker(trt)
