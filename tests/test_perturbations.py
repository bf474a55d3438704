"""Augmentation, mixup and ODS: what they do to a batch, and that a seed repeats them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from students import ONLINE, SHORT, make_ensemble, make_student
from torch import nn

from hydra_edge.distillation import distill
from hydra_edge.ensembles import Ensemble
from hydra_edge.errors import InputError
from hydra_edge.perturbations import augmented, diversified, mixed
from hydra_edge.processes import Processes
from hydra_edge.teachers import EnsembleShare, LiveTeacher


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mixup_stays_nearer_to_the_sample_than_to_its_partner() -> None:
    x = torch.eye(6)[:, None].repeat(1, 2, 1)
    words = torch.arange(6)
    y, same = mixed((x, words), 1.0, seeded())
    assert torch.equal(same, words)
    torch.testing.assert_close(y.sum(-1), torch.ones(6, 2))
    own = y[torch.arange(6), 0, torch.arange(6)]
    assert (own >= 0.5).all()
    assert own.min() < 0.9
    assert torch.equal(y, mixed((x, words), 1.0, seeded())[0])
    assert not torch.equal(y, mixed((x, words), 1.0, seeded(1))[0])
    nearly = mixed((x, words), 1e-3, seeded())[0]
    torch.testing.assert_close(nearly, x, atol=1e-3, rtol=0)


def test_ods_moves_by_the_radius_along_the_gradient_of_weighted_outputs() -> None:
    """For a linear member f(x) = A x the direction is Aᵀ w, normalised."""
    member = nn.Linear(4, 3)
    teacher = LiveTeacher(Ensemble([member]), Processes())
    x = torch.randn(5, 4, generator=seeded())
    words = torch.arange(5)

    class Both(nn.Module):
        def forward(self, values: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = member(values)
            return output

    teacher.ensemble.members[0] = Both()
    moved, same = diversified((x, words), 0.3, teacher.direction, seeded(4))
    assert torch.equal(same, words)
    torch.testing.assert_close((moved - x).norm(dim=1), torch.full((5,), 0.3))
    generator = seeded(4)
    torch.randint(2**31, (), generator=generator)
    weights = 2 * torch.rand(5, 3, generator=generator) - 1
    expected = weights @ member.weight.detach()
    expected = 0.3 * expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(moved - x, expected)
    assert member.weight.grad is None


def test_ods_leaves_a_sample_where_the_member_is_flat() -> None:
    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * x

    teacher = LiveTeacher(Ensemble([Flat()]), Processes())
    x = torch.ones(2, 3)
    assert torch.equal(diversified((x,), 1.0, teacher.direction, seeded())[0], x)


def test_ods_finds_more_disagreement_than_noise_of_the_same_size() -> None:
    ensemble = make_ensemble().eval()
    x = torch.randn(400, 4, generator=seeded())
    teacher = LiveTeacher(ensemble, Processes())
    noise = torch.nn.functional.normalize(torch.randn(400, 4, generator=seeded(1)), dim=1)

    def change(y: torch.Tensor) -> float:
        with torch.no_grad():
            return float((ensemble(y) - ensemble(x)).square().mean())

    (moved,) = diversified((x,), 0.5, teacher.direction, seeded(2))
    assert change(moved) > 1.2 * change(x + 0.5 * noise)


def test_integers_alone_are_refused() -> None:
    tokens = (torch.arange(6).view(3, 2),)
    with pytest.raises(InputError, match=r"mixup is set, but the inputs are torch\.int64"):
        mixed(tokens, 1.0, seeded())
    teacher = LiveTeacher(make_ensemble(), Processes())
    with pytest.raises(InputError, match=r"ods is set, but the inputs .*Set ods=0"):
        diversified(tokens, 1.0, teacher.direction, seeded())


def test_augmentation_keeps_the_batch_axis() -> None:
    x = (torch.ones(3, 2), torch.arange(3))
    doubled, same = augmented(lambda value, _: 2 * value, x, seeded())
    assert torch.equal(doubled, 2 * x[0])
    assert same is x[1]
    with pytest.raises(InputError, match=r"augment returned \[1, 2\] for a batch \[3, 2\]"):
        augmented(lambda value, _: value[:1], x, seeded())
    with pytest.raises(InputError, match="augment returned tuple"):
        augmented(lambda value, _: (value,), x, seeded())  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", ["mixup", "ods"])
def test_they_change_a_run_and_need_members_that_run(name: str) -> None:
    data = torch.randn(25, 4, generator=seeded())
    ensemble, seen = make_ensemble(), []
    ensemble.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    config = dataclasses.replace(ONLINE, **{name: 0.5})  # type: ignore[arg-type]
    first = distill(ensemble, make_student(), data, config, progress=False)
    assert not torch.isin(seen[-1], data).all()
    again = distill(ensemble, make_student(), data, config, progress=False)
    assert torch.equal(first.body[0].weight, again.body[0].weight)  # type: ignore[index]
    cached = dataclasses.replace(SHORT, **{name: 0.5})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"{name} is given, but teacher is 'cached'"):
        distill(ensemble, make_student(), data, cached, progress=False)
    if name == "ods":  # as on more processes than members
        empty = EnsembleShare({}, 4)
        with pytest.raises(InputError, match=r"Process 0 holds no member.*at most 4 processes"):
            distill(empty, make_student(), data, config, progress=False)
    with pytest.raises(InputError, match=f"{name} is -1"):
        dataclasses.replace(SHORT, **{name: -1})  # type: ignore[arg-type]
