"""What turns a graph into a program and runs it. One file per backend, found by file name."""

from __future__ import annotations

import importlib
import pkgutil

from hydra_edge.errors import DeviceMismatchError
from hydra_edge.programs import Backend
from hydra_edge.targets import Target


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
