"""Figures of quality against libraries, and reasons where there is no figure."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from hydra_edge import quality, tasks
from hydra_edge.artifacts.prediction import Prediction
from hydra_edge.artifacts.report import IN_DISTRIBUTION
from hydra_edge.quality import Answers, bin_doubts, bin_reliability, judge

TASK = tasks.find("classification")
RNG = np.random.default_rng(0)
TRUTH = RNG.integers(0, 4, 200)
LOGITS = RNG.standard_normal((5, 200, 4)) + 2.0 * np.eye(4)[TRUTH]


def answers(logits: np.ndarray = LOGITS, outliers: np.ndarray | None = None) -> Answers:
    sets = {IN_DISTRIBUTION: logits}
    if outliers is not None:
        sets["odd"] = outliers
    return Answers(TASK, sets, {name: TASK.summarize(array) for name, array in sets.items()})


def test_the_tasks_metrics_are_taken_over() -> None:
    found = judge(answers(), TRUTH, None)
    assert found.figures == TASK.metrics(LOGITS, TRUTH)
    assert not found.not_measured


def test_a_summary_may_lack_what_its_graph_omits() -> None:
    arrays = {k: v for k, v in TASK.summarize(LOGITS).items() if k != "variation_ratio"}
    state = {"next_state": np.zeros((200, 3), np.float32), "more": np.zeros((200, 3), np.float32)}
    found = quality._answers(TASK, {IN_DISTRIBUTION: Prediction({**arrays, **state})})
    assert set(found.summaries[IN_DISTRIBUTION]) == set(arrays)
    assert not found.logits
    del arrays["mutual_information"]
    assert not quality._answers(TASK, {IN_DISTRIBUTION: Prediction(arrays)}).summaries


def test_without_labels_there_is_a_reason() -> None:
    found = judge(answers(), None, None)
    assert not found.figures
    assert found.not_measured == {"task metrics": "no labels were given"}


def test_without_a_task_or_heads_there_is_a_reason() -> None:
    assert judge(Answers(None, {}, {}), TRUTH, None).not_measured == {
        "task metrics": "the engine declares no task"
    }
    assert judge(Answers(TASK, {}, {}), TRUTH, answers()).not_measured == {
        "task metrics": "the engine returns no per-head output",
        "drift": "the engine returns no per-head output",
    }


def test_a_missing_library_is_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    found = judge(answers(outliers=LOGITS), TRUTH, answers(outliers=LOGITS))
    assert "pip install 'hydra-edge[metrics]'" in found.not_measured["task metrics"]
    assert "pip install 'hydra-edge[metrics]'" in found.not_measured["ood_auroc"]
    assert found.figures["mi_rank_correlation"] == pytest.approx(1.0)  # needs no library


def test_outliers_that_all_are_more_doubtful_give_an_auroc_of_one() -> None:
    sure = LOGITS[:1] + 1e-3 * RNG.standard_normal(LOGITS.shape)
    torn = np.tile(20.0 * np.eye(4)[[0, 1, 2, 3, 0]][:, None, :], (1, 200, 1))
    assert judge(answers(sure, torn), None, None).figures["ood_auroc_odd"] == 1.0


def test_drift_covers_all_sets_and_each_of_them() -> None:
    other = RNG.standard_normal(LOGITS.shape)
    ours, theirs = answers(LOGITS, other), answers(LOGITS, 1.5 * other)
    found = judge(ours, None, theirs).figures
    together = TASK.drift(
        np.concatenate([LOGITS, other], 1), np.concatenate([LOGITS, 1.5 * other], 1)
    )
    assert found.items() >= together.items()
    assert found[f"mi_ratio_{IN_DISTRIBUTION}"] == 1.0
    assert found["mi_ratio_odd"] < 1.0


def test_what_is_not_defined_is_a_reason() -> None:
    certain = np.tile(1e4 * np.eye(4)[TRUTH], (5, 1, 1))  # entropies that are exactly 0
    found = judge(answers(), None, answers(certain))
    assert "not defined" in found.not_measured["mi_rank_correlation"]
    assert all(np.isfinite(list(found.figures.values())))


def test_one_head_has_no_disagreement() -> None:
    one = answers(LOGITS[:1], LOGITS[:1])
    found = judge(one, TRUTH, answers(LOGITS, LOGITS))
    assert set(found.not_measured) == {
        "mutual_information",
        "disagreement",
        "ood_auroc_odd",
        "drift",
    }
    assert set(found.not_measured.values()) == {"a single head cannot disagree with itself"}
    assert bin_doubts({"one": one}) == ()


def test_another_task_is_no_reference() -> None:
    other = Answers(tasks.find("regression"), {IN_DISTRIBUTION: LOGITS}, {})
    assert "another task" in judge(answers(), None, other).not_measured["drift"]


def test_reliability_bins_give_the_calibration_error() -> None:
    found = bin_reliability("a", answers(), TRUTH)
    assert found is not None
    total = sum(each.count for each in found.bins)
    gaps = sum(each.count * abs(each.accuracy - each.confidence) for each in found.bins)
    assert total == 200
    # torchmetrics computes in float32.
    assert gaps / total == pytest.approx(TASK.metrics(LOGITS, TRUTH)["ece"], abs=1e-6)


def test_scores_make_answers_right_by_degrees() -> None:
    """Labels of one right answer each and their scores give one diagram; half scores half of it."""
    whole = bin_reliability("a", answers(), TRUTH)
    assert bin_reliability("a", answers(), np.eye(4)[TRUTH]) == whole
    half = bin_reliability("a", answers(), 0.5 * np.eye(4)[TRUTH])
    assert whole is not None
    assert half is not None
    for ours, theirs in zip(half.bins, whole.bins, strict=True):
        assert ours.accuracy == pytest.approx(0.5 * theirs.accuracy)
        assert ours.confidence == theirs.confidence


def test_there_is_no_reliability_without_labels_or_classes() -> None:
    assert bin_reliability("a", answers(), None) is None
    assert bin_reliability("a", Answers(None, {}, {}), TRUTH) is None


def test_histograms_share_their_edges_and_count_every_sample() -> None:
    found = bin_doubts({"a": answers(LOGITS, 3 * LOGITS), "b": answers(0.1 * LOGITS)})
    assert [(each.session, each.dataset) for each in found] == [
        ("a", IN_DISTRIBUTION),
        ("a", "odd"),
        ("b", IN_DISTRIBUTION),
    ]
    assert len({each.edges for each in found}) == 1
    assert all(sum(each.counts) == 200 for each in found)
    assert {each.quantity for each in found} == {"mutual_information"}


def test_doubt_of_several_outputs_is_their_mean() -> None:
    task = tasks.find("regression")
    params = RNG.standard_normal((3, 10, 4))
    found = Answers(task, {}, {"x": task.summarize(params)})
    expected = params[:, :, :2].var(0).mean(1)
    np.testing.assert_allclose(found.doubt("x"), expected)


def test_the_module_needs_no_optional_library() -> None:
    assert not {"torch", "sklearn"} & set(vars(quality))
