"""What TensorRT says while it works, kept: for exceptions, and for notes about an engine."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import types

_log = logging.getLogger(__name__)
_MOST = 2000  # characters in an exception
_SKIPPED = re.compile(r"skipping tactic|insufficient memory", re.IGNORECASE)
_ON_THE_GPU = re.compile(
    r"[Ll]ayer (.+?) is not supported on DLA|DLA Layer (.+?) does not support|"
    r"[Ll]ayer '?(.+?)'?:? [Uu]nsupported on DLA|Switching (.+?) device type to GPU"
)


class Messages:
    """A logger for TensorRT that remembers.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.

    Attributes:
        logger: What TensorRT's factories want.
        errors: What it called errors, in order.
        warnings: What it called warnings.
    """

    def __init__(self, trt: types.ModuleType) -> None:
        errors: list[str] = []
        warnings: list[str] = []
        Severity = trt.ILogger.Severity  # noqa: N806
        kept = {
            int(Severity.INTERNAL_ERROR): errors,
            int(Severity.ERROR): errors,
            int(Severity.WARNING): warnings,
        }

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                text = message.strip()
                if int(severity) in kept:
                    kept[int(severity)].append(text)
                _log.debug("%s", text)

        self.logger = Logger()
        self.errors, self.warnings = errors, warnings

    def words(self) -> str:
        """Its errors, or where it named none its warnings, short enough for a message."""
        said = list(dict.fromkeys(self.errors or self.warnings))
        return " ".join(said)[:_MOST] or "It gave no reason."

    def skipped_tactics(self) -> int:
        """How many ways to compute a layer were left out for want of memory."""
        return sum(1 for text in (*self.warnings, *self.errors) if _SKIPPED.search(text))

    def left_to_the_gpu(self) -> tuple[str, ...]:
        """Layers that were meant for a DLA and run on the GPU."""
        found = (_ON_THE_GPU.search(text) for text in self.warnings)
        return tuple(dict.fromkeys(next(filter(None, match.groups())) for match in found if match))
