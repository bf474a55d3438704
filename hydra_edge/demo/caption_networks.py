"""The networks of the captioning demo; `member` and `student` are factories."""

from __future__ import annotations

import torch
from torch import nn

from hydra_edge.captioning.networks import Captioner
from hydra_edge.demo.scenes import vocabulary

HEADS = 5
_FEATURES = 96
_HIDDEN = 128
_NECK = 192


class _Context(nn.Module):
    """Adds to every cell what the whole image holds: captions name what lies elsewhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """``[B, K, g, g]`` to the same."""
        return torch.relu(maps + self.mix(maps.mean((2, 3), keepdim=True)))


def _block(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size % 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def body() -> nn.Sequential:
    """Five convolutions and a view of the whole: ``[B, 3, 64, 64]`` to ``[B, 96, 8, 8]``."""
    return nn.Sequential(
        *_block(3, 48, size=4, stride=4),
        *_block(48, 160, stride=2),
        *_block(160, 160),
        *_block(160, 160),
        *_block(160, _FEATURES),
        _Context(_FEATURES),
    )


def member() -> Captioner:
    """One member of the ensemble."""
    return _captioner(1)


def student(start: Captioner) -> Captioner:
    """One body and decoder like a member's, and five heads of each kind.

    Args:
        start: A trained member whose weights all of them begin with.
    """
    made = _captioner(HEADS)
    weights = start.state_dict()
    for name in list(weights):
        kind, _, rest = name.partition(".0.")
        if kind in ("heads", "box_heads"):
            weights |= {f"{kind}.{head}.{rest}": weights[name] for head in range(1, HEADS)}
    made.load_state_dict(weights)
    return made


def _captioner(heads: int) -> Captioner:
    return Captioner(
        body(),
        vocabulary().words,
        features=_FEATURES,
        hidden=_HIDDEN,
        heads=heads,
        neck=_NECK,
    )
