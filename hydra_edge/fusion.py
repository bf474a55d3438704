"""`fuse`: M isomorphic branches become one branch of stacked ops.

`branches` finds them, `stacking` knows how each operator acts on M branches at once; here the
result takes the place of the branches, and is compared with its source before it is returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from hydra_edge import branches, equivalence, joins, surgery
from hydra_edge.artifacts.graph import FusionGroup, Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.branches import MATMULS, Branches, Shared, Step, Weights
from hydra_edge.errors import HydraError
from hydra_edge.stacking import RULES
from hydra_edge.stacking.stacker import CHANNELS, Emitted, Size, Stacker, UnsupportedError

# Fusing may bring equal branches together that were hidden one level down. Every round takes one
# level of nesting; no network has more than a few.
_ROUNDS = 8
Key = tuple[str, ...]  # names of the tensors that meet
Reason = tuple[str, str]  # for people, for programs


def fuse(graph: Graph) -> Graph:
    """Fuse every set of parallel branches whose operators have a stacked form.

    The result is compared with ``graph`` on random inputs. A group that does not compute the same
    is left alone, and so is everything when ``graph`` itself does not run on random inputs.

    Args:
        graph: Any graph; heads may be plain or behind Q/DQ of any producer.

    Returns:
        A graph with the same inputs and outputs. Its ``fusion`` says what was fused, and what was
        left alone and why. Fusing twice changes nothing.
    """
    refused: dict[Key, Reason] = {}
    attempt = _Attempt(graph, refused)
    if attempt.fused and (problem := attempt.problem()):
        keys = list(attempt.fused)
        for key in keys:
            others = {other: problem for other in keys if other != key}
            alone = _Attempt(graph, others)
            if found := alone.problem():
                refused[key] = found
        attempt = _Attempt(graph, refused)
        if attempt.fused and (problem := attempt.problem()):  # only together are they wrong
            attempt = _Attempt(graph, dict.fromkeys(keys, problem))
    if attempt.fused:
        return attempt.result
    if graph.metadata.fusion is not None:
        return graph
    return Graph(graph.model, replace(graph.metadata, fusion=attempt.left))


def explain(graph: Graph) -> tuple[FusionGroup, ...]:
    """What `fuse` would do, without building or checking the result."""
    return tuple(group for _, group in _round(_open(graph), {}, []))


def _open(graph: Graph) -> gs.Graph:
    """Without the nodes that no output needs, which would count as users of what they read."""
    surgeon = surgery.open_model(graph.model)
    surgery.sort(surgeon)
    return surgeon


class _Attempt:
    """One try at fusing all groups but the refused ones."""

    def __init__(self, graph: Graph, refused: Mapping[Key, Reason]) -> None:
        self.source = graph
        self.fused: dict[Key, FusionGroup] = {}
        self.left: tuple[FusionGroup, ...] = ()
        surgeon = _open(graph)
        deferred: list[surgery.Deferred] = []
        for index in range(_ROUNDS):
            found = _round(surgeon, refused, deferred)
            fused = {key: group for key, group in found if group.fused}
            self.fused |= fused
            if not index:  # later rounds see our own nodes, whose reasons mean nothing to anybody
                self.left = tuple(group for _, group in found if not group.fused)
            if not fused:
                break
        if self.fused:
            earlier = tuple(group for group in graph.fusion if group.fused)
            model = surgery.close_model(surgeon, like=graph.model, deferred=deferred)
            groups = (*earlier, *self.fused.values(), *self.left)
            self.result = graph.derive(model, "fuse", fusion=groups)

    def problem(self) -> Reason | None:
        """Why the result cannot stand for its source, or None."""
        source = self.source
        feeds = equivalence.random_inputs(source.inputs)
        try:
            expected = evaluate(source.model, feeds)
        except HydraError as exc:
            return f"the source does not run on random inputs: {exc.why}", "not-checked"
        try:
            name, error = equivalence.worst_difference(
                self.result.model, expected, feeds, source.metadata.logits
            )
        except HydraError as exc:
            return f"fused, it does not run: {exc.why} Please report the graph", "not-equal"
        limit = equivalence.tolerance_of(source.model)
        if error <= limit:
            return None
        return (
            f"fused, it differs by {error:.2g} (relative RMS) on '{name}'; up to {limit:g} is "
            "rounding. Please report the graph",
            "not-equal",
        )


def _round(
    surgeon: gs.Graph, refused: Mapping[Key, Reason], deferred: list[surgery.Deferred]
) -> list[tuple[Key, FusionGroup]]:
    """Fuse what can be; inner joins of branches that were fused are gone and not reported."""
    groups = []
    consumed: set[int] = set()
    for candidate in branches.find(surgeon):
        key = tuple(str(tensor.name) for tensor in candidate.join.tensors)
        nodes = {id(node) for step in candidate.steps for node in step.nodes}
        ends = {id(node) for tensor in candidate.join.tensors for node in tensor.inputs}
        if (nodes | ends) & consumed:
            continue
        if key in refused and not candidate.problem:
            problem, code = refused[key]
            candidate = replace(candidate, problem=problem, code=code)
        group = _fuse_one(surgeon, candidate, deferred)
        if group.fused:
            consumed |= nodes | {id(node) for node in candidate.join.nodes}
        elif not candidate.join.is_worth_a_reason and not candidate.problem:
            continue
        groups.append((key, group))
    surgery.sort(surgeon)
    return groups[::-1]


def _fuse_one(
    surgeon: gs.Graph, candidate: Branches, deferred: list[surgery.Deferred]
) -> FusionGroup:
    problem, code = candidate.problem, candidate.code
    if not problem:
        prefix = surgery.fresh_name(surgeon, "hydra")
        stacker = Stacker(candidate, prefix, RULES, int(surgeon.opset))
        try:
            _replace(surgeon, candidate, stacker, _join(candidate, stacker, stacker.result()))
        except UnsupportedError as exc:
            stacker.discard()
            problem, code = str(exc), exc.code
        else:
            deferred.extend(stacker.deferred)
    flops, weight_bytes = _cost(candidate)
    return FusionGroup(
        source=candidate.source(),
        heads=candidate.heads,
        ops=tuple(step.op for step in candidate.steps),
        fused=not problem,
        reason=problem,
        code=code,
        join=candidate.join.kind.lower(),
        members=candidate.join.indices,
        flops_per_sample=flops,
        weight_bytes=weight_bytes,
    )


def _cost(candidate: Branches) -> tuple[int, int]:
    """FLOPs at batch 1, other unknown sizes counting 1, and the bytes of the stored weights."""
    flops = 0
    stored: dict[int, gs.Constant] = {}
    for step in candidate.steps:
        for value in step.inputs:
            if isinstance(value, Weights):
                stored |= {id(tensor): tensor for tensor in value.tensors}
            elif isinstance(value, Shared) and isinstance(value.tensor, gs.Constant):
                stored[id(value.tensor)] = value.tensor
        if step.op in MATMULS:
            flops += 2 * candidate.heads * _multiply_adds(step)
    return flops, sum(tensor_bytes(tensor) for tensor in stored.values())


def _multiply_adds(step: Step) -> int:
    def sizes(tensor: gs.Tensor) -> list[int]:
        return [size if isinstance(size, int) else 1 for size in tensor.shape or ()]

    output, weight = sizes(step.output), sizes(step.nodes[0].inputs[1])
    if step.op in ("Conv", "ConvTranspose"):
        spread = output if step.op == "Conv" else sizes(step.nodes[0].inputs[0])
        return math.prod(spread) * math.prod(weight[1:])
    if step.op == "Einsum" or len(weight) < 2:
        return math.prod(output)
    return math.prod(output) * weight[-1 if step.attrs.get("transB", 0) else -2]


def tensor_bytes(tensor: gs.Constant) -> int:
    """Bytes of a constant; types that numpy lacks have one or two."""
    dtype = tensor.dtype
    itemsize = 2 if isinstance(dtype, int) else np.dtype(dtype).itemsize
    return int(math.prod(tensor.shape)) * itemsize


def _join(candidate: Branches, stacker: Stacker, value: Emitted) -> list[gs.Tensor]:
    """What replaces the results of the join, made from the value of all branches."""
    join, heads = candidate.join, stacker.heads_count
    if join.kind == "tensors":
        return _apart(candidate, stacker, value)
    result = join.results[0]
    axis = join.axis % (value.rank + (join.kind == "stack"))
    if join.is_reduction:
        x = stacker.heads(value, always=True)
        axes = stacker.constant(np.asarray([0], np.int64))
        op = joins.REDUCTIONS[join.kind]
        y = stacker.node(op, [x.tensor, axes], result.dtype, value.shape, keepdims=0)
        if join.rest:
            op = "Add" if join.kind == "Sum" else join.kind
            for other in join.rest:
                y = stacker.node(op, [y, other], result.dtype, result.shape)
        return [y]
    if join.kind == "concat" and axis == 1 and value.layout == CHANNELS:
        return [value.tensor]
    x = stacker.heads(value, always=True).tensor
    if axis:
        order = [*range(1, axis + 1), 0, *range(axis + 1, value.rank + 1)]
        x = stacker.transpose(x, order)
    if join.kind == "concat":
        width = value.shape[axis]
        dims: list[int | Size] = [Size(x, index) for index in range(axis)]
        dims.append(heads * width if isinstance(width, int) else -1)
        dims += [Size(x, index + 1) for index in range(axis + 1, value.rank)]
        x = stacker.reshape(x, dims)
    if not x.inputs or x.inputs[0] not in stacker.nodes:
        x = stacker.node("Identity", [x], result.dtype, result.shape)
    return [x]


def _apart(candidate: Branches, stacker: Stacker, value: Emitted) -> list[gs.Tensor]:
    """Every branch's value as a tensor of its own."""
    results = candidate.join.results
    x = stacker.heads(value, always=True).tensor
    return [
        stacker.node(
            "Gather",
            [x, stacker.constant(np.asarray(head, np.int64))],
            tensor.dtype,
            tensor.shape,
            axis=0,
        )
        for head, tensor in enumerate(results)
    ]


def _replace(
    surgeon: gs.Graph, candidate: Branches, stacker: Stacker, results: list[gs.Tensor]
) -> None:
    """Put the emitted nodes into the graph and let them write the tensors the join wrote."""
    surgeon.nodes.extend(stacker.nodes)
    for old, new in zip(candidate.join.results, results, strict=True):
        old.inputs.clear()
        producer = new.inputs[0]
        readers = [node for node in new.outputs if node is not producer]
        producer.outputs[producer.outputs.index(new)] = old
        for reader in readers:
            reader.inputs = [old if tensor is new else tensor for tensor in reader.inputs]
