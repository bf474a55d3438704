"""Into and out of ONNX GraphSurgeon, keeping everything it would lose on the way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from hydra_edge import ops, weightless
from hydra_edge.errors import GraphError

Array = npt.NDArray[np.generic]
_NOT_IN_NUMPY = frozenset(
    {
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.FLOAT8E4M3FN,
        onnx.TensorProto.FLOAT8E4M3FNUZ,
        onnx.TensorProto.FLOAT8E5M2,
        onnx.TensorProto.FLOAT8E5M2FNUZ,
    }
)
_WRITTEN_HERE = frozenset({"int4", "uint4", "float8_e4m3fnuz"})
# How exporters compute axes; shapes have few of them.
_ARITHMETIC = frozenset({
    "Add", "Cast", "Concat", "Div", "Gather", "Mod", "Mul", "Neg", "Reshape", "Squeeze", "Sub",
    "Unsqueeze",
})  # fmt: skip
_MOST_AXES = 32


def open_model(model: onnx.ModelProto, opset: int = ops.MINIMUM_OPSET) -> gs.Graph:
    """A mutable copy of ``model``: at least ``opset``, shapes inferred, constants as tensors.

    Local functions of other domains than ours are inlined. Large weights are read where they are,
    in ``model``, and only when a pass asks for them.
    """
    light, weights = weightless.split(model)
    light = ops.upgrade(light, opset)
    with _mapped("read"), G_LOGGER.suppress():
        light = _inferred(_inlined(light))
        graph = gs.import_onnx(light)
        tensors = graph.tensors()
        for name, proto in weights.items():
            if name in tensors:
                tensors[name].to_constant(LazyValues(proto))
                tensors[name].proto = proto
        for proto in (*light.graph.initializer, *weights.values()):
            if proto.data_type in _NOT_IN_NUMPY and proto.name in tensors:
                # GraphSurgeon would warn on every use; ONNX gives arrays of ml_dtypes.
                tensors[proto.name].values = np.array(onnx.numpy_helper.to_array(proto))
        graph.inputs = [tensor for tensor in graph.inputs if tensor.name not in weights]
        _constants_to_tensors(graph)
        return graph


def read(tensor: gs.Constant) -> Array:
    """The values of a constant that nobody changed since `open_model`.

    GraphSurgeon would keep a copy of every weight that it was once asked for.
    """
    proto = getattr(tensor, "proto", None)
    return np.asarray(tensor.values if proto is None else onnx.numpy_helper.to_array(proto))


class Deferred(LazyValues):  # type: ignore[misc]
    """A new weight that `close_model` moves into the model when all else of it is there.

    Until then there is a stub: GraphSurgeon and ONNX copy three times what they put together.
    """

    def __init__(self, name: str, values: Array) -> None:
        dtype = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        super().__init__(onnx.TensorProto(name=name, data_type=dtype, dims=values.shape))
        self.values: Array | None = values

    def load(self) -> Array:
        """The values."""
        assert self.values is not None, "the model is closed"
        return self.values

    def take(self) -> bytes:
        """The values as they are stored, which are given up for them."""
        data = self.load().tobytes()
        self.values = None
        return data


def close_model(
    graph: gs.Graph, like: onnx.ModelProto, deferred: Sequence[Deferred] = ()
) -> onnx.ModelProto:
    """Turn ``graph`` back into a model with the producer and metadata of ``like``.

    ``deferred`` are all the weights in ``graph`` that are `Deferred`; they cannot be read again.
    """
    with _mapped("write"), G_LOGGER.suppress():
        sort(graph)
        _write_small_types(graph)
        model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
        waiting = {weight.tensor.name: weight for weight in deferred}
        for tensor in model.graph.initializer:
            if tensor.name in waiting and not tensor.HasField("raw_data"):
                tensor.raw_data = waiting[tensor.name].take()
    ops.declare(model)
    model.ir_version = max(model.ir_version, 8)
    _keep_declarations(model, like)
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    model.domain, model.model_version = like.domain, like.model_version
    model.doc_string, model.graph.doc_string = like.doc_string, like.graph.doc_string
    del model.metadata_props[:]
    model.metadata_props.extend(like.metadata_props)
    return model


def _write_small_types(graph: gs.Graph) -> None:
    """GraphSurgeon would write one number of 4 bits in a byte, not two, and E4M3FNUZ as E4M3FN."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and str(tensor.dtype) in _WRITTEN_HERE:
            proto = onnx.numpy_helper.from_array(np.asarray(tensor.values), tensor.name)
            tensor.values = LazyValues(proto)


