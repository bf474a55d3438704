"""The demo's networks, and how a member is trained; `member` and `student` are factories."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from hydra_edge.demo.digits import AUGMENTATION, Images, Painter
from hydra_edge.ensembles import Hydra, mlp_heads

HEADS = 10
LABELS = tuple("0123456789")
_FEATURES = 96
_EPOCHS = 15
_BATCH = 128
_LEARNING_RATE = 3e-3


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def body() -> nn.Sequential:
    """Four convolutions and a dense layer: ``[B, 1, 8, 8]`` to ``[B, 96]``, 8.3 MFLOP per image."""
    return nn.Sequential(
        *_block(1, 48),
        *_block(48, 64),
        nn.MaxPool2d(2),
        *_block(64, 96),
        *_block(96, 96),
        nn.Flatten(),
        nn.Linear(96 * 16, _FEATURES),
        nn.ReLU(),
    )


def member() -> nn.Sequential:
    """One member of the ensemble: a body and a linear layer."""
    return nn.Sequential(body(), nn.Linear(_FEATURES, len(LABELS)))


def student() -> Hydra:
    """One body like a member's, and ten heads with one hidden layer."""
    heads = mlp_heads(HEADS, _FEATURES, len(LABELS), hidden=(64,))
    return Hydra(body(), heads, task="classification", labels=LABELS)


def untrained_member(seed: int) -> nn.Module:
    """A member with initial weights of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return member().train()


def train_member(
    images: Images,
    labels: npt.NDArray[np.int64],
    seed: int,
    model: nn.Module,
    on_epoch: Callable[[], None],
) -> nn.Module:
    """Train one member with its own shuffling and augmentation."""
    painter = Painter(seed)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, weight_decay=1e-2)
    steps = len(x) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=_EPOCHS * steps, pct_start=0.2
    )
    for _ in range(_EPOCHS):
        distorted = painter.jitter(x, AUGMENTATION)
        order = torch.randperm(len(x), generator=painter.generator)
        for batch in torch.split(order[: steps * _BATCH], _BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(distorted[batch]), y[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        on_epoch()
    return model.eval()


def epochs() -> int:
    """Epochs that `train_member` runs, for a progress bar."""
    return _EPOCHS
