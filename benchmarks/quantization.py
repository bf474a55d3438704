"""What each way of finding scales gains, on the demo's student and on heads of very uneven scales.

Usage: python benchmarks/quantization.py DEMO_FOLDER [-o results/quantization.json]

Losses are those of `hydra_edge.sensitivity`: by how much a figure is worse than in fp32, measured
on test samples that neither training nor calibration saw. SQNR is the power of the fp32 logits over
that of their error, in dB, of the worst head.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.exporting import summarize
from hydra_edge.probe import describe_machine
from hydra_edge.quantization import CalibrationOptions, quantize
from hydra_edge.sensitivity import losses
from hydra_edge.tasks import find

Array = npt.NDArray[np.float32]
VARIANTS = {
    "minmax": CalibrationOptions(),
    "percentile 99.99": CalibrationOptions("percentile", 99.99),
    "percentile 99.9": CalibrationOptions("percentile", 99.9),
    "entropy": CalibrationOptions("entropy"),
    "mse": CalibrationOptions("mse"),
    "weights mse": CalibrationOptions(weights="mse"),
    "equalize": CalibrationOptions(equalize=True),
    "correct bias": CalibrationOptions(correct_bias=True),
    "mse, weights mse, equalize": CalibrationOptions("mse", weights="mse", equalize=True),
    "the same, correct bias": CalibrationOptions(
        "mse", weights="mse", equalize=True, correct_bias=True
    ),
}
PRECISIONS = ("int8", "int8-weight-only", "int4-weight-only,block=32", "fp8")


@dataclass(frozen=True)
class Data:
    """A student, what it is calibrated on and what it is measured on."""

    name: str
    graph: Graph
    calibration: Array
    inputs: Array
    labels: npt.NDArray[np.int64]


def digits(folder: Path) -> Data:
    """The student that `hydra-edge demo` trained."""
    test = np.load(folder / "test.npz")
    return Data(
        name="digits",
        graph=Graph.load(folder / "student.onnx"),
        calibration=np.load(folder / "calibration.npz")["input"],
        inputs=test["input"],
        labels=test["labels"],
    )


def uneven(heads: int = 16, features: int = 64, hidden: int = 32, classes: int = 10) -> Data:
    """Random MLP heads whose channels differ in scale by up to 1000, on inputs with outliers.

    What a channel gains in one layer it loses in the next, so the heads compute what even ones
    would. Labels are drawn from what the student says, so in fp32 it is perfectly calibrated.
    """
    rng = np.random.default_rng(0)
    weights: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, values: npt.NDArray[np.float64]) -> str:
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def layer(x: str, name: str, weight: npt.NDArray[np.float64], size: int, scale: object) -> str:
        bias = 0.1 * rng.standard_normal(size) * scale
        inputs = [x, constant(f"{name}_w", weight), constant(f"{name}_b", bias)]
        nodes.append(helper.make_node("Gemm", inputs, [f"{name}_y"], name))
        return f"{name}_y"

    def relu(x: str) -> str:
        nodes.append(helper.make_node("Relu", [x], [f"{x}_relu"], f"{x}_relu_node"))
        return f"{x}_relu"

    body = rng.standard_normal((32, features)) / np.sqrt(32)
    z = relu(layer("input", "body", body, features, 1.0))
    weights.append(numpy_helper.from_array(np.asarray([0], np.int64), "axes"))
    rows = []
    for m in range(heads):
        scale = 10.0 ** rng.uniform(-1.5, 1.5, hidden)
        first = rng.standard_normal((features, hidden)) * np.sqrt(2 / features) * scale
        second = rng.standard_normal((hidden, classes)) * np.sqrt(2 / hidden) / scale[:, None]
        h = relu(layer(z, f"h{m}_0", first, hidden, scale))
        y = layer(h, f"h{m}_1", second * 10.0 ** rng.uniform(-0.3, 0.3), classes, 1.0)
        nodes.append(helper.make_node("Unsqueeze", [y, "axes"], [f"h{m}_row"], f"h{m}_unsqueeze"))
        rows.append(f"h{m}_row")
    nodes.append(helper.make_node("Concat", rows, ["logits"], "join", axis=0))
    model = helper.make_graph(
        nodes,
        "uneven",
        [helper.make_tensor_value_info("input", 1, ["batch", 32])],
        [helper.make_tensor_value_info("logits", 1, [heads, "batch", classes])],
        weights,
    )
    opset = [helper.make_opsetid("", 20)]
    graph = Graph(helper.make_model(model, opset_imports=opset, ir_version=10))
    graph = summarize(graph, "classification", "logits")
    inputs = rng.standard_t(4, (4512, 32)).astype(np.float32)
    test = inputs[512:]
    prob = evaluate(graph.model, {"input": test})["mean_prob"].astype(np.float64)
    labels = (prob.cumsum(1) > rng.random((len(test), 1))).argmax(1)
    return Data("uneven", graph, inputs[:512], test, labels)


def measure(data: Data, precision: str, options: CalibrationOptions) -> dict[str, float]:
    """Losses of one variant."""
    task = find("classification")
    found = quantize(data.graph, precision, calibration=data.calibration, options=options)
    name = data.graph.inputs[0].name
    logits, reference = (
        evaluate(graph.model, {name: data.inputs}, ["head_logits"])["head_logits"]
        for graph in (found, data.graph)
    )
    noise = np.mean(np.square(logits - reference, dtype=np.float64), axis=(1, 2))
    signal = np.mean(np.square(reference, dtype=np.float64), axis=(1, 2))
    return {
        "sqnr_db": float(10 * np.log10(signal / np.maximum(noise, 1e-30)).min()),
        **losses(task, logits, reference, data.labels),
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for data in (digits(arguments.demo), uneven()):
        for precision in PRECISIONS:
            print(f"\n{data.name}, {precision}, {len(data.inputs)} samples: loss against fp32")
            names = ("sqnr_db", "accuracy", "nll", "ece", "mi", "mi_rank")
            print(f"{'':<28}" + "".join(f"{name:>10}" for name in names))
            for title, options in VARIANTS.items():
                weight_only = "weight-only" in precision or precision == "fp8"
                if weight_only and options.method != "minmax" and options.weights == "minmax":
                    continue  # it finds scales for int8 activations
                found = measure(data, precision, options)
                rows.append({"data": data.name, "precision": precision, "variant": title, **found})
                print(f"{title:<28}" + "".join(f"{found[name]:10.4f}" for name in names))
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(describe_machine(["onnxruntime"])),
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
