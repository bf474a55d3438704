"""What an engine really computes in: its layers, as TensorRT's inspector tells of them.

A builder that finds no kernel of the type that a graph asks for may choose another one and say
nothing. So the inspector's answer is compared with the types that the lowered model multiplies in.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx

from hydra_edge.errors import CompilationError

if TYPE_CHECKING:
    import types

# How "Format/Datatype" names them, in the versions that we know: "Row major linear FP16 format",
# "Int8", "Half", "kgen … FP8".
_NAMES = {
    "fp32": r"FP32|Float\b|float32",
    "fp16": r"FP16|Half",
    "bf16": r"BF16|BFloat16",
    "int8": r"INT8|Int8",
    "int4": r"INT4|Int4",
    "fp8": r"FP8",
}
# What reads a type without multiplying in it.
_MOVES_ONLY = ("Reformat", "NoOp", "Constant", "Shuffle", "Copy", "Quantize", "Dequantize", "Cast")
_MULTIPLIES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_HALVES = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
_STORED = {
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.FLOAT8E4M3FN: "fp8",
}


def inspect(trt: types.ModuleType, engine: Any) -> list[Mapping[str, Any]]:
    """The layers of a live engine.

    Args:
        trt: The module.
        engine: An ``ICudaEngine`` that was built with detailed verbosity.
    """
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text)["Layers"]
    return [layer for layer in layers if isinstance(layer, dict)]


def delivered(layers: list[Mapping[str, Any]]) -> Counter[str]:
    """How many layers that compute read or hold each type."""
    found: Counter[str] = Counter()
    for layer in layers:
        if str(layer.get("LayerType", "")).startswith(_MOVES_ONLY):
            continue
        described = " ".join(
            str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", [])
        )
        weights = layer.get("Weights")
        if isinstance(weights, Mapping):
            described += f" {weights.get('Type', '')}"
        found.update(kind for kind, names in _NAMES.items() if re.search(names, described))
    return found


def asked(model: onnx.ModelProto) -> frozenset[str]:
    """The types below fp32 that a lowered model multiplies in, outside of our plugin."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    stored = {
        node.output[0]: _STORED[types[node.input[0]]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and types.get(node.input[0]) in _STORED
    }
    quantized = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    real = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized
    }
    found = set()
    for node in model.graph.node:
        if node.op_type not in _MULTIPLIES:
            continue
        weight = stored.get(node.input[1])
        if weight is not None and node.input[0] in real:
            found.add(weight)
        elif types.get(node.input[1]) in _HALVES:
            found.add(_HALVES[types[node.input[1]]])
    return frozenset(found)


def check(model: onnx.ModelProto, layers: list[Mapping[str, Any]], name: str) -> str:
    """Compare what was asked for with what was delivered.

    Returns:
        A sentence on what the engine computes in.

    Raises:
        CompilationError: No layer computes in a type that the graph asks for.
    """
    found = delivered(layers)
    missing = sorted(asked(model) - set(found))
    said = ", ".join(f"{count} in {kind}" for kind, count in sorted(found.items()))
    if missing:
        raise CompilationError(
            f"{name} built an engine that multiplies nothing in {', '.join(missing)}.",
            f"The graph asks for it, but of the layers {said or 'none computes'}.",
            "Choose a precision that the GPU has (`hydra-edge targets`), or another version of "
            f"{name}.",
        )
    return f"layers by the types they read: {said}"
