"""What the kernels should reach on a device that is not at hand: a model, not a measurement.

Usage: python benchmarks/kernel_model.py [-o results/kernel-model.json]

For every layer of every benchmarked shape it asks the heuristic how the work is shared out, and
predicts the time from what nvcc made of the kernel (kernels/budgets.json) and from the device:

    time = launch + the longest of
      DRAM     latency + bytes that must come / bandwidth + overhead of the last blocks
      SM       the same with the bytes of the busiest SM, and its rate: the least of
                 issue   instructions of the loop, 4 a clock, of which 80 % are reached
                 L1      128 bytes a clock; of x half, for two rows of 64 bytes share the banks
                 L2      weights, and x where it does not stay in L1, through the SM's port
                 tensor  multiply-adds
      latency  blocks of the busiest SM, as many at once as fit, and the life of one: latency for
               every 4 KB of a warp (fewer of int4), and its start and end

The floor is the time that weights, x and y take at full bandwidth. `fraction` is floor / (time -
launch): how much of the bandwidth a kernel reaches while it runs. Below a megabyte or so latency is
most of that time; `attainable` is what the same bytes could reach: floor / (floor + latency +
overhead).

Wherever a figure of a device is not published it errs to the slow side, and is marked so below.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from head_shapes import SHAPES, Shape

from hydra_edge import kernels, targets
from hydra_edge.kernels import FLOAT16, FLOAT32, INT4, INT8, Library, LinearConfig, LinearShape

BUDGETS = Path(__file__).parents[1] / "kernels" / "budgets.json"
KB = 1024
TILE = 1024  # bytes; also what one trip through the loop multiplies per row tile
BLOCK_CLOCKS = 1200  # a block's life without loads: launch, barrier, sums, stores (assumed)


@dataclass(frozen=True)
class Gpu:
    """A device.

    Attributes:
        name: What `hydra-edge targets` will call it.
        compute_capability: 87 for 8.7.
        sm_count: SMs.
        clock: Hz.
        bandwidth: Bytes/s of DRAM.
        latency: Seconds from DRAM under load (assumed).
        l2_port: Bytes per clock from L2 into one SM (assumed; measured by others on H100).
        l1: Bytes of L1 and shared memory per SM.
        shared: Bytes of shared memory per SM.
        multiplies: fp16 multiply-adds per clock and SM by mma.sync; int8 twice as many.
        launch: Seconds of a launch inside a graph (assumed).
    """

    name: str
    compute_capability: int
    sm_count: int
    clock: float
    bandwidth: float
    latency: float
    l2_port: float
    l1: int
    shared: int
    multiplies: int
    launch: float = 1.3e-6


def _gpu(name: str, *, bandwidth: float | None = None, **assumed: Any) -> Gpu:
    """A row of `hydra_edge.targets`, and what no data sheet says."""
    row = targets.find(name).gpu
    if row is None:
        raise ValueError(f"'{name}' is no GPU")
    return Gpu(
        name=name,
        compute_capability=row.compute_capability,
        sm_count=row.sm_count,
        clock=row.clock_ghz * 1e9,
        bandwidth=bandwidth or row.bandwidth_gb_s * 1e9,
        **assumed,
    )


# L1 and shared memory: CUDA programming guide. On Thor and H200 mma.sync does not reach the rate of
# the newer instructions that the data sheets print; that of sm_80 is assumed.
_ORIN = {"latency": 0.8e-6, "l2_port": 32, "l1": 192 * KB, "shared": 164 * KB, "multiplies": 1024}
_LARGE = {"l1": 256 * KB, "shared": 228 * KB, "multiplies": 1024}
GPUS = (
    _gpu("jetson-agx-orin", **_ORIN),
    _gpu("jetson-orin-nano", **_ORIN),
    _gpu("jetson-thor", latency=0.8e-6, l2_port=32, **_LARGE),
    # A measured copy, read and write counted.
    _gpu("h200", bandwidth=4300e9, latency=0.7e-6, l2_port=28, **_LARGE),
)


@dataclass(frozen=True)
class Format:
    """One way to store weights; see kernels/hydra/formats.cuh."""

    name: str
    x_type: int
    weight_type: int
    bits: int
    depth: int  # K of a tile
    units: int  # chunks of x per lane and tile
    group: int = 0

    @property
    def x_bytes(self) -> int:
        """Of one value of x."""
        return 1 if self.x_type == INT8 else 2


FORMATS = (
    Format("fp16", FLOAT16, FLOAT16, 16, 32, 1),
    Format("w8a8", INT8, INT8, 8, 64, 1),
    Format("w8a16", FLOAT16, INT8, 8, 64, 2),
    Format("w4a16", FLOAT16, INT4, 4, 128, 4, group=128),
)


@dataclass(frozen=True)
class Prediction:
    """Of one launch.

    Attributes:
        floor: Seconds that weights, x and y take at full bandwidth.
        time: Seconds from launch to launch, `launch` included.
        launch: Seconds of an empty kernel.
        fixed: Seconds of latency and of the last blocks, which no bandwidth shortens.
        bound: What the time is made of.
        blocks_per_sm: That fit.
        waves: Blocks over blocks that run at once.
    """

    floor: float
    time: float
    launch: float
    fixed: float
    bound: str
    blocks_per_sm: int
    waves: float

    @property
    def fraction(self) -> float:
        """Of the bandwidth, while the kernel runs."""
        return self.floor / (self.time - self.launch)

    @property
    def attainable(self) -> float:
        """What `fraction` would be if nothing but DRAM took time."""
        return self.floor / (self.floor + self.fixed)


def layers(shape: Shape) -> Iterator[tuple[int, int]]:
    """(K, N) of each linear layer."""
    return itertools.pairwise((shape.features, *shape.hidden, shape.outputs))


def predict(
    gpu: Gpu, shape: LinearShape, format: Format, config: LinearConfig, shared: int, budget: Any
) -> Prediction:
    """The time of one `group_linear`; `shared` is a block's, `budget` a row of budgets.json."""
    nt, rt, warps = config.batch_tiles, config.row_tiles, config.row_warps * config.k_warps
    row_tiles, k_tiles = -(-shape.outputs // 16), -(-shape.inputs // format.depth)
    columns = -(-row_tiles // (rt * config.row_warps))
    batches = -(-shape.batch // (8 * nt))
    grid = columns * shape.heads * batches
    per_warp = -(-k_tiles // config.k_warps)

    # Bytes. Batch tiles run side by side: DRAM gives their weights once.
    tile_bytes = TILE + (32 * 128 // format.group if format.group else 0)
    weights = shape.heads * row_tiles * k_tiles * tile_bytes
    x = shape.batch * shape.inputs * format.x_bytes * (shape.heads if shape.x_per_head else 1)
    y = shape.heads * shape.batch * shape.outputs * 4
    dram = (weights + x + y) / gpu.bandwidth
    block_bytes = weights * batches / grid

    # An SM's rate while it has enough to do, in clocks per tile.
    x_of_block = 8 * nt * shape.inputs * format.x_bytes
    stays = not shape.x_per_head and x_of_block <= (gpu.l1 - 2 * shared) / 2
    x_from_l1 = format.units * nt * 512 / rt  # bytes per tile
    x_from_l2 = 0 if stays else x_from_l1 / config.row_warps
    macs = 2 * format.units * nt * (4096 if format.x_type == INT8 else 2048)
    clocks = {
        "issue": budget["loop"] / 4 / 0.8,
        "L1": tile_bytes / 128 + x_from_l1 / 64,
        "L2": (tile_bytes + x_from_l2) / gpu.l2_port,
        "tensor": macs / (gpu.multiplies * (2 if format.x_type == INT8 else 1)),
    }
    bound = max(clocks, key=lambda key: clocks[key])
    rate = tile_bytes / clocks[bound] * gpu.clock

    # And while it waits.
    threads = 32 * warps
    registers = -(-budget["registers"] // 8) * 8 * threads
    fit = min(65536 // registers, gpu.shared // (shared + KB), 1536 // threads)
    resident = min(fit, -(-grid // gpu.sm_count))
    rows = 16 * rt * config.row_warps
    stores = -(-rows * min(8 * nt, shape.batch) // threads)
    overhead = (BLOCK_CLOCKS + stores * (20 + 10 * config.k_warps)) / gpu.clock
    life = gpu.latency * -(-per_warp * rt // on_the_way(format, nt, rt)) + overhead
    busiest = max(grid / gpu.sm_count, min(-(-grid // gpu.sm_count), fit))  # blocks of one SM
    fixed = gpu.latency + overhead
    times = {
        "DRAM": fixed + dram,
        bound: fixed + busiest * block_bytes / rate,
        "latency": busiest / resident * life,
    }
    bound = max(times, key=lambda key: times[key])
    needed = shape.heads * shape.inputs * shape.outputs * format.bits / 8
    floor = (needed + x + y) / gpu.bandwidth
    waves = grid / (fit * gpu.sm_count)
    return Prediction(floor, gpu.launch + times[bound], gpu.launch, fixed, bound, fit, waves)


def on_the_way(format: Format, batch_tiles: int, row_tiles: int) -> int:
    """KB of weights that a warp has asked for, as `WarpMultiply::kAhead` says it."""
    if not format.group:
        return 4
    if batch_tiles == 1:
        return (4 - row_tiles) * row_tiles
    return 2 if batch_tiles == 8 else 2 * row_tiles


def linear_shape(shape: Shape, batch: int, layer: int, format: Format) -> LinearShape:
    """A layer as the kernels see it; only the first shares its input."""
    inputs, outputs = list(layers(shape))[layer]
    return LinearShape(
        heads=shape.heads,
        batch=batch,
        inputs=inputs,
        outputs=outputs,
        x_type=format.x_type,
        weight_type=format.weight_type,
        y_type=FLOAT32,
        x_per_head=int(layer > 0),
        group=format.group,
    )


def device_of(gpu: Gpu) -> kernels.Device:
    """What the heuristic sees of it."""
    return kernels.Device(gpu.compute_capability, gpu.sm_count, gpu.shared - KB)


@functools.cache
def _budgets() -> dict[str, Any]:
    return dict(json.loads(BUDGETS.read_text()))


def budget_of(gpu: Gpu, format: Format, config: LinearConfig) -> Any:
    """Registers and instructions of the kernel that this configuration launches."""
    table = _budgets()[f"sm_{gpu.compute_capability}"]
    return table[f"group_linear {format.name} {config.batch_tiles}x{config.row_tiles}"]


def configurations() -> Iterator[LinearConfig]:
    """All that could be launched."""
    for nt, rt, rows, depth in itertools.product((1, 2, 4, 8), (1, 2), (1, 2, 4, 8), (1, 2, 4, 8)):
        if rows * depth <= 8:
            yield LinearConfig(nt, rt, rows, depth)


def best(library: Library, gpu: Gpu, shape: LinearShape, format: Format) -> float:
    """The least time that the model predicts for any configuration."""
    least = math.inf
    for config in configurations():
        try:
            row = budget_of(gpu, format, config)
        except KeyError:  # not compiled
            continue
        shared = library.linear_shared_bytes(shape, config)
        if shared <= 48 * KB:
            least = min(least, predict(gpu, shape, format, config, shared, row).time)
    return least


def evaluate(library: Library, gpu: Gpu) -> list[dict[str, Any]]:
    """A row per layer of each shape, batch size and format."""
    rows = []
    for shape, format in itertools.product(SHAPES, FORMATS):
        if shape.image:
            continue
        for batch, layer in itertools.product(shape.rows, range(len(shape.hidden) + 1)):
            linear = linear_shape(shape, batch, layer, format)
            config = library.choose_linear(linear, device_of(gpu))
            shared = library.linear_shared_bytes(linear, config)
            p = predict(gpu, linear, format, config, shared, budget_of(gpu, format, config))
            rows.append(
                {
                    "shape": shape.name,
                    "format": format.name,
                    "batch": batch,
                    "layer": layer,
                    "weights_mb": round(
                        linear.heads * linear.inputs * linear.outputs * format.bits / 8e6, 3
                    ),
                    "config": {
                        key: getattr(config, key)
                        for key in ("batch_tiles", "row_tiles", "row_warps", "k_warps")
                    },
                    "floor_us": round(p.floor * 1e6, 3),
                    "time_us": round(p.time * 1e6, 3),
                    "fraction": round(p.fraction, 3),
                    "attainable": round(p.attainable, 3),
                    "bound": p.bound,
                    "blocks_per_sm": p.blocks_per_sm,
                    "waves": round(p.waves, 2),
                    "against_best": round(p.time / best(library, gpu, linear, format), 3),
                }
            )
    return rows


def record(library: Library) -> dict[str, Any]:
    """All predictions."""
    devices = [dataclasses.asdict(gpu) | {"rows": evaluate(library, gpu)} for gpu in GPUS]
    return {"what": "predicted, not measured", "devices": devices}


def _a_row_a_line(predicted: dict[str, Any]) -> str:
    text = json.dumps(predicted, indent=1)
    return re.sub(r"\{\s+\"shape\"[^}]*\}[^}]*\}", _on_a_line, text) + "\n"


def _on_a_line(found: re.Match[str]) -> str:
    return re.sub(r"\s+", " ", found[0])


def main() -> None:
    """Predict, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "results" / "kernel-model.json"
    parser.add_argument("-o", "--output", type=Path, default=default)
    parser.add_argument("--library", type=Path, help="libhydra_kernels.so")
    arguments = parser.parse_args()
    predicted = record(kernels.load(arguments.library))
    arguments.output.write_text(_a_row_a_line(predicted))
    for device in predicted["devices"]:
        print(device["name"])
        for row in device["rows"]:
            print(
                f"  {row['shape'][:24]:24} {row['format']:6} B={row['batch']:<4} "
                f"layer {row['layer']} {row['weights_mb']:9.3f} MB  {row['floor_us']:8.2f} us "
                f"-> {row['time_us']:8.2f} us  {row['fraction']:6.1%} of {row['attainable']:6.1%} "
                f"{row['bound']:8} {tuple(row['config'].values())} best x{row['against_best']}"
            )


if __name__ == "__main__":
    sys.exit(main())
