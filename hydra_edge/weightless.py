"""Models without their weights: what ONNX's own passes and ONNX Runtime are shown of large models.

One protobuf message holds at most 2 GB, and shape inference, the version converter, the inliner and
ONNX Runtime all take a serialized model. None of them looks at large weights, so those stay behind;
that is also several times faster, because weights are not copied back and forth.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

import onnx
from google.protobuf.message import Message
from onnx import TensorProto

# Smaller constants hold axes, shapes and scales, which passes do look at.
SMALL_BYTES = 1024


def split(
    model: onnx.ModelProto, types: Container[int] | None = None
) -> tuple[onnx.ModelProto, dict[str, TensorProto]]:
    """A copy of ``model`` in which large weights are graph inputs, and those weights by name.

    With ``types``, only weights of those ONNX data types.

    The weights are those of ``model`` itself, not copies.
    """
    light = onnx.ModelProto()
    _copy(model, light, "graph")
    _copy(model.graph, light.graph, "initializer", "node")
    written = {value.name for value in model.graph.output}  # an output needs what writes it
    weights: dict[str, TensorProto] = {}

    def taken(tensor: TensorProto, name: str) -> bool:
        large = size_of(tensor) > SMALL_BYTES and name not in written
        return large and (types is None or tensor.data_type in types)

    for tensor in model.graph.initializer:
        if taken(tensor, tensor.name):
            weights[tensor.name] = tensor
        else:
            light.graph.initializer.append(tensor)
    for node in model.graph.node:
        value = _constant(node)
        if value is not None and taken(value, node.output[0]):
            weights[node.output[0]] = value
        else:
            light.graph.node.append(node)
    declared = {value.name for value in light.graph.input}
    for name, tensor in weights.items():
        if name not in declared:  # in old models every initializer is an input, too
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            )
    return light, weights


def without_data(
    model: onnx.ModelProto, stub: Callable[[TensorProto], TensorProto | None]
) -> onnx.ModelProto:
    """A copy of ``model`` with ``stub(tensor)`` in place of every initializer; None keeps it."""
    light = onnx.ModelProto()
    _copy(model, light, "graph")
    _copy(model.graph, light.graph, "initializer")
    light.graph.initializer.extend(stub(tensor) or tensor for tensor in model.graph.initializer)
    return light


def external(tensor: TensorProto, location: str, offset: int, length: int) -> TensorProto:
    """``tensor`` without its data, which lies in the file ``location``."""
    stub = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    stub.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        stub.external_data.add(key=key, value=str(value))
    return stub


def size_of(tensor: TensorProto) -> int:
    """Bytes of a tensor as it is stored."""
    if tensor.HasField("raw_data"):
        return _elements(tensor) * _itemsize(tensor.data_type)
    return int(tensor.ByteSize())


def total_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all weights."""
    return sum(map(size_of, _tensors(model.graph)))


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        value = _constant(node)
        if value is not None:
            yield value


def _elements(tensor: TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def _itemsize(data_type: int) -> int:
    # Half of that for 4 bits, which makes no difference here.
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _constant(node: onnx.NodeProto) -> TensorProto | None:
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return next((a.t for a in node.attribute if a.name == "value"), None)


def _copy(source: Message, target: Message, *without: str) -> None:
    """Copy all set fields but some."""
    for field, value in source.ListFields():
        if field.name in without:
            continue
        if isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        elif isinstance(value, str | bytes | int | float):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).extend(value)
