"""`export` and `merge`: torch modules, or M ONNX files, become one `Graph` with its uncertainty."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.compose
import onnx.version_converter
import onnx_graphsurgeon as gs

from hydra_edge import ops, surgery, tasks
from hydra_edge.artifacts.graph import Graph, Metadata, TensorSpec
from hydra_edge.errors import ExportError, GraphError, InputError, require

if TYPE_CHECKING:
    import torch

BATCH = "batch"
LOGITS = "head_logits"


def export(
    model: torch.nn.Module,
    example: object,
    *,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    head_logits: bool = True,
) -> Graph:
    """Turn a torch module into a graph with a dynamic batch.

    Args:
        model: A `Hydra` or an `Ensemble`, whose graph ends in the task's summary op; or any other
            module with one output, e.g. a single member, exported as it is.
        example: One input (array or tensor, axis 0 the batch) or a tuple of inputs.
        input_names: Names of the inputs; ``input`` or ``input_0``, ``input_1``, … by default.
        output_names: Names of the outputs of another module, which may then have several, each
            with axis 0 the batch or, to be summarized, ``[M, B, C]``.
        head_logits: Keep the per-head output ``head_logits [M, B, C]`` among the outputs.

    Returns:
        The graph. A `Hydra` or `Ensemble` has the task's outputs, each with axis 0 the batch.

    Raises:
        ExportError: Torch cannot export the module, or its output does not fit the task.
    """
    torch = require("torch", "train")
    require("onnxscript", "train")
    from hydra_edge.ensembles import Ensemble, Hydra

    examples = _examples(example)
    names = list(input_names) or _default_names(len(examples))
    if len(names) != len(examples):
        raise InputError(
            f"There are {len(examples)} example inputs and {len(names)} input names.",
            "Each input needs one name.",
            "Give one name per input.",
        )
    known = model if isinstance(model, (Hydra, Ensemble)) else None
    outputs = [LOGITS] if known else list(output_names) or ["logits"]
    # The forward of Hydra and Ensemble takes *inputs, which torch.export sees as one tuple.
    axes = tuple({0: BATCH} for _ in examples)
    proto = _to_onnx(model, examples, names, outputs, (axes,) if known else axes)
    kind = "student" if isinstance(model, Hydra) else "ensemble" if known else "member"
    graph = Graph(proto, Metadata(kind=kind, provenance=(f"export:torch {torch.__version__}",)))
    if known is None:
        return graph
    return summarize(graph, known.task, LOGITS, labels=known.labels, head_logits=head_logits)


def merge(
    members: Sequence[Graph],
    *,
    task: str = "classification",
    labels: Sequence[str] = (),
    logits: str | None = None,
) -> Graph:
    """Join M graphs into one ensemble graph with the outputs of the task.

    Args:
        members: Graphs with the same inputs; each gives logits ``[B, C]``. Inputs are matched by
            name where all members use the same names, otherwise by position.
        task: What they are for.
        labels: Names of the C outputs; those of the first member by default.
        logits: Name of the output with the logits; needed when members have several outputs.

    Returns:
        A graph whose members run side by side and end in the task's summary op.

    Raises:
        InputError: There are no members.
        GraphError: Members differ in inputs or outputs.
    """
    if not members:
        raise InputError(
            "There are no members to merge.", "An ensemble has at least one.", "Name ONNX files."
        )
    members = [_in_order(member, members[0]) for member in members]
    opset = max(ops.opset_of(ops.upgrade(member.model)) for member in members)
    first = members[0]
    outputs = [_logits_of(member, logits, index) for index, member in enumerate(members)]
    merged: onnx.ModelProto | None = None
    for index, member in enumerate(members):
        _check_member(member, first, outputs[index], outputs[0], index)
        model = _renamed(member, index, first.inputs, outputs[index].name, opset)
        merged = model if merged is None else _side_by_side(merged, model)
    assert merged is not None
    surgeon = gs.import_onnx(merged)
    tensors = surgeon.tensors()
    axes = gs.Constant("stack/axes", np.asarray([0], np.int64))
    rows = []
    for index, spec in enumerate(outputs):
        row = gs.Variable(f"stack/{index}", dtype=np.dtype(spec.dtype))
        source = tensors[f"member_{index}/{spec.name}"]
        surgeon.nodes.append(gs.Node("Unsqueeze", row.name, inputs=[source, axes], outputs=[row]))
        rows.append(row)
    shape = [len(members), *outputs[0].shape]
    stacked = gs.Variable(LOGITS, dtype=np.dtype(outputs[0].dtype), shape=shape)
    surgeon.nodes.append(gs.Node("Concat", "stack", {"axis": 0}, inputs=rows, outputs=[stacked]))
    surgeon.outputs = [stacked]
    model = surgery.close_model(surgeon, like=first.model)
    known = tuple(labels) or first.metadata.labels
    metadata = Metadata(kind="ensemble", provenance=(f"merge:{len(members)}",))
    return summarize(Graph(model, metadata), task, LOGITS, labels=known)


def summarize(
    graph: Graph,
    task: str,
    logits: str | Sequence[str] | None = None,
    *,
    labels: Sequence[str] = (),
    head_logits: bool = True,
    keep: Sequence[str] = (),
    omit: Sequence[str] = (),
) -> Graph:
    """End a graph in the summary op of its task: how a model exported by anybody gets its doubt.

    Args:
        graph: A graph with one per-head output ``[M, B, C]``, or M outputs ``[B, C]``; its other
            outputs are dropped, but those of ``keep``.
        task: Task name.
        logits: Name of that output, or names of those M; None when the graph has no others.
        labels: Names of the C outputs.
        head_logits: Keep the per-head output among the outputs.
        keep: Names of further outputs to keep, e.g. the state of a decoder.
        omit: Outputs of the summary to leave out: what nobody reads is not computed.

    Raises:
        GraphError: The output is missing or has another rank.
        InputError: The labels do not match C, or the summary has no output that is to be omitted.
    """
    described = tasks.find(task)
    if unknown := sorted(set(omit) - set(described.outputs)):
        raise InputError(
            f"The summary of '{task}' has no output '{unknown[0]}' to leave out.",
            f"It gives {', '.join(described.outputs)}.",
            "Name some of those.",
        )
    model, (heads, batch, channels) = _with_head_logits(graph, logits)
    used = {name for node in model.graph.node for name in (*node.input, *node.output)}
    taken = sorted(used & set(described.outputs))
    if taken:
        raise GraphError(
            f"The graph has a tensor '{taken[0]}' already.",
            "The summary writes a tensor of that name; perhaps the graph ends in one already.",
            "Use the graph as it is, or rename that tensor.",
        )
    width = described.width(channels) if isinstance(channels, int) else channels
    if labels and len(labels) != width:
        raise InputError(
            f"There are {len(labels)} labels for {width} outputs.",
            "Each output needs one label.",
            f"Give {width} labels, or none.",
        )
    model.graph.node.append(
        onnx.helper.make_node(
            described.summary_op, [LOGITS], list(described.outputs), "summary", domain=ops.DOMAIN
        )
    )
    others = {value.name: value for value in model.graph.output}
    if missing := sorted(set(keep) - set(others)):
        raise GraphError(
            f"The graph has no output '{missing[0]}' to keep.",
            f"It gives {'; '.join(map(str, graph.outputs))}.",
            "Name outputs of the graph.",
        )
    kept = [others[name] for name in ((LOGITS,) if head_logits else ()) + tuple(keep)]
    del model.graph.output[:]
    for name in (name for name in described.outputs if name not in omit):
        shape = [batch, width] if name in described.vector_outputs else [batch]
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        )
    model.graph.output.extend(kept)
    ops.declare(model)
    return graph.derive(
        model,
        f"summarize:{task}",
        task=task,
        heads=heads,
        labels=tuple(labels),
        logits=LOGITS if head_logits else None,
    )


def _with_head_logits(
    graph: Graph, logits: str | Sequence[str] | None
) -> tuple[onnx.ModelProto, tuple[int, int | str, int | str]]:
    """A copy of the model in which the per-head output is called `LOGITS`, and its shape."""
    wanted = [spec.name for spec in graph.outputs] if logits is None else logits
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    found = {spec.name: spec for spec in graph.outputs}
    specs = [found[name] for name in names if name in found]
    ranks = {len(spec.shape) for spec in specs}
    shapes = {spec.shape for spec in specs}
    stacked = len(specs) == 1 and ranks == {3} and isinstance(specs[0].shape[0], int)
    apart = len(specs) > 1 and ranks == {2} and len(shapes) == 1
    if len(specs) < len(names) or not (stacked or apart):
        described = "; ".join(map(str, graph.outputs))
        raise GraphError(
            f"The per-head outputs {', '.join(map(repr, names))} cannot be summarized.",
            f"The graph gives {described}; a summary needs one output [M, B, C] with a known M, or "
            "M outputs [B, C] of one shape.",
            "Name the right outputs with logits=… or --logits, stack the heads along axis 0, or "
            "merge member files with `hydra-edge merge`.",
        )
    model = onnx.ModelProto()
    model.CopyFrom(ops.upgrade(graph.model))
    if stacked:
        _rename(model.graph, names[0], LOGITS)
        heads, batch, channels = specs[0].shape
        assert isinstance(heads, int)
        return model, (heads, batch, channels)
    batch, channels = specs[0].shape
    axes = onnx.helper.make_tensor(f"{LOGITS}/axes", onnx.TensorProto.INT64, [1], [0])
    model.graph.initializer.append(axes)
    rows = [f"{LOGITS}/{index}" for index in range(len(names))]
    for name, row in zip(names, rows, strict=True):
        model.graph.node.append(onnx.helper.make_node("Unsqueeze", [name, axes.name], [row], row))
    model.graph.node.append(onnx.helper.make_node("Concat", rows, [LOGITS], LOGITS, axis=0))
    kind = next(v for v in model.graph.output if v.name == names[0]).type.tensor_type.elem_type
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(LOGITS, kind, [len(names), batch, channels])
    )
    return model, (len(names), batch, channels)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Give a tensor another name, everywhere."""
    if old == new:
        return
    if any(new in (*node.input, *node.output) for node in graph.node):
        raise GraphError(
            f"The graph has a tensor '{new}' that is not its per-head output '{old}'.",
            f"The per-head output is called '{new}' from here on.",
            "Rename that tensor.",
        )
    _read_instead(graph, {old: new})
    for node in graph.node:
        for position, name in enumerate(node.output):
            node.output[position] = new if name == old else name
    for value in (*graph.output, *graph.value_info):
        value.name = new if value.name == old else value.name


