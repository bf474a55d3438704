"""Boxes: overlap, and which of many to keep. ``[N, 4]``: left, top, right, bottom, any unit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
# Of a head's box in the mean: where none sees an object all count alike, not as rounding has it.
LEAST_WEIGHT = 1e-3


def overlaps(a: npt.ArrayLike, b: npt.ArrayLike) -> Float:
    """Intersection over union of every box of one set with every box of another.

    Args:
        a: ``[N, 4]``.
        b: ``[K, 4]``.

    Returns:
        ``[N, K]`` in 0..1; 0 where both boxes are empty.
    """
    left, right = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    low, high = np.maximum(left[..., :2], right[..., :2]), np.minimum(left[..., 2:], right[..., 2:])
    shared = _areas(low, high)
    union = _areas(left[..., :2], left[..., 2:]) + _areas(right[..., :2], right[..., 2:]) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _areas(low: Float, high: Float) -> Float:
    """Of boxes from a corner to the opposite one, both ``[…, 2]``; 0 where one is not beyond."""
    sides = np.maximum(high - low, 0)
    return np.asarray(sides[..., 0] * sides[..., 1])


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
    order = np.flatnonzero(values > score)
    order = order[np.argsort(-values[order], kind="stable")]
    if len(order) < 2:
        return order[:most]
    corners = np.asarray(boxes)[order]
    apart = overlaps(corners, corners) <= overlap
    alive = np.ones(len(order), bool)
    kept: list[int] = []
    for place, cell in enumerate(order.tolist()):
        if alive[place]:
            kept.append(cell)
            alive &= apart[place]
            if len(kept) == most:
                break
    return np.asarray(kept, np.int64)