class Writer:
    """Adds nodes to a graph, under names that begin with ``prefix`` and are new below it."""

    def __init__(self, graph: gs.Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        self.count = 0

    def name(self, kind: str) -> str:
        """A new name."""
        self.count += 1
        return f"{self.prefix}/{kind}_{self.count}"

    def constant(self, values: Array) -> gs.Constant:
        """A new constant."""
        return gs.Constant(self.name("constant"), np.array(values, order="C"))

    def emit(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        dtype: npt.DTypeLike = np.float32,
        attrs: Mapping[str, object] | None = None,
        *,
        domain: str | None = None,
        shape: Sequence[int | str] | None = None,
    ) -> gs.Variable:
        """A new node with one new output."""
        output = gs.Variable(self.name(op), dtype, shape)
        self.append(op, inputs, [output], attrs or {}, domain)
        return output

    def append(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        outputs: Sequence[gs.Tensor],
        attrs: Mapping[str, object],
        domain: str | None = None,
    ) -> None:
        """A new node that writes ``outputs``."""
        node = gs.Node(op, self.name(f"{op}_node"), dict(attrs), list(inputs), list(outputs))
        node.domain = domain
        self.graph.nodes.append(node)


def dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """Its type, also where GraphSurgeon has only ONNX's number for it, as of bfloat16."""
    if tensor.dtype is None:
        return None
    if isinstance(tensor.dtype, int):
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype))
    found: np.dtype[Any] = np.dtype(tensor.dtype)
    return found


def sort(graph: gs.Graph) -> None:
    """Drop what no output needs, and bring nodes into an order in which they can run.

    Nodes keep their order where they can. GraphSurgeon's own sort recurses, and fails on deep
    graphs.
    """
    graph.cleanup(remove_unused_graph_inputs=False)
    writers = {id(tensor): node for node in graph.nodes for tensor in node.outputs}
    done: set[int] = set()
    ordered: list[gs.Node] = []
    for root in graph.nodes:
        pending = [root]
        while pending:
            node = pending[-1]
            if id(node) in done:
                pending.pop()
                continue
            missing = [
                writers[id(tensor)]
                for tensor in _read_by(node)
                if id(tensor) in writers and id(writers[id(tensor)]) not in done
            ]
            if missing:
                pending.extend(reversed(missing))
                continue
            done.add(id(node))
            ordered.append(pending.pop())
    graph.nodes = ordered


