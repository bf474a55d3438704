"""Bias correction: what quantization shifts a layer's outputs by on average is put into its bias.

Layer after layer along the graph, because correcting one changes what the next ones read:
bias += E[y in fp32] - E[y quantized], per output channel, over the calibration data.
Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, with measured expectations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from hydra_edge import surgery
from hydra_edge.calibration import Samples

_BIASED = ("Conv", "ConvTranspose", "Gemm")  # their outputs have channels on axis 1
Means = Mapping[str, npt.NDArray[np.float64]]


def correct(
    model: onnx.ModelProto, reference: onnx.ModelProto, names: Sequence[str], samples: Samples
) -> onnx.ModelProto:
    """Correct the biases of the layers called ``names``.

    Args:
        model: A quantized model.
        reference: The model it was made from; nodes and tensors of layers have the same names.
        names: The quantized nodes.
        samples: Calibration data.
    """
    graph = surgery.open_model(model)
    nodes = [n for n in graph.nodes if n.name in set(names) and n.op in _BIASED]
    if not nodes:
        return model
    expected = _means(reference, nodes, samples)
    taken = set(graph.tensors())
    for level in _levels(graph, nodes):
        found = _means(surgery.close_model(graph.copy(), like=model), level, samples)
        for node in level:
            shift = expected[node.outputs[0].name] - found[node.outputs[0].name]
            _shift(node, shift, surgery.unused(f"{node.name}_corrected_bias", taken))
    return surgery.close_model(graph, like=model)


def _levels(graph: gs.Graph, nodes: Sequence[gs.Node]) -> list[list[gs.Node]]:
    """The layers by how many others lie in front of them; heads are side by side on one level."""
    wanted = {id(node) for node in nodes}
    depth: dict[int, int] = {}
    levels: dict[int, list[gs.Node]] = {}
    for node in graph.nodes:
        sources = [tensor.inputs[0] for tensor in node.inputs if tensor.inputs]
        before = max((depth[id(source)] for source in sources), default=0)
        depth[id(node)] = before + (id(node) in wanted)
        if id(node) in wanted:
            levels.setdefault(depth[id(node)], []).append(node)
    return [levels[key] for key in sorted(levels)]


def _means(model: onnx.ModelProto, nodes: Sequence[gs.Node], samples: Samples) -> Means:
    """Mean output per channel, over samples and positions."""
    names = [str(node.outputs[0].name) for node in nodes]
    totals: dict[str, npt.NDArray[np.float64]] = dict.fromkeys(names, np.zeros(()))
    counts = dict.fromkeys(names, 0)
    for values in samples.run(model, names, "correcting biases"):
        for name, array in values.items():
            axes = tuple(axis for axis in range(array.ndim) if axis != 1)
            totals[name] = totals[name] + np.sum(array, axes, np.float64)
            counts[name] += array.size // array.shape[1]
    return {name: total / max(counts[name], 1) for name, total in totals.items()}


def _shift(node: gs.Node, shift: npt.NDArray[np.float64], name: str) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    if bias is not None and not isinstance(bias, gs.Constant):
        return
    beta = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0
    old = np.zeros(shift.shape) if bias is None else np.asarray(bias.values, np.float64) * beta
    values = np.broadcast_to(old, (*old.shape[:-1], len(shift))) + shift
    constant = gs.Constant(name, values.astype(np.float32))
    if node.op == "Gemm":
        node.attrs["beta"] = 1.0
    node.inputs = [*node.inputs[:2], constant]
