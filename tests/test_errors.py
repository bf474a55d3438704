"""The exception tree is the one drawn at the top of its file."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from hydra_edge import errors
from hydra_edge.errors import HydraError, InputError, MissingDependencyError, require

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, HydraError)
]


def drawn() -> dict[str, tuple[str, int]]:
    """Parent and exit code by class, read off the module's docstring."""
    found: dict[str, tuple[str, int]] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([ │├└─]*)(\w*Error)\b.*?\s(\d)\s", line)
        if match:
            depth, name, code = len(match[1]), match[2], int(match[3])
            stack = [(d, n) for d, n in stack if d < depth]
            found[name] = (stack[-1][1] if stack else "Exception", code)
            stack.append((depth, name))
    return found


def test_the_tree_is_the_drawing() -> None:
    real = {c.__name__: (c.__bases__[0].__name__, c.exit_code) for c in CLASSES}
    assert drawn() == real


@pytest.mark.parametrize("kind", CLASSES)
def test_three_parts(kind: type[HydraError]) -> None:
    error = kind("This happened.", "It is bad.", "Do that.")
    assert str(error) == "This happened. It is bad. Do that."
    assert (error.what, error.why, error.fix) == ("This happened.", "It is bad.", "Do that.")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    for clone in (again, copy.copy(error)):
        assert type(clone) is kind
        assert clone.__dict__ == error.__dict__


def test_input_errors_are_value_errors() -> None:
    assert issubclass(InputError, ValueError)


def test_every_class_says_what_it_is() -> None:
    assert all(kind.__doc__ for kind in CLASSES)


def test_require_gives_the_module() -> None:
    assert require("json") is __import__("json")


@pytest.mark.parametrize(
    ("extra", "command"),
    [("train", r"pip install 'hydra-edge\[train\]'$"), (None, "pip install 'hydra-edge'$")],
)
def test_require_names_the_command(extra: str | None, command: str) -> None:
    with pytest.raises(
        MissingDependencyError, match="'no_such_library' is not.*" + command
    ) as info:
        require("no_such_library", extra)
    assert isinstance(info.value.__cause__, ModuleNotFoundError)


def test_require_names_what_is_missing_further_down(tmp_path: object) -> None:
    with pytest.raises(MissingDependencyError, match=r"'json.nothing' is not installed"):
        require("json.nothing")