def _read_by(node: gs.Node) -> Iterator[gs.Tensor]:
    """Inputs of a node and whatever the graphs in it read."""
    yield from node.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from _read_by(inner)
            yield from value.outputs


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    foreign = [(f.domain, f.name) for f in model.functions if f.domain != ops.DOMAIN]
    return onnx.inliner.inline_selected_functions(model, foreign) if foreign else model


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with the shapes that can be inferred; passes check those they need.

    ONNX infers nothing for GroupNormalization, which keeps the shape of its input, nor from
    arithmetic on constants, in which TorchScript's exporter hides where to cut a shape.
    """
    hidden = _computed(model)
    for index, node in enumerate(model.graph.node):
        if node.op_type == "GroupNormalization" and node.domain in ("", "ai.onnx"):
            hidden[index] = onnx.NodeProto()
            hidden[index].CopyFrom(node)
            del node.input[1:], node.attribute[:]
            node.op_type = "Identity"
    with contextlib.suppress(onnx.shape_inference.InferenceError):
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for index, node in hidden.items():
        model.graph.node[index].CopyFrom(node)
    return model


def _computed(model: onnx.ModelProto) -> dict[int, onnx.NodeProto]:
    """Put constants in the place of nodes that compute axes from constants; returns those nodes."""
    known = {t.name: t for t in model.graph.initializer if _is_list(t)}
    replaced = {}
    for index, node in enumerate(model.graph.node):
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            if _is_list(node.attribute[0].t):
                known[node.output[0]] = node.attribute[0].t
        elif node.op_type in _ARITHMETIC and not node.domain and known.keys() >= set(node.input):
            tensor = _value_of(node, [known[name] for name in node.input])
            if tensor is None:
                continue
            replaced[index] = onnx.NodeProto()
            replaced[index].CopyFrom(node)
            node.CopyFrom(onnx.helper.make_node("Constant", [], node.output, value=tensor))
            known[node.output[0]] = tensor
    return replaced


def _value_of(node: onnx.NodeProto, operands: list[onnx.TensorProto]) -> onnx.TensorProto | None:
    feeds = {n: onnx.numpy_helper.to_array(t) for n, t in zip(node.input, operands, strict=True)}
    try:
        (values,) = ReferenceEvaluator(node).run(None, feeds)
    except Exception:  # it raises whatever its parts raise
        return None
    return onnx.numpy_helper.from_array(np.asarray(values))


def _is_list(tensor: onnx.TensorProto) -> bool:
    integers = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    return tensor.data_type in integers and math.prod(tensor.dims) <= _MOST_AXES


@contextlib.contextmanager
def _mapped(verb: str) -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # they raise whatever a damaged model leads to
        raise GraphError(
            f"ONNX and its GraphSurgeon cannot {verb} the model.",
            f"It says: {(str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip('.')}.",
            "Check the model with onnx.checker.check_model(model, full_check=True).",
        ) from exc


def _keep_declarations(model: onnx.ModelProto, like: onnx.ModelProto) -> None:
    """Inputs and outputs as ``like`` declares them: shape inference names nameless axes."""
    declared = {value.name: value for value in (*like.graph.input, *like.graph.output)}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in declared:
            shape, old = (v.type.tensor_type.shape for v in (value, declared[value.name]))
            if len(shape.dim) == len(old.dim):
                shape.CopyFrom(old)


def fresh_name(graph: gs.Graph, stem: str) -> str:
    """A prefix starting with ``stem``; ``graph`` has no tensor or node of that name or below it."""
    taken = {name.split("/")[0] for name in graph.tensors()}
    taken |= {node.name.split("/")[0] for node in graph.nodes}
    index = 0
    while f"{stem}_{index}" in taken:
        index += 1
    return f"{stem}_{index}"


def unused(name: str, taken: set[str]) -> str:
    """``name``, longer if it is ``taken``, which it is from now on."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _constants_to_tensors(graph: gs.Graph) -> None:
    """Replace Constant nodes by constant tensors, so that passes see one kind of weight."""
    for node in list(graph.nodes):
        if node.op != "Constant" or len(node.outputs) != 1:
            continue
        value = _constant_value(node)
        if value is None:
            continue
        output = node.outputs[0]
        node.outputs.clear()
        if output in graph.outputs:  # a graph output must stay a variable that a node writes
            node.outputs.append(output)
            continue
        output.to_constant(value)


def _constant_value(node: gs.Node) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    for name, dtype in (
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_float", np.float32),
        ("value_floats", np.float32),
    ):
        if name in node.attrs:
            return np.asarray(node.attrs[name], dtype)
    value = node.attrs.get("value")
    return np.asarray(value.values) if isinstance(value, gs.Tensor) else None
