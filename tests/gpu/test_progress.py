"""A build shows how far it is, and ends when it is told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hydra_edge.gpu.progress import Watch

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def test_ctrl_c_ends_a_real_build() -> None:
    """The signal comes while the builder runs; the process ends in order, without an engine."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from onnx_models import mlp_heads
from hydra_edge import targets
from hydra_edge.backends import tensorrt_rtx
from hydra_edge.gpu import building, progress
from hydra_edge.programs import BuildRequest

class Interrupted(progress.Watch):
    def _start(self, phase, parent, steps):
        super()._start(phase, parent, steps)
        if len(self.phases) == 2:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
building.Watch = Interrupted
graph = mlp_heads()
request = BuildRequest((targets.find("rtx-4090"),), graph.inputs, (1, 2, 4))
try:
    tensorrt_rtx.build(graph.model, request)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_steps_go_on_until_it_is_stopped() -> None:
    watch = Watch(trt)
    watch.monitor.phase_start("outer", None, 3)
    watch.monitor.phase_start("inner", "outer", 2)
    assert watch.monitor.step_complete("inner", 0)
    watch.monitor.phase_finish("inner")
    watch.monitor.phase_finish("never begun")
    assert watch.phases == ["outer", "inner"]
    watch._stop.set()
    assert not watch.monitor.step_complete("outer", 1)


def test_results_and_failures_come_back() -> None:
    assert Watch(trt).run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        Watch(trt).run(lambda: 1 // 0)
