"""The kernels against torch on a GPU, every benchmarked shape, in CUDA graphs.

Usage: python benchmarks/kernels.py [-o results/kernels.json] [--only NAME] [--without SIDE]
                                    [--replays 40] [--library FILE]

Cold: a graph runs the heads again and again, each time with another copy of the weights; the
copies take more than twice the L2, so that weights come from DRAM; for heads of a few KB that is
not so, as `cold_from` says. Warm: the same copy every time.
Each time is that of one run inside the graph, summary included; the median of replays, and their
10th and 90th percentile. All sides of a row are timed in turn, in one process.

`fraction` of the bandwidth is weight bytes / time / bandwidth, where the bandwidth is that of the
fastest device-to-device copy in this run, read and write counted. The floor is weight bytes /
bandwidth + the time of an empty kernel in a graph. Baselines are fp16, whatever ours is: it is what
an engineer has.

Without a GPU it writes that nothing was measured, and why.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from head_shapes import SHAPES, Shape
from kernel_model import FORMATS
from kernel_work import Heads, Ours, Torch, Work, paths

from hydra_edge import kernels
from hydra_edge.errors import HydraError
from hydra_edge.probe import describe_machine

RESULTS = Path(__file__).parent / "results"
# Rows of the roofline: heads, features, hidden, outputs.
ROOFLINE = (
    Shape("roofline 8x(512,128,10)", 8, 512, (128,), 10),
    Shape("roofline 32x(512,256,1000)", 32, 512, (256,), 1000),
    Shape("roofline 32x(768,512,3129)", 32, 768, (512,), 3129),
)
BASELINES = ("separate", "bmm", "compiled")
MAX_COPIES = 256  # of 0.4 MB and more on an H100: what is smaller comes from L2 even when cold
MAX_BYTES = 40 << 30  # of all copies of one side
TOLERANCE = {"fp16": 0.02, "w8a8": 0.1, "w8a16": 0.05, "w4a16": 0.5}


class Timer:
    """CUDA graphs of several pieces of work, replayed in turn.

    Args:
        replays: How many of each are timed.
        head_start: Clocks that the GPU waits while the CPU submits a graph.
    """

    def __init__(self, replays: int = 40, head_start: int = 5_000_000) -> None:
        self.replays = replays
        self.head_start = head_start
        self.graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}

    def capture(self, name: str, launch: Callable[[int], Any], runs: int) -> None:
        """A graph of ``launch(0)`` to ``launch(runs - 1)``."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(min(runs, 3)):
                launch(i)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(runs):
                launch(i)
        self.graphs[name] = (graph, runs)

    def measure(self) -> dict[str, dict[str, float]]:
        """Microseconds per run: median, 10th and 90th percentile."""
        times: dict[str, list[float]] = {name: [] for name in self.graphs}
        for replay in range(self.replays + 3):
            for name, (graph, runs) in self.graphs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(self.head_start)
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                if replay >= 3:
                    times[name].append(begin.elapsed_time(end) * 1e3 / runs)
        return {name: _spread(values) for name, values in times.items()}


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return {
        "median_us": round(statistics.median(ordered), 3),
        "p10_us": round(ordered[tenth], 3),
        "p90_us": round(ordered[-1 - tenth], 3),
    }


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and write counted: CUDA's own or a kernel's."""
    source = torch.empty(1 << 28, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    timer = Timer(20)
    timer.capture("copy", lambda _: target.copy_(source), 4)
    timer.capture("add", lambda _: torch.add(source, 1, out=target), 4)
    fastest = min(time["p10_us"] for time in timer.measure().values())
    return 2 * source.numel() * source.element_size() / (fastest * 1e-6)


def empty_kernel() -> float:
    """Microseconds of a kernel that writes one number, in a graph of many."""
    number = torch.zeros(1, device="cuda")
    timer = Timer()
    timer.capture("empty", lambda _: number.zero_(), 200)
    return timer.measure()["empty"]["median_us"]


def copies_for(weight_bytes: int, l2: int) -> int:
    """How many copies of the weights take more than twice the L2."""
    wanted = math.ceil(2.2 * l2 / max(weight_bytes, 1)) + 1
    return max(2, min(wanted, MAX_COPIES, MAX_BYTES // max(weight_bytes, 1)))


def sides(
    library: kernels.Library, heads: Heads, batch: int, l2: int, baselines: tuple[str, ...]
) -> list[Work]:
    """Everything that can run these heads."""

    def copies(bits: int) -> int:
        return copies_for(heads.shape.parameters * bits // 8, l2)

    works: list[Work] = [Torch(heads, batch, how, copies(16)) for how in baselines]
    for format in FORMATS:
        works += [
            Ours(library, heads, batch, format, path, copies(format.bits))
            for path in paths(library, heads.shape, batch, format)
        ]
    return works


def agree(works: list[Work]) -> dict[str, float]:
    """Largest difference of each side's mean probabilities from those of ``bmm``."""
    expected = next(work for work in works if work.name == "bmm").run(0)[0].clone()
    found = {}
    for work in works:
        difference = float((work.run(work.copies - 1)[0] - expected).abs().max())
        tolerance = TOLERANCE.get(work.name.split()[0], 0.02)
        if not difference <= tolerance:
            raise SystemExit(f"{work.name} is off by {difference:.3g}: nothing is timed")
        found[work.name] = difference
    return found


