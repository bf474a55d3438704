"""`benchmark`: latency, memory and quality of sessions, side by side, under one protocol."""

from __future__ import annotations

from collections.abc import Mapping

from hydra_edge.artifacts.report import Protocol as Protocol
from hydra_edge.artifacts.report import Report
from hydra_edge.runtime import EnsembleSession, Session


def benchmark(
    sessions: Mapping[str, Session | EnsembleSession],
    inputs: object,
    *,
    labels: object = None,
    shifted: Mapping[str, object] | None = None,
    reference: str | None = None,
    protocol: Protocol | None = None,
    progress: bool = False,
) -> Report:
    """Measure sessions side by side."""
    raise NotImplementedError


def speedup(report: Report, session: str, baseline: str, batch: int) -> float:
    """How many times faster ``session`` answers than ``baseline``: the ratio of their p50."""
    return report.latency(baseline, batch).p50_ms / report.latency(session, batch).p50_ms
