"""A benchmark of small real engines: every figure is there, or a reason for its absence."""

from __future__ import annotations

import getpass
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx_models import Net, conv_student, linear, tiny_engine

from hydra_edge import compilation, fusion, measurement, runtime
from hydra_edge.artifacts.graph import Graph, Metadata
from hydra_edge.artifacts.report import IN_DISTRIBUTION, NotMeasured, Report
from hydra_edge.costs import cost
from hydra_edge.errors import InputError
from hydra_edge.measurement import Protocol, benchmark, speedup

RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((21, 3, 8, 8)).astype(np.float32)
LABELS = RNG.integers(0, 4, 21)
BRISK = Protocol(
    batches=(1, 6),
    warmup_s=0.001,
    window_s=0.002,
    min_windows=2,
    max_windows=3,
    cold_samples=2,
)
Sessions = dict[str, runtime.Session | runtime.EnsembleSession]


def member(seed: int) -> Graph:
    """An image classifier with one answer and no task."""
    net = Net(seed=seed)
    x = net.input("x", ("batch", 3, 8, 8))
    h = net.op("Relu", net.op("Conv", x, net.random(8, 3, 3, 3)))
    h = net.op("Flatten", net.op("GlobalAveragePool", h))
    return net.graph({linear(net, h, 8, 4): ("batch", 4)}, Metadata(kind="member"))


@pytest.fixture(scope="module")
def sessions() -> Iterator[Sessions]:
    options = compilation.CompileOptions(batch=(1, 2, 4), threads=1, lowering="grouped")
    graph = fusion.fuse(conv_student())
    graph = Graph(graph.model, replace(graph.metadata, kind="student"))
    student = compilation.compile(graph, options=options)
    members = [compilation.compile(member(seed), options=options) for seed in range(3)]
    live: Sessions = {
        "student": runtime.load(student, threads=1),
        "ensemble": runtime.EnsembleSession([runtime.load(m, threads=1) for m in members]),
        "one member": runtime.load(members[0], threads=1),
    }
    yield live
    for session in live.values():
        session.close()


@pytest.fixture(scope="module")
def report(sessions: Sessions) -> Report:
    return benchmark(
        sessions,
        INPUTS,
        labels=LABELS,
        shifted={"loud": 5 * INPUTS},
        reference="ensemble",
        protocol=BRISK,
    )


def test_every_session_and_batch_has_a_row(report: Report, sessions: Sessions) -> None:
    assert [row.label for row in report.sessions] == list(sessions)
    found = [(row.batch, row.session) for row in report.latencies]
    assert found == [(batch, label) for batch in (1, 6) for label in sessions]
    assert report.datasets == {IN_DISTRIBUTION: 21, "loud": 21}
    assert (report.protocol, report.reference, report.commit) == (BRISK, "ensemble", None)
    assert report.created.endswith("+00:00")


def test_sessions_are_described(report: Report, sessions: Sessions) -> None:
    student, ensemble, single = report.sessions
    assert (student.kind, student.heads, student.engines) == ("student", 3, 1)
    assert (ensemble.kind, ensemble.heads, ensemble.engines) == ("ensemble", 3, 3)
    assert (single.kind, single.heads, single.engines) == ("member", 1, 1)
    assert {row.task for row in report.sessions} == {"classification"}
    assert {(row.threads, row.target, row.backend) for row in report.sessions} == {
        (1, "cpu", "onnxruntime")
    }
    assert student.flops_per_sample == cost(fusion.fuse(conv_student())).flops_per_sample
    assert ensemble.flops_per_sample == 3 * cost(member(0)).flops_per_sample
    assert ensemble.size_bytes > single.size_bytes > 0


def test_startup_is_measured_in_a_fresh_process(report: Report) -> None:
    for row in report.sessions:
        assert isinstance(row.load_ms, float)
        assert isinstance(row.first_run_ms, float)
        assert isinstance(row.energy_mj, NotMeasured)


def test_quality_covers_task_outliers_and_drift(report: Report) -> None:
    student, ensemble, single = report.sessions
    for row in report.sessions:
        assert {"accuracy", "nll", "ece", "brier"} <= set(row.quality)
    assert {"ood_auroc_loud", "mi_rank_correlation", "mi_ratio", "mi_ratio_loud"} <= set(
        student.quality
    )
    assert "ood_auroc_loud" in ensemble.quality
    assert "mi_ratio" not in ensemble.quality  # the reference is not compared with itself
    assert "a single head" in single.not_measured["ood_auroc_loud"]