def measure(
    library: kernels.Library,
    heads: Heads,
    batch: int,
    machine: dict[str, Any],
    baselines: tuple[str, ...] = BASELINES,
    replays: int = 40,
) -> Any:
    """One row: all sides, cold and warm."""
    shape = heads.shape
    works = sides(library, heads, batch, machine["l2_bytes"], baselines)
    errors = agree(works)
    cold, warm = Timer(replays), Timer(replays)
    for work in works:
        runs = max(work.copies, 64)
        cold.capture(work.name, lambda i, work=work: work.run(i % work.copies), runs)
        warm.capture(work.name, lambda _, work=work: work.run(0), 64)
    times = {"cold": cold.measure(), "warm": warm.measure()}
    row: dict[str, Any] = {"shape": asdict(shape), "batch": batch, "sides": []}
    for work in works:
        side: dict[str, Any] = {
            "name": work.name,
            "weight_bytes": work.weight_bytes,
            "copies": work.copies,
            "cold_from": "DRAM"
            if work.copies * work.weight_bytes > 2 * machine["l2_bytes"]
            else "L2",
            "difference": errors[work.name],
        }
        if isinstance(work, Ours):
            side |= {"launches": work.launches, "summary_alone": work.summary_alone}
            chosen = paths(library, shape, batch, work.format)[0]
            side["preferred"] = work.path == chosen
        floor = work.weight_bytes / machine["copy_bandwidth"] * 1e6 + machine["empty_kernel_us"]
        for kind, measured in times.items():
            seconds = measured[work.name]["median_us"] * 1e-6
            side[kind] = measured[work.name] | {
                "gb_per_s": round(work.weight_bytes / seconds / 1e9, 1),
                "fraction": round(work.weight_bytes / seconds / machine["copy_bandwidth"], 3),
                "of_floor": round(floor / (seconds * 1e6), 3),
            }
        row["sides"].append(side)
    return row


def targets(rows: list[Any]) -> dict[str, Any]:
    """The numbers to reach, as these rows have them; None where no row says."""

    def best(row: Any, names: tuple[str, ...] | None = None) -> float:
        """Least cold time of the baselines, or of ours in some format."""
        found = [
            side["cold"]["median_us"]
            for side in row["sides"]
            if (side["name"] in BASELINES if names is None else _format(side) in names)
            and side.get("preferred", True)
        ]
        return min(found, default=math.nan)

    small = [row for row in rows if row["batch"] <= 64]
    speedups = [best(row) / best(row, ("fp16",)) for row in small]
    speedups = [value for value in speedups if not math.isnan(value)]
    large = [
        side["cold"]["fraction"]
        for row in rows
        if row["batch"] <= 16
        for side in row["sides"]
        if side.get("preferred") and side["weight_bytes"] >= 25e6
    ]
    tiny = [
        1 / side["cold"]["of_floor"]
        for row in rows
        for side in row["sides"]
        if side.get("preferred") and side["weight_bytes"] <= 1e6 and row["batch"] <= 64
    ]
    heavy = [row for row in small if row["sides"][0]["weight_bytes"] >= 25e6]
    quantized = [best(row, ("fp16",)) / best(row, ("w8a8", "w8a16")) for row in heavy]
    return {
        "least fraction of bandwidth, weights >= 25 MB, B <= 16": min(large, default=None),
        "largest time over floor, weights <= 1 MB": max(tiny, default=None),
        "least speed-up over the best baseline, B <= 64": min(speedups, default=None),
        "geometric mean of those": statistics.geometric_mean(speedups) if speedups else None,
        "least speed-up of int8 weights over ours in fp16, weights >= 25 MB": min(
            quantized, default=None
        ),
    }


