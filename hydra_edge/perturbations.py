"""What may happen to a batch before teacher and student see it: augmentation, mixup, ODS.

All of it is drawn from one generator per piece of a batch: a run can be repeated and resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from hydra_edge.errors import InputError
from hydra_edge.transfer import Inputs

Augment: TypeAlias = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
Direction: TypeAlias = Callable[
    [Inputs, Callable[[torch.Size], torch.Tensor], int], list[torch.Tensor]
]

# Keeps a sample on which a member is flat where it is, instead of dividing 0 by 0.
_LEAST_NORM = 1e-12


def augmented(augment: Augment, x: Inputs, generator: torch.Generator) -> Inputs:
    """The inputs with the first of them augmented.

    Raises:
        InputError: The function did not keep the batch axis.
    """
    result = augment(x[0], generator)
    if not isinstance(result, torch.Tensor) or result.shape[:1] != x[0].shape[:1]:
        got = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise InputError(
            f"augment returned {got} for a batch {list(x[0].shape)}.",
            "It must keep the batch axis.",
            "Return one augmented sample per sample.",
        )
    return (result, *x[1:])


def mixed(x: Inputs, alpha: float, generator: torch.Generator) -> Inputs:
    """Every sample mixed with another one of the batch: ``λ x + (1 - λ) x'``, λ ~ Beta(α, α).

    The teacher answers the mixed samples, so no labels are mixed. Inputs that are not floats, such
    as tokens, stay those of the sample with the larger share.

    Args:
        x: Inputs ``[B, …]``.
        alpha: α; 1 draws λ evenly, smaller ones keep most samples nearly as they were.
        generator: Where λ and the partners come from.

    Raises:
        InputError: No input holds floats.

    Source: Zhang et al. 2018, arXiv 1710.09412, eq. 1; λ is drawn per sample.
    """
    _require_floats(x, "mixup")
    count = len(x[0])
    partner = torch.randperm(count, generator=generator)
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    drawn = np.random.default_rng(seed).beta(alpha, alpha, count)
    share = torch.from_numpy(np.maximum(drawn, 1 - drawn))

    def mix(part: torch.Tensor) -> torch.Tensor:
        if not part.is_floating_point():
            return part
        weight = share.to(part).view(-1, *[1] * (part.ndim - 1))
        return weight * part + (1 - weight) * part[partner.to(part.device)]

    return tuple(map(mix, x))


def diversified(
    x: Inputs, radius: float, direction: Direction, generator: torch.Generator
) -> Inputs:
    """Every sample moved to where a member's outputs change most: output diversified sampling.

        x + radius · g / ‖g‖₂,  g = ∇ₓ (wᵀ f(x)),  w ~ U(-1, 1) per sample and output

    Args:
        x: Inputs ``[B, …]`` on the teacher's device; floats are moved.
        radius: Length of the step in the input's units, over all inputs of a sample together.
        direction: `LiveTeacher.direction`; f is a member drawn for the batch.
        generator: Where w and the member come from.

    Raises:
        InputError: No input holds floats.

    Source: Tashiro et al. 2020, arXiv 2003.06878, eq. 1; for distillation from a random member:
    Nam et al. 2021, arXiv 2110.14149.
    """
    _require_floats(x, "ods")
    member = int(torch.randint(2**31, (), generator=generator))

    def draw(shape: torch.Size) -> torch.Tensor:
        return 2 * torch.rand(shape, generator=generator) - 1

    gradients = direction(x, draw, member)
    square = sum(gradient.float().square().flatten(1).sum(1) for gradient in gradients)
    assert isinstance(square, torch.Tensor)
    scale = radius / square.sqrt().clamp_min(_LEAST_NORM)
    steps = iter(gradients)

    def move(part: torch.Tensor) -> torch.Tensor:
        if not part.is_floating_point():
            return part
        return part + (scale.view(-1, *[1] * (part.ndim - 1)) * next(steps)).to(part.dtype)

    return tuple(map(move, x))


def _require_floats(x: Inputs, name: str) -> None:
    if not any(part.is_floating_point() for part in x):
        kinds = ", ".join(str(part.dtype) for part in x)
        raise InputError(
            f"{name} is set, but the inputs are {kinds}.",
            "Only floating-point inputs can be mixed or moved.",
            f"Set {name}=0, or give the model embeddings.",
        )
