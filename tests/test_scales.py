"""Cuts and scales against references written value by value in float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from hydra_edge.scales import BINS, METHODS, histogram, step, threshold, weight_scale

Values = npt.NDArray[np.float64]

NORMAL = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
OUTLIER = np.append(NORMAL, np.float32(12.0))
RELU = np.maximum(NORMAL - 1.0, 0.0)  # five zeros in six
FEW = np.float32([0.1, -0.7, 0.7, 3.0])
CONSTANT = np.full(100, -2.5, np.float32)


def cut(values: npt.ArrayLike, method: str, percentile: float = 99.0) -> float:
    values = np.asarray(values)
    peak = float(np.abs(values).max())
    return threshold(histogram(values, peak), peak, method, percentile, 127.0)


def squared_error(values: npt.ArrayLike, kept: float, limit: float = 127.0) -> float:
    values = np.asarray(values, np.float64)
    scale = kept / limit
    stored = np.clip(np.rint(values / scale), -limit, limit)
    return float(np.sum((stored * scale - values) ** 2))


# scales


def test_a_step_takes_the_largest_value_to_the_limit() -> None:
    assert step(np.float32([127.0, 1.0]), 127.0).tolist() == [1.0, np.float32(1 / 127)]
    assert step(3.0, 448.0).dtype == np.float32


@pytest.mark.parametrize("peak", [0.0, 1e-45, 1e-38])
def test_zeros_and_denormals_have_a_step_one_can_divide_by(peak: float) -> None:
    assert step(peak, 127.0) == 1.0


# histograms


def test_a_histogram_counts_all_but_zeros() -> None:
    counts = histogram(np.float32([[0.0, 0.5], [-1.0, 1.0]]), 1.0)
    assert counts.shape == (BINS,)
    assert counts.sum() == 3
    assert (counts[BINS // 2], counts[-1]) == (1, 2)


def test_a_histogram_counts_larger_values_last() -> None:
    assert histogram(np.float32([0.5, 7.0, -1e30]), 1.0)[-1] == 2


@pytest.mark.parametrize("peak", [1e-44, 1e-30, 1e30])
def test_a_histogram_of_any_size_of_values(peak: float) -> None:
    values = np.float32(peak) * np.float32([0.25, 1.0, -1.0])
    counts = histogram(values, float(np.float32(peak)))
    assert (counts.sum(), counts[-1]) == (3, 2)


# activations


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_zeros(method: str) -> None:
    assert threshold(np.zeros(BINS), 0.0, method, 99.0, 127.0) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_is_kept(method: str) -> None:
    assert cut(CONSTANT, method) == 2.5


def test_minmax_keeps_all() -> None:
    assert cut(OUTLIER, "minmax") == 12.0


@pytest.mark.parametrize("percentile", [50.5, 90.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("values", [NORMAL, OUTLIER, RELU, FEW], ids=["normal", "out", "relu", "4"])
def test_percentile(values: npt.NDArray[np.float32], percentile: float) -> None:
    magnitudes = np.sort(np.abs(values[values != 0]).astype(np.float64))
    expected = magnitudes[math.ceil(round(percentile / 100 * len(magnitudes), 6)) - 1]
    found = cut(values, "percentile", percentile)
    assert expected - 1e-6 <= found <= expected + magnitudes[-1] / BINS + 1e-6


def test_percentile_on_the_edge_of_a_bin() -> None:
    """Four values at the lower edges of their bins: 75 % are the first three."""
    values = np.float32([0.25, 0.5, 0.75, 1.0])
    assert cut(values, "percentile", 75.0) == 0.75 + 1 / BINS
    assert cut(values, "percentile", 75.1) == 1.0


@pytest.mark.parametrize("values", [NORMAL, OUTLIER, RELU, FEW], ids=["normal", "out", "relu", "4"])
def test_mse_is_the_best_cut_and_never_worse_than_none(values: npt.NDArray[np.float32]) -> None:
    peak = float(np.abs(values).max())
    found = squared_error(values, cut(values, "mse"))
    best = min(squared_error(values, peak * share) for share in np.linspace(0.02, 1.0, 100))
    # Values are known to a bin, 1/16 of a step.
    assert found <= min(1.02 * best, squared_error(values, peak)) + 1e-9


def migacz(histogram: Values) -> int:
    """The search of the slides, bin by bin."""
    results, counts = [], histogram.tolist()
    for size in range(128, len(counts) + 1, 16):
        p = counts[:size]
        p[-1] += sum(counts[size:])
        q = [0.0] * size
        members: dict[int, list[int]] = {}
        for i in range(size):
            if counts[i] > 0:
                members.setdefault(i * 128 // size, []).append(i)
        for group in members.values():
            mean = sum(counts[i] for i in group) / len(group)
            for i in group:
                q[i] = mean
        total, filled = sum(p), sum(q)
        if filled == 0:
            continue
        p, q = [v / total for v in p], [v / filled for v in q]
        divergence = 0.0
        for a, b in zip(p, q, strict=True):
            if a > 0:
                divergence += a * math.log(a / b) if b > 0 else 10.0 * a
        results.append((divergence, size))
    return min(results)[1]


@pytest.mark.parametrize("values", [OUTLIER, RELU], ids=["out", "relu"])
def test_entropy(values: npt.NDArray[np.float32]) -> None:
    peak = float(np.abs(values).max())
    counts = histogram(values, peak)
    found = threshold(counts, peak, "entropy", 99.0, 127.0)
    assert found == pytest.approx(peak * migacz(counts) / BINS, rel=1e-12)


def test_entropy_cuts_an_outlier_and_nothing_else() -> None:
    assert 3.0 < cut(OUTLIER, "entropy") < 5.0
    assert cut(FEW, "entropy") == 3.0


def test_entropy_does_not_mind_zeros() -> None:
    """A share of 5/6 in one bin would make the cut 0.2."""
    assert cut(RELU, "entropy") == cut(RELU[RELU > 0], "entropy") > 2.0


# weights


def test_weights_by_minmax() -> None:
    weight = np.random.default_rng(1).standard_normal((5, 4, 3)).astype(np.float32)
    found = weight_scale(weight, (0, 2), 127.0, "minmax")
    expected = [[[np.abs(weight[:, n].astype(np.float64)).max() / 127] for n in range(4)]]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize("limit", [7.0, 127.0])
def test_weights_by_mse_are_the_best_of_all_cuts(limit: float) -> None:
    weight = np.random.default_rng(1).standard_t(3, (2000, 6)).astype(np.float32)
    found = weight_scale(weight, (0,), limit, "mse")
    shrunk = 0
    for column, scale in zip(weight.T, found[0], strict=True):
        peak = float(np.abs(column).max())
        error = squared_error(column, float(scale) * limit, limit)
        assert error <= squared_error(column, peak, limit) * (1 + 1e-5)
        cuts = np.linspace(1.0, 0.5, 26) * peak
        best = min(squared_error(column, float(kept), limit) for kept in cuts)
        assert error == pytest.approx(best, rel=1e-4)
        shrunk += scale * limit < 0.99 * peak
    assert shrunk  # or this compares minmax with itself


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_odd_channels(method: str) -> None:
    """A dead one, a denormal one, a constant one, and the largest and smallest that are normal."""
    weight = np.float32([[0, 1e-44, 2, 3e38, 1e-30], [0, -1e-44, 2, -1e38, 5e-31]])
    found = weight_scale(weight, (0,), 127.0, method)[0]
    assert found[:2].tolist() == [1.0, 1.0]
    assert found[2] == pytest.approx(2 / 127)
    assert 0.5 <= found[3] / (3e38 / 127) <= 1.0001
    assert 0.5 <= found[4] / (1e-30 / 127) <= 1.0001


def test_mse_does_not_depend_on_the_unit() -> None:
    weight = np.random.default_rng(1).standard_t(3, (64, 6)).astype(np.float32)
    small, large = (weight_scale(weight * np.float32(2.0**e), (0,), 7.0, "mse") for e in (-90, 90))
    np.testing.assert_array_equal(small * np.float32(2.0**90), large / np.float32(2.0**90))
