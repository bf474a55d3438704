"""Finds M isomorphic branches that leave one tensor and meet again: heads, by structure alone.

The M tensors that meet are walked backwards in lockstep. Where all M are one tensor, the branches
leave it; where all M are constants of one shape, they are weights; where all M come from nodes that
agree in operator and attributes, the walk goes on through their inputs. Anything else ends it with
a reason. The result is one tree for all M branches, found in time linear in M.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from hydra_edge import ops

MATMULS = ("Gemm", "MatMul", "Conv")


@dataclass(frozen=True, eq=False)
class Shared:
    """One tensor that all branches read."""

    tensor: gs.Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """M constants of equal shape and type, one per branch."""

    tensors: tuple[gs.Constant, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """M nodes of the same operator and attributes; an absent optional input is None."""

    nodes: tuple[gs.Node, ...]
    inputs: tuple[Shared | Weights | Step | None, ...]
    output: gs.Tensor

    @property
    def op(self) -> str:
        """The operator."""
        return str(self.nodes[0].op)


Value = Shared | Weights | Step


@dataclass(frozen=True, eq=False)
class Join:
    """Where the branches meet.

    Attributes:
        kind: ``"stack"`` (Unsqueeze + Concat), ``"concat"``, or ``"outputs"`` (M graph outputs).
        axis: The axis of the result along which the branches lie; 0 for ``"outputs"``.
        tensors: The M tensors that meet.
        nodes: The nodes that join them.
        results: What leaves the join: one tensor, or the M outputs.
    """

    kind: str
    axis: int
    tensors: tuple[gs.Tensor, ...]
    nodes: tuple[gs.Node, ...]
    results: tuple[gs.Tensor, ...]


@dataclass(frozen=True, eq=False)
class Branches:
    """One candidate: a join and the common tree of its branches.

    Attributes:
        join: Where they meet.
        value: The root of the tree, or None when the branches differ.
        steps: All steps of the tree in topological order.
        problem: Why the branches cannot be treated as one; empty when they can.
    """

    join: Join
    value: Step | None
    steps: tuple[Step, ...] = ()
    problem: str = ""

    @property
    def heads(self) -> int:
        """M."""
        return len(self.join.tensors)

    def source(self) -> str:
        """Name of the tensor the branches leave; the first if there are several."""
        for step in self.steps:
            for child in step.inputs:
                if isinstance(child, Shared) and not isinstance(child.tensor, gs.Constant):
                    return str(child.tensor.name)
        return ""


class _MismatchError(Exception):
    pass


def find(graph: gs.Graph) -> list[Branches]:
    """All candidates in ``graph``, in topological order of their joins.

    Joins of constants, of shape arithmetic and of single branches are no candidates.
    """
    return [branches for join in _joins(graph) if (branches := _examine(graph, join)) is not None]


def _examine(graph: gs.Graph, join: Join) -> Branches | None:
    try:
        value, steps = _align(join.tensors)
    except _MismatchError as exc:
        return Branches(join, None, problem=str(exc))
    if not isinstance(value, Step) or not any(step.op in MATMULS for step in steps):
        return None
    branches = Branches(join, value, steps)
    return Branches(join, value, steps, _escape(graph, branches))


def _joins(graph: gs.Graph) -> Iterator[Join]:
    for node in graph.nodes:
        if node.op == "Concat" and len(node.inputs) > 1:
            join = _stack(node) or Join(
                "concat", int(node.attrs["axis"]), tuple(node.inputs), (node,), (node.outputs[0],)
            )
            if all(is_computed(tensor) for tensor in join.tensors):
                yield join
    alike: dict[tuple[object, ...], list[gs.Tensor]] = {}
    for tensor in graph.outputs:
        if is_computed(tensor) and tensor.inputs[0].domain != ops.DOMAIN:
            key = (tensor.inputs[0].op, str(tensor.dtype), str(tensor.shape))
            alike.setdefault(key, []).append(tensor)
    for tensors in alike.values():
        if len(tensors) > 1:
            yield Join("outputs", 0, tuple(tensors), (), tuple(tensors))


def _stack(concat: gs.Node) -> Join | None:
    """The join when every input of ``concat`` is an Unsqueeze along the concatenated axis."""
    parts = [tensor.inputs[0] for tensor in concat.inputs if tensor.inputs]
    if len(parts) != len(concat.inputs) or any(part.op != "Unsqueeze" for part in parts):
        return None
    axis = int(concat.attrs["axis"])
    for part in parts:
        axes = part.inputs[1] if len(part.inputs) > 1 else None
        if not isinstance(axes, gs.Constant) or len(part.outputs[0].outputs) != 1:
            return None
        if [int(a) for a in np.atleast_1d(axes.values)] != [axis]:
            return None
    tensors = tuple(part.inputs[0] for part in parts)
    return Join("stack", axis, tensors, (*parts, concat), (concat.outputs[0],))


def is_computed(tensor: gs.Tensor) -> bool:
    """Whether a node computes ``tensor`` and it is not shape arithmetic."""
    if isinstance(tensor, gs.Constant) or not tensor.inputs:
        return False
    return tensor.dtype is None or not np.issubdtype(np.dtype(tensor.dtype), np.integer)


def _align(root: tuple[gs.Tensor, ...]) -> tuple[Value, tuple[Step, ...]]:
    """Walk backwards from ``root`` in lockstep; depth first, without recursion (models are deep).

    Returns:
        The value of ``root`` and all steps, in topological order.
    """
    seen: dict[tuple[int, ...], Value] = {}
    steps: list[Step] = []
    pending = [root]
    while pending:
        tensors = pending[-1]
        key = tuple(map(id, tensors))
        if key in seen:
            pending.pop()
            continue
        leaf = _leaf(tensors)
        if leaf is not None:
            seen[key] = leaf
            continue
        nodes = _matching_nodes(tensors)
        groups = _matching_inputs(nodes)
        missing = [group for group in groups if group and tuple(map(id, group)) not in seen]
        if missing:
            pending.extend(reversed(missing))
            continue
        inputs = tuple(seen[tuple(map(id, group))] if group else None for group in groups)
        step = Step(nodes, inputs, tensors[0])
        seen[key] = step
        steps.append(step)
    return seen[tuple(map(id, root))], tuple(steps)


def _leaf(tensors: tuple[gs.Tensor, ...]) -> Shared | Weights | None:
    first = tensors[0]
    if all(tensor is first for tensor in tensors):
        return Shared(first)
    if any(isinstance(tensor, gs.Constant) for tensor in tensors):
        return _align_constants(tensors)
    return None


def _matching_nodes(tensors: tuple[gs.Tensor, ...]) -> tuple[gs.Node, ...]:
    """The nodes that compute ``tensors``, all of one operator with the same attributes."""
    for index, tensor in enumerate(tensors):
        if not tensor.inputs:
            raise _MismatchError(f"branch {index} starts at the graph input '{tensor.name}'")
    nodes = tuple(tensor.inputs[0] for tensor in tensors)
    lead = nodes[0]
    for index, (node, tensor) in enumerate(zip(nodes, tensors, strict=True)):
        if (node.op, node.domain) != (lead.op, lead.domain):
            raise _MismatchError(f"branch {index} has {node.op} where branch 0 has {lead.op}")
        if not _same_attributes(node, lead):
            raise _MismatchError(
                f"branch {index} has a {node.op} with other attributes than branch 0"
            )
        if len(node.inputs) != len(lead.inputs):
            raise _MismatchError(f"branch {index} has a {node.op} with other inputs than branch 0")
        if _position(node, tensor) != _position(lead, tensors[0]):
            raise _MismatchError(f"branch {index} uses another output of {node.op} than branch 0")
    if len({id(node) for node in nodes}) < len(nodes):
        raise _MismatchError(f"two branches share one {lead.op}")
    return nodes


def _matching_inputs(nodes: tuple[gs.Node, ...]) -> list[tuple[gs.Tensor, ...]]:
    """Input by input, the M tensors the nodes read; an empty tuple where all leave it out."""
    groups = []
    for position in range(len(nodes[0].inputs)):
        group = tuple(node.inputs[position] for node in nodes)
        absent = [tensor.is_empty() for tensor in group]
        if any(absent) and not all(absent):
            raise _MismatchError(f"some branches leave out input {position} of {nodes[0].op}")
        groups.append(() if all(absent) else group)
    return groups


def _align_constants(tensors: tuple[gs.Tensor, ...]) -> Weights:
    constants = []
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, gs.Constant):
            raise _MismatchError(
                f"branch {index} computes a value that is a constant in another branch"
            )
        if tuple(tensor.shape) != tuple(tensors[0].shape) or tensor.dtype != tensors[0].dtype:
            raise _MismatchError(
                f"branch {index} has a weight {list(tensor.shape)} {tensor.dtype} where branch 0 "
                f"has {list(tensors[0].shape)} {tensors[0].dtype}"
            )
        constants.append(tensor)
    return Weights(tuple(constants))


def _same_attributes(node: gs.Node, lead: gs.Node) -> bool:
    if set(node.attrs) != set(lead.attrs):
        return False
    return all(
        not isinstance(value, gs.Graph) and np.array_equal(value, node.attrs[name])
        for name, value in lead.attrs.items()
    )


def _position(node: gs.Node, tensor: gs.Tensor) -> int:
    return next(index for index, output in enumerate(node.outputs) if output is tensor)


def _escape(graph: gs.Graph, branches: Branches) -> str:
    """Why an inner value is needed outside the branches, or an empty string."""
    steps = branches.steps
    inside = {id(node) for step in steps for node in step.nodes}
    inside |= {id(node) for node in branches.join.nodes}
    results = {id(tensor) for tensor in branches.join.results}
    outputs = {id(tensor) for tensor in graph.outputs}
    for step in steps:
        for index, node in enumerate(step.nodes):
            for tensor in node.outputs:
                if id(tensor) in results:
                    continue
                outside = [user for user in tensor.outputs if id(user) not in inside]
                if outside or id(tensor) in outputs:
                    where = f"by {outside[0].op}" if outside else "as a graph output"
                    return f"the {node.op} of branch {index} is also used {where}"
    return ""