def _examples(example: object) -> tuple[torch.Tensor, ...]:
    import torch

    parts = example if isinstance(example, tuple) else (example,)
    tensors = []
    for index, part in enumerate(parts):
        tensor = part if isinstance(part, torch.Tensor) else torch.as_tensor(np.asarray(part))
        if tensor.ndim == 0 or not len(tensor):
            raise InputError(
                f"Example input {index} has shape {list(tensor.shape)}.",
                "Axis 0 is the batch and must hold at least one sample.",
                "Pass for example torch.zeros(1, 3, 224, 224).",
            )
        # torch.export takes an axis of size 1 for a constant, so the example needs two samples.
        tensors.append(torch.cat([tensor[:1], tensor[:1]]).cpu())
    return tuple(tensors)


def _default_names(count: int) -> list[str]:
    return ["input"] if count == 1 else [f"input_{index}" for index in range(count)]


def _to_onnx(
    model: torch.nn.Module,
    examples: tuple[torch.Tensor, ...],
    names: list[str],
    outputs: list[str],
    dynamic_shapes: tuple[object, ...],
) -> onnx.ModelProto:
    import torch

    frozen = copy.deepcopy(model).eval().cpu()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:  # they report every optional package that is not installed
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                frozen,
                examples,
                dynamo=True,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
        assert program is not None  # with dynamo=True it is what was exported
        proto = program.model_proto
    except Exception as exc:  # whatever the module's own code and torch.export raise
        raise ExportError(
            f"Torch cannot export this {type(model).__name__}.",
            f"It says: {_last_line(exc)}.",
            "Its forward must be traceable by torch.export with a dynamic batch: no data-dependent "
            "control flow, no reshape to a fixed batch size.",
        ) from exc
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return _cleaned(proto)


