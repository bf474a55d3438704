"""Writes explicit precision into a graph: QuantizeLinear and DequantizeLinear in front of layers.

    int8              x -> Q -> DQ -> layer <- DQ <- int8 weight, one scale per output channel
    fp8               the same in E4M3 with one scale per tensor, which is what TensorRT multiplies
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
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from hydra_edge import scales

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
    if precision not in ("int8", "fp8") or node.op not in (*LAYERS, *POOLS):
        return []
    if precision == "fp8" and (node.op in POOLS or weight_of(node) is None):
        return []
    operands = node.inputs[:1] if node.op != "MatMul" else node.inputs[:2]
    return [
        tensor
        for tensor in operands
        if not isinstance(tensor, gs.Constant) and tensor.dtype in (None, np.float32)
    ]


class Inserter:
    """Puts Q/DQ into one graph; what several layers read is quantized once."""

    def __init__(
        self, graph: gs.Graph, thresholds: Mapping[str, float], weights: str, block: int
    ) -> None:
        self.graph = graph
        self.thresholds = thresholds
        self.weights = weights
        self.block = block
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
            index = 1
            node.inputs[index] = self._weight(node, weight, precision)
        return True

    def _activation(self, tensor: gs.Tensor, precision: str) -> gs.Tensor:
        key = (str(tensor.name), precision)
        if key not in self._activations:
            limit = scales.LIMITS[precision]
            kept = self.thresholds[tensor.name]
            scale = np.float32(kept / limit if kept > 0 else 1.0)
            dtype = _STORED[precision]
            stem = f"{tensor.name}" if precision == "int8" else f"{tensor.name}_{precision}"
            parameters = [
                gs.Constant(f"{stem}_scale", np.asarray(scale)),
                gs.Constant(f"{stem}_zero_point", np.zeros((), dtype)),
            ]
            stored = gs.Variable(f"{stem}_quantized", dtype, tensor.shape)
            back = gs.Variable(f"{stem}_dequantized", np.float32, tensor.shape)
            for op, source, result in (
                ("QuantizeLinear", tensor, stored),
                ("DequantizeLinear", stored, back),
            ):
                self.graph.nodes.append(
                    gs.Node(op, f"{stem}_{op}", {}, [source, *parameters], [result])
                )
            self._activations[key] = back
        return self._activations[key]

    def _weight(self, node: gs.Node, weight: gs.Constant, precision: str) -> gs.Tensor:
        channel = _output_axis(node, weight)
        blocked = precision == "int4-weight-only" and not node.op.startswith("Conv")
        axis = _input_axis(node, weight) if blocked else channel
        key = (str(weight.name), precision, axis)
        if key not in self._weights:
            if blocked:
                parts, attrs = self._blocks(weight, axis)
            elif precision == "fp8":
                parts, attrs = self._whole(weight)
            else:
                parts, attrs = self._channels(weight, channel)
            stem = f"{weight.name}_{precision}_{axis}"
            constants = [
                _constant(f"{stem}_{part}", values)
                for part, values in zip(("quantized", "scale", "zero_point"), parts, strict=True)
            ]
            back = gs.Variable(f"{stem}_dequantized", np.float32, list(weight.shape))
            self.graph.nodes.append(
                gs.Node("DequantizeLinear", f"{stem}_DequantizeLinear", attrs, constants, [back])
            )
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
        peak = float(np.abs(values).max(initial=0.0))
        scale = np.asarray(peak / scales.LIMITS["fp8"] if peak else 1.0, np.float32)
        dtype = _STORED["fp8"]
        return ((values / scale).astype(dtype), scale, np.zeros((), dtype)), {}


def _output_axis(node: gs.Node, weight: gs.Constant) -> int:
    if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return 0
    return 1 if node.op == "ConvTranspose" else len(weight.shape) - 1


def _input_axis(node: gs.Node, weight: gs.Constant) -> int:
    transposed = node.op == "Gemm" and node.attrs.get("transB", 0)
    return 1 if transposed else len(weight.shape) - 2


def _constant(name: str, values: Array) -> gs.Constant:
    if values.dtype == ml_dtypes.int4:  # GraphSurgeon would not pack two in a byte
        return gs.Constant(name, LazyValues(onnx.numpy_helper.from_array(values, name)))
    return gs.Constant(name, values)
