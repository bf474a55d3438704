"""How long calls take: windows in turn until the noise is low enough, or time is up.

Sessions take turns in short windows, so that all of them see the same noise. Everything but the
call itself lies outside the timed region.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from hydra_edge.artifacts.report import Figure, LatencyRow, NotMeasured, Protocol

Call = Callable[[], object]
UNKNOWN_CACHE_BYTES = 64 << 20  # more than most machines of one processor have


def measure(
    calls: Mapping[str, Sequence[Call]],
    batch: int,
    protocol: Protocol,
    cache_bytes: int | None,
) -> list[LatencyRow]:
    """Latency of several sessions at one batch size.

    Args:
        calls: By session: what to call, over and over in this order.
        batch: Samples of one call.
        protocol: How long, how often, how exactly.
        cache_bytes: Size of the last-level cache, or None when unknown.

    Returns:
        One row per session, in the given order.
    """
    endless = {label: itertools.cycle(each) for label, each in calls.items()}
    with _no_garbage_collection():
        windows = _windows(endless, protocol)
        cold = _cold(endless, protocol, cache_bytes)
    return [_row(label, batch, windows[label], protocol, cold[label]) for label in calls]


def _windows(
    calls: Mapping[str, Iterator[Call]], protocol: Protocol
) -> dict[str, list[list[float]]]:
    """Latencies in milliseconds by session and window."""
    for each in calls.values():
        _window(each, protocol.warmup_s)
    labels = list(calls)
    windows: dict[str, list[list[float]]] = {label: [] for label in labels}
    rng = np.random.default_rng(protocol.seed)
    end = time.perf_counter() + protocol.max_seconds
    for count in range(1, protocol.max_windows + 1):
        for index in rng.permutation(len(labels)):
            label = labels[index]
            windows[label].append(_window(calls[label], protocol.window_s))
        settled = all(_noise(found) <= protocol.max_noise for found in windows.values())
        late = count > 1 and time.perf_counter() > end
        if late or (settled and count >= protocol.min_windows):
            break
    return windows


def _window(calls: Iterator[Call], seconds: float) -> list[float]:
    """Latencies in milliseconds of calls for ``seconds``, after one untimed call to warm up."""
    next(calls)()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        samples.append(_timed_ms(next(calls)))
    return samples


def _timed_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _noise(windows: Sequence[Sequence[float]]) -> float:
    """Interquartile range of the windows' medians, relative to their median."""
    low, middle, high = np.percentile([np.median(window) for window in windows], (25, 50, 75))
    return float((high - low) / middle)


def _cold(
    calls: Mapping[str, Iterator[Call]], protocol: Protocol, cache_bytes: int | None
) -> dict[str, Figure]:
    """Median latency per session when weights and inputs come from main memory."""
    if not protocol.cold_samples:
        return dict.fromkeys(calls, NotMeasured("the protocol takes no cold samples"))
    evictor = np.zeros(2 * (cache_bytes or UNKNOWN_CACHE_BYTES), np.uint8)
    samples: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(protocol.cold_samples):
        for label, call in calls.items():
            ready = next(call)
            evictor += 1
            samples[label].append(_timed_ms(ready))
    return {label: float(np.median(found)) for label, found in samples.items()}


def _row(
    label: str,
    batch: int,
    windows: Sequence[Sequence[float]],
    protocol: Protocol,
    cold_p50_ms: Figure,
) -> LatencyRow:
    samples = np.concatenate(windows)
    p50, p90, p99 = map(float, np.percentile(samples, (50, 90, 99)))
    spread = _noise(windows)
    return LatencyRow(
        session=label,
        batch=batch,
        min_ms=float(samples.min()),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=float(samples.mean()),
        n=len(samples),
        windows=len(windows),
        noise=spread,
        converged=spread <= protocol.max_noise and len(windows) >= protocol.min_windows,
        throughput_per_s=batch / p50 * 1e3,
        cold_p50_ms=cold_p50_ms,
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collections strike at random and would be charged to whichever session runs just then."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