def _last_line(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return (lines[0] if lines else type(exc).__name__).rstrip(".")


def _cleaned(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without stack traces and other notes that name files of the exporting machine."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    proto.graph.name = "hydra"
    graph = proto.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    del graph.metadata_props[:]
    return proto


def _logits_of(member: Graph, logits: str | None, index: int) -> TensorSpec:
    candidates = [spec for spec in member.outputs if logits in (None, spec.name)]
    if len(candidates) != 1:
        raise GraphError(
            f"Member {index} has the outputs {', '.join(spec.name for spec in member.outputs)}.",
            f"Its logits are not clear{f': there is no {logits!r}' if logits else ''}.",
            "Name the output with the logits: logits=… or --logits NAME.",
        )
    if len(candidates[0].shape) != 2:
        raise GraphError(
            f"Member {index} gives {candidates[0]}.",
            "A member gives logits of shape [B, C].",
            "Choose another output, or export the member without its summary.",
        )
    return candidates[0]


def _in_order(member: Graph, first: Graph) -> Graph:
    """A member whose inputs stand in the order of the first one's, if they have the same names."""
    order = [spec.name for spec in first.inputs]
    names = [spec.name for spec in member.inputs]
    if names == order or sorted(names) != sorted(order):
        return member
    model = onnx.ModelProto()
    model.CopyFrom(member.model)
    values = {value.name: value for value in member.model.graph.input}
    rest = [value for name, value in values.items() if name not in order]
    del model.graph.input[:]
    model.graph.input.extend([*(values[name] for name in order), *rest])
    return Graph(model, member.metadata)


def _check_member(
    member: Graph, first: Graph, output: TensorSpec, expected: TensorSpec, index: int
) -> None:
    def shape(spec: TensorSpec) -> tuple[str, tuple[int | str, ...]]:
        return spec.dtype, tuple("" if isinstance(s, str) else s for s in spec.shape)

    ours, theirs = list(map(shape, member.inputs)), list(map(shape, first.inputs))
    if ours != theirs:
        raise GraphError(
            f"Member {index} takes {'; '.join(map(str, member.inputs))}.",
            f"Member 0 takes {'; '.join(map(str, first.inputs))}; one input feeds them all.",
            "Merge members of one input format.",
        )
    if shape(output) != shape(expected):
        raise GraphError(
            f"Member {index} gives {output}.",
            f"Member 0 gives {expected}, and their outputs are averaged.",
            "Merge members trained for the same outputs.",
        )


def _renamed(
    member: Graph, index: int, inputs: tuple[TensorSpec, ...], logits: str, opset: int
) -> onnx.ModelProto:
    """A member, all names prefixed but its inputs, which it shares; only its logits leave it."""
    model = ops.inline(ops.upgrade(member.model))
    if ops.opset_of(model) != opset:
        model = onnx.version_converter.convert_version(model, opset)
    prefixed = onnx.compose.add_prefix(model, f"member_{index}/", rename_inputs=True)
    names = {
        f"member_{index}/{own.name}": shared.name
        for own, shared in zip(member.inputs, inputs, strict=True)
    }
    _read_instead(prefixed.graph, names)
    for value in prefixed.graph.input:
        value.name = names.get(value.name, value.name)
    kept = [value for value in prefixed.graph.output if value.name == f"member_{index}/{logits}"]
    del prefixed.graph.output[:]
    prefixed.graph.output.extend(kept)
    return prefixed


def _read_instead(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Let nodes read other tensors, also those in the branches of If and the bodies of Loop."""
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _read_instead(inner, names)


def _side_by_side(merged: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    merged.graph.node.extend(model.graph.node)
    merged.graph.initializer.extend(model.graph.initializer)
    merged.graph.value_info.extend(model.graph.value_info)
    merged.graph.output.extend(model.graph.output)
    merged.ir_version = max(merged.ir_version, model.ir_version)
    known = {entry.domain for entry in merged.opset_import}
    merged.opset_import.extend(e for e in model.opset_import if e.domain not in known)
    return merged
