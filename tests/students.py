"""Small ensembles and students for the tests of distillation."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.utils.data import Dataset

from hydra_edge.distillation import DistillationConfig
from hydra_edge.ensembles import Ensemble, Hydra, mlp_heads

SHORT = DistillationConfig(epochs_mean=2, epochs_heads=3, batch_size=8, learning_rate=1e-2)
ONLINE = dataclasses.replace(SHORT, teacher="online")
SAMPLES, FEATURES, CLASSES = 25, 4, 3  # 25 is three batches of 8 and one left-over sample


def make_ensemble(members: int = 4, classes: int = CLASSES) -> Ensemble:
    torch.manual_seed(1)
    return Ensemble(
        [
            nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, classes))
            for _ in range(members)
        ]
    )


def make_student(heads: int = 4, classes: int = CLASSES) -> Hydra:
    """A student with state that a resume can lose: batch statistics and random dropout."""
    torch.manual_seed(2)
    body = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
    return Hydra(body, mlp_heads(heads, 8, classes, (6,), norm="batch"))


class Samples(Dataset[object]):
    """Yields ``(x, label)``; ``interrupt`` is the number of reads after which it is killed."""

    def __init__(self, data: torch.Tensor, interrupt: float = float("inf")) -> None:
        self.data, self.interrupt, self.reads = data, interrupt, 0
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[object, int]:
        self.reads += 1
        if self.reads > self.interrupt:
            raise KeyboardInterrupt
        self.order.append(index)
        return self.data[index], 0


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def noisy(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)
