"""Factories by name; tests/test_ensembles.py has those that build modules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hydra_edge import factories
from hydra_edge.errors import InputError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_here.py").write_text(
        "calls = []\nnumber = 3\n"
        "def make():\n    calls.append(1)\n    return [4]\n"
        "def fails():\n    raise OSError('no such disk')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "made_here", raising=False)
    return "made_here"


def test_functions_are_found_and_called(project: str) -> None:
    path = list(sys.path)
    found = factories.find(f"{project}:make")
    assert sys.modules[project].calls == []
    assert factories.call(f"{project}:make") == found() == [4]
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("made_here", "does not name a factory"),
        ("made_here:nothing", "has no function 'nothing'"),
        ("made_here:number", "has no function 'number'"),
        ("not_there.at_all:make", "Module 'not_there.at_all' cannot be found"),
        ("made_here:fails", "Loading 'made_here:fails' raised OSError: no such disk"),
    ],
)
def test_names_that_cannot_be_used_say_why(project: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        factories.call(name)
