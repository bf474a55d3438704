"""Overlaps and suppression against plain loops, and against ONNX's own operator."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.captioning.boxes import overlaps, suppress


def random_boxes(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.7, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(0.05, 0.3, (count, 2))], 1)


def plain_overlap(a: np.ndarray, b: np.ndarray) -> float:
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = wide * high
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return float(shared / union) if union > 0 else 0.0


def plain_suppression(
    boxes: np.ndarray, scores: np.ndarray, overlap: float, score: float, most: int
) -> list[int]:
    left = [i for i in range(len(boxes)) if scores[i] > score]
    kept: list[int] = []
    while left and len(kept) < most:
        best = max(left, key=lambda i: (scores[i], -i))
        kept.append(best)
        left = [i for i in left if i != best and plain_overlap(boxes[best], boxes[i]) <= overlap]
    return kept


def onnx_suppression(
    boxes: np.ndarray, scores: np.ndarray, overlap: float, score: float, most: int
) -> list[int]:
    names = ["boxes", "scores", "most", "overlap", "score"]
    node = helper.make_node("NonMaxSuppression", names, ["kept"])
    constants = [
        helper.make_tensor("most", TensorProto.INT64, [1], [most]),
        helper.make_tensor("overlap", TensorProto.FLOAT, [1], [overlap]),
        helper.make_tensor("score", TensorProto.FLOAT, [1], [score]),
    ]
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, len(boxes), 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 1, len(boxes)]),
        ],
        [helper.make_tensor_value_info("kept", TensorProto.INT64, ["k", 3])],
        constants,
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.checker.check_model(model)
    corners = boxes[:, [1, 0, 3, 2]]  # top, left, bottom, right
    feeds = {"boxes": corners[None].astype(np.float32), "scores": scores[None, None]}
    return [int(row[2]) for row in evaluate(model, feeds)["kept"]]


def test_overlaps_are_those_of_a_plain_loop() -> None:
    a, b = random_boxes(20, 1), random_boxes(15, 2)
    a[3] = [0.5, 0.5, 0.5, 0.5]  # an empty box
    expected = [[plain_overlap(x, y) for y in b] for x in a]
    np.testing.assert_allclose(overlaps(a, b), expected, atol=1e-12)  # fp64
    assert overlaps(a[3:4], a[3:4])[0, 0] == 0


def test_a_box_overlaps_itself_wholly() -> None:
    boxes = random_boxes(5, 3)
    np.testing.assert_allclose(np.diag(overlaps(boxes, boxes)), 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("overlap", "score", "most"), [(0.3, 0.2, 64), (0.5, 0.0, 5), (0, 0.9, 9)])
def test_suppression_is_that_of_the_references(
    seed: int, overlap: float, score: float, most: int
) -> None:
    boxes = random_boxes(60, seed)
    scores = np.random.default_rng(seed + 100).permutation(60).astype(np.float32) / 60
    found = suppress(boxes, scores, overlap=overlap, score=score, most=most).tolist()
    assert found == plain_suppression(boxes, scores, overlap, score, most)
    assert found == onnx_suppression(boxes, scores, overlap, score, most)
    assert found


def test_of_equal_scores_the_first_comes_first() -> None:
    boxes = np.asarray([[0, 0, 1, 1], [2, 0, 3, 1], [0, 0, 1, 1.0]])
    assert suppress(boxes, [0.5, 0.5, 0.5], overlap=0.5, score=0, most=9).tolist() == [0, 1]


def test_nothing_to_keep() -> None:
    found = suppress(random_boxes(4, 0), np.zeros(4), overlap=0.5, score=0.0, most=9)
    assert found.shape == (0,)
