"""A report survives its file exactly, and refuses files that are not one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from reports import latency, sample

from hydra_edge.artifacts.report import NotMeasured, Protocol, Report
from hydra_edge.errors import ArtifactError, InputError


def test_json_gives_the_same_report_and_the_same_text() -> None:
    report = sample()
    text = report.to_json()
    again = Report.from_json(text)
    assert again == report
    assert again.to_json() == text
    assert again.sessions[1].load_ms == NotMeasured("the fresh process failed")
    assert isinstance(again.sessions[0].parameters, int)
    assert isinstance(again.latencies[0].p50_ms, float)


def test_a_missing_figure_is_a_reason_in_the_file_and_never_a_number() -> None:
    content = json.loads(sample().to_json())
    assert content["sessions"][0]["energy_mj"] == {"reason": "there is no sensor"}
    assert str(NotMeasured("no time")) == "not measured: no time"


def test_the_file_is_written_and_read(tmp_path: Path) -> None:
    path = sample().save(tmp_path / "report.json")
    assert Report.load(path) == sample()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = sample().save(tmp_path / "report.json")
    before = path.read_bytes()
    broken = replace(sample(), latencies=(latency("student", 1, math.nan),))
    with pytest.raises(InputError, match=r"NaN or infinite\. JSON .* Put NotMeasured"):
        broken.save(path)
    assert path.read_bytes() == before


def edit(change: Callable[[dict[str, object]], object]) -> str:
    content = json.loads(sample().to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "'format' is not 'hydra-edge report'"),
        ("{}", "'format' is not"),
        (sample().to_json()[:-100], "not a usable report"),
        (edit(lambda c: c.pop("schema")), "schema"),
        (edit(lambda c: c.pop("machine")), "report lacks 'machine'"),
        (edit(lambda c: c.update(extra=1)), "report has the unknown 'extra'"),
        (edit(lambda c: c.update(created=5)), r"report\.created is 5, not str"),
        (edit(lambda c: c.update(reference=5)), r"report\.reference is 5"),
        (edit(lambda c: c.update(sessions={})), r"report\.sessions is \{\}"),
        (edit(lambda c: c["machine"].update(cores=True)), r"machine\.cores is true, not int"),
        (edit(lambda c: c["sessions"][1].update(load_ms="5")), r"sessions\[1\]\.load_ms is \"5\""),
        (edit(lambda c: c["sessions"][1].update(load_ms=None)), r"sessions\[1\]\.load_ms is null"),
        (edit(lambda c: c["sessions"][0].update(energy_mj={})), "energy_mj lacks 'reason'"),
        (edit(lambda c: c["latencies"][0].update(p50_ms=math.nan)), "NaN is not a number"),
        (edit(lambda c: c["protocol"].update(window_s=-1)), "window_s=-1"),
        ("[" * 100_000, "not a usable report"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Report.from_json(text)


def test_a_newer_report_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"schema 2\. This version reads up to schema 1\. Upg"):
        Report.from_json(edit(lambda c: c.update(schema=2)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.json' does not exist\. Expected a report"):
        Report.load(tmp_path / "none.json")


def test_rows_are_found_by_name() -> None:
    report = sample()
    assert report.session("ensemble").engines == 10
    assert report.latency("student", 32).p50_ms == 0.5
    with pytest.raises(InputError, match=r"no session 'x'\. It has: student, ensemble\."):
        report.session("x")
    with pytest.raises(InputError, match=r"no session 'x'"):
        report.latency("x", 1)
    with pytest.raises(InputError, match=r"not measured at batch 5\. The protocol's batches are 1"):
        report.latency("student", 5)


def test_a_row_knows_when_other_work_disturbed_it() -> None:
    assert latency("a", 1, 2.1, min_ms=1.0).disturbed
    assert not latency("a", 1, 1.9, min_ms=1.0).disturbed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": ()}, r"batch sizes are \(\)"),
        ({"batches": (1, 1)}, "measured once"),
        ({"batches": (0,)}, "at least one sample"),
        ({"min_windows": 1}, "at least two"),
        ({"min_windows": 9, "max_windows": 8}, "Between 9 and 8 windows"),
        ({"window_s": 0.0}, "window_s=0.0"),
        ({"warmup_s": -1.0}, "warmup_s=-1.0"),
        ({"max_seconds": math.inf}, "max_seconds=inf"),
        ({"max_noise": 0.0}, "max_noise=0.0"),
        ({"cold_samples": -1}, "cold_samples=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_protocol_that_cannot_work_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Protocol(**arguments)  # type: ignore[arg-type]
