"""What turns a graph into a program and runs it. One file per backend, found by file name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx

from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.errors import DeviceMismatchError
from hydra_edge.targets import Target

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class BuildRequest:
    """What a program is built for.

    Attributes:
        target: The device.
        inputs: Declared inputs; axis 0 of each is the batch.
        batch: Smallest, best and largest batch.
    """

    target: Target
    inputs: tuple[TensorSpec, ...]
    batch: tuple[int, int, int]


class Runner(Protocol):
    """A loaded program. ``run`` may be called from several threads."""

    threads: int

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once on inputs of the declared names, shapes and dtypes."""
        ...

    def close(self) -> None:
        """Release what the program holds; ``run`` is not called again."""
        ...


class Backend(Protocol):
    """What every module in this package offers."""

    LOWERINGS: tuple[str, ...]
    RUNS_HERE: bool  # whether `open` runs what `build` makes; else a program is built unseen

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that decide what a program does."""
        ...

    def build(self, model: onnx.ModelProto, request: BuildRequest) -> bytes:
        """Compile one lowered model.

        Raises:
            CompilationError: The backend refused it; its own words are in the message.
        """
        ...

    def open(self, payload: bytes, threads: int | None) -> Runner:
        """Load what `build` made.

        Raises:
            CompilationError: The payload does not load here.
        """
        ...


def build_for(target: Target) -> bool:
    """Whether this version builds engines for a target."""
    return target.backend in _names()


def _names() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def find(name: str) -> Backend:
    """Load a backend by file name.

    Raises:
        DeviceMismatchError: This version has no such backend.
    """
    known = _names()
    if name not in known:
        raise DeviceMismatchError(
            f"The engine needs the backend '{name}'.",
            f"This version of hydra-edge has: {', '.join(known)}.",
            "Upgrade hydra-edge, or compile for a target listed by `hydra-edge targets`.",
        )
    backend: Backend = importlib.import_module(f"{__name__}.{name}")
    return backend
