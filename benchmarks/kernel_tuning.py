"""Every way to share out `group_linear` on a GPU, against what the heuristic chooses.

Usage: python benchmarks/kernel_tuning.py [-o results/kernel-tuning.json] [--only NAME]
                                          [--formats fp16,w8a16] [--library FILE]

Each layer of each benchmarked shape runs cold (other weights in every launch, more than the L2
holds of them) in a CUDA graph, with every configuration that is compiled. Weights are random bits
in the size of each format: the time does not depend on them. `chosen_over_best` is the median time
of the heuristic's choice over that of the fastest.

`cublas_us` is what the same layer takes in fp16 through torch: one wide GEMM where heads share x,
else a batched one, bias included. A row in fp16 is like against like; the others read fewer bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from head_shapes import SHAPES, Shape
from kernel_model import FORMATS, Format, configurations, linear_shape

from hydra_edge import kernels
from hydra_edge.errors import HydraError
from hydra_edge.kernels import INT8, Library, LinearArguments, LinearConfig, LinearShape
from hydra_edge.probe import describe_machine
from kernels import ROOFLINE, Timer, copies_for, describe_device

RESULTS = Path(__file__).parent / "results"
FIELDS = ("batch_tiles", "row_tiles", "row_warps", "k_warps")
REPLAYS = 5
LAUNCHES = 24
HEAD_START = 400_000


class Layer:
    """One layer with weights enough that each launch reads them from DRAM."""

    def __init__(self, library: Library, shape: LinearShape, format: Format, l2: int) -> None:
        self.library, self.shape = library, shape
        tiles = -(-shape.outputs // 16) * -(-shape.inputs // format.depth)
        size = shape.heads * tiles * 1024
        self.copies = min(copies_for(size, l2), 512)
        weights = torch.randn(self.copies * size // 2, device="cuda", dtype=torch.float16)
        rows = shape.batch * (shape.heads if shape.x_per_head else 1)
        x_type = torch.int8 if format.x_type == INT8 else torch.float16
        x = torch.ones((rows, shape.inputs), device="cuda", dtype=x_type)
        numbers = torch.full((shape.heads, shape.outputs), 0.01, device="cuda")
        groups = -(-shape.inputs // format.group) if format.group else 1
        scales = torch.ones(
            (shape.heads * 16 * -(-shape.outputs // 16) * (groups + 8),),
            device="cuda",
            dtype=torch.float16,
        )
        y = torch.empty((shape.heads, shape.batch, shape.outputs), device="cuda")
        self.kept = (weights, x, numbers, scales, y)
        self.arguments = [
            LinearArguments(
                x=x.data_ptr(),
                weight=weights.data_ptr() + copy * size,
                weight_scale=numbers.data_ptr(),
                group_scale=scales.data_ptr(),
                bias=numbers.data_ptr(),
                x_scale=numbers.data_ptr(),
                y=y.data_ptr(),
            )
            for copy in range(self.copies)
        ]

    def time(self, configs: list[LinearConfig]) -> list[float | None]:
        """Microseconds of a launch with each, median; None where there is no such kernel."""
        timer = Timer(REPLAYS, HEAD_START)
        for i, config in enumerate(configs):
            try:
                self.launch(config, 0)
            except HydraError:
                continue
            timer.capture(str(i), lambda run, config=config: self.launch(config, run), LAUNCHES)
        found = timer.measure()
        return [
            found[str(i)]["median_us"] if str(i) in found else None for i in range(len(configs))
        ]

    def launch(self, config: LinearConfig, run: int) -> None:
        """Enqueue it with one of the copies."""
        stream = torch.cuda.current_stream().cuda_stream
        arguments = self.arguments[run % self.copies]
        self.library.group_linear(self.shape, arguments, config, stream)


def cublas(shape: LinearShape, l2: int) -> float:
    """Microseconds of the layer in fp16, by torch."""
    size = 2 * shape.heads * shape.inputs * shape.outputs
    copies, m, n = min(copies_for(size, l2), 512), shape.heads, shape.outputs
    options = {"device": "cuda", "dtype": torch.float16}
    timer = Timer(REPLAYS, HEAD_START)
    if shape.x_per_head:
        x = torch.randn((m, shape.batch, shape.inputs), **options)
        weights = torch.randn((copies, m, shape.inputs, n), **options)
        bias, y = torch.randn((m, 1, n), **options), torch.empty((m, shape.batch, n), **options)
        timer.capture(
            "", lambda run: torch.baddbmm(bias, x, weights[run % copies], out=y), LAUNCHES
        )
    else:
        x = torch.randn((shape.batch, shape.inputs), **options)
        weights = torch.randn((copies, shape.inputs, m * n), **options)
        bias, y = torch.randn(m * n, **options), torch.empty((shape.batch, m * n), **options)
        timer.capture("", lambda run: torch.addmm(bias, x, weights[run % copies], out=y), LAUNCHES)
    return timer.measure()[""]["median_us"]


def row(library: Library, shape: Shape, batch: int, index: int, format: Format, l2: int) -> Any:
    """One layer: the heuristic's choice, and the best five."""
    linear = linear_shape(shape, batch, index, format)
    chosen = library.choose_linear(linear, library.device())
    others = [config for config in configurations() if named(config) != named(chosen)]
    for config in others:
        config.overlap = chosen.overlap
    times = Layer(library, linear, format, l2).time([chosen, *others])
    assert times[0] is not None
    ranked = sorted(
        (time, named(config))
        for time, config in zip(times, (chosen, *others), strict=True)
        if time is not None
    )
    return {
        "shape": shape.name,
        "batch": batch,
        "layer": index,
        "format": format.name,
        "weights_mb": round(linear.heads * linear.inputs * linear.outputs * format.bits / 8e6, 3),
        "cublas_us": cublas(linear, l2),
        "chosen": named(chosen),
        "chosen_us": times[0],
        "best": [{"config": config, "us": time} for time, config in ranked[:5]],
        "chosen_over_best": round(times[0] / ranked[0][0], 3),
        "tried": len(ranked),
    }


