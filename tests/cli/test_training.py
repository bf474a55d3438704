"""`distill` and `teach`: from a recipe to a student, also through the death of a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import recipe_project
import torch
from typer.testing import CliRunner, Result

from hydra_edge.checkpoints import loss_curve
from hydra_edge.cli import app
from hydra_edge.ensembles import load_weights

KEPT = '[predictions]\nfolder = "kept"\nformat = "{form}"\nblock = 20\n{more}'


def hydra(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def alone(*recipes: Path) -> list[str]:
    """What `distill` prints for each, in a process of its own: accelerate keeps one precision."""
    options = "'--quiet', '--json'], standalone_mode=False"
    calls = [f"app(['distill', {str(recipe)!r}, {options})" for recipe in recipes]
    code = "; ".join(["from hydra_edge.cli import app", *calls])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_killed_process_stops_the_run_which_then_goes_on(project: Path) -> None:
    """Two processes in bf16; one is killed, the rest stops, and one process finishes the run."""
    settings = 'teacher = "online"\nmixed_precision = "bf16"'
    augment = 'augment = "killed:{}"'
    recipe = recipe_project.write(
        project, "killed", augment=augment.format("slow"), distillation=settings
    )
    command = [sys.executable, "-m", "hydra_edge.cli", "distill", str(recipe), "--quiet"]
    launcher = subprocess.Popen(
        [*command, "--processes", "2"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    checkpoint = project / "run" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)  # the run itself has to get somewhere
    victim = next(
        child
        for child in psutil.Process(launcher.pid).children()
        if child.environ().get("RANK") == "1"
    )
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    _, err = launcher.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert launcher.returncode == 1
    assert f"Process 1 of 2 was killed by SIGKILL (process id {victim.pid})." in err
    assert "run the same command again" in err
    done = sum(map(len, loss_curve(project / "run")))
    assert 0 < done < 16
    recipe_project.write(project, "killed", augment=augment.format("quick"), distillation=settings)
    whole = project / "whole.toml"
    whole.write_text(recipe.read_text().replace('"run"', '"whole"'))
    printed = alone(recipe, whole)
    assert sum('"heads": 3' in line for line in printed) == 2
    curves = [np.concatenate(loss_curve(project / name)) for name in ("run", "whole")]
    assert curves[0].shape == (16,)
    # bf16 keeps 8 bits, and the halves of a batch are rounded apart.
    np.testing.assert_allclose(*curves, rtol=0.05)


def test_members_are_asked_once_and_the_student_learns_from_files(project: Path) -> None:
    recipe = recipe_project.write(
        project, "asked", predictions=KEPT.format(form="top-k", more="top_k = 2")
    )
    taught = hydra("teach", recipe, "--quiet", "--json")
    assert taught.exit_code == 0, taught.output
    found = json.loads(taught.stdout)
    assert found["shape"] == "3 × 64 × 3"
    assert found["format"] == "top-k"
    assert "mean" in found["probability_error at temperature 1"]
    files = {p: p.stat().st_mtime_ns for p in (project / "kept").rglob("*.npy")}
    assert len(files) == 3 * 4
    done = hydra("distill", recipe, "--quiet")
    assert done.exit_code == 0, done.output
    assert files == {p: p.stat().st_mtime_ns for p in files}
    assert "loss of phase 2" in done.stdout
    torch.manual_seed(0)
    sys.modules["asked"].student()
    load_weights(sys.modules["asked"].student(), project / "student.safetensors")
    assert hydra("teach", recipe, "--verify").exit_code == 0
    next(iter(files)).write_bytes(b"")
    broken = hydra("teach", recipe, "--verify")
    assert broken.exit_code == 1
    assert "is missing, cut off or changed" in broken.output


def test_mistakes_have_messages_and_exit_codes(project: Path) -> None:
    recipe = recipe_project.write(project, "mistaken")
    missing = hydra("teach", recipe)
    assert missing.exit_code == 2
    assert "has no [predictions]" in missing.output
    recipe.write_text(recipe.read_text().replace("batch_size", "batchsize"))
    wrong = hydra("distill", recipe, "--json")
    assert wrong.exit_code == 1
    assert json.loads(wrong.stdout)["error"]["what"].endswith("has 'batchsize' in [distillation].")
    assert hydra("distill", recipe, "--processes", "0").exit_code == 2
