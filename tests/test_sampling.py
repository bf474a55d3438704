"""Batches and their pieces: every sample once an epoch, weights that sum to one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydra_edge.sampling import batches, pieces


def test_batches_hold_every_sample_once_and_leave_none_alone() -> None:
    found = batches(25, 8, torch.Generator().manual_seed(0))
    assert sorted(index for batch in found for index in batch) == list(range(25))
    assert [len(batch) for batch in found] == [8, 8, 9]
    assert [len(batch) for batch in batches(3, 1, torch.Generator())] == [1, 1, 1]
    assert found == batches(25, 8, torch.Generator().manual_seed(0))
    assert found != batches(25, 8, torch.Generator().manual_seed(1))


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5))
def test_pieces_are_the_batch(size: int, processes: int, accumulation: int) -> None:
    batch = list(range(100, 100 + size))
    plan = pieces(batch, processes, accumulation)
    flat = [piece for part in plan for piece in part]
    assert all(len(part) == processes for part in plan)
    assert len(plan) <= accumulation
    share = dict.fromkeys(batch, 0.0)
    for piece in flat:
        for index in piece.indices:
            share[index] += piece.weight / len(piece.indices)
    assert all(value == pytest.approx(1 / size) for value in share.values())
    assert sorted(piece.number for piece in flat) == list(range(len(flat)))
    if len(plan) > 1:
        assert min(sum(len(piece.indices) for piece in part) for part in plan) >= 2 * processes


def test_one_process_gets_the_batch_itself() -> None:
    (((piece,),),) = (pieces([3, 1, 2], 1, 1),)
    assert (piece.indices, piece.weight, piece.number) == ([3, 1, 2], 1.0, 0)


def test_processes_and_accumulation_cut_alike() -> None:
    """So that a run goes on elsewhere with the same draws."""

    def cut(processes: int, accumulation: int) -> dict[int, list[int]]:
        plan = pieces(list(range(48)), processes, accumulation)
        return {piece.number: piece.indices for part in plan for piece in part}

    assert cut(1, 4) == cut(2, 2) == cut(4, 1)


def test_a_batch_smaller_than_the_processes_is_seen_by_all() -> None:
    (part,) = pieces([7, 8, 9], 4, 2)
    assert [piece.indices for piece in part] == [[7], [8], [9], [7]]
    assert [piece.weight for piece in part] == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 6])