def named(config: LinearConfig) -> str:
    """Batch tiles x row tiles x warps along rows x warps along K."""
    return "x".join(str(getattr(config, field)) for field in FIELDS)


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "kernel-tuning.json")
    parser.add_argument("--only", default="", help="part of a shape's name")
    parser.add_argument("--formats", default=",".join(format.name for format in FORMATS))
    parser.add_argument("--library", type=Path, help="libhydra_kernels.so")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: no CUDA device on this machine")
        return 6
    library = kernels.load(arguments.library)
    machine = describe_device()
    record: dict[str, Any] = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": dataclasses.asdict(describe_machine([])),
        "machine": machine,
        "rows": [],
    }
    chosen = [format for format in FORMATS if format.name in arguments.formats.split(",")]
    for shape in (*SHAPES, *ROOFLINE):
        if shape.image or arguments.only not in shape.name:
            continue
        every = itertools.product(shape.rows, range(len(shape.hidden) + 1), chosen)
        for batch, index, format in every:
            found = row(library, shape, batch, index, format, machine["l2_bytes"])
            record["rows"].append(found)
            print(
                f"{shape.name:<26} B={batch:<4} layer {index} {format.name:<6} "
                f"{found['weights_mb']:8.2f} MB {found['chosen']:<9} {found['chosen_us']:8.2f} us, "
                f"best {found['best'][0]['config']:<9} {found['best'][0]['us']:8.2f} us, "
                f"x {found['chosen_over_best']:.2f}, cuBLAS {found['cublas_us']:8.2f} us",
                flush=True,
            )
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    ratios = [found["chosen_over_best"] for found in record["rows"]]
    record["geometric_mean"] = round(statistics.geometric_mean(ratios), 3)
    record["largest"] = max(ratios)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"chosen over best: geometric mean {record['geometric_mean']}, largest {max(ratios)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
