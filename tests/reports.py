"""A report made by hand: every kind of figure, measured and not, without running anything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hydra_edge.artifacts.report import (
    IN_DISTRIBUTION,
    Histogram,
    LatencyRow,
    Machine,
    NotMeasured,
    Protocol,
    Reliability,
    ReliabilityBin,
    Report,
    SessionRow,
)

NO_SENSOR = NotMeasured("there is no sensor")
QUALITY = {
    "accuracy": 0.97,
    "nll": 0.11,
    "ece": 0.031,
    "mutual_information": 0.05,
    "ood_auroc_noise": 0.84,
    "mi_rank_correlation": 0.95,
    "mi_ratio": 0.7,
}


def session(label: str, kind: str = "student", **changes: object) -> SessionRow:
    row = SessionRow(
        label=label,
        kind=kind,
        task="classification",
        precision="fp32",
        backend="onnxruntime",
        target="cpu",
        threads=2,
        heads=10,
        engines=1,
        size_bytes=1_400_000,
        weight_bytes=1_390_000,
        parameters=347_500,
        flops_per_sample=1_500_000,
        load_ms=40.5,
        first_run_ms=1.25,
        base_memory_mb=65.0,
        peak_memory_mb=94.2,
        energy_mj=NO_SENSOR,
        quality=QUALITY,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def latency(label: str, batch: int, p50_ms: float, **changes: object) -> LatencyRow:
    row = LatencyRow(
        session=label,
        batch=batch,
        min_ms=0.9 * p50_ms,
        p50_ms=p50_ms,
        p90_ms=1.3 * p50_ms,
        p99_ms=2.5 * p50_ms,
        mean_ms=1.1 * p50_ms,
        n=1234,
        windows=9,
        noise=0.021,
        converged=True,
        throughput_per_s=batch / p50_ms * 1e3,
        cold_p50_ms=1.6 * p50_ms,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def sample(student: str = "student", shifted: str = "noise") -> Report:
    """A student and an ensemble; the names can be chosen, because users choose them."""
    edges = tuple(map(float, np.logspace(-4, 0, 5)))
    theirs = {name: 1.001 * value for name, value in QUALITY.items() if "mi_" not in name}
    return Report(
        created="2025-01-02T03:04:05+00:00",
        machine=Machine("Linux 6 x86_64", "A processor", 2, 1 << 25, "3.11.7", {"onnx": "1.2.3"}),
        protocol=Protocol(),
        datasets={IN_DISTRIBUTION: 100, shifted: 50},
        reference="ensemble",
        sessions=(
            session(student, quality={**QUALITY, f"ood_auroc_{shifted}": 0.84}),
            session(
                "ensemble",
                "ensemble",
                engines=10,
                flops_per_sample=9_000_000,
                load_ms=NotMeasured("the fresh process failed"),
                quality=theirs,
                not_measured={"brier": "nobody asked"},
            ),
        ),
        latencies=(
            latency(student, 1, 0.08),
            latency("ensemble", 1, 0.8, converged=False, noise=0.31),
            latency(student, 32, 0.5, n=20),
            latency("ensemble", 32, 20.0, min_ms=5.0, cold_p50_ms=NotMeasured("no time")),
        ),
        reliabilities=(
            Reliability(student, (ReliabilityBin(0.6, 0.5, 10), ReliabilityBin(0.98, 0.99, 90))),
        ),
        histograms=tuple(
            Histogram(label, name, "mutual_information", edges, counts)
            for label in (student, "ensemble")
            for name, counts in ((IN_DISTRIBUTION, (60, 30, 10, 0)), (shifted, (0, 5, 15, 30)))
        ),
        commit="0123456789abcdef",
        notes=("A note.",),
    )
