"""The torch modules that `make` exports: students, ensembles, and parallel branches that are none.

Written as people write them, each with its own seed. Widths are small; the structure is the point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Join = Callable[[list[Tensor]], object]


def stack(ys: list[Tensor]) -> Tensor:
    return torch.stack(ys)


def stack_last(ys: list[Tensor]) -> Tensor:
    return torch.stack(ys, dim=-1)


def cat(ys: list[Tensor]) -> Tensor:
    return torch.cat(ys, dim=1)


def mean(ys: list[Tensor]) -> Tensor:
    return torch.stack(ys).mean(0)


def total(ys: list[Tensor]) -> Tensor:
    return sum(ys[1:], ys[0]) / len(ys)


def mean_softmax(ys: list[Tensor]) -> Tensor:
    return torch.stack([y.softmax(-1) for y in ys], dim=1).mean(1)


def moments(ys: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What a deep ensemble answers: the mean of the members and how far they are apart."""
    stacked = torch.stack(ys)
    return stacked.mean(0), stacked.var(0)


class Heads(nn.Module):
    """One body, M heads."""

    def __init__(self, body: nn.Module, heads: Iterable[nn.Module], join: Join = tuple) -> None:
        super().__init__()
        self.body, self.heads, self.join = body, nn.ModuleList(heads), join

    def forward(self, x: Tensor) -> object:
        features = self.body(x)
        return self.join([head(features) for head in self.heads])


def times(m: int, build: Callable[[], nn.Module]) -> list[nn.Module]:
    return [build() for _ in range(m)]


# bodies


def flat_body(k: int = 12, hidden: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(k, hidden), nn.ReLU())


