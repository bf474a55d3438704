"""What a user names as ``pkg.module:function``: networks, data, augmentations."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra_edge.errors import InputError


def find(name: str) -> Callable[..., Any]:
    """Import ``pkg.module:function``, without calling it.

    The current directory is importable meanwhile, as with ``python -m``.

    Args:
        name: Module and attribute, with a colon between them.

    Raises:
        InputError: The text is malformed, or there is no such module or function.
    """
    with _current_directory_importable():
        return _find(name)


def call(name: str) -> object:
    """Import ``pkg.module:function`` and call it without arguments.

    Returns:
        What it returned.

    Raises:
        InputError: As `find`; or the function raised an error.
    """
    with _current_directory_importable():
        build = _find(name)
        try:
            return build()
        except Exception as exc:
            raise _raised(name, exc) from exc


def _find(name: str) -> Callable[..., Any]:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise InputError(
            f"'{name}' does not name a factory.",
            "A factory is written as module, colon, function.",
            "Write it like 'models.resnet:small'.",
        )
    try:
        found: object = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as exc:
        absent = exc.name if isinstance(exc, ModuleNotFoundError) else None
        if absent and f"{module_name}.".startswith(f"{absent}."):
            raise InputError(
                f"Module '{module_name}' cannot be found.",
                f"It is neither installed nor a file under '{Path.cwd()}'.",
                "Run from the folder that holds it, or install its package.",
            ) from exc
        raise _raised(name, exc) from exc
    if not callable(found):
        raise InputError(
            f"Module '{module_name}' has no function '{attribute}'.",
            "A factory is called to build a new module.",
            "Check the spelling after the colon.",
        )
    return found


def _raised(name: str, exc: Exception) -> InputError:
    return InputError(
        f"Loading '{name}' raised {type(exc).__name__}: {exc}.",
        "Its module is imported, then the function is called without arguments.",
        "Correct that code, or name a function that takes no arguments.",
    )


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    entry = str(Path.cwd())
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the imported file may have removed it itself
            sys.path.remove(entry)
