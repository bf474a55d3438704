"""The VQA task: official accuracy, coverage at a risk and effective reliability, written out."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from hydra_edge import tasks
from hydra_edge.errors import InputError
from hydra_edge.ops.ensemble_summary import softmax
from hydra_edge.tasks.vqa import (
    TASK,
    best_threshold,
    coverage_at_risk,
    effective_reliability,
    reliability,
)
from hydra_edge.vqa.answers import Vocabulary, accuracy

HEADS, BATCH, ANSWERS = 4, 50, 6


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.fixture
def logits(rng: np.random.Generator) -> np.ndarray:
    return 2 * rng.normal(size=(HEADS, BATCH, ANSWERS))


@pytest.fixture
def scores(rng: np.random.Generator) -> np.ndarray:
    values = rng.choice([0, 0, 0, 0.3, 0.6, 1], (BATCH, ANSWERS))
    values[0] = 0  # the right answer is not in the vocabulary
    return np.asarray(values)


def test_the_task_is_found_without_heavy_imports() -> None:
    code = (
        "import sys; from hydra_edge import tasks; tasks.find('vqa'); tasks.find('vqa_sigmoid'); "
        "print({'torch', 'sklearn', 'scipy', 'torchmetrics', 'tokenizers', 'PIL'} "
        "& set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert tasks.find("vqa") is TASK


def test_summary_and_names_agree(logits: np.ndarray) -> None:
    summary = TASK.summarize(logits)
    assert tuple(summary) == TASK.outputs
    assert TASK.epistemic in summary
    np.testing.assert_allclose(summary["mean_prob"].sum(-1), 1)


def test_metrics_match_their_formulas(logits: np.ndarray, scores: np.ndarray) -> None:
    prob = softmax(logits).mean(0)
    best = prob.argmax(-1)
    right = scores[np.arange(BATCH), best]
    metrics = TASK.metrics(logits, scores)
    assert metrics["accuracy"] == pytest.approx(right.mean())
    shares = [
        -(row * np.log(p)).sum() / row.sum()
        for row, p in zip(scores, prob, strict=True)
        if any(row)
    ]
    assert metrics["nll"] == pytest.approx(np.mean(shares))
    bins = np.minimum((prob.max(-1) * 15).astype(int), 14)
    gaps = [abs((prob.max(-1) - right)[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    assert metrics["ece"] == pytest.approx(sum(gaps))
    assert metrics["coverage_at_risk_0.1"] == coverage_at_risk(prob.max(-1), right, 0.1)
    assert metrics["effective_reliability"] == effective_reliability(prob.max(-1), right)
    assert metrics["mutual_information"] > 0


def test_accuracy_is_the_official_one(rng: np.random.Generator, logits: np.ndarray) -> None:
    words = ("red", "2", "yes", "circle", "no", "left")
    people = [list(rng.choice([*words, "rare"], 10)) for _ in range(BATCH)]
    answers = [words[i] for i in softmax(logits).mean(0).argmax(-1)]
    official = np.mean([accuracy(a, said) for a, said in zip(answers, people, strict=True)])
    found = TASK.metrics(logits, Vocabulary(words).scores(people))["accuracy"]
    assert found == pytest.approx(official)


def test_one_right_answer_each_is_a_target_too(logits: np.ndarray) -> None:
    truth = np.arange(BATCH) % ANSWERS
    found = TASK.metrics(logits, truth)
    classifier = tasks.find("classification").metrics(logits, truth)
    for name in ("accuracy", "nll", "ece", "mutual_information", "disagreement"):
        assert found[name] == pytest.approx(classifier[name], rel=1e-5), name


def test_coverage_at_risk() -> None:
    confidence = [0.9, 0.8, 0.7, 0.6]
    score = [1.0, 0.0, 1.0, 1.0]  # risks 0, 1/2, 1/3, 1/4
    assert coverage_at_risk(confidence, score, 0) == 0.25
    assert coverage_at_risk(confidence, score, 0.3) == 1
    assert coverage_at_risk(confidence, score, 0.25) == 1
    assert coverage_at_risk(confidence, score, 0.2) == 0.25
    assert coverage_at_risk([0.5, 0.4], [0, 1], 0.2) == 0
    # Equally sure ones cannot be told apart: both or none.
    assert coverage_at_risk([0.5, 0.5], [1, 0], 0.1) == 0
    assert coverage_at_risk([0.5] * 10, [0.9] * 10, 0.1) == 1  # whatever sums round to


def test_reliability_is_what_the_paper_says() -> None:
    answered, score = [True, True, True, False], [1.0, 0.3, 0.0, 1.0]
    assert reliability(answered, score) == pytest.approx((1 + 0.3 - 1 + 0) / 4)
    assert reliability(answered, score, cost=100) == pytest.approx((1.3 - 100) / 4)


@pytest.mark.parametrize("cost", [1.0, 10.0])
def test_the_threshold_is_the_best_there_is(rng: np.random.Generator, cost: float) -> None:
    confidence, score = rng.uniform(size=40).round(1), rng.choice([0, 0.3, 1], 40)
    every = [reliability(confidence >= t, score, cost) for t in [*confidence, np.inf]]
    found = best_threshold(confidence, score, cost)
    assert reliability(confidence >= found, score, cost) == pytest.approx(max(every))
    assert best_threshold(confidence, np.zeros(40), cost) == np.inf


def test_no_question_is_judged_at_a_threshold_it_chose() -> None:
    # Even questions are surer and right, odd ones wrong. Together they would choose a threshold
    # that answers the even ones; each half by itself gets the other's, which answers nothing.
    confidence, score = np.tile([0.9, 0.8], 10), np.tile([1.0, 0.0], 10)
    assert reliability(confidence >= best_threshold(confidence, score), score) == 0.5
    assert effective_reliability(confidence, score) == 0
    # Halves that are alike choose alike.
    confidence, score = np.repeat([0.9, 0.8], 10), np.repeat([1.0, 0.0], 10)
    assert effective_reliability(confidence, score) == 0.5
    assert np.isnan(effective_reliability([0.5], [1.0]))


def test_drift_and_losses_are_a_classifiers(logits: np.ndarray) -> None:
    classifier = tasks.find("classification")
    assert TASK.drift(logits, logits[:3]) == classifier.drift(logits, logits[:3])
    student = torch.from_numpy(logits)
    assert TASK.head_loss(student, student.flip(0), 2.0) == classifier.head_loss(
        student, student.flip(0), 2.0
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (np.zeros((BATCH, ANSWERS + 1)), "The target is float64 of shape"),
        (np.zeros(BATCH), "The target is float64 of shape"),
        (np.full(BATCH, ANSWERS), f"holds answers {ANSWERS} to {ANSWERS}"),
        (np.full((BATCH, ANSWERS), 1.5), "outside 0 to 1"),
        (np.full((BATCH, ANSWERS), np.nan), "outside 0 to 1, or NaN"),
    ],
)
def test_targets_that_are_none(logits: np.ndarray, target: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TASK.metrics(logits, target)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([np.nan], [1.0])])
def test_confidences_that_do_not_fit(a: list[float], b: list[float]) -> None:
    with pytest.raises(InputError, match="confidence"):
        coverage_at_risk(a, b, 0.1)
