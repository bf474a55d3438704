"""What a fresh process tells, and what becomes of it when it cannot."""

from __future__ import annotations

import getpass
import json
import platform
from dataclasses import replace
from pathlib import Path

import captioners
import pytest
from onnx_models import tiny_engine

from hydra_edge import probe
from hydra_edge.artifacts.report import NotMeasured


def test_a_fresh_process_loads_and_runs() -> None:
    found = probe.measure_startup([tiny_engine(), tiny_engine()], batch=4, threads=1)
    assert isinstance(found.load_ms, float)
    assert isinstance(found.first_run_ms, float)
    if Path("/proc/self/status").exists():
        assert isinstance(found.base_memory_mb, float)
        assert isinstance(found.peak_memory_mb, float)
        assert 1 < found.base_memory_mb <= found.peak_memory_mb


def test_programs_run_on_what_was_recorded_of_them() -> None:
    found = probe.measure_startup([captioners.engine(), captioners.engine("member")], 1, threads=1)
    assert isinstance(found.first_run_ms, float), found
    assert isinstance(found.peak_memory_mb, float), found


def test_a_process_that_fails_is_a_reason_without_paths() -> None:
    broken = replace(tiny_engine(), backend="of_the_future")
    found = probe.measure_startup([broken], batch=1, threads=1)
    assert isinstance(found.load_ms, NotMeasured)
    assert "of_the_future" in found.load_ms.reason
    assert "hydra-edge-" not in found.load_ms.reason
    assert found.peak_memory_mb == found.load_ms


def test_the_entry_prints_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_engine().save(tmp_path / "a.hydra")
    probe.main([str(path), "--batch", "2", "--threads", "1"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["load_ms", "first_run_ms", "base_memory_mb", "peak_memory_mb"]


def test_a_system_without_proc_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "_STATUS", tmp_path / "none")
    found = probe._peak_memory_mb()
    assert isinstance(found, NotMeasured)
    assert "VmHWM" in found.reason


def test_the_machine_is_described_without_names() -> None:
    machine = probe.describe_machine(["onnxruntime"])
    assert machine.cores >= 1
    assert {"hydra-edge", "numpy", "onnxruntime"} <= set(machine.versions)
    text = repr(machine)
    for secret in (platform.node(), f"/{getpass.getuser()}", str(Path.home())):
        assert not secret or secret not in text
