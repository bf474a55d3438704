"""What hydra-edge adds: to an ONNX Runtime call, to a run on a GPU, to an import, to `--help`.

Usage: python benchmarks/overhead.py ENGINE.hydra [-o results/overhead.json]
       python benchmarks/overhead.py --gpu [-o results/overhead-gpu.json]

``--gpu`` measures `EngineRunner.run` on an engine that computes nothing. Where there is no GPU it
runs on the tests' double of the CUDA driver (see tests/gpu/driver), whose calls cost less than real
ones: what is left is Python. The result says which driver it was.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import hydra_edge as he
from hydra_edge.equivalence import random_inputs
from hydra_edge.gpu.device import Device
from hydra_edge.gpu.engines import Context, Tensor
from hydra_edge.gpu.running import EngineRunner, Limits
from hydra_edge.probe import describe_machine

CALLS = 4000
STARTS = 15
FEATURES, CLASSES = 512, 10


def session_overhead_us(path: Path) -> dict[str, float]:
    """p50 of `Session.run` and of the bare ONNX Runtime call, alternating, at batch 1."""
    engine = he.Engine.load(path)
    feeds = random_inputs(engine.inputs, batch=1)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    payload = engine.programs["main"].payload
    bare = ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    program = engine.programs["main"]
    names = [spec.name for spec in program.outputs if spec.name not in program.optional]
    ours, theirs = [], []
    with he.load(engine, threads=1) as session:
        for _ in range(CALLS):
            start = time.perf_counter()
            session.run(feeds)
            middle = time.perf_counter()
            bare.run(names, feeds)
            theirs.append(time.perf_counter() - middle)
            ours.append(middle - start)
    run, call = statistics.median(ours) * 1e6, statistics.median(theirs) * 1e6
    return {"session_run_us": run, "onnxruntime_us": call, "overhead_us": run - call}


class NullEngine:
    """A classifier that computes nothing: one input, and the five outputs of the summary."""

    inputs = (Tensor("x", (-1, FEATURES), np.dtype(np.float32)),)
    outputs = (
        Tensor("mean_prob", (-1, CLASSES), np.dtype(np.float32)),
        *(
            Tensor(name, (-1,), np.dtype(np.float32))
            for name in (
                *("predictive_entropy", "expected_entropy"),
                *("mutual_information", "variation_ratio"),
            )
        ),
    )
    profiles = ((1, 32),)
    device_memory_bytes = 1024

    def create_context(self, profile: int, stream: int, memory: int) -> Context:
        """One that only remembers the batch."""
        return NullContext()

    def words(self) -> str:
        """It refuses nothing."""
        return ""

    def close(self) -> None:
        """It holds nothing."""


class NullContext:
    """A context of `NullEngine`."""

    batch = 0

    def set_profile(self, profile: int, stream: int) -> bool:
        """There is one."""
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """Remember the batch."""
        self.batch = shape[0]
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """As the engine declares it."""
        return (self.batch, CLASSES) if name == "mean_prob" else (self.batch,)

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Nothing is read or written."""
        return True

    def execute_async(self, stream: int) -> bool:
        """Nothing is done."""
        return True

    def is_capturable(self, stream: int) -> bool:
        """Nothing can be kept as a graph."""
        return True

    def close(self) -> None:
        """It holds nothing."""


def gpu_overhead() -> dict[str, Any]:
    """p50 of a run at batch 1, as a graph and without one, alternating."""
    x = np.zeros((1, FEATURES), np.float32)
    names = [tensor.name for tensor in NullEngine.outputs]
    runners = {
        "run_us": EngineRunner(NullEngine(), Device()),
        "run_without_graph_us": EngineRunner(NullEngine(), Device(), Limits(graphs=0)),
    }
    device = Device()

    def time_one(run: Callable[..., object]) -> float:
        start = time.perf_counter()
        run({"x": x}, names)
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(CALLS):
        for name, runner in runners.items():
            times[name].append(time_one(runner.run))
    why = runners["run_us"].plain_because
    for runner in runners.values():
        runner.close()
    device.close()
    if why:
        sys.exit(f"There was no graph to measure. {why}")
    return {
        "driver": device.name,
        "batch": 1,
        "input_bytes": x.nbytes,
        "outputs": len(names),
        **{name: statistics.median(found[CALLS // 10 :]) * 1e6 for name, found in times.items()},
        **{name: importlib.metadata.version(name) for name in ("pycuda", "cuda-bindings")},
    }


def on_the_double(arguments: Sequence[str]) -> bool:
    """Where there is no CUDA driver, do it again in a process that finds the tests' double.

    Returns:
        Whether that was done.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "gpu" / "driver"))
    import double

    if double.is_driver_here():
        return False
    reason = double.missing()
    if reason:
        sys.exit(f"There is no CUDA driver here, and no double of it: {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        double.compile_double(Path(folder), double.pycuda_library())
        environment = {**os.environ, "LD_LIBRARY_PATH": folder}
        subprocess.run([sys.executable, *arguments], env=environment, check=True)
    return True


def start_ms(arguments: list[str]) -> float:
    """Fastest of several fresh processes: what else the machine does only ever adds."""
    times = []
    for _ in range(STARTS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def cpu_overhead(path: Path) -> dict[str, float]:
    """All there is to measure without a GPU."""
    python = start_ms(["-c", "pass"])
    return {
        **session_overhead_us(path),
        "python_start_ms": python,
        "import_ms": start_ms(["-c", "import hydra_edge"]) - python,
        "help_ms": start_ms(["-m", "hydra_edge.cli", "--help"]),
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path, nargs="?")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.gpu == (arguments.engine is not None):
        parser.error("give an engine, or --gpu")
    if arguments.gpu and on_the_double(sys.argv):
        return
    found = gpu_overhead() if arguments.gpu else cpu_overhead(arguments.engine)
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(describe_machine([] if arguments.gpu else ["onnxruntime"])),
        "calls": CALLS,
        **found,
    }
    text = json.dumps(result, indent=1, default=lambda value: np.asarray(value).tolist())
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
