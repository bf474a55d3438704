"""What the demos share."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("torch")

import torch

from hydra_edge.demo import TASKS, run_demo, story
from hydra_edge.demo.story import Training, at_least, at_most, between
from hydra_edge.errors import InputError

QUIET = Console(quiet=True)


def test_checks_include_their_limits_and_fail_on_nan() -> None:
    assert at_most("x", 0.5, 0.5).passed
    assert not at_most("x", 0.6, 0.5).passed
    assert at_least("x", 0.5, 0.5).passed
    assert not at_least("x", 0.4, 0.5).passed
    assert between("x", 0.5, 0.5, 1).passed
    assert not between("x", 1.1, 0.5, 1).passed
    nan = float("nan")
    assert not any(
        one.passed for one in (at_most("x", nan, 1), at_least("x", nan, 1), between("x", nan, 0, 1))
    )


def untrained(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2)


def shifting(
    calls: list[int], seed: int, network: torch.nn.Module, on_epoch: Callable[[], None]
) -> torch.nn.Module:
    calls.append(seed)
    with torch.no_grad():
        network.weight += 1
    on_epoch()
    return network


def test_threads_are_as_before(tmp_path: Path) -> None:
    """Also for a caller that has not computed yet."""
    before = torch.get_num_threads()
    plans = {f"m{i}": Training(partial(untrained, i), partial(shifting, [], i), 1) for i in (3, 1)}

    def caller() -> int:
        story.trained(tmp_path, plans, QUIET, workers=2)
        return torch.get_num_threads()

    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(caller).result() == 3
    finally:
        torch.set_num_threads(before)


def test_what_ends_one_training_ends_the_others(tmp_path: Path) -> None:
    """As Ctrl-C does, which only the main thread sees."""
    epochs: list[int] = []

    def broken(network: torch.nn.Module, on_epoch: Callable[[], None]) -> torch.nn.Module:
        raise RuntimeError("no more")

    def long(network: torch.nn.Module, on_epoch: Callable[[], None]) -> torch.nn.Module:
        for epoch in range(1000):
            epochs.append(epoch)
            time.sleep(0.01)
            on_epoch()
        return network

    plans = {
        "a": Training(partial(untrained, 1), broken, 1),
        "b": Training(partial(untrained, 2), long, 1000),
    }
    with pytest.raises(RuntimeError, match="no more"):
        story.trained(tmp_path, plans, QUIET, workers=2)
    assert len(epochs) < 500
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_networks_are_trained_once(tmp_path: Path, workers: int) -> None:
    calls: list[int] = []
    plans = {
        f"m{i}": Training(partial(untrained, i), partial(shifting, calls, i), 1) for i in (3, 1)
    }
    first = story.trained(tmp_path, plans, QUIET, workers)
    assert list(first) == ["m3", "m1"]
    assert sorted(calls) == [1, 3]
    for seed, network in zip((3, 1), first.values(), strict=True):
        assert torch.equal(network.weight, untrained(seed).weight + 1)
        assert not network.training
    (tmp_path / "m1.safetensors").unlink()
    again = story.trained(tmp_path, plans, QUIET, workers)
    assert sorted(calls) == [1, 1, 3]
    for name, network in first.items():
        assert torch.equal(network.weight, again[name].weight)


def test_demos_are_those_of_tasks(tmp_path: Path) -> None:
    assert "vqa" in TASKS
    with pytest.raises(InputError, match="no demo of the task 'poetry'"):
        run_demo(tmp_path / "x", QUIET, "poetry")
    assert not (tmp_path / "x").exists()
    assert np.isfinite(story.OPTIONS.batch).all()