def _format(side: Any) -> str:
    return str(side["name"]).split()[0]


def describe_device() -> dict[str, Any]:
    """The GPU, and what its memory and launches take in this run."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_bandwidth": copy_bandwidth(),
        "empty_kernel_us": empty_kernel(),
    }


def table(record: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{'heads':<28} {'B':>4} {'side':<14} {'MB':>8} {'cold us':>9} {'GB/s':>7} {'of copy':>8}"
    ]
    lines[0] += f" {'of floor':>9} {'warm us':>9} {'x best baseline':>16}"
    for row in record["rows"]:
        baseline = min(
            side["cold"]["median_us"] for side in row["sides"] if side["name"] in BASELINES
        )
        for side in row["sides"]:
            cold, warm = side["cold"], side["warm"]
            lines.append(
                f"{row['shape']['name']:<28} {row['batch']:4d} {side['name']:<14} "
                f"{side['weight_bytes'] / 1e6:8.2f} {cold['median_us']:9.2f} "
                f"{cold['gb_per_s']:7.0f} {cold['fraction']:8.1%} {cold['of_floor']:9.1%} "
                f"{warm['median_us']:9.2f} {baseline / cold['median_us']:16.2f}"
                + (" *" if side.get("preferred") else "")
            )
    lines.append("* what the heuristics launch")
    lines += [f"{name}: {value}" for name, value in record["targets"].items()]
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Bytes of weights against bandwidth reached, cold, and the roofline."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    bandwidth = record["machine"]["copy_bandwidth"] / 1e9
    empty = record["machine"]["empty_kernel_us"]
    sizes = [10 ** (3 + step / 20) for step in range(121)]
    reach = [size / 1e9 / ((size / bandwidth / 1e9) + empty * 1e-6) for size in sizes]
    axes.plot(sizes, reach, color="0.6", label="bandwidth and one empty launch")
    names = ("bmm", *(format.name for format in FORMATS))
    for marker, name in zip("xo^sD", names, strict=True):
        points = [
            (side["weight_bytes"], side["cold"]["gb_per_s"])
            for row in record["rows"]
            for side in row["sides"]
            if _format(side) == name and side.get("preferred", True)
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, s=22, label=name)
    axes.set(xscale="log", yscale="log", xlabel="bytes of weights", ylabel="GB/s of weights, cold")
    axes.set_title(record["machine"]["gpu"])
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    """Measure, print, plot and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--only", help="part of a shape's name")
    parser.add_argument("--without", choices=BASELINES, action="append", default=[])
    parser.add_argument("--replays", type=int, default=40, help="of each side, cold and warm")
    parser.add_argument("--library", type=Path, help="libhydra_kernels.so")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": asdict(describe_machine([])),
    }
    reason = None if torch.cuda.is_available() else "no CUDA device on this machine"
    try:
        library = kernels.load(arguments.library)
    except HydraError as error:
        reason = reason or str(error)
    if reason:
        record |= {"measured": False, "why": reason, "rows": [], "targets": targets([])}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"not measured: {reason}")
        return 6
    baselines = tuple(name for name in BASELINES if name not in arguments.without)
    record |= {"measured": True, "machine": describe_device(), "replays": arguments.replays}
    record |= {"baselines": baselines, "rows": []}
    for shape in (*SHAPES, *ROOFLINE):
        if shape.image or (arguments.only and arguments.only not in shape.name):
            continue
        heads = Heads.random(shape, "cuda")
        for batch in shape.rows:
            row = measure(library, heads, batch, record["machine"], baselines, arguments.replays)
            record["rows"].append(row)
            gc.collect()  # a compiled function and its weights refer to each other
            torch.cuda.empty_cache()
            record["targets"] = targets(record["rows"])
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{shape.name}, B={batch}", file=sys.stderr, flush=True)
    print(table(record))
    plot(record, arguments.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
