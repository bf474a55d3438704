"""`quantize`: explicit precision in the graph, before fusion.

What the precisions mean stands in `qdq`. Softmax and entropies stay fp32, because mutual
information is a small difference of large terms.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from hydra_edge import anatomy, bias_correction, equalization, ops, qdq, surgery
from hydra_edge.artifacts.graph import Graph
from hydra_edge.calibration import Calibration, CalibrationOptions, Samples, thresholds
from hydra_edge.errors import InputError, QuantizationError
from hydra_edge.half_precision import to_fp16
from hydra_edge.precision import PRECISIONS, Precision

__all__ = [
    "PRECISIONS",
    "Calibration",
    "CalibrationOptions",
    "Precision",
    "Prepared",
    "prepare",
    "quantize",
]


def quantize(
    graph: Graph,
    precision: str | Precision,
    *,
    calibration: Calibration | None = None,
    options: CalibrationOptions | None = None,
) -> Graph:
    """Store and multiply body, heads and single layers in lower precision, explicitly.

    Args:
        graph: An unfused fp32 graph.
        precision: One of `PRECISIONS`, or a `Precision` with different parts.
        calibration: Representative inputs, needed for int8 and fp8: an array ``[N, ...]``, arrays
            by input name, an ``.npz`` file of those, or an iterable of batches of either.
        options: How scales are found; minmax by default.

    Returns:
        A graph with the same inputs and outputs; low-precision parts behind Q/DQ, fp16 parts
        between casts.

    Raises:
        InputError: Calibration data is missing or does not fit the inputs.
        QuantizationError: The graph is fused or quantized already, or ONNX Runtime failed.
    """
    wanted = Precision.parse(precision) if isinstance(precision, str) else precision
    options = options or CalibrationOptions()
    _require_plain(graph)
    _require_data(wanted, options, calibration)
    if wanted == Precision():
        return graph.derive(graph.model, "quantize:fp32", precision="fp32")
    return prepare(graph, calibration, options).apply(wanted)


@dataclass(frozen=True)
class Prepared:
    """A graph that is about to be quantized, perhaps several times in different precisions.

    Attributes:
        graph: The fp32 graph it came from.
        core: Everything in front of the summary, constants folded, in standard operators.
        samples: The calibration data, if there is any.
        options: How scales are found.
    """

    graph: Graph
    core: onnx.ModelProto
    summary: _Summary
    samples: Samples | None
    options: CalibrationOptions
    heads: tuple[frozenset[str], ...]
    kept: dict[tuple[str, str], float]

    def layers(self) -> list[str]:
        """Names of all layers whose weights can be quantized, in order."""
        return [str(node.name) for node in qdq.layers(surgery.open_model(self.core))]

    def apply(self, precision: Precision) -> Graph:
        """Quantize.

        Raises:
            InputError: It needs calibration data, or names a head or layer that does not exist.
            QuantizationError: Nothing can be quantized, or a weight is not finite.
        """
        _require_data(precision, self.options, self.samples)
        wanted = [opset for name, opset in qdq.OPSETS.items() if name in precision]
        surgeon = surgery.open_model(self.core, max((ops.MINIMUM_OPSET, *wanted)))
        chosen = self._assign(surgeon, precision)
        self._require_something(surgeon, chosen, precision)
        inserter = qdq.Inserter(
            surgeon, self._thresholds(surgeon, chosen), self.options.weights, precision.block
        )
        touched = [
            str(node.name)
            for node in list(surgeon.nodes)
            if node.name in chosen and inserter.quantize(node, chosen[node.name])
        ]
        model = surgery.close_model(surgeon, like=self.core)
        corrected = self.options.correct_bias and bool(touched)
        if corrected:
            assert self.samples is not None
            model = bias_correction.correct(model, self.core, touched, self.samples)
        half = {name for name, kind in chosen.items() if kind == "fp16"}
        if half:
            model = to_fp16(model, half)
        return self.graph.derive(
            self.summary.attach(model),
            f"quantize:{precision}",
            precision=str(precision),
            calibration_sha256=self.samples.digest
            if self.samples is not None and (precision.needs_calibration or corrected)
            else None,
        )

    def _assign(self, surgeon: gs.Graph, precision: Precision) -> dict[str, str]:
        """The precision of every node that does not stay in fp32."""
        parts: dict[str, str] = {}
        inside = _heads(surgeon) if precision.tells_heads_apart else set()
        for node in surgeon.nodes:
            parts[node.name] = precision.heads if node.name in inside else precision.body
        for index, value in precision.head_overrides.items():
            if not 0 <= index < len(self.heads):
                raise InputError(
                    f"There is no head {index}.",
                    f"The graph has {len(self.heads)} heads, counted from 0.",
                    "Leave that override out.",
                )
            parts |= dict.fromkeys(self.heads[index], value)
        for name, value in precision.layers.items():
            if name not in parts:
                raise InputError(
                    f"There is no layer '{name}'.",
                    f"The graph's layers are: {', '.join(self.layers()[:8])} and so on.",
                    "Names are those that `hydra-edge quantize --report` prints.",
                )
            parts[name] = value
        return {name: value for name, value in parts.items() if value != "fp32"}

    def _thresholds(
        self, surgeon: gs.Graph, chosen: Mapping[str, str]
    ) -> dict[tuple[str, str], float]:
        """Ranges by tensor and precision; what was measured before is remembered."""
        needed = {
            (str(tensor.name), chosen[node.name])
            for node in surgeon.nodes
            if node.name in chosen
            for tensor in qdq.observed(node, chosen[node.name])
        }
        for precision in sorted({kind for _, kind in needed - set(self.kept)}):
            assert self.samples is not None
            missing = [n for n, kind in needed - set(self.kept) if kind == precision]
            # The steps of fp8 shrink with the values: cutting the largest makes no other finer.
            options = replace(self.options, method="minmax") if precision == "fp8" else self.options
            found = thresholds(self.core, missing, self.samples, options)
            self.kept.update({(name, precision): value for name, value in found.items()})
        return self.kept

    def _require_something(
        self, surgeon: gs.Graph, chosen: Mapping[str, str], precision: Precision
    ) -> None:
        few_bits = {name for name, value in chosen.items() if value != "fp16"}
        if few_bits and not any(n.name in few_bits for n in qdq.layers(surgeon)):
            raise QuantizationError(
                f"Nothing in the graph can be quantized to {precision}.",
                f"It needs {', '.join(qdq.LAYERS)} nodes with constant weights in that part.",
                "Check which part holds the weights with `hydra-edge inspect`.",
            )


def prepare(
    graph: Graph, calibration: Calibration | None, options: CalibrationOptions | None = None
) -> Prepared:
    """Check graph and data once for several `Prepared.apply`; see `quantize`.

    Raises:
        InputError: The data does not fit the inputs.
        QuantizationError: The graph is fused or quantized already, or ONNX Runtime failed.
    """
    options = options or CalibrationOptions()
    _require_plain(graph)
    samples = None
    if calibration is not None:
        samples = Samples(calibration, graph.inputs, progress=options.progress)
    core, summary = _cut(graph)
    if not graph.is_large:  # ONNX Runtime writes one message
        core = _optimize(core)
    if options.equalize:
        core = equalization.equalize(core)
    heads = anatomy.heads(surgery.open_model(core))
    return Prepared(graph, core, summary, samples, options, heads, {})


def _require_data(precision: Precision, options: CalibrationOptions, data: object) -> None:
    if data is None and (precision.needs_calibration or options.correct_bias):
        raise InputError(
            f"{precision} needs calibration data, and none was given.",
            "Activation scales come from representative inputs, and so do corrections of biases.",
            "Pass calibration=…: a few hundred unlabelled samples of the training distribution.",
        )


def _require_plain(graph: Graph) -> None:
    found = {node.op_type for node in graph.model.graph.node}
    if any("GroupedMatMul" in kind for kind in found):
        raise QuantizationError(
            "The graph is fused already.",
            "Calibrators know standard operators only.",
            "Quantize first, then fuse.",
        )
    if found & {"QuantizeLinear", "DequantizeLinear"}:
        raise QuantizationError(
            "The graph holds QuantizeLinear or DequantizeLinear already.",
            "Quantizing twice would put one rounding on top of another.",
            "Fuse and compile it as it is, or start from the fp32 graph.",
        )


@dataclass(frozen=True)
class _Summary:
    """The summary part of a graph, kept aside while the rest is quantized."""

    nodes: tuple[gs.Node, ...]
    outputs: tuple[gs.Tensor, ...]
    like: onnx.ModelProto

    def attach(self, core: onnx.ModelProto) -> onnx.ModelProto:
        """The quantized core with the summary behind it again."""
        graph = surgery.open_model(core)
        tensors = graph.tensors()

        def inner(tensor: gs.Tensor) -> gs.Tensor:
            return tensors.setdefault(
                tensor.name, gs.Variable(tensor.name, tensor.dtype, tensor.shape)
            )

        for node in self.nodes:
            graph.nodes.append(
                gs.Node(
                    node.op,
                    node.name,
                    dict(node.attrs),
                    [inner(tensor) for tensor in node.inputs],
                    [inner(tensor) for tensor in node.outputs],
                    domain=node.domain,
                )
            )
        graph.outputs = [inner(tensor) for tensor in self.outputs]
        for tensor, old in zip(graph.outputs, self.outputs, strict=True):
            if isinstance(tensor, gs.Variable):  # a weight may be an output, too
                tensor.dtype, tensor.shape = old.dtype, old.shape
        return surgery.close_model(graph, like=self.like)


def _cut(graph: Graph) -> tuple[onnx.ModelProto, _Summary]:
    """Take the summary functions off: what is left ends at the per-head outputs."""
    surgeon = surgery.open_model(graph.model)
    nodes = tuple(node for node in surgeon.nodes if node.domain == ops.DOMAIN)
    outputs = tuple(surgeon.outputs)
    written = {tensor.name for node in nodes for tensor in node.outputs}
    ends = [tensor for tensor in outputs if tensor.name not in written]
    for node in nodes:
        for tensor in node.inputs:
            if all(tensor is not end for end in ends):
                ends.append(tensor)
    frozen = tuple(
        gs.Node(n.op, n.name, dict(n.attrs), list(n.inputs), list(n.outputs), domain=n.domain)
        for n in nodes
    )
    for node in nodes:
        node.inputs.clear()
        node.outputs.clear()
    surgeon.outputs = ends
    _name_nodes(surgeon.nodes)
    return surgery.close_model(surgeon, like=graph.model), _Summary(frozen, outputs, graph.model)


def _optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and batch norms with ONNX Runtime, in standard operators only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimized.onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        try:
            ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as exc:  # its exceptions share no public base class
            raise _failed("load the graph", exc) from exc
        optimized = onnx.load(path)
    # It imports every domain it knows, which another runtime might not.
    used = {node.domain for node in optimized.graph.node} | {""}
    kept = [entry for entry in optimized.opset_import if entry.domain in used]
    del optimized.opset_import[:]
    optimized.opset_import.extend(kept)
    _name_nodes(optimized.graph.node)
    return optimized


def _name_nodes(nodes: Sequence[onnx.NodeProto | gs.Node]) -> None:
    """Give every node a name of its own, because body and heads are told apart by them."""
    taken = {node.name for node in nodes}
    seen: set[str] = set()
    for index, node in enumerate(nodes):
        if not node.name or node.name in seen:
            node.name = next(
                name for n in itertools.count() if (name := f"node_{index}_{n}") not in taken
            )
            taken.add(node.name)
        seen.add(node.name)


def _heads(surgeon: gs.Graph) -> set[str]:
    """Names of the nodes in heads; a graph without any has one precision only."""
    found = anatomy.head_nodes(surgeon)
    if not found:
        raise QuantizationError(
            "The graph has no heads to tell from its body.",
            "Heads are matmuls side by side whose results one Concat joins, or that are outputs.",
            "Use one precision for all, e.g. 'int8'.",
        )
    return found


def _failed(what: str, exc: Exception) -> QuantizationError:
    return QuantizationError(
        f"ONNX Runtime could not {what}.",
        f"It says: {(str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip('.')}.",
        "Check that the graph runs in ONNX Runtime and that calibration data fits it.",
    )
