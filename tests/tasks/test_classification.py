"""The classification task against formulas written out in float64."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from hydra_edge import tasks
from hydra_edge.errors import InputError
from hydra_edge.ops.ensemble_summary import softmax
from hydra_edge.tasks.classification import TASK, disagreement, ood_auroc

HEADS, BATCH, CLASSES = 5, 40, 4


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def logits(rng: np.random.Generator) -> np.ndarray:
    return 2 * rng.normal(size=(HEADS, BATCH, CLASSES))


@pytest.fixture
def target(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, CLASSES, BATCH)


def test_the_task_is_found_without_heavy_imports() -> None:
    code = (
        "import sys; from hydra_edge import tasks; tasks.find('classification'); "
        "tasks.find('regression'); "
        "print({'torch', 'sklearn', 'scipy', 'torchmetrics'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert tasks.find("classification") is TASK


def test_summary_and_names_agree(logits: np.ndarray) -> None:
    summary = TASK.summarize(logits)
    assert tuple(summary) == TASK.outputs
    assert TASK.epistemic in TASK.outputs
    for name, value in summary.items():
        vector = name in TASK.vector_outputs
        assert value.shape == ((BATCH, TASK.width(CLASSES)) if vector else (BATCH,))


def test_metrics_match_their_formulas(logits: np.ndarray, target: np.ndarray) -> None:
    prob = softmax(logits)
    mean = prob.mean(0)
    entropy = -(mean * np.log(mean)).sum(-1)
    heads_entropy = -(prob * np.log(prob)).sum(-1).mean(0)
    onehot = np.eye(CLASSES)[target]
    confidence, correct = mean.max(-1), mean.argmax(-1) == target
    bins = np.minimum((confidence * 15).astype(int), 14)
    ece = sum(
        np.mean(bins == i) * abs(correct[bins == i].mean() - confidence[bins == i].mean())
        for i in np.unique(bins)
    )
    expected = {
        "accuracy": correct.mean(),
        "nll": -np.log(mean[np.arange(BATCH), target]).mean(),
        "brier": ((mean - onehot) ** 2).sum(-1).mean(),
        "ece": ece,
        "mutual_information": (entropy - heads_entropy).mean(),
        "predictive_entropy": entropy.mean(),
        "disagreement": disagreement(logits),
    }
    metrics = TASK.metrics(logits, target)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        # torchmetrics bins in float32.
        assert metrics[name] == pytest.approx(value, abs=1e-6 if name == "ece" else 1e-12), name


def test_metrics_of_certain_predictions() -> None:
    logits = np.full((2, 3, 2), -1000.0)
    logits[:, :, 1] = 1000.0
    right = TASK.metrics(logits, np.array([1, 1, 1], np.uint8))
    assert (right["accuracy"], right["brier"], right["ece"]) == (1.0, 0.0, 0.0)
    wrong = TASK.metrics(logits, [0, 0, 0])
    assert (wrong["accuracy"], wrong["brier"], wrong["ece"]) == (0.0, 2.0, 1.0)
    assert np.isfinite(wrong["nll"])
    assert wrong["disagreement"] == wrong["mutual_information"] == 0.0


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_disagreement_counts_head_pairs(rng: np.random.Generator, heads: int) -> None:
    logits = rng.normal(size=(heads, BATCH, CLASSES))
    votes = logits.argmax(-1)
    pairs = [np.mean(a != b) for a, b in itertools.combinations(votes, 2)]
    assert disagreement(logits) == pytest.approx(np.mean(pairs) if pairs else 0.0)


def test_drift_from_itself_is_none(logits: np.ndarray) -> None:
    drift = TASK.drift(logits, logits)
    assert drift == pytest.approx(
        {
            "mi_rank_correlation": 1.0,
            "mi_ratio": 1.0,
            "disagreement_ratio": 1.0,
            "max_abs_mean_prob": 0.0,
            "top1_agreement": 1.0,
        }
    )


def test_drift_to_fewer_and_closer_heads(logits: np.ndarray) -> None:
    closer = logits[:3] * 0.5
    drift = TASK.drift(closer, logits)
    ours, theirs = TASK.summarize(closer), TASK.summarize(logits)
    ratio = ours["mutual_information"].mean() / theirs["mutual_information"].mean()
    difference = np.abs(ours["mean_prob"] - theirs["mean_prob"]).max()
    same = (ours["mean_prob"].argmax(-1) == theirs["mean_prob"].argmax(-1)).mean()
    assert drift["mi_ratio"] == pytest.approx(ratio)
    assert drift["max_abs_mean_prob"] == pytest.approx(difference)
    assert drift["top1_agreement"] == pytest.approx(same)
    assert drift["disagreement_ratio"] == pytest.approx(disagreement(closer) / disagreement(logits))


def test_drift_from_heads_that_all_agree_is_undefined(logits: np.ndarray) -> None:
    drift = TASK.drift(logits, np.repeat(logits[:1], 2, axis=0))
    assert np.isnan(drift["disagreement_ratio"])
    assert np.isfinite(drift["top1_agreement"])


def test_inputs_that_do_not_fit(logits: np.ndarray, target: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"logits have shape \[40, 4\].*needs \[M, B, C\]"):
        TASK.metrics(logits[0], target)
    with pytest.raises(InputError, match="2 classes"):
        TASK.metrics(logits[..., :1], target)
    with pytest.raises(InputError, match="contain NaN"):
        TASK.metrics(np.where(logits > 5, logits, np.nan), target)
    with pytest.raises(InputError, match=r"target is int64 of shape \[39\].*integers of shape"):
        TASK.metrics(logits, target[:-1])
    with pytest.raises(InputError, match=r"target is float64 of shape \[40\]"):
        TASK.metrics(logits, target.astype(float))
    with pytest.raises(InputError, match=r"target is float64 of shape \[40, 4\]"):
        TASK.metrics(logits, np.eye(CLASSES)[target])
    with pytest.raises(InputError, match=r"classes -1 to .*numbered from 0 to 3"):
        TASK.metrics(logits, np.where(target == 0, -1, target))
    with pytest.raises(InputError, match=r"to 4.*numbered from 0 to 3"):
        TASK.metrics(logits, target + 1)
    with pytest.raises(InputError, match=r"\[5, 40, 4\] but the reference is \[5, 39, 4\]"):
        TASK.drift(logits, logits[:, :-1])


def test_auroc_of_an_uncertainty() -> None:
    assert ood_auroc([0.1, 0.2], [0.3, 0.4, 0.5]) == 1.0
    assert ood_auroc([0.3, 0.4], [0.1]) == 0.0
    assert ood_auroc([0.1, 0.1], [0.1]) == 0.5
    with pytest.raises(InputError, match=r"score_out has shape \[0\]"):
        ood_auroc([0.1], [])
    with pytest.raises(InputError, match=r"score_in has shape \[2, 1\]"):
        ood_auroc([[0.1], [0.2]], [0.3])
    with pytest.raises(InputError, match=r"score_out .* 1 values that are not finite"):
        ood_auroc([0.1], [np.nan])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_losses_and_gradients_match_torch_distributions(temperature: float) -> None:
    torch.manual_seed(0)
    teacher = torch.randn(3, 6, 4, dtype=torch.float64)
    student = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    prob = (teacher / temperature).softmax(-1)
    heads = kl_divergence(Categorical(prob), Categorical(logits=student / temperature))
    mean = kl_divergence(Categorical(prob.mean(0)), Categorical(logits=student[0] / temperature))
    for loss, divergence in (
        (TASK.head_loss(student, teacher, temperature), heads),
        (TASK.mean_loss(student[0], teacher, temperature), mean),
    ):
        expected = temperature**2 * divergence.mean()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        gradients = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_losses_vanish_at_the_teacher_and_bear_certain_members() -> None:
    teacher = torch.tensor([[[0.0, 1.0, 2.0]], [[0.0, 500.0, -torch.inf]]])
    assert TASK.head_loss(teacher[:1], teacher[:1], 3.0).abs() < 1e-6
    assert TASK.head_loss(torch.zeros_like(teacher), teacher, 1.0).isfinite()
    assert TASK.mean_loss(torch.zeros(1, 3), teacher[1:], 1.0).item() == pytest.approx(np.log(3))
