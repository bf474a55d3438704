"""Checkpoints: what is written is read back; tests/test_distillation.py stops and resumes runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from students import make_student

from hydra_edge import checkpoints
from hydra_edge.errors import ArtifactError, DistillationError

IDENTITY = {"config": "a", "data": "b"}


def written(folder: Path) -> torch.optim.AdamW:
    student = make_student()
    optimizer = torch.optim.AdamW(student.parameters(), 0.1)
    student(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    losses = ([0.5, 0.25], [2.0])
    checkpoints.write(folder, IDENTITY, (1, 3, 7), losses, student, optimizer, None)
    return optimizer


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert not checkpoints.read(tmp_path, IDENTITY).started
    optimizer = written(tmp_path)
    found = checkpoints.read(tmp_path, IDENTITY)
    assert found.started
    assert (found.phase, found.epoch, found.step, found.scaler) == (1, 3, 7, None)
    assert found.losses == ([0.5, 0.25], [2.0])
    state = optimizer.state_dict()
    assert found.param_groups[0]["params"] == state["param_groups"][0]["params"]
    for index, values in state["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(found.optimizer[index][name], value)
    make_student().load_state_dict(dict(found.student))
    assert [curve.tolist() for curve in checkpoints.loss_curve(tmp_path)] == [[0.5, 0.25], [2.0]]


def test_other_runs_and_damage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        checkpoints.loss_curve(tmp_path)
    written(tmp_path)
    with pytest.raises(DistillationError, match="belongs to a run with another data"):
        checkpoints.read(tmp_path, IDENTITY | {"data": "c"})
    path = tmp_path / checkpoints.NAME
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=r"cannot be read.*Delete it to start over"):
        checkpoints.read(tmp_path, IDENTITY)
