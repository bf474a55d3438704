"""Boxes: overlap, and which of many to keep. ``[N, 4]``: left, top, right, bottom, any unit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]


def overlaps(a: npt.ArrayLike, b: npt.ArrayLike) -> Float:
    """Intersection over union of every box of one set with every box of another.

    Args:
        a: ``[N, 4]``.
        b: ``[K, 4]``.

    Returns:
        ``[N, K]`` in 0..1; 0 where both boxes are empty.
    """
    left, right = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    sides = np.minimum(left[..., 2:], right[..., 2:]) - np.maximum(left[..., :2], right[..., :2])
    shared = np.clip(sides, 0, None).prod(-1)
    union = _areas(left) + _areas(right) - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))


def _areas(boxes: Float) -> Float:
    return np.asarray(np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(-1))


def suppress(
    boxes: npt.ArrayLike, scores: npt.ArrayLike, *, overlap: float, score: float, most: int
) -> npt.NDArray[np.int64]:
    """Greedy non-maximum suppression.

    Args:
        boxes: ``[N, 4]``.
        scores: ``[N]``.
        overlap: A box that overlaps a kept one by more than this goes.
        score: A box that scores no more than this goes.
        most: Boxes kept at most.

    Returns:
        Indices of the kept boxes, best first; of equal scores the first comes first. The same as
        ONNX's NonMaxSuppression.
    """
    values = np.asarray(scores)
    order = np.argsort(-values, kind="stable")
    order = order[values[order] > score]
    corners = np.asarray(boxes)[order]
    kept: list[int] = []
    alive = np.ones(len(order), bool)
    matrix = overlaps(corners, corners)
    for place in range(len(order)):
        if alive[place] and len(kept) < most:
            kept.append(int(order[place]))
            alive &= matrix[place] <= overlap
    return np.asarray(kept, np.int64)
