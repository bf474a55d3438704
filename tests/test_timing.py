"""How measuring stops, takes turns and says what it found. Nothing here asserts a speed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import count, groupby

import pytest

from hydra_edge.artifacts.report import LatencyRow, NotMeasured, Protocol
from hydra_edge.timing import measure

QUICK = Protocol(
    warmup_s=0, window_s=1e-4, min_windows=3, max_windows=5, max_noise=1e9, cold_samples=0
)


def nothing() -> None:
    """The shortest call."""


def run(protocol: Protocol, **calls: Callable[[], object]) -> list[LatencyRow]:
    return measure({name: [call] for name, call in calls.items()}, 4, protocol, 1 << 12)


def changed(**changes: object) -> Protocol:
    return Protocol(**{**vars(QUICK), **changes})  # type: ignore[arg-type]


def test_it_stops_when_the_noise_is_low_enough() -> None:
    (row,) = run(QUICK, a=nothing)
    assert (row.windows, row.converged) == (3, True)


def test_it_stops_in_any_case_and_says_so() -> None:
    sizes = count(10_000, 10_000)
    (row,) = run(changed(max_noise=1e-9), a=lambda: sum(range(next(sizes))))  # ever slower
    assert (row.windows, row.converged) == (5, False)


def test_it_stops_when_time_is_up_with_two_windows_at_least() -> None:
    (row,) = run(changed(max_seconds=1e-9), a=nothing)
    assert (row.windows, row.converged) == (2, False)


def test_a_row_is_consistent() -> None:
    (row,) = run(QUICK, a=nothing)
    assert 0 < row.min_ms <= row.p50_ms <= row.p90_ms <= row.p99_ms
    assert row.n >= row.windows
    assert row.noise >= 0
    assert row.throughput_per_s == pytest.approx(4 / row.p50_ms * 1e3)
    assert row.cold_p50_ms == NotMeasured("the protocol takes no cold samples")


def test_sessions_take_turns_in_every_round() -> None:
    order: list[str] = []
    names = ("a", "b", "c")
    rows = run(changed(window_s=1e-9), **{n: lambda n=n: order.append(n) for n in names})
    assert [row.session for row in rows] == ["a", "b", "c"]
    calls = [name for name, _ in groupby(order)]
    assert all(calls.count(name) <= 4 for name in names)  # warm-up and three rounds
    assert {row.windows for row in rows} == {3}


def test_cold_calls_come_on_top_of_the_windows() -> None:
    counts = []
    for cold_samples in (0, 7):
        calls: list[int] = []
        protocol = changed(window_s=1e-9, cold_samples=cold_samples)
        (row,) = run(protocol, a=lambda calls=calls: calls.append(1))
        counts.append(len(calls))
    assert counts[1] == counts[0] + 7
    assert isinstance(row.cold_p50_ms, float)


def test_inputs_are_used_in_turn() -> None:
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    measure({"a": calls}, 1, changed(window_s=1e-9), None)
    assert seen[:6] == [0, 1, 2, 0, 1, 2]


def test_garbage_collection_is_back_afterwards() -> None:
    states: list[bool] = []
    assert gc.isenabled()
    run(QUICK, a=lambda: states.append(gc.isenabled()))
    assert gc.isenabled()
    assert not any(states)
