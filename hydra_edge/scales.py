"""From the values a tensor takes to the largest one that is kept, and to weights in few bits.

Everything is symmetric: a number x is stored as round(x / scale), cut at ``limit``.

    minmax      the largest value seen: nothing is cut
    percentile  a share of all values is kept
    mse         the smallest squared error, over candidates from 1/50 of the largest value up
    entropy     the smallest KL divergence between the histogram and its quantized form, as in
                Migacz, "8-bit Inference with TensorRT" (GTC 2017)
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
    """Counts of magnitudes in `BINS` equal bins over ``[0, peak]``."""
    magnitudes = np.abs(np.asarray(values, np.float32)).reshape(-1)
    index = np.minimum((magnitudes * (BINS / peak)).astype(np.int64), BINS - 1)
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
    peak = np.where(peak > 0, peak, limit).astype(np.float32)
    if method == "minmax":
        return np.asarray(peak / np.float32(limit), np.float32)
    best = np.full(peak.shape, np.inf, np.float32)
    chosen = peak
    for cut in _WEIGHT_CUTS:
        scale = (peak * np.float32(cut / limit)).astype(np.float32)
        kept = np.clip(np.rint(values / scale), -limit, limit) * scale
        error = np.square(kept - values).sum(axes, keepdims=True)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, scale, chosen)
    return np.asarray(chosen, np.float32)
