"""What `compile` adds to TensorRT-RTX's builder: the same model through both, in turns.

The bare builder parses the lowered model and builds it, with the same flags and profile. Ours also
lowers the graph, proves the lowering with ONNX Runtime, watches progress and packs up the result.

Usage: python benchmarks/building.py [-o results/building.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

import hydra_edge as he
from hydra_edge import lowering, ops
from hydra_edge.errors import require
from hydra_edge.exporting import summarize
from hydra_edge.probe import describe_machine

ROUNDS = 5
BATCH = (1, 8, 32)
GENERATION, TARGET = "SM89", "rtx-4090"
# Body layers, width, heads, hidden width and outputs: 4, 45 and 150 MB of weights.
CASES = ((8, 256, 8, 256, 10), (8, 1024, 4, 768, 100), (24, 1024, 8, 1024, 1000))


def student(layers: int, width: int, heads: int, hidden: int, outputs: int) -> he.Graph:
    """A body of dense layers and MLP heads, as an exporter writes them."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray[Any, Any]] = {}
    lines = []

    def dense(x: str, y: str, inputs: int, size: int) -> None:
        scale = np.float32(inputs**-0.5)
        weights[f"w_{y}"] = rng.standard_normal((inputs, size), np.float32) * scale
        weights[f"b_{y}"] = rng.standard_normal(size, np.float32)
        lines.append(f"{y} = Gemm(x_{x}, w_{y}, b_{y})")

    lines.append("x_0 = Identity(x)")
    for index in range(layers):
        dense(str(index), f"h{index}", width, width)
        lines.append(f"x_{index + 1} = Relu(h{index})")
    for head in range(heads):
        dense(str(layers), f"a{head}", width, hidden)
        lines.append(f"x_a{head} = Relu(a{head})")
        dense(f"a{head}", f"l{head}", hidden, outputs)
        lines.append(f"u{head} = Unsqueeze(l{head}, axes)")
    parts = ", ".join(f"u{head}" for head in range(heads))
    lines.append(f"head_logits = Concat <axis = 0> ({parts})")
    body = "\n".join(lines)
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {width}] x) => (float[{heads}, batch, {outputs}] head_logits)
        <int64[1] axes = {{0}}> {{ {body} }}"""
    )
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return summarize(he.Graph(model), "classification", "head_logits")


def bare_build(trt: Any, model: onnx.ModelProto, width: int) -> int:
    """Parse and build, as TensorRT-RTX's own documentation does it; bytes of the engine."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise RuntimeError(parser.get_error(0).desc())
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *((size, width) for size in BATCH))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, GENERATION), 0)
    return int(builder.build_serialized_network(network, config).nbytes)


def measure(case: Sequence[int], precision: str) -> dict[str, Any]:
    """Both ways in turns: medians, and the ratio's spread."""
    trt = require("tensorrt_rtx", "rtx")
    graph = student(*case)
    fused = he.fuse(graph if precision == "fp32" else he.quantize(graph, precision))
    model = ops.inline(lowering.lower(fused, "qdq").model)
    golden = {"x": np.random.default_rng(1).standard_normal((8, case[1])).astype(np.float32)}
    ours, bare, size = [], [], 0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        size = bare_build(trt, model, case[1])
        middle = time.perf_counter()
        he.compile(fused, TARGET, batch=BATCH, golden=golden)
        bare.append(middle - start)
        ours.append(time.perf_counter() - middle)
    added = [a - b for a, b in zip(ours, bare, strict=True)]
    allowed = 0.1 * statistics.median(bare) + 0.5
    return {
        "layers, width, heads, hidden, outputs": list(case),
        "precision": precision,
        "engine_bytes": size,
        "bare_s": round(statistics.median(bare), 3),
        "ours_s": round(statistics.median(ours), 3),
        "added_s": round(statistics.median(added), 3),
        "added_s_range": [round(min(added), 3), round(max(added), 3)],
        "allowed_s": round(allowed, 3),
        "within": statistics.median(added) <= allowed,
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        for precision in ("fp32", "fp16"):
            rows.append(measure(case, precision))
            print(rows[-1])
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(describe_machine(["onnxruntime", "tensorrt_rtx"])),
        "rounds": ROUNDS,
        "allowed": "10 % of the bare builder + 0.5 s",
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
