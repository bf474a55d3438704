"""Into and out of ONNX GraphSurgeon, keeping everything it would lose on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs

from hydra_edge import ops
from hydra_edge.errors import GraphError


def open_model(model: onnx.ModelProto) -> gs.Graph:
    """A mutable copy of ``model``: opset at least 18, shapes inferred, constants as tensors."""
    model = ops.upgrade(model)
    with _mapped("read"):
        # Shapes already in the file are enough for most graphs; passes check what they need.
        with contextlib.suppress(onnx.shape_inference.InferenceError):
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        graph = gs.import_onnx(model)
        _constants_to_tensors(graph)
        return graph


def close_model(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    """Turn ``graph`` back into a model with the producer and metadata of ``like``."""
    with _mapped("write"):
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    ops.declare(model)
    model.ir_version = max(model.ir_version, 8)
    _keep_declarations(model, like)
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    del model.metadata_props[:]
    model.metadata_props.extend(like.metadata_props)
    return model


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
