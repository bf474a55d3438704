"""The task of saying the next word: that of naming a class, with padding left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hydra_edge import tasks
from hydra_edge.errors import InputError
from hydra_edge.tasks.dense_captioning import rows_of

TASK = tasks.find("dense_captioning")
PLAIN = tasks.find("classification")
LOGITS = np.random.default_rng(0).normal(size=(3, 40, 6))
WORDS = np.random.default_rng(1).integers(0, 6, 40)


def test_padding_does_not_count() -> None:
    target = WORDS.copy()
    target[::3] = -1
    spoken = target >= 0
    expected = PLAIN.metrics(LOGITS[:, spoken], target[spoken])
    found = TASK.metrics(LOGITS, target)
    assert found.pop("perplexity") == pytest.approx(math.exp(expected["nll"]))
    assert found == expected


def test_the_prediction_is_the_mean_of_the_heads_word_by_word() -> None:
    prob = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    np.testing.assert_allclose(TASK.summarize(LOGITS)["mean_prob"], prob.mean(0))
    assert (TASK.name, TASK.summary_op) == ("dense_captioning", "EnsembleSummary")
    assert TASK.epistemic == "mutual_information"


def test_rows_are_those_of_words() -> None:
    logits = torch.randn(2, 3, 4, 5)
    words = torch.tensor([[1, 0, -1, -1], [2, 3, 4, 0], [0, -1, -1, -1]])
    rows = rows_of(logits, words)
    assert rows.shape == (2, 7, 5)
    torch.testing.assert_close(rows[:, 2:6], logits[:, 1])


def test_all_is_padding() -> None:
    with pytest.raises(InputError, match="All target words are padding"):
        TASK.metrics(LOGITS, np.full(40, -1))


def test_a_target_of_another_size() -> None:
    with pytest.raises(InputError, match="The logits hold 40 samples"):
        TASK.metrics(LOGITS, WORDS[:5])
