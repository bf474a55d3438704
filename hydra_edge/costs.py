"""`cost`: the arithmetic and the weights of a graph, counted before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.shape_inference

from hydra_edge import ops
from hydra_edge.artifacts.graph import Graph
from hydra_edge.errors import GraphError

Shape = tuple[int, ...]

# Position of the weight, whose shape says how many products one output value sums.
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
_PRODUCTS = frozenset({"Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"})
_COUNTED = frozenset({*_CONVOLUTIONS, *_PRODUCTS, "ConvTranspose"})
# Not weights: indices, axes and shapes.
_NOT_PARAMETERS = frozenset(
    {onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}
)
_PACKED_BITS = {
    getattr(onnx.TensorProto, name): bits
    for name, bits in (
        ("INT4", 4), ("UINT4", 4), ("FLOAT4E2M1", 4), ("INT2", 2), ("UINT2", 2)
    )
    if hasattr(onnx.TensorProto, name)
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a graph costs on any machine.

    Attributes:
        flops_per_sample: Two per multiply-add of the convolutions and matrix products, at batch 1.
        weight_bytes: Bytes of all constants as stored.
        parameters: Number of constants, without indices and shapes.
    """

    flops_per_sample: int
    weight_bytes: int
    parameters: int


def cost(graph: Graph) -> Cost:
    """Count the arithmetic and the weights of a graph.

    Multiply-adds of Conv, ConvTranspose, Gemm, MatMul and their integer forms count as two
    operations each, bias and elementwise ops as none, so a fused graph costs what its source does.

    Args:
        graph: Any graph. A fixed batch is divided out; of named axes only the batch may be unknown.

    Raises:
        GraphError: A shape that decides the count is unknown, or a counted op lies in a subgraph.
    """
    model, batch = _at_batch_one(graph)
    shapes = _shapes(model)
    operations = 0
    for node in model.graph.node:
        if node.op_type in _COUNTED and node.domain in ("", "ai.onnx"):
            operations += 2 * _multiply_adds(node, shapes)
        elif inner := next((n for n in _inner_nodes(node) if n.op_type in _COUNTED), None):
            raise GraphError(
                f"A {inner.op_type} lies inside the {node.op_type} '{node.name}'.",
                "How often it runs is only known at run time, so its cost cannot be counted.",
                "Export the model without control flow around its layers.",
            )
    constants = list(_constants(graph.model.graph))
    return Cost(
        flops_per_sample=operations // batch,
        weight_bytes=sum(map(_stored_bytes, constants)),
        parameters=sum(
            math.prod(tensor.dims)
            for tensor in constants
            if tensor.data_type not in _NOT_PARAMETERS
        ),
    )


def _at_batch_one(graph: Graph) -> tuple[onnx.ModelProto, int]:
    """The model without functions and its batch: 1, or what the file fixes it to."""
    model = onnx.ModelProto()
    model.CopyFrom(ops.inline(graph.model))
    batches = {spec.shape[0] for spec in graph.inputs if spec.shape}
    fixed = [size for size in batches if isinstance(size, int)]
    if fixed and len(batches) == 1:
        return model, fixed[0]
    names = {axis for axis in batches if isinstance(axis, str)}
    inputs = {spec.name for spec in graph.inputs}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for index, dim in enumerate(value.type.tensor_type.shape.dim):
            anonymous = value.name in inputs and index == 0 and not dim.HasField("dim_value")
            if anonymous or (dim.dim_param and dim.dim_param in names):
                dim.dim_value = 1
    return model, 1


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Known shapes by tensor name: what shape inference finds, and else what the file declares."""
    declared = _declared_shapes(model)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    # A shape that was recorded with another batch would contradict the inferred one.
    del bare.graph.value_info[:]
    for value in bare.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return declared  # it may do: `_multiply_adds` checks what it needs
    return {**declared, **_declared_shapes(inferred)}


def _declared_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    graph = model.graph
    shapes = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def _multiply_adds(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    def shape(name: str) -> Shape:
        if name in shapes:
            return shapes[name]
        raise GraphError(
            f"The shape of '{name}' at the {node.op_type} '{node.name}' is unknown.",
            "The operations of a layer follow from the shapes around it.",
            "Give all axes but the batch a fixed size, and run onnx.shape_inference on the model.",
        )

    if node.op_type == "ConvTranspose":
        return math.prod(shape(node.input[0])) * math.prod(shape(node.input[1])[1:])
    if node.op_type in _CONVOLUTIONS:
        weight = shape(node.input[_CONVOLUTIONS[node.op_type]])
        return math.prod(shape(node.output[0])) * math.prod(weight[1:])
    factor = shape(node.input[0])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(shape(node.output[0])) * factor[-2 if transposed else -1]


def _inner_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for graph in _subgraphs(node):
        for inner in graph.node:
            yield inner
            yield from _inner_nodes(inner)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and Constant nodes, those of subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.FLOATS):
                yield onnx.numpy_helper.from_array(
                    np.asarray([*attribute.floats] or attribute.f, np.float32)
                )
            elif attribute.type in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS):
                yield onnx.numpy_helper.from_array(
                    np.asarray([*attribute.ints] or attribute.i, np.int64)
                )
        for inner in _subgraphs(node):
            yield from _constants(inner)


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    count = math.prod(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    bits = _PACKED_BITS.get(tensor.data_type, dtype.itemsize * 8)
    return int(-(-count * bits // 8))
