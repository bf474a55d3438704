"""Time and memory that `fuse` takes against the number of heads.

Usage: python benchmarks/fuse_scaling.py [-o results/fuse-scaling-cpu.json]

Every run has a process of its own, which loads the graph from a file. "extra" is the peak of that
process while it fuses, above what it held with the graph loaded; "total" counts the loaded graph,
too. Both are given in bytes of the model, and without what Python and its libraries take.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from head_shapes import Shape, heads_graph

from hydra_edge.artifacts.graph import Graph
from hydra_edge.fusion import fuse
from hydra_edge.probe import describe_machine

HEADS = (10, 30, 100, 300, 1000)
REPEATS = 3


def memory(field: str) -> int:
    """Bytes the process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(path: Path) -> dict[str, float]:
    """One run, in this process."""
    fuse(heads_graph(Shape("warm-up", 3, 8, (8,), 4)))  # imports and first calls
    empty = memory("VmRSS")
    graph = Graph.load(path)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading freed
    held = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.perf_counter()
    fused = fuse(graph)
    seconds = time.perf_counter() - start
    peak = memory("VmHWM")
    return {
        "fused_heads": sum(group.heads for group in fused.fusion if group.fused),
        "nodes": len(graph.model.graph.node),
        "fuse_s": seconds,
        "extra_bytes": peak - held,
        "total_bytes": peak - empty,
    }


def measure_apart(path: Path) -> list[dict[str, float]]:
    """Several runs, each in a process of its own."""
    runs = []
    for _ in range(REPEATS):
        command = [sys.executable, __file__, "--one", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    rows = []
    print(f"{'M':>5} {'precision':>9} {'MB':>6} {'fuse s':>7} {'extra':>6} {'total':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "int8"):
            for heads in HEADS:
                path = Path(folder, "heads.onnx")
                heads_graph(Shape("scaling", heads, 512, (128,), 10), precision).save(path)
                size = path.stat().st_size
                runs = measure_apart(path)
                middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                if middle["fused_heads"] != heads:
                    raise SystemExit(f"only {middle['fused_heads']} of {heads} heads were fused")
                rows.append({"heads": heads, "precision": precision, "model_bytes": size, **middle})
                rows[-1]["fuse_s_all"] = [run["fuse_s"] for run in runs]
                print(
                    f"{heads:5d} {precision:>9} {size / 1e6:6.1f} {middle['fuse_s']:7.3f} "
                    f"{middle['extra_bytes'] / size:6.2f} {middle['total_bytes'] / size:6.2f}"
                )
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(describe_machine(["onnxruntime"])),
        "head": "512 -> 128 -> 10, ReLU; random weights",
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
