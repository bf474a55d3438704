"""Synchronized batch normalisation, alone in its group; tests/test_training.py has several."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn

from hydra_edge.batch_norm import synchronized


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_it_is_torchs_own_where_nothing_is_shared(
    momentum: float | None, options: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=momentum, **options))
    ours = synchronized(copy.deepcopy(plain), torch.device("cpu"))
    assert type(ours[1]) is not nn.BatchNorm2d  # type: ignore[index]
    x = 5 + torch.randn(4, 2, 6, 6)
    for step in range(3):
        outputs = [module(x * (step + 1)) for module in (plain, ours)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        for module, output in zip((plain, ours), outputs, strict=True):
            module.zero_grad()
            (output * output.sigmoid()).sum().backward()
        for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    state = ours.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value)
    torch.testing.assert_close(plain.eval()(x), ours.eval()(x), rtol=1e-4, atol=1e-5)


def test_only_batch_normalisation_is_replaced_and_parameters_are_kept() -> None:
    norm, layer = nn.BatchNorm1d(3), nn.Linear(3, 3)
    module = nn.Sequential(layer, nn.ModuleDict({"norm": norm}), nn.LayerNorm(3))
    found = synchronized(module, torch.device("cpu"))
    assert found is module
    assert found[0] is layer
    assert found[1]["norm"].weight is norm.weight  # type: ignore[index]
    assert isinstance(found[2], nn.LayerNorm)
    assert isinstance(synchronized(nn.BatchNorm1d(3), torch.device("cpu")).weight, nn.Parameter)
