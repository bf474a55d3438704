"""Which samples a step sees, and which process sees which of them.

The global batches depend on the seed alone. Each is cut into as many pieces as there are processes
and steps of accumulation: their number changes who computes what, never what is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hydra_edge.transfer import chunks


@dataclass(frozen=True)
class Piece:
    """A part of one global batch.

    Attributes:
        indices: Numbers of its samples; never empty.
        weight: Share of the batch; the weights of all pieces of a batch sum to 1.
        number: Position among the pieces of the batch, which seeds what is random in it.
    """

    indices: list[int]
    weight: float
    number: int


def batches(count: int, size: int, generator: torch.Generator) -> list[list[int]]:
    """The global batches of one epoch, in random order.

    A single left-over sample joins the batch before it, because batch normalisation cannot train
    on one.
    """
    found = list(chunks(torch.randperm(count, generator=generator).tolist(), size))
    if len(found) > 1 and len(found[-1]) == 1 < size:
        found[-2:] = [found[-2] + found[-1]]
    return found


def pieces(batch: Sequence[int], processes: int, accumulation: int) -> list[list[Piece]]:
    """Cut a batch into what each process does in each step of accumulation.

    A batch too small for all steps has fewer of them, so that two samples a process stay together
    where possible. In one smaller than the number of processes some samples are seen twice, with
    half the weight: every process takes part in every exchange.

    Args:
        batch: Numbers of the samples.
        processes: How many processes share the batch.
        accumulation: Steps that their gradients are summed over, at most.

    Returns:
        By step of accumulation, then by process.
    """
    steps = max(1, min(accumulation, len(batch) // (2 * processes)))
    count = steps * processes
    if len(batch) >= count:
        ends = [len(batch) * k // count for k in range(count + 1)]
        parts = [list(batch[a:b]) for a, b in itertools.pairwise(ends)]
        weights = [len(part) / len(batch) for part in parts]
    else:
        picks = [k % len(batch) for k in range(count)]
        parts = [[batch[pick]] for pick in picks]
        weights = [1 / len(batch) / picks.count(pick) for pick in picks]
    found = [Piece(*item) for item in zip(parts, weights, range(count), strict=True)]
    # Neighbouring pieces are one process's: the same samples whatever the steps of accumulation.
    return [found[step::steps] for step in range(steps)]
