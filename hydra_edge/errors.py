"""Every error hydra-edge raises on purpose, and the exit code the CLI gives it.

    HydraError                          1   anything below, caught at once
    ├── InputError (ValueError)         1   arrays or arguments that do not fit what was declared
    │   └── UsageError                  2   options of a command that do not make sense
    ├── ArtifactError                   1   a file that is missing, damaged, changed or too new
    ├── GraphError                      1   a model the stage at hand cannot take
    │   ├── ExportError                 1   torch could not be turned into ONNX
    │   ├── QuantizationError           1   calibration or Q/DQ insertion failed
    │   └── CompilationError            1   a backend refused the graph
    ├── DistillationError               1   training cannot start or go on
    ├── GateError                       3   accuracy or uncertainty drifted too far
    ├── DeviceMismatchError             4   the engine was built for another device
    ├── ExecutionError                  1   the device failed while it ran a program
    ├── PerformanceGateError            5   slower than the caller allowed
    └── MissingDependencyError          6   a library or a device is not there

A message has three parts: what happened (with the value), why, and what to do about it.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class HydraError(Exception):
    """Base of every deliberate error.

    Args:
        what: What happened, with the offending value.
        why: Why that is a problem.
        fix: What the user can do now.
    """

    exit_code = 1

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what} {why} {fix}")
        self.what, self.why, self.fix = what, why, fix

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.fix)


class InputError(HydraError, ValueError):
    """Arrays or arguments that do not fit what was declared."""


class UsageError(InputError):
    """Options of a command that do not make sense."""

    exit_code = 2


class ArtifactError(HydraError):
    """A file that is missing, damaged, tampered with or written by a newer version."""


class GraphError(HydraError):
    """A model that the stage at hand cannot take."""


class ExportError(GraphError):
    """A torch module that could not be turned into ONNX."""


class QuantizationError(GraphError):
    """Calibration or Q/DQ insertion failed."""


class CompilationError(GraphError):
    """A backend refused the graph."""


class DistillationError(HydraError):
    """Training cannot start or cannot go on."""


class GateError(HydraError):
    """Accuracy or uncertainty drifted further than the gates allow."""

    exit_code = 3


class DeviceMismatchError(HydraError):
    """The engine was built for another device."""

    exit_code = 4


class ExecutionError(HydraError):
    """The device failed while it ran a program."""


class PerformanceGateError(HydraError):
    """Slower than the caller allowed."""

    exit_code = 5


class MissingDependencyError(HydraError):
    """A library or a device that the call needs is not there."""

    exit_code = 6


def require(module: str, extra: str | None = None) -> ModuleType:
    """Import an optional library, or say exactly how to install it.

    Args:
        module: Dotted module name, e.g. ``"torch"``.
        extra: The hydra-edge extra that brings it, e.g. ``"train"``; None for the base install.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        package = f"hydra-edge[{extra}]" if extra else "hydra-edge"
        raise MissingDependencyError(
            f"The library '{exc.name}' is not installed.",
            f"This step imports '{module}', which is not part of what is installed here.",
            f"Run: pip install '{package}'",
        ) from exc