def test_quality_is_that_of_the_session(report: Report, sessions: Sessions) -> None:
    prediction = sessions["student"].run(INPUTS)
    accuracy = (prediction.mean_prob.argmax(-1) == LABELS).mean()
    assert report.session("student").quality["accuracy"] == pytest.approx(float(accuracy))


def test_plot_data_is_there(report: Report) -> None:
    assert [each.session for each in report.reliabilities] == ["student", "ensemble", "one member"]
    assert {(each.session, each.dataset) for each in report.histograms} == {
        (session, name) for session in ("student", "ensemble") for name in (IN_DISTRIBUTION, "loud")
    }


def test_what_a_reader_must_know_is_noted(report: Report) -> None:
    assert "'student' takes up to 4 samples at once; it split batch 6." in report.notes


def test_the_report_survives_its_file_and_names_nobody(report: Report) -> None:
    text = report.to_json()
    assert Report.from_json(text) == report
    for secret in (platform.node(), str(Path.home()), tempfile.gettempdir(), getpass.getuser()):
        assert len(secret) < 4 or secret not in text


def test_speedup_is_the_ratio_of_medians(report: Report) -> None:
    ratio = report.latency("ensemble", 6).p50_ms / report.latency("student", 6).p50_ms
    assert speedup(report, "student", "ensemble", 6) == ratio
    with pytest.raises(InputError, match="not measured at batch 7"):
        speedup(report, "student", "ensemble", 7)


def test_little_is_enough(sessions: Sessions, capsys: pytest.CaptureFixture[str]) -> None:
    one_batch = Protocol(batches=(2,), warmup_s=0, window_s=1e-4, min_windows=2, max_windows=2,
                         cold_samples=0)  # fmt: skip
    found = benchmark(
        {"one member": sessions["one member"]}, {"x": INPUTS[:1]}, protocol=one_batch, progress=True
    )
    (row,) = found.sessions
    assert (row.task, row.quality) == (None, {})
    assert row.not_measured["task metrics"] == "no labels were given"
    assert isinstance(found.latencies[0].cold_p50_ms, NotMeasured)
    assert not found.histograms
    assert not found.reliabilities
    assert "\n" not in capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": "teacher"}, r"'teacher' is not among .* They are student, ensemble"),
        ({"labels": LABELS[:3]}, r"labels have shape \[3\]\. The inputs hold 21 samples"),
        ({"labels": np.float32(1)}, r"labels have shape \[\]"),
        ({"shifted": {IN_DISTRIBUTION: INPUTS}}, "A shifted set is called 'in_distribution'"),
        ({"shifted": {"odd": INPUTS[:, :2]}}, r"'x' has shape \[21, 2, 8, 8\]"),
        ({"inputs": INPUTS.astype(np.float64)}, "dtype float64"),
        ({"inputs": {"y": INPUTS}}, "no input 'y'"),
    ],
)
def test_data_that_does_not_fit_is_refused_at_once(
    sessions: Sessions, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        benchmark(sessions, **{"inputs": INPUTS, **arguments})  # type: ignore[arg-type]


def test_sessions_that_cannot_be_compared_are_refused(sessions: Sessions) -> None:
    with pytest.raises(InputError, match=r"There is no session\."):
        benchmark({}, INPUTS)
    with runtime.load(tiny_engine()) as other, pytest.raises(InputError, match="The others take"):
        benchmark({"student": sessions["student"], "other": other}, INPUTS)


def test_one_array_is_not_enough_for_two_inputs() -> None:
    net = Net()
    total = net.op("Add", net.input("a", ("batch", 2)), net.input("b", ("batch", 2)))
    engine = compilation.compile(net.graph({total: ("batch", 2)}), batch=(1, 1, 1))
    with runtime.load(engine, threads=1) as session:
        message = r"'in_distribution' is one array\. The engines take a: .*; b: .* Pass a mapping"
        with pytest.raises(InputError, match=message):
            benchmark({"sum": session}, INPUTS)


def test_names_are_those_of_the_public_api() -> None:
    import hydra_edge as he

    assert he.benchmark is measurement.benchmark
    assert he.Protocol is Protocol
