"""Captioning networks: a member with one head of each kind, a student with M, an ensemble of M.

A network is two functions. ``encode`` looks at an image once and gives, for each of N cells of a
grid, M votes on a box there, and the state its caption begins with. ``step`` takes the words so far
one further, for any number R of regions:

    encode: images [B, 3, H, W]                -> votes [M, B, N, 5], states [B, N, S]
    step:   words [R] (int64), states [R, S]   -> logits [M, R, V], states [R, S]

``speak`` is ``step`` along whole captions, for training.

A state holds what the decoder remembers and what it sees, so that nothing else has to be kept. All
M heads of a student share one state; an ensemble's holds those of its members, side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from hydra_edge.captioning.boxes import LEAST_WEIGHT
from hydra_edge.ensembles import linear_heads, mlp_heads
from hydra_edge.errors import InputError

_REACH = 1.5  # cells that the centre of a box may lie away from its own


class CaptionNetwork(Protocol):
    """What training, distillation and export ask of a network."""

    vocabulary: tuple[str, ...]
    head_count: int

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Votes ``[M, B, N, 5]`` and states ``[B, N, S]``."""
        ...

    def step(self, words: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[M, R, V]`` and states ``[R, S]``."""
        ...

    def speak(self, words: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Logits ``[M, R, T, V]`` along words ``[R, T]``."""
        ...


class Recurrence(nn.GRU):
    """A gated recurrent unit that takes whole captions, or one `step`.

    Source: Cho et al. 2014, arXiv 1406.1078, in the form that torch documents for GRUCell.
    """

    def step(self, word: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """See `Step.step`."""
        into, over, into_bias, over_bias = self.all_weights[0]
        memory, seen = _parts(state, self.hidden_size, state.shape[-1] - self.hidden_size)
        given = functional.linear(torch.cat([word, seen], -1), into, into_bias).chunk(3, -1)
        known = functional.linear(memory, over, over_bias).chunk(3, -1)
        reset, kept = torch.sigmoid(given[0] + known[0]), torch.sigmoid(given[1] + known[1])
        fresh = torch.tanh(given[2] + reset * known[2])
        return fresh + kept * (memory - fresh)

    @torch.no_grad()
    def joined(self, words: int) -> Step:
        """The same step as one matmul, which does not learn.

        Args:
            words: E, the size of a word.
        """
        into, over, into_bias, over_bias = self.all_weights[0]
        gates, hidden = 2 * self.hidden_size, self.hidden_size
        weight = into.new_zeros(4 * hidden, into.shape[1] + hidden)
        bias = into.new_zeros(4 * hidden)
        known = slice(words, words + hidden)
        others = [i for i in range(weight.shape[1]) if not known.start <= i < known.stop]
        weight[: 3 * hidden, others], bias[: 3 * hidden] = into, into_bias
        weight[:gates, known], weight[3 * hidden :, known] = over[:gates], over[gates:]
        bias[:gates] += over_bias[:gates]
        bias[3 * hidden :] = over_bias[gates:]
        return Step(weight, bias)


class Step(nn.Module):
    """A `Recurrence` whose step is one matmul: an engine is asked for each word anew.

    What is fresh has its memory part apart, in the last rows, for the reset gate scales it alone.

    Args:
        weight: ``[4 H, E + H + K]``, of a word, what is remembered, and what is seen.
        bias: ``[4 H]``.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def step(self, word: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The next memory ``[R, H]``.

        Args:
            word: ``[R, E]``.
            state: What is remembered and what is seen, ``[R, H + K]``.
        """
        hidden = len(self.bias) // 4
        memory, _ = _parts(state, hidden, state.shape[-1] - hidden)
        parts = functional.linear(torch.cat([word, state], -1), self.weight, self.bias)
        gates, fresh, remembered = _parts(parts, 2 * hidden, hidden, hidden)
        reset, kept = torch.sigmoid(gates).chunk(2, -1)
        fresh = torch.tanh(fresh + reset * remembered)
        return fresh + kept * (memory - fresh)


class Captioner(nn.Module):
    """A student, or with one head a member.

    Args:
        body: Gives ``[B, features, g, g]`` for an image: a grid of g × g cells.
        vocabulary: The V words; see `hydra_edge.captioning.vocabulary.Vocabulary`.
        features: K, the body's channels.
        heads: M.
        hidden: Size of the decoder's memory.
        embedding: Size of a word.
        neck: Width of a layer that all vocabulary heads share; 0 for none.
        head_hidden: Widths of a vocabulary head's hidden layers; none for a linear head.
    """

    def __init__(
        self,
        body: nn.Module,
        vocabulary: Sequence[str],
        *,
        features: int,
        heads: int = 1,
        hidden: int = 96,
        embedding: int = 32,
        neck: int = 0,
        head_hidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.head_count = heads
        self.hidden = hidden
        self.body = body
        self.box_heads = nn.ModuleList(linear_heads(heads, features, 5))
        for head in self.box_heads:
            assert isinstance(head, nn.Linear)
            nn.init.constant_(head.bias, -2.0)  # most cells hold nothing
        self.start = nn.Linear(features, hidden)
        self.embedding = nn.Embedding(len(self.vocabulary), embedding)
        self.cell: Recurrence | Step = Recurrence(embedding + features, hidden, batch_first=True)
        size, width = len(self.vocabulary), neck or hidden + features
        self.neck = (
            nn.Sequential(nn.Linear(hidden + features, neck), nn.ReLU()) if neck else nn.Identity()
        )
        self.heads = nn.ModuleList(
            mlp_heads(heads, width, size, head_hidden)
            if head_hidden
            else linear_heads(heads, width, size)
        )

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module's docstring."""
        features = self.body(images).flatten(2).transpose(1, 2)
        votes = torch.stack([head(features) for head in self.box_heads])
        return votes, torch.cat([torch.tanh(self.start(features)), features], -1)

    def step(self, words: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module's docstring."""
        memory = self.cell.step(self.embedding(words), states)
        _, features = _parts(states, self.hidden, states.shape[-1] - self.hidden)
        states = torch.cat([memory, features], -1)
        known = self.neck(states)
        return torch.stack([head(known) for head in self.heads]), states

    def speak(self, words: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """See the module's docstring."""
        assert isinstance(self.cell, Recurrence)
        memory, features = states[:, : self.hidden], states[:, self.hidden :]
        seen = features.unsqueeze(1).expand(-1, words.shape[1], -1)
        inputs = torch.cat([self.embedding(words), seen], -1)
        memories, _ = self.cell(inputs, memory.unsqueeze(0).contiguous())
        along = self.neck(torch.cat([memories, seen], -1))
        return torch.stack([head(along) for head in self.heads])


class CaptionEnsemble(nn.Module):
    """Members side by side, each with a state of its own.

    Args:
        members: Networks with one head each and the same vocabulary, grid and state.

    Raises:
        InputError: There is no member, one has several heads, or vocabularies differ.
    """

    def __init__(self, members: Sequence[Captioner]) -> None:
        super().__init__()
        if not members or any(member.head_count != 1 for member in members):
            raise InputError(
                f"An ensemble of {len(members)} captioners cannot be formed.",
                "It has at least one member, and each has one head of each kind.",
                "Give captioners made with heads=1.",
            )
        if len({member.vocabulary for member in members}) > 1:
            raise InputError(
                "The members have different vocabularies.",
                "Their probabilities are averaged word by word.",
                "Train all of them with one vocabulary.",
            )
        self.members = nn.ModuleList(members)
        self.vocabulary = members[0].vocabulary
        self.head_count = len(members)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module's docstring."""
        parts = [member.encode(images) for member in self.members]  # type: ignore[operator]
        return torch.cat([votes for votes, _ in parts]), torch.cat([s for _, s in parts], -1)

    def step(self, words: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module's docstring."""
        own = states.chunk(self.head_count, -1)
        pairs = zip(self.members, own, strict=True)
        parts = [member.step(words, state) for member, state in pairs]  # type: ignore[operator]
        return torch.cat([logits for logits, _ in parts]), torch.cat([s for _, s in parts], -1)

    def speak(self, words: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """See the module's docstring."""
        pairs = zip(self.members, states.chunk(self.head_count, -1), strict=True)
        return torch.cat([m.speak(words, state) for m, state in pairs])  # type: ignore[operator]


def for_steps(network: nn.Module) -> nn.Module:
    """A copy whose recurrences are made for single steps: it cannot ``speak`` or learn."""
    network = copy.deepcopy(network)
    for part in list(network.modules()):
        if isinstance(part, Captioner) and isinstance(part.cell, Recurrence):
            part.cell = part.cell.joined(part.embedding.embedding_dim)
    return network


def _parts(rows: torch.Tensor, *sizes: int) -> tuple[torch.Tensor, ...]:
    """``[…, K]`` in parts of the given sizes: one node of a graph, where slices are several."""
    found: tuple[torch.Tensor, ...] = rows.split(list(sizes), -1)  # type: ignore[no-untyped-call]
    return found


def boxes_of(votes: torch.Tensor) -> torch.Tensor:
    """Boxes that heads vote for.

    Args:
        votes: ``[…, N, 5]`` for the N = g × g cells of a grid, row by row: objectness, then how far
            the centre lies from the cell's, and the size.

    Returns:
        ``[…, N, 4]``: left, top, right, bottom as fractions of the image.
    """
    cells = votes.shape[-2]
    side = round(cells**0.5)
    ticks = (torch.arange(side, dtype=votes.dtype, device=votes.device) + 0.5) / side
    rows, columns = torch.meshgrid(ticks, ticks, indexing="ij")
    home = torch.stack([columns.flatten(), rows.flatten()], -1)
    centre = home + torch.tanh(votes[..., 1:3]) * (_REACH / side)
    half = torch.sigmoid(votes[..., 3:5]) / 2
    return torch.cat([centre - half, centre + half], -1)


def summarize_votes(votes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What M heads say about boxes, together.

    Args:
        votes: ``[M, B, N, 5]``.

    Returns:
        ``boxes [B, N, 4]``, the mean over heads, each weighted by 1e-3 and its probability of an
        object; ``scores [B, N]``, the mean probability of an object; ``score_mi [B, N]``, how much
        heads disagree on that, in nats; ``box_spread [B, N]``, the standard deviation of a side
        over heads, as a fraction of the image.
    """
    probability = torch.sigmoid(votes[..., 0])
    boxes = boxes_of(votes)
    weights = probability + LEAST_WEIGHT
    weights = (weights / weights.sum(0)).unsqueeze(-1)
    mean = (weights * boxes).sum(0)
    spread = (weights * (boxes - mean).square()).sum(0).mean(-1).sqrt()
    scores = probability.mean(0, keepdim=True)
    entropies = _binary_entropy(torch.cat([scores, probability]))
    doubt = entropies[0] - entropies[1:].mean(0)
    return mean, scores[0], doubt.clamp_min(0), spread


def _binary_entropy(probability: torch.Tensor) -> torch.Tensor:
    p = probability.clamp(1e-6, 1 - 1e-6)  # 0 · log 0 is 0, which fp32 does not know
    return -(p * p.log() + (1 - p) * (1 - p).log())
