"""The ONNX domain ``hydra``: each op is a local function of standard ops; any runtime runs it."""

from __future__ import annotations

import onnx
import onnx.inliner
import onnx.parser
import onnx.version_converter

from hydra_edge import weightless
from hydra_edge.errors import GraphError
from hydra_edge.ops import ensemble_summary, grouped_matmul

DOMAIN = "hydra"
VERSION = 1
MINIMUM_OPSET = 18  # reductions take their axes as an input from here on

_SOURCES = {**ensemble_summary.FUNCTIONS, **grouped_matmul.FUNCTIONS}
NAMES = frozenset(_SOURCES)


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the default ONNX domain that ``model`` imports.

    Raises:
        GraphError: It imports none.
    """
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return int(entry.version)
    raise GraphError(
        "The model imports no version of the ONNX operator set.",
        "Its operators have no defined meaning.",
        "Export it again with a current exporter.",
    )


def upgrade(model: onnx.ModelProto, opset: int = MINIMUM_OPSET) -> onnx.ModelProto:
    """Return ``model``, converted to ``opset`` if it is older.

    The default is the oldest opset our functions are written for.

    Raises:
        GraphError: ONNX's version converter cannot convert it.
    """
    if opset_of(model) >= opset:
        return model
    try:
        return onnx.version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError) as exc:
        raise GraphError(
            f"The model uses opset {opset_of(model)} and cannot be converted to {opset}.",
            f"ONNX's converter says: {str(exc).strip()}.",
            f"Export it again with opset {opset} or newer.",
        ) from exc


def declare(model: onnx.ModelProto) -> None:
    """Add to ``model``, in place, the functions its ``hydra`` nodes use and the domain's import.

    Raises:
        GraphError: It uses an op of the domain that this version does not have.
    """
    opset = opset_of(model)
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    if unknown := sorted(used - NAMES):
        raise GraphError(
            f"The graph uses the operator '{unknown[0]}' of the domain '{DOMAIN}'.",
            f"This version has: {', '.join(sorted(NAMES))}.",
            "Upgrade hydra-edge.",
        )
    kept = [f for f in model.functions if f.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    for name in sorted(used):
        text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{_SOURCES[name]}'
        model.functions.append(onnx.parser.parse_function(text))
    imports = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    if used:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
        # IR version 8 is the first that has local functions.
        model.ir_version = max(model.ir_version, 8)


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``model`` with every local function replaced by what is read of its body.

    Large weights stay where they are meanwhile: the inliner would copy them four times.
    """
    if not model.functions:
        return model
    light, weights = weightless.split(model)
    inlined = onnx.inliner.inline_local_functions(light)
    kept = [value for value in inlined.graph.input if value.name not in weights]
    kept += [value for value in model.graph.input if value.name in weights]  # as in old models
    order = {value.name: index for index, value in enumerate(model.graph.input)}
    kept.sort(key=lambda value: order[value.name])
    inputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del inlined.graph.input[:]
    inlined.graph.input.extend(inputs)
    inlined.graph.initializer.extend(_named(tensor, name) for name, tensor in weights.items())
    _drop_unread(inlined.graph)
    return inlined


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Drop nodes whose results nobody reads; a runtime would compute them all the same."""
    read = {value.name for value in graph.output}
    for index in reversed(range(len(graph.node))):
        if read.isdisjoint(graph.node[index].output):
            del graph.node[index]
        else:
            read |= _reads(graph.node[index])


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, also inside its subgraphs."""
    found = set(node.input)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            found |= {value.name for value in inner.output}
            found = found.union(*map(_reads, inner.node))
    return found


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """The tensor under the name that its readers know: the value of a Constant node has none."""
    if tensor.name == name:
        return tensor
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy
