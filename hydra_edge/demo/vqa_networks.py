"""The networks of the VQA demo, and how a member is trained; `member` and `student` are factories.

A convolution reads the image into 3 x 3 cells, one for each place. The question sets gain and shift
of two layers on them (FiLM: Perez et al. 2018, arXiv 1709.07871), which is where it looks; what is
there is summed up under eight maps of attention (Yang et al. 2016, arXiv 1511.02274), and words and
image are joined by a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from hydra_edge.ensembles import Hydra, linear_heads

HEADS = 5
WORDS = 12  # tokens of a question
FEATURES = 128
_VOCABULARY = 64  # room for the tokenizer's words
_EMBEDDING = 32
_CHANNELS = 64
_CELLS = 9
_MAPS = 8
_BATCH = 128
_LEARNING_RATE = 4e-3


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class _Modulated(nn.Module):
    """A layer on every cell whose gain and shift the question sets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(_CHANNELS, _CHANNELS, 1, bias=False)
        self.norm = nn.BatchNorm2d(_CHANNELS)

    def forward(self, x: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        normal = self.norm(self.layer(x))
        return functional.relu(normal * (1 + gain[:, :, None, None]) + shift[:, :, None, None])


def _reader() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(_VOCABULARY, _EMBEDDING),
        nn.Flatten(),
        nn.Linear(WORDS * _EMBEDDING, FEATURES),
        nn.ReLU(),
        nn.Linear(FEATURES, FEATURES),
        nn.ReLU(),
    )


class Body(nn.Module):
    """``image [B, 3, 24, 24]`` and ``question [B, 12]`` to features ``[B, 128]``."""

    def __init__(self) -> None:
        super().__init__()
        self.question = _reader()
        self.modulation = nn.Linear(FEATURES, 4 * _CHANNELS)
        self.image = nn.Sequential(
            _block(3, 32, 2),
            _block(32, 48, 2),
            _block(48, _CHANNELS, 1),
            _block(_CHANNELS, _CHANNELS, 2),
        )
        self.places = nn.Parameter(0.5 * torch.randn(1, _CHANNELS, 3, 3))
        self.first, self.second = _Modulated(), _Modulated()
        self.attention = nn.Conv2d(_CHANNELS, _MAPS, 1)
        self.values = nn.Conv2d(_CHANNELS, _CHANNELS, 1)
        self.joined = nn.Linear((_MAPS + _CELLS) * _CHANNELS, 2 * FEATURES)
        self.gate = nn.Linear(FEATURES, 2 * FEATURES)
        self.features = nn.Linear(2 * FEATURES, FEATURES)

    def forward(self, image: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Features that all heads read."""
        words = self.question(question)
        gain, shift, gain_2, shift_2 = self.modulation(words).chunk(4, 1)
        cells = self.image(image)
        looked = self.second(self.first(cells + self.places, gain, shift), gain_2, shift_2)
        maps = torch.sigmoid(self.attention(looked)).flatten(2)
        seen = maps @ self.values(cells).flatten(2).transpose(1, 2)
        both = torch.cat([seen.flatten(1), looked.flatten(1)], 1)
        fused = functional.relu(self.joined(both) * (1 + self.gate(words)))
        return functional.relu(self.features(fused))


class Member(nn.Module):
    """One member of the ensemble: a body and a linear layer."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(FEATURES, answers)

    def forward(self, image: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]``."""
        logits: torch.Tensor = self.head(self.body(image, question))
        return logits


class Blind(nn.Module):
    """Answers without looking: what the questions alone give away."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_reader(), nn.Linear(FEATURES, answers))

    def forward(self, image: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]``."""
        logits: torch.Tensor = self.layers(question)
        return logits


def student(labels: tuple[str, ...], start: nn.Module | None = None) -> Hydra:
    """One body like a member's, and five linear heads.

    Args:
        labels: The answers.
        start: A trained member whose weights body and heads begin with.
    """
    hydra = Hydra(Body(), linear_heads(HEADS, FEATURES, len(labels)), task="vqa", labels=labels)
    if isinstance(start, Member):
        hydra.body.load_state_dict(start.body.state_dict())
        for head in hydra.heads:
            head.load_state_dict(start.head.state_dict())
    return hydra


def untrained(kind: Callable[[int], nn.Module], answers: int, seed: int) -> nn.Module:
    """A `Member` or `Blind` with initial weights of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = kind(answers)
    return network


@dataclass(frozen=True)
class Examples:
    """What a member learns from.

    Attributes:
        images: ``[N, 3, 24, 24]``.
        questions: ``[N, 12]``.
        scores: ``[N, C]``, how right each answer is.
    """

    images: npt.NDArray[np.float32]
    questions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


def train(
    examples: Examples, seed: int, epochs: int, model: nn.Module, on_epoch: Callable[[], None]
) -> nn.Module:
    """Train one network on the shares of the answers, with its own order of the examples."""
    generator = torch.Generator().manual_seed(seed)
    images, questions = torch.from_numpy(examples.images), torch.from_numpy(examples.questions)
    scores = torch.from_numpy(examples.scores)
    shares = scores / scores.sum(1, keepdim=True).clamp_min(1e-6)
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, weight_decay=1e-3)
    steps = len(images) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=epochs * steps, pct_start=0.2
    )
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in torch.split(order[: steps * _BATCH], _BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[batch], questions[batch]), shares[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        on_epoch()
    return model.eval()
