"""From the values a tensor takes to the largest one that is kept, and to weights in few bits.

Everything is symmetric: a number x is stored as round(x / scale), cut at ``limit``.

    minmax      the largest value seen: nothing is cut
    percentile  a share of the values is kept
    mse         the smallest squared error, over candidates from 1/50 of the largest value up
    entropy     the smallest KL divergence between the histogram and its quantized form, as in
                Migacz, "8-bit Inference with TensorRT" (GTC 2017)

Zeros do not count, because every scale stores them exactly: the many that a ReLU writes would pull
the entropy's choice far below what the other values need.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Float = npt.NDArray[np.float64]

BINS = 2048
METHODS = ("minmax", "percentile", "entropy", "mse")
_LEVELS = 128  # of int8 on one side of 0, which the entropy method spreads values over
_CANDIDATES = 100
# Where between the largest weight and half of it the best cut is looked for.
_WEIGHT_CUTS = np.linspace(1.0, 0.5, 26)
LIMITS = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
# Below this a scale is no normal float32: quotients by it lose digits, or runtimes take it for 0.
_SMALLEST = float(np.finfo(np.float32).tiny)


def step(peak: npt.ArrayLike, limit: float) -> Array:
    """Scales, float32, with which magnitudes up to ``peak`` reach ``limit``; 1 for zeros."""
    scale = np.asarray(peak, np.float64) / limit
    return np.where(scale >= _SMALLEST, scale, 1.0).astype(np.float32)


def threshold(counts: Float, peak: float, method: str, percentile: float, limit: float) -> float:
    """The largest magnitude that is kept.

    Args:
        counts: Histogram of magnitudes over ``[0, peak]``.
        peak: The largest magnitude seen.
        method: One of `METHODS`.
        percentile: Share of values kept, in percent, for ``"percentile"``.
        limit: The largest integer.
    """
    if peak <= 0 or method == "minmax":
        return peak
    edges = np.linspace(0.0, peak, len(counts) + 1)
    if method == "percentile":
        share = np.cumsum(counts) / counts.sum()
        return float(edges[1 + int(np.searchsorted(share, percentile / 100.0 - 1e-12))])
    if method == "mse":
        centres = (edges[:-1] + edges[1:]) / 2
        cuts = peak * np.linspace(0.02, 1.0, _CANDIDATES)[::-1]
        errors = [_squared_error(centres, counts, cut / limit, limit) for cut in cuts]
        return float(cuts[int(np.argmin(errors))])
    return float(edges[_entropy_bins(counts)])


def _squared_error(values: Float, counts: Float, scale: float, limit: float) -> float:
    kept = np.minimum(np.rint(values / scale), limit) * scale
    return float(np.sum(counts * (kept - values) ** 2))


def _entropy_bins(counts: Float) -> int:
    """How many bins are kept."""
    best, bins = np.inf, len(counts)
    for size in range(_LEVELS, len(counts) + 1, 16):
        kept = counts[:size].copy()
        filled = kept > 0
        kept[-1] += counts[size:].sum()
        # Values are spread over the filled bins of the level they fall into.
        level = np.arange(size) * _LEVELS // size
        totals = np.bincount(level, counts[:size], _LEVELS)
        filled_bins = np.bincount(level, filled, _LEVELS)
        spread = np.where(filled, (totals / np.maximum(filled_bins, 1))[level], 0.0)
        if not spread.sum():
            continue
        p, q = kept / kept.sum(), spread / spread.sum()
        both = (p > 0) & (q > 0)
        divergence = float(np.sum(p[both] * np.log(p[both] / q[both])))
        divergence += float(p[(p > 0) & (q <= 0)].sum()) * 10.0  # mass that nothing stands for
        if divergence < best:
            best, bins = divergence, size
    return bins


def histogram(values: Array, peak: float) -> Float:
    """Counts of magnitudes in `BINS` equal bins over ``[0, peak]``, without zeros.

    Larger ones are counted in the last bin.
    """
    magnitudes = np.abs(np.asarray(values, np.float32))
    magnitudes = np.minimum(magnitudes[magnitudes > 0], np.float32(peak))
    index = np.minimum((magnitudes / np.float32(peak) * BINS).astype(np.int64), BINS - 1)
    return np.bincount(index, minlength=BINS).astype(np.float64)


def weight_scale(weight: Array, axes: tuple[int, ...], limit: float, method: str) -> Array:
    """Scales of a weight, with the reduced ``axes`` kept as 1.

    Args:
        weight: Floats.
        axes: The axes that share a scale.
        limit: The largest integer.
        method: ``"minmax"`` or ``"mse"``.

    Returns:
        float32; all-zero groups get 1.
    """
    values = np.asarray(weight, np.float32)
    peak = np.abs(values).max(axes, keepdims=True)
    if method == "minmax":
        return step(peak, limit)
    # Shares of the largest one, whose squares neither overflow nor vanish.
    shares = values / np.where(peak > 0, peak, np.float32(1.0))
    best, chosen = np.full(peak.shape, np.inf), np.ones(peak.shape)
    for cut in _WEIGHT_CUTS:
        scale = np.float32(cut / limit)
        kept = np.clip(np.rint(shares / scale), -limit, limit) * scale
        error = np.square(kept - shares).sum(axes, keepdims=True)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, cut, chosen)
    return step(peak * chosen, limit)
