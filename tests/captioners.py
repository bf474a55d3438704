"""Small captioners for tests: of torch, compiled, and of numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import hydra_edge as he
from hydra_edge.captioning.exporting import export_captioner
from hydra_edge.captioning.models import Encoding, Rows, Said, State
from hydra_edge.captioning.networks import CaptionEnsemble, Captioner
from hydra_edge.captioning.scenes import Scene
from hydra_edge.captioning.vocabulary import END, UNKNOWN

WORDS = (END, UNKNOWN, "a", "red", "blue", "square")
SIZE, GRID, FEATURES, HIDDEN = 16, 4, 8, 6
OPTIONS = he.CompileOptions(batch=(1, 4, 16), threads=1)


def network(heads: int, seed: int, loud: float = 1.0) -> Captioner:
    """A small captioner whose cells see their own corner of the image; ``loud`` heads disagree."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, FEATURES, 4, 4), nn.Tanh())
    made = Captioner(
        body,
        WORDS,
        features=FEATURES,
        heads=heads,
        hidden=HIDDEN,
        embedding=4,
        head_hidden=(8,) if heads > 1 else (),
    )
    with torch.no_grad():
        for parameter in made.heads.parameters():
            parameter.mul_(loud)
    return made.eval()


def ensemble(members: int = 2) -> CaptionEnsemble:
    return CaptionEnsemble([network(1, seed, loud=3.0) for seed in range(members)]).eval()


def images(count: int = 2, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(0, 1, (count, 3, SIZE, SIZE)).astype(np.float32)


def painted(count: int, seed: int) -> list[Scene]:
    """Scenes that a small captioner can learn: one red or blue square each."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        image = np.full((3, SIZE, SIZE), 0.5, np.float32)
        row, column = rng.integers(0, GRID, 2) * (SIZE // GRID)
        blue = index % 2
        image[:, row : row + 4, column : column + 4] = 0.0
        image[2 * blue, row : row + 4, column : column + 4] = 1.0
        box = np.asarray([[column, row, column + 4, row + 4]]) / SIZE
        found.append(Scene(image, box, (f"a {('red', 'blue')[blue]} square",)))
    return found


@cache
def graphs(kind: str) -> dict[str, he.Graph]:
    """The programs of a student of three heads, or of an ensemble or member, unfused."""
    made = {
        "student": lambda: network(3, 7, loud=3.0),
        "ensemble": ensemble,
        "member": lambda: network(1, 0, loud=3.0),
    }[kind]()
    return export_captioner(made, images(1))


@cache
def engine(kind: str = "student") -> he.Engine:
    """Compiled for the CPU."""
    unfused = graphs(kind)
    fused = {name: he.fuse(graph) for name, graph in unfused.items()}
    return he.compile(fused, options=OPTIONS, unfused=unfused)


class Table:
    """A captioner of numpy: a random recurrent network over V words, with M = 2 heads."""

    def __init__(self, words: int = 4, seed: int = 0, rows: tuple[int, int] = (1, 1000)) -> None:
        rng = np.random.default_rng(seed)
        self.words = (END, UNKNOWN, *(f"w{i}" for i in range(words - 2)))
        self.rows = rows
        self.seen: list[int] = []  # rows of every step
        self.embedding = rng.normal(0, 1.5, (words, 5))
        self.mix = rng.normal(0, 1, (5, 5))
        self.heads = rng.normal(0, 1, (2, 5, words))

    def encode(self, images: object) -> Encoding:
        raise NotImplementedError(images)

    def begin(self, states: Sequence[npt.NDArray[np.generic]]) -> State:
        return states[0]

    def step(self, words: Rows, state: State) -> Said:
        assert isinstance(state, np.ndarray)
        assert self.rows[0] <= len(words) <= self.rows[1]
        self.seen.append(len(words))
        memory = np.tanh(self.embedding[words] + state @ self.mix)
        logits = memory @ self.heads
        prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        mean = prob.mean(0)
        total = -(mean * np.log(mean)).sum(-1)
        expected = -(prob * np.log(prob)).sum(-1).mean(0)
        return Said(mean, total, expected, total - expected, memory)

    def reorder(self, state: State, rows: Rows) -> State:
        assert isinstance(state, np.ndarray)
        return state[rows]

    def speak(self, states: Sequence[npt.NDArray[np.generic]], words: int) -> None:
        return None
