"""Writes explicit precision into a graph: QuantizeLinear and DequantizeLinear in front of layers.

    int8              x -> Q -> DQ -> layer <- DQ <- int8 weight, one scale per output channel
    fp8               the same in E4M3 with one scale per tensor, which is what TensorRT multiplies;
                      larger values become 448, not NaN
    int8-weight-only  layer <- DQ <- int8 weight, one scale per output channel
    int4-weight-only  layer <- DQ <- int4 weight, one scale per block of rows; convolutions, which
                      have no blocks, get int8-weight-only

All symmetric, zero point 0. Q/DQ stand only in front of layers, never behind them: that is what
TensorRT fuses best, and lowerings for other runtimes can move them.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from hydra_edge import scales, surgery
from hydra_edge.errors import QuantizationError

Array = npt.NDArray[np.generic]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
POOLS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
OPSETS = {"int4-weight-only": 21, "fp8": 19}
FEW_BITS = ("int8", "int8-weight-only", "int4-weight-only", "fp8")
_STORED: Mapping[str, type] = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}


def layers(graph: gs.Graph) -> list[gs.Node]:
    """Nodes with a constant weight that can be stored in few bits, in order."""
    return [node for node in graph.nodes if node.op in LAYERS and weight_of(node) is not None]


def weight_of(node: gs.Node) -> gs.Constant | None:
    """The constant weight of a layer."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(weight, gs.Constant) or len(weight.shape) < 2:
        return None
    return weight if weight.dtype == np.float32 else None


def observed(node: gs.Node, precision: str) -> list[gs.Tensor]:
    """The activations that a node reads in a precision that needs their range."""
    if precision not in ("int8", "fp8"):
        return []
    has_weight = node.op in LAYERS and weight_of(node) is not None
    if has_weight or (precision == "int8" and _pools(node)):
        operands = node.inputs[:1]
    elif precision == "int8" and node.op == "MatMul":
        operands = node.inputs[:2]  # one of them alone would be rounded for nothing
    else:
        return []
    fits = all(
        not isinstance(tensor, gs.Constant) and tensor.dtype in (None, np.float32)
        for tensor in operands
    )
    return list(operands) if fits else []


def _pools(node: gs.Node) -> bool:
    """Whether it averages positions of an image; the means in norms need all their digits."""
    if node.op != "ReduceMean":
        return node.op in POOLS
    rank = len(node.inputs[0].shape or ())
    axes = node.inputs[1].values if isinstance(node.inputs[-1], gs.Constant) else ()
    return rank > 3 and sorted(int(axis) % rank for axis in axes) == list(range(2, rank))


