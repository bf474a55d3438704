"""What engines can be compiled for: one row per target, plain data.

A target appears here once an engine for it can be built by a backend in ``hydra_edge/backends``.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_edge.errors import InputError


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        name: What the user types, e.g. ``"cpu"``.
        backend: File name (without ``.py``) under ``hydra_edge/backends``.
        precisions: Precisions the backend runs, the most exact first.
        description: One line for ``hydra-edge targets``.
    """

    name: str
    backend: str
    precisions: tuple[str, ...]
    description: str


TARGETS = (
    Target(
        "cpu",
        "onnxruntime",
        ("fp32", "fp16", "int8"),
        "Any CPU that ONNX Runtime supports. fp16 is stored as fp16 and mostly computed as fp32.",
    ),
)


def find(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        InputError: There is no such target.
    """
    for target in TARGETS:
        if target.name == name:
            return target
    known = ", ".join(target.name for target in TARGETS)
    raise InputError(
        f"Unknown target '{name}'.",
        f"This version compiles for: {known}.",
        "Pick one of those; `hydra-edge targets` lists them with their precisions.",
    )
