"""The training loop: one process or several, in one go or with stops, the result is the same."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import multi_process
import numpy as np
import pytest
import torch
from students import ONLINE, SAMPLES, SHORT, Samples, assert_equal, make_ensemble, make_student
from torch import nn

from hydra_edge import checkpoints
from hydra_edge.distillation import distill
from hydra_edge.ensembles import Hydra, linear_heads
from hydra_edge.errors import DistillationError
from hydra_edge.processes import Processes
from hydra_edge.training import step_loss

TESTS = Path(__file__).parent
# Sums over the processes are rounded in another order. AdamW divides that by the size of gradients
# that are themselves tiny, so after 20 steps losses of about 0.05 differ in the sixth digit.
CURVE = {"rtol": 1e-3, "atol": 2e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(3))


def in_processes(count: int, folder: Path, *cases: str) -> dict[str, Any]:
    """What process 0 of several found."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(TESTS / "multi_process.py"), str(folder), *cases]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", str(count), *script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / f"{count}.json").read_text())
    return found


def here(folder: Path, case: str) -> Any:
    """The same case in this process."""
    return getattr(multi_process, case)(folder / f"{case}-1", Processes())


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    cases = ("cached", "online", "accumulated", "perturbed", "predictions", "half")
    found = in_processes(2, tmp_path, *cases)
    for case in ("cached", "online"):
        alone = here(tmp_path, case)
        np.testing.assert_allclose(found[case]["curve"], alone["curve"], **CURVE)
        np.testing.assert_allclose(found[case]["prob"], alone["prob"], atol=1e-3)
        assert alone["curve"][0] != pytest.approx(alone["curve"][-1], rel=0.1)
    np.testing.assert_allclose(found["accumulated"], here(tmp_path, "accumulated"), **CURVE)
    kept = here(tmp_path, "predictions")
    assert found["predictions"]["files"] == kept["files"]
    np.testing.assert_allclose(found["predictions"]["outputs"], kept["outputs"], atol=1e-6)
    np.testing.assert_allclose(found["predictions"]["curve"], kept["curve"], **CURVE)
    # Draws differ between two pieces and one, the size of the loss does not.
    drawn, alone = found["perturbed"]["curve"], here(tmp_path, "perturbed")["curve"]
    assert not np.allclose(drawn, alone, rtol=1e-2)
    assert np.mean(drawn) == pytest.approx(np.mean(alone), rel=0.5)
    # What two processes began, one finishes.
    assert len(found["half"]) == 6
    resumed = here(tmp_path, "finished")
    whole = here(tmp_path / "whole", "finished")
    assert resumed[:6] == pytest.approx(found["half"], rel=1e-6)
    np.testing.assert_allclose(resumed, whole, **CURVE)


def test_four_processes_do_what_one_does(tmp_path: Path) -> None:
    """Four processes share three members, and a last batch of two samples."""
    found = in_processes(4, tmp_path, "exchanges", "normalized", "online", "predictions")
    np.testing.assert_allclose(found["online"]["curve"], here(tmp_path, "online")["curve"], **CURVE)
    kept = here(tmp_path, "predictions")
    assert found["predictions"]["files"] == kept["files"]
    np.testing.assert_allclose(found["predictions"]["outputs"], kept["outputs"], atol=1e-6)
    for ours, torchs in zip(found["normalized"], here(tmp_path, "normalized"), strict=True):
        np.testing.assert_allclose(ours, torchs, rtol=1e-5, atol=1e-6)
    assert found["exchanges"] == {
        "gathered": [0, 1, 2, 3],
        "main": 0,
        "total": [4.0, 4.0],
        "rows": [[float(r)] * 2 for r in range(4) for _ in range(r + 1)],
        "failed": ["What. Why. Fix."] * 4,
        "members": [[0], [1], [2], []],
    }


def test_accumulation_changes_no_gradient(data: torch.Tensor, tmp_path: Path) -> None:
    curves = []
    for steps in (1, 3):
        torch.manual_seed(0)
        student = Hydra(nn.Linear(4, 8), linear_heads(4, 8, 3))
        config = dataclasses.replace(SHORT, accumulation=steps)
        folder = tmp_path / str(steps)
        distill(make_ensemble(), student, data, config, workdir=folder, progress=False)
        curves.append(np.concatenate(checkpoints.loss_curve(folder)))
    assert curves[0].shape == (5 * 3,)
    np.testing.assert_allclose(*curves, rtol=1e-4)


@pytest.mark.parametrize("reads", [12, 60])
def test_a_run_killed_within_an_epoch_goes_on_from_its_step(
    data: torch.Tensor, tmp_path: Path, reads: int
) -> None:
    config = dataclasses.replace(ONLINE, checkpoint_steps=1)
    arguments = (make_ensemble(), make_student())
    whole = distill(*arguments, data, config, progress=False)
    with pytest.raises(KeyboardInterrupt):
        distill(*arguments, Samples(data, 2 + reads), config, workdir=tmp_path, progress=False)
    samples = Samples(data)
    resumed = distill(*arguments, samples, config, workdir=tmp_path, progress=False)
    assert_equal(resumed, whole)
    whole_batches = reads % SAMPLES // 8 * 8
    assert samples.reads == 2 + 5 * SAMPLES - reads // SAMPLES * SAMPLES - whole_batches


def test_how_it_runs_may_change_when_it_goes_on(data: torch.Tensor, tmp_path: Path) -> None:
    arguments = (make_ensemble(), make_student(), data)
    first = distill(*arguments, SHORT, workdir=tmp_path, progress=False)
    other = dataclasses.replace(SHORT, accumulation=2, checkpoint_steps=5, timeout_s=9.0)
    assert_equal(distill(*arguments, other, workdir=tmp_path, progress=False), first)
    mixed = dataclasses.replace(SHORT, teacher="online", mixup=0.5)
    with pytest.raises(DistillationError, match="another config"):
        distill(*arguments, mixed, workdir=tmp_path, progress=False)


def test_a_diverging_run_says_where(data: torch.Tensor) -> None:
    config = dataclasses.replace(SHORT, learning_rate=1e30, gradient_clip=None)
    with pytest.raises(DistillationError, match=r"The loss is \w+ in phase 1, epoch 1, step"):
        distill(make_ensemble(), make_student(), data * 1e20, config, progress=False)


def test_the_loss_is_the_tasks() -> None:
    output, target = torch.randn(2, 5, 3), torch.randn(4, 5, 3)
    config = dataclasses.replace(SHORT, temperature=(1.0, 2.0), disagreement_weight=3.0)
    both = step_loss("classification", 1, output, target, config)
    plain = dataclasses.replace(config, disagreement_weight=0.0)
    one, two = (
        step_loss("classification", 1, output, target, dataclasses.replace(plain, temperature=t))
        for t in (1.0, 2.0)
    )
    torch.testing.assert_close(
        step_loss("classification", 1, output, target, plain), (one + two) / 2
    )
    assert both > (one + two) / 2
    first = step_loss("classification", 0, output[0], target, config)
    assert first.ndim == 0
    assert first > 0
