"""A step is a step of what is spoken, an ensemble is its members, boxes are where cells are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captioners import FEATURES, GRID, HIDDEN, WORDS, ensemble, images, network

from hydra_edge.captioning.networks import CaptionEnsemble, boxes_of, summarize_votes
from hydra_edge.errors import InputError


@pytest.mark.parametrize("make", [lambda: network(3, 1, 3.0), ensemble])
@torch.no_grad()
def test_steps_say_what_is_spoken_at_once(make: object) -> None:
    made = make()  # type: ignore[operator]
    votes, states = made.encode(torch.from_numpy(images()))
    assert votes.shape[1:] == (2, GRID * GRID, 5)
    rows = states[:, :4].flatten(0, 1)
    words = torch.randint(0, len(WORDS), (len(rows), 5), generator=torch.Generator().manual_seed(0))
    spoken = made.speak(words, rows)
    for place in range(5):
        logits, rows = made.step(words[:, place], rows)
        torch.testing.assert_close(spoken[:, :, place], logits)


@torch.no_grad()
def test_a_step_is_that_of_torch() -> None:
    made = network(1, 3)
    cell = torch.nn.GRUCell(4 + FEATURES, HIDDEN)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in made.cell.state_dict().items()})
    word, memory, seen = torch.randn(5, 4), torch.randn(5, HIDDEN), torch.randn(5, FEATURES)
    found = made.cell.step(word, torch.cat([memory, seen], -1))
    torch.testing.assert_close(found, cell(torch.cat([word, seen], -1), memory))


@torch.no_grad()
def test_an_ensemble_is_its_members() -> None:
    both = ensemble(2)
    x = torch.from_numpy(images())
    votes, states = both.encode(x)
    for index, member in enumerate(both.members):
        own_votes, own_states = member.encode(x)
        torch.testing.assert_close(votes[index], own_votes[0])
        torch.testing.assert_close(states.chunk(2, -1)[index], own_states)


def test_boxes_lie_at_their_cells() -> None:
    votes = torch.zeros(GRID * GRID, 5)
    found = boxes_of(votes)
    centres = (found[:, :2] + found[:, 2:]) / 2
    assert centres[0].tolist() == [0.125, 0.125]
    assert centres[1].tolist() == [0.375, 0.125]  # row by row
    torch.testing.assert_close(found[:, 2:] - found[:, :2], torch.full((16, 2), 0.5))


def test_votes_together_in_float64() -> None:
    votes = torch.randn(3, 2, GRID * GRID, 5, generator=torch.Generator().manual_seed(2))
    boxes, scores, doubt, spread = (t.numpy() for t in summarize_votes(votes))
    each = boxes_of(votes).double().numpy()
    p = 1 / (1 + np.exp(-votes[..., 0].double().numpy()))
    weights = ((p + 1e-3) / (p + 1e-3).sum(0))[..., None]
    mean = (weights * each).sum(0)

    def entropy(q: np.ndarray) -> np.ndarray:
        return -(q * np.log(q) + (1 - q) * np.log(1 - q))

    # fp32 keeps 1e-7 of probabilities, and the doubt is a difference of two entropies
    np.testing.assert_allclose(boxes, mean, atol=1e-6)
    np.testing.assert_allclose(scores, p.mean(0), atol=1e-6)
    np.testing.assert_allclose(doubt, entropy(p.mean(0)) - entropy(p).mean(0), atol=1e-5)
    variance = (weights * (each - mean) ** 2).sum(0).mean(-1)
    np.testing.assert_allclose(spread, np.sqrt(variance), atol=1e-5)


def test_heads_that_agree_have_no_doubt() -> None:
    votes = torch.randn(1, 1, 16, 5).expand(4, 1, 16, 5)
    _, _, doubt, spread = summarize_votes(votes)
    assert float(doubt.max()) < 1e-6
    assert float(spread.max()) < 1e-3  # the root of fp32's rounding


def test_ensembles_that_cannot_be() -> None:
    with pytest.raises(InputError, match="An ensemble of 0 captioners cannot be formed"):
        CaptionEnsemble([])
    with pytest.raises(InputError, match="each has one head of each kind"):
        CaptionEnsemble([network(2, 0)])
    odd = network(1, 0)
    odd.vocabulary = (*WORDS[:-1], "other")
    with pytest.raises(InputError, match="different vocabularies"):
        CaptionEnsemble([network(1, 0), odd])
