"""DenseCap's average precision on cases that can be worked out by hand, and against its loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from hydra_edge.captioning.evaluation import (
    METEORS,
    OVERLAPS,
    judge,
    meteor,
    mutual_rank_correlation,
)
from hydra_edge.captioning.scenes import Scene
from hydra_edge.errors import InputError

pytest.importorskip("nltk")
A, B = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9)


@dataclass(frozen=True)
class Found:
    box: tuple[float, float, float, float]
    score: float
    text: str
    mutual: float = 0.0


def scene(*regions: tuple[tuple[float, ...], str]) -> Scene:
    boxes = np.asarray([box for box, _ in regions], np.float64).reshape(-1, 4)
    return Scene(np.zeros((3, 4, 4), np.float32), boxes, tuple(text for _, text in regions))


def test_all_right() -> None:
    found = [[Found(A, 0.9, "a red circle"), Found(B, 0.8, "a blue square")]]
    scores = judge(found, [scene((A, "a red circle"), (B, "a blue square"))])
    assert scores.map == scores.detection_map == 1.0
    assert set(scores.table) == {(o, m) for o in OVERLAPS for m in METEORS}
    assert scores.meteor == pytest.approx(0.98, abs=0.02)  # METEOR's penalty of one chunk


def test_a_wrong_caption_counts_for_detection_alone() -> None:
    found = [[Found(A, 0.9, "yellow"), Found(B, 0.8, "a blue square")]]
    scores = judge(found, [scene((A, "a red circle"), (B, "a blue square"))])
    assert scores.detection_map == 1.0
    # Recall stops at 1/2, where precision is 1/2: 51 of 101 recalls are reached.
    assert scores.map == pytest.approx(0.5 * 51 / 101)


def test_a_true_box_is_found_once() -> None:
    truth = [scene((A, "a red circle"), (B, "a blue square"))]
    twice = [[Found(A, 0.9, "a red circle"), Found(A, 0.8, "a red circle")]]
    once = [[Found(A, 0.9, "a red circle")]]
    assert judge(twice, truth).map == judge(once, truth).map == pytest.approx(51 / 101)


def test_overlap_thresholds_count_by_themselves() -> None:
    shifted = (0.0, 0.0, 0.4, 0.2)  # half of A
    table = judge([[Found(shifted, 0.9, "a red circle")]], [scene((A, "a red circle"))]).table
    assert [table[overlap, 0.25] for overlap in OVERLAPS] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_true_boxes_that_overlap_much_are_one_with_several_captions() -> None:
    near = (0.0, 0.0, 0.4, 0.38)
    truth = [scene((A, "a red circle"), (near, "the sun"))]
    for text in ("a red circle", "the sun"):
        assert judge([[Found(A, 0.9, text)]], truth).map == 1.0


def test_a_confident_mistake_costs_more_than_a_doubtful_one() -> None:
    truth = [scene((A, "a red circle"))]
    right, wrong = Found(A, 0.5, "a red circle"), (0.6, 0.0, 0.9, 0.3)
    early = judge([[Found(wrong, 0.9, "a"), right]], truth).map
    late = judge([[Found(wrong, 0.1, "a"), right]], truth).map
    assert (early, late) == (0.5, 1.0)


def test_scores_are_ranked_over_all_images() -> None:
    truth = [scene((A, "a red circle")), scene()]
    found = [[Found(A, 0.5, "a red circle")], [Found(B, 0.9, "a")]]
    assert judge(found, truth).map == 0.5


def test_average_precision_is_that_of_the_published_loop() -> None:
    rng = np.random.default_rng(0)
    words = ["a red circle", "a blue square", "a green ring", "two cats"]
    truth, found = [], []
    for _ in range(12):
        corners = rng.uniform(0, 0.6, (3, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.1, 0.3, (3, 2))], 1)
        truth.append(scene(*((tuple(box), words[rng.integers(4)]) for box in boxes)))
        guesses = [tuple(map(float, box + rng.normal(0, 0.02, 4))) for box in boxes]
        texts = [words[rng.integers(4)] for _ in guesses]
        found.append(
            [Found(g, float(rng.uniform()), t) for g, t in zip(guesses, texts, strict=True)]  # type: ignore[arg-type]
        )
    scores = judge(found, truth)
    for (overlap, words_right), value in scores.table.items():
        assert value == pytest.approx(published(found, truth, overlap, words_right), abs=1e-9)


def published(found: list[list[Found]], truth: list[Scene], overlap: float, words: float) -> float:
    """As eval_utils.lua of DenseCap goes about it, with boxes that overlap too little to merge."""
    records = []
    for regions, one in zip(found, truth, strict=True):
        used: set[int] = set()
        for region in sorted(regions, key=lambda region: -region.score):
            best, best_overlap = -1, 0.0
            for index, box in enumerate(one.boxes):
                wide = min(region.box[2], box[2]) - max(region.box[0], box[0])
                high = min(region.box[3], box[3]) - max(region.box[1], box[1])
                if wide > 0 and high > 0:
                    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (region.box, box)]
                    value = wide * high / (sum(areas) - wide * high)
                    if value > best_overlap:
                        best, best_overlap = index, value
            ok = best >= 0 and best not in used
            used.add(best)
            said = meteor(region.text, [one.captions[best]]) if best >= 0 else 0.0
            records.append((region.score, ok and best_overlap >= overlap and said > words))
    records.sort(key=lambda record: -record[0])
    positives = sum(len(one.boxes) for one in truth)
    right = 0
    points = []
    for count, (_, is_right) in enumerate(records, 1):
        right += is_right
        points.append((right / positives, right / count))
    recalls = [step / 100 for step in range(101)]
    return sum(max((p for r, p in points if r >= t), default=0.0) for t in recalls) / 101


def test_meteor_knows_stems_and_no_synonyms() -> None:
    assert meteor("two red circles", ["two red circle"]) > 0.9
    assert meteor("a big dog", ["the large hound"]) == 0.0
    assert meteor("", ["a dog"]) == 0.0
    assert meteor("a dog", ["a cat", "a dog"]) > meteor("a dog", ["a cat"])


def test_numbers_that_do_not_match() -> None:
    with pytest.raises(InputError, match="There are regions for 1 images, and 2 scenes"):
        judge([[]], [scene((A, "a")), scene((B, "b"))])
    with pytest.raises(InputError, match="1 scenes with 0 boxes"):
        judge([[]], [scene()])


def test_doubts_are_ranked_over_regions_that_both_found() -> None:
    ours = [[Found(A, 1, "", 0.1), Found(B, 1, "", 0.5)], [Found(A, 1, "", 0.3)], []]
    theirs = [
        [Found(B, 1, "", 5.0), Found(A, 1, "", 1.0)],
        [Found(A, 1, "", 3.0)],
        [Found(A, 1, "")],
    ]
    assert mutual_rank_correlation(ours, theirs) == (pytest.approx(1.0), 3)
    assert np.isnan(mutual_rank_correlation([[]], [[]])[0])
