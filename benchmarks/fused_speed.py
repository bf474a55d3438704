"""Fused heads against the same heads unfused, on the CPU through ONNX Runtime.

Usage: python benchmarks/fused_speed.py [-o results/fused-cpu.json] [--threads 1] [--only NAME]

Both sides are compiled for one batch size, as a user would: `compile` times the lowerings of the
fused graph and the unfused graph, and keeps the fastest. Where that is "unfused", fusing does not
pay and was not done: both sides are the same program byte for byte, and what their ratio is away
from 1 is the noise of the measurement. The two programs run in turn, in one process; what is
compared are the medians. Every shape has a process of its own.
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

from head_shapes import SHAPES, Shape, heads_graph

from hydra_edge.artifacts.engine import Engine
from hydra_edge.backends import onnxruntime as backend
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.equivalence import random_inputs
from hydra_edge.fusion import fuse
from hydra_edge.probe import describe_machine

BATCHES = (1, 8, 32)
PRECISIONS = ("fp32", "int8")
SECONDS = 1.0  # per pair of programs
BLOCKS = 15


def compare(ours: Engine, theirs: Engine, batch: int, threads: int) -> dict[str, float]:
    """Medians over blocks in which both run in turn, and how far the blocks' ratios scatter."""
    feeds = random_inputs(ours.inputs, batch=batch)
    runners = [backend.open(e.programs["main"].payload, threads) for e in (ours, theirs)]
    for runner in runners:
        runner.run(feeds, ["logits"])
    start = time.perf_counter()
    for runner in runners:
        runner.run(feeds, ["logits"])
    pair_s = time.perf_counter() - start
    calls = max(1, int(SECONDS / BLOCKS / pair_s))
    blocks: list[tuple[float, float]] = []
    for block in range(BLOCKS):
        times: list[list[float]] = [[], []]
        for call in range(calls):
            order = (0, 1) if (block + call) % 2 else (1, 0)  # who goes second finds a cold cache
            for side in order:
                start = time.perf_counter()
                runners[side].run(feeds, ["logits"])
                times[side].append(time.perf_counter() - start)
        blocks.append((statistics.median(times[0]), statistics.median(times[1])))
    ratios = sorted(a / b for a, b in blocks)
    return {
        "fused_ms": statistics.median(a for a, _ in blocks) * 1e3,
        "unfused_ms": statistics.median(b for _, b in blocks) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_p10": ratios[BLOCKS // 10],
        "ratio_p90": ratios[-1 - BLOCKS // 10],
        "calls": calls * BLOCKS,
    }


def measure(shape: Shape, precision: str, threads: int) -> list[dict[str, object]]:
    """One shape in one precision, at every batch size."""
    graph = heads_graph(shape, precision)
    fused = fuse(graph)
    groups = [group.heads for group in fused.fusion if group.fused]
    rows = []
    for batch in BATCHES:
        options = CompileOptions(batch=(batch, batch, batch), threads=threads)
        ours = compile(fused, options=options, unfused=graph)
        theirs = compile(graph, options=options)
        program = ours.programs["main"]
        row: dict[str, object] = {
            "shape": asdict(shape),
            "precision": precision,
            "batch": batch,
            "fused_groups": groups,
            "kept": program.lowering,
            "same_program": program.payload == theirs.programs["main"].payload,
            "candidates_ms": dict(program.lowering_ms),
        }
        rows.append(row | compare(ours, theirs, batch, threads))
    return rows


def save(arguments: argparse.Namespace, rows: list[object], failed: dict[str, str]) -> None:
    """Write what is measured so far: the whole takes a while."""
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(describe_machine(["onnxruntime"])),
        "threads": arguments.threads,
        "ratio": "fused over unfused, medians of blocks run in turn; below 1 is faster",
        "rows": rows,
        "not_measured": failed,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="part of a shape's name")
    parser.add_argument("--skip", nargs="*", default=[], help="names of shapes to leave out")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        index, precision = arguments.one
        print(json.dumps(measure(SHAPES[int(index)], precision, arguments.threads)))
        return
    rows = []
    failed = {}
    print(f"{'heads':<28} {'precision':<9} {'B':>3} {'kept':<9} {'ratio':>6}  p10-p90")
    for index, shape in enumerate(SHAPES):
        for precision in PRECISIONS:
            if arguments.only and arguments.only not in shape.name:
                continue
            if shape.name in arguments.skip:
                failed[f"{shape.name}, {precision}"] = "left out of this run"
                continue
            command = [sys.executable, __file__, "--one", str(index), precision]
            command += ["--threads", str(arguments.threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
                failed[f"{shape.name}, {precision}"] = reason
                print(f"{shape.name:<28} {precision:<9} not measured: {reason}")
                continue
            for row in json.loads(done.stdout.splitlines()[-1]):
                rows.append(row)
                print(
                    f"{shape.name:<28} {precision:<9} {row['batch']:3d} {row['kept']:<9} "
                    f"{row['ratio']:6.3f}  {row['ratio_p10']:.3f}-{row['ratio_p90']:.3f}"
                    + ("  the same program" if row["same_program"] else ""),
                    flush=True,
                )
            save(arguments, rows, failed)


if __name__ == "__main__":
    main()