def image_body(c: int = 8, pool: bool = False) -> nn.Module:
    layers = [nn.Conv2d(3, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pool else []
    return nn.Sequential(*layers, *tail)


def text_body(width: int = 8) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, 12, dropout=0.0, batch_first=True)


# heads


def mlp(k: int = 16, hidden: int = 8, c: int = 5, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(k, hidden), act(), nn.Dropout(0.1), nn.Linear(hidden, c))


def vqa(k: int = 16, c: int = 7) -> nn.Module:
    """The classifier of ViLT."""
    return nn.Sequential(nn.Linear(k, 2 * k), nn.LayerNorm(2 * k), nn.GELU(), nn.Linear(2 * k, c))


class Residual(nn.Module):
    """The last stage of a ResNet with its classifier."""

    def __init__(self, k: int = 8, c: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(k, 2 * k, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * k)
        self.conv2 = nn.Conv2d(2 * k, 2 * k, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * k)
        self.down = nn.Sequential(
            nn.Conv2d(k, 2 * k, 1, stride=2, bias=False), nn.BatchNorm2d(2 * k)
        )
        self.fc = nn.Linear(2 * k, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y = (y + self.down(x)).relu()
        return self.fc(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


def conv(k: int = 8, c: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(k, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=2), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, c),
    )  # fmt: skip


def separable(k: int = 8, c: int = 5) -> nn.Module:
    """As MobileNet does it."""
    return nn.Sequential(
        nn.Conv2d(k, k, 3, padding=1, groups=k, bias=False), nn.BatchNorm2d(k), nn.ReLU6(),
        nn.Conv2d(k, 12, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, c),
    )  # fmt: skip


def segmentation(k: int = 8, c: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(k, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(6, c, 1),
    )  # fmt: skip


class Attention(nn.Module):
    """Self-attention over the sequence, then one answer from its mean."""

    def __init__(self, width: int = 8, c: int = 5) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, c)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.fc(self.norm(x + y).mean(1))


class Block(nn.Module):
    """A whole transformer block, and answers for every token."""

    def __init__(self, width: int = 8, c: int = 6) -> None:
        super().__init__()
        self.block, self.fc = text_body(width), nn.Linear(width, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(x))


class Gated(nn.Module):
    """A gated linear unit, cut out of one wide layer."""

    def __init__(self, k: int = 16, c: int = 5) -> None:
        super().__init__()
        self.wide, self.fc = nn.Linear(k, 24), nn.Linear(12, c)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(x).chunk(2, dim=-1)
        return self.fc(value * gate.sigmoid())


class Gaussian(nn.Module):
    """Mean and variance of a regression."""

    def __init__(self, k: int = 16, c: int = 2) -> None:
        super().__init__()
        self.hidden, self.mean, self.var = nn.Linear(k, 8), nn.Linear(8, c), nn.Linear(8, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.hidden(x).tanh()
        return torch.cat([self.mean(y), nn.functional.softplus(self.var(y)) + 1e-6], dim=-1)


class Cosine(nn.Module):
    """Similarity to learned directions, scaled."""

    def __init__(self, k: int = 16, c: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c, k))
        self.scale = nn.Parameter(torch.tensor(8.0) + torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        norm = nn.functional.normalize
        return self.scale * nn.functional.linear(norm(x, dim=-1), norm(self.weight, dim=-1))


class Recurrent(nn.Module):
    def __init__(self, width: int = 8, c: int = 5) -> None:
        super().__init__()
        self.gru, self.fc = nn.GRU(width, 8, batch_first=True), nn.Linear(8, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(x)[0][:, -1])


# not a body and heads


class Experts(nn.Module):
    """Multi-gate mixture of experts: experts and gates and towers are three sets of branches."""

    def __init__(self, k: int = 12, experts: int = 4, tasks: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(times(experts, lambda: flat_body(k, 8)))
        self.gates = nn.ModuleList(times(tasks, lambda: nn.Linear(k, experts)))
        self.towers = nn.ModuleList(times(tasks, lambda: mlp(8, 6, 2)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = torch.stack([expert(x) for expert in self.experts], dim=1)
        weights = [gate(x).softmax(-1).unsqueeze(-1) for gate in self.gates]
        mixed = [(values * weight).sum(1) for weight in weights]
        return tuple(tower(y) for tower, y in zip(self.towers, mixed, strict=True))


class Cascade(nn.Module):
    """Every head also reads what the one before it said: not parallel at all."""

    def __init__(self, k: int = 16, c: int = 4) -> None:
        super().__init__()
        self.body, self.first = flat_body(), nn.Linear(k, c)
        self.others = nn.ModuleList(times(3, lambda: nn.Linear(k + c, c)))

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        ys = [self.first(features)]
        for head in self.others:
            ys.append(head(torch.cat([features, ys[-1]], dim=1)))
        return torch.stack(ys)


class Inception(nn.Module):
    """Four paths of different kernels, joined along the channels."""

    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.one = nn.Conv2d(k, 4, 1)
        self.three = nn.Sequential(nn.Conv2d(k, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))
        self.five = nn.Sequential(nn.Conv2d(k, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 5, padding=2))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(k, 4, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1).relu()
        return self.fc(y.mean((2, 3)))


class ResNeXt(nn.Module):
    """A block of equal paths, written out and summed, around its shortcut."""

    def __init__(self, k: int = 8, paths: int = 4) -> None:
        super().__init__()
        self.stem, self.fc = image_body(k), nn.Linear(k, 5)
        self.paths = nn.ModuleList(
            times(paths, lambda: nn.Sequential(
                nn.Conv2d(k, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
                nn.Conv2d(4, k, 1),
            ))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = features = self.stem(x)
        for path in self.paths:
            y = y + path(features)
        return self.fc(y.relu().mean((2, 3)))


class Detector(nn.Module):
    """Class and box branches on two scales: equal at the start, of different widths at the end."""

    def __init__(self, k: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.stem, self.down = image_body(k), nn.Conv2d(k, k, 3, stride=2, padding=1)

        def branch(c: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(k, k, 3, padding=1), nn.SiLU(), nn.Conv2d(k, c, 1))

        self.classes = nn.ModuleList(times(2, lambda: branch(classes)))
        self.boxes = nn.ModuleList(times(2, lambda: branch(4)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scales = [self.stem(x)]
        scales.append(self.down(scales[0]).relu())
        logits = [f(y).flatten(2) for f, y in zip(self.classes, scales, strict=True)]
        boxes = [f(y).flatten(2) for f, y in zip(self.boxes, scales, strict=True)]
        return torch.cat(logits, dim=2).sigmoid(), torch.cat(boxes, dim=2)


class Batched(nn.Module):
    """M heads in one parameter, as `torch.func.stack_module_state` or an einsum leave them."""

    def __init__(self, m: int = 4, k: int = 16, c: int = 5) -> None:
        super().__init__()
        self.body = flat_body(12, k)
        self.weight = nn.Parameter(torch.randn(m, k, c))
        self.bias = nn.Parameter(torch.randn(m, 1, c))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bk,mkc->mbc", self.body(x), self.weight) + self.bias


class Hidden(nn.Module):
    """The first layers of the heads are an output, too."""

    def __init__(self, m: int = 3) -> None:
        super().__init__()
        self.body = flat_body()
        self.first = nn.ModuleList(times(m, lambda: nn.Linear(16, 8)))
        self.second = nn.ModuleList(times(m, lambda: nn.Linear(8, 5)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        inner = [layer(features).relu() for layer in self.first]
        ys = [layer(y) for layer, y in zip(self.second, inner, strict=True)]
        return torch.stack(ys), torch.stack(inner)


class Members(nn.Module):
    """An ensemble of whole networks, side by side."""

    def __init__(self, members: Sequence[nn.Module], join: Join) -> None:
        super().__init__()
        self.members, self.join = nn.ModuleList(members), join

    def forward(self, x: Tensor) -> object:
        return self.join([member(x) for member in self.members])


class Loop(nn.Module):
    """Writes every head's answer into its slice of one tensor."""

    def __init__(self, m: int = 3) -> None:
        super().__init__()
        self.body, self.heads = flat_body(), nn.ModuleList(times(m, mlp))

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        out = features.new_zeros(len(self.heads), x.shape[0], 5)
        for index, head in enumerate(self.heads):
            out[index] = head(features)
        return out