class Inserter:
    """Puts Q/DQ into one graph; what several layers read is quantized once."""

    def __init__(
        self,
        graph: gs.Graph,
        thresholds: Mapping[tuple[str, str], float],
        weights: str,
        block: int,
    ) -> None:
        self.graph = graph
        self.thresholds = thresholds
        self.weights = weights
        self.block = block
        self._taken = {*graph.tensors(), *(str(node.name) for node in graph.nodes)}
        self._activations: dict[tuple[str, str], gs.Tensor] = {}
        self._weights: dict[tuple[str, str, int], gs.Tensor] = {}

    def quantize(self, node: gs.Node, precision: str) -> bool:
        """Store and multiply ``node`` in ``precision``; False when there is nothing to do."""
        if precision not in FEW_BITS:
            return False
        activations = observed(node, precision)
        weight = weight_of(node) if node.op in LAYERS else None
        if weight is None and not activations:
            return False
        for tensor in activations:
            back = self._activation(tensor, precision)
            node.inputs = [back if operand is tensor else operand for operand in node.inputs]
        if weight is not None:
            node.inputs[1] = self._weight(node, weight, precision)
        return True

    def _activation(self, tensor: gs.Tensor, precision: str) -> gs.Tensor:
        key = (str(tensor.name), precision)
        if key not in self._activations:
            scale = scales.step(self.thresholds[key], scales.LIMITS[precision])
            dtype = _STORED[precision]
            stem = f"{tensor.name}" if precision == "int8" else f"{tensor.name}_{precision}"
            parameters = [
                gs.Constant(self._name(f"{stem}_scale"), scale),
                gs.Constant(self._name(f"{stem}_zero_point"), np.zeros((), dtype)),
            ]
            stored = gs.Variable(self._name(f"{stem}_quantized"), dtype, tensor.shape)
            back = gs.Variable(self._name(f"{stem}_dequantized"), np.float32, tensor.shape)
            for op, source, result in (
                ("QuantizeLinear", tensor, stored),
                ("DequantizeLinear", stored, back),
            ):
                name = self._name(f"{stem}_{op}")
                self.graph.nodes.append(gs.Node(op, name, {}, [source, *parameters], [result]))
            self._activations[key] = back
        return self._activations[key]

    def _name(self, name: str) -> str:
        return surgery.unused(name, self._taken)

    def _weight(self, node: gs.Node, weight: gs.Constant, precision: str) -> gs.Tensor:
        channel = _output_axis(node, weight)
        blocked = precision == "int4-weight-only" and not node.op.startswith("Conv")
        axis = _input_axis(node, weight) if blocked else channel
        key = (str(weight.name), precision, axis)
        if key not in self._weights:
            _require_finite(weight)
            if blocked:
                parts, attrs = self._blocks(weight, axis)
            elif precision == "fp8":
                parts, attrs = self._whole(weight)
            else:
                parts, attrs = self._channels(weight, channel)
            stem = f"{weight.name}_{precision}_{axis}"
            constants = [
                gs.Constant(self._name(f"{stem}_{part}"), values)
                for part, values in zip(("quantized", "scale", "zero_point"), parts, strict=True)
            ]
            result, name = self._name(f"{stem}_dequantized"), self._name(f"{stem}_DequantizeLinear")
            back = gs.Variable(result, np.float32, list(weight.shape))
            self.graph.nodes.append(gs.Node("DequantizeLinear", name, attrs, constants, [back]))
            self._weights[key] = back
        return self._weights[key]

    def _channels(
        self, weight: gs.Constant, axis: int
    ) -> tuple[tuple[Array, Array, Array], dict[str, int]]:
        values = np.asarray(weight.values)
        others = tuple(index for index in range(values.ndim) if index != axis)
        limit = scales.LIMITS["int8"]
        scale = scales.weight_scale(values, others, limit, self.weights)
        stored = np.clip(np.rint(values / scale), -limit, limit).astype(np.int8)
        flat = scale.reshape(-1)
        return (stored, flat, np.zeros(flat.shape, np.int8)), {"axis": axis}

    def _blocks(
        self, weight: gs.Constant, axis: int
    ) -> tuple[tuple[Array, Array, Array], dict[str, int]]:
        values = np.asarray(weight.values)
        rows = values.shape[axis]
        missing = -rows % self.block
        padding = [(0, missing if index == axis else 0) for index in range(values.ndim)]
        padded = np.pad(values, padding)
        shape = [*values.shape]
        shape[axis : axis + 1] = [-1, self.block]
        limit = scales.LIMITS["int4"]
        grouped = padded.reshape(shape)
        scale = scales.weight_scale(grouped, (axis + 1,), limit, self.weights)
        stored = np.clip(np.rint(grouped / scale), -limit, limit).reshape(padded.shape)
        stored = np.take(stored, np.arange(rows), axis).astype(ml_dtypes.int4)
        flat = scale.squeeze(axis + 1)
        zeros = np.zeros(flat.shape, ml_dtypes.int4)
        return (stored, flat, zeros), {"axis": axis, "block_size": self.block}

    def _whole(self, weight: gs.Constant) -> tuple[tuple[Array, Array, Array], dict[str, int]]:
        values = np.asarray(weight.values)
        limit, dtype = scales.LIMITS["fp8"], _STORED["fp8"]
        scale = scales.step(np.abs(values).max(initial=0.0), limit)
        stored = np.clip(values / scale, -limit, limit).astype(dtype)
        return (stored, scale, np.zeros((), dtype)), {}


def _require_finite(weight: gs.Constant) -> None:
    if not np.isfinite(weight.values).all():
        raise QuantizationError(
            f"The weight '{weight.name}' holds NaN or infinity.",
            "No scale fits such values.",
            "Check the graph in fp32 first.",
        )


def _output_axis(node: gs.Node, weight: gs.Constant) -> int:
    if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return 0
    return 1 if node.op == "ConvTranspose" else len(weight.shape) - 1


def _input_axis(node: gs.Node, weight: gs.Constant) -> int:
    transposed = node.op == "Gemm" and node.attrs.get("transB", 0)
    return 1 if transposed else len(weight.shape) - 2
