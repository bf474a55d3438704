"""What hydra-edge adds: to an ONNX Runtime call, to an import, to `--help`.

Usage: python benchmarks/overhead.py ENGINE.hydra [-o results/overhead.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnxruntime as ort

import hydra_edge as he
from hydra_edge.equivalence import random_inputs
from hydra_edge.probe import describe_machine

CALLS = 4000
STARTS = 15


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


def start_ms(arguments: list[str]) -> float:
    """Fastest of several fresh processes: what else the machine does only ever adds."""
    times = []
    for _ in range(STARTS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    python = start_ms(["-c", "pass"])
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(describe_machine(["onnxruntime"])),
        "calls": CALLS,
        **session_overhead_us(arguments.engine),
        "python_start_ms": python,
        "import_ms": start_ms(["-c", "import hydra_edge"]) - python,
        "help_ms": start_ms(["-m", "hydra_edge.cli", "--help"]),
    }
    text = json.dumps(result, indent=1, default=lambda value: np.asarray(value).tolist())
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
