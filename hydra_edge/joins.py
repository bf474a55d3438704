"""Where parallel branches may meet: Concat, Sum and Mean nodes, chains of Add, graph outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from hydra_edge import ops

REDUCTIONS = {"Sum": "ReduceSum", "Mean": "ReduceMean", "Max": "ReduceMax", "Min": "ReduceMin"}


@dataclass(frozen=True, eq=False)
class Join:
    """Where branches meet.

    Attributes:
        kind: ``"stack"`` (Unsqueeze + Concat), ``"concat"``, a key of `REDUCTIONS`, or
            ``"tensors"`` when every branch end is needed on its own, like M graph outputs.
        axis: For stack and concat, the axis of the result along which the branches lie.
        tensors: The M tensors that meet.
        nodes: The nodes that join them, replaced together with the branches.
        results: What leaves the join: one tensor, or for ``"tensors"`` the M ends.
        rest: What else a reduction takes in.
        indices: Which of all that meet the M are, in order.
    """

    kind: str
    axis: int
    tensors: tuple[gs.Tensor, ...]
    nodes: tuple[gs.Node, ...]
    results: tuple[gs.Tensor, ...]
    rest: tuple[gs.Tensor, ...] = ()
    indices: tuple[int, ...] = ()

    @property
    def is_reduction(self) -> bool:
        """Whether the branches are added, averaged or compared; a network does that everywhere."""
        return self.kind in REDUCTIONS

    @property
    def is_worth_a_reason(self) -> bool:
        """Whether to say why branches stay apart. Every residual connection adds two."""
        return not self.is_reduction or len(self.tensors) > 2

    def part(self, indices: Sequence[int]) -> Join:
        """The join of only some of the branches; whatever joins them now stays."""
        tensors = tuple(self.tensors[index] for index in indices)
        if self.is_reduction:
            rest = [t for index, t in enumerate(self.tensors) if index not in set(indices)]
            return replace(self, tensors=tensors, rest=(*self.rest, *rest), indices=tuple(indices))
        return Join("tensors", 0, tensors, (), tensors, indices=tuple(indices))

    def apart(self) -> Join:
        """The same branches, with every end kept as a tensor of its own."""
        return Join("tensors", 0, self.tensors, (), self.tensors, indices=self.indices)


def find(graph: gs.Graph) -> Iterator[Join]:
    """All places where two or more computed tensors meet, last ones first, outputs before all.

    Outer joins come before the inner ones of their branches. Joins of constants and of shape
    arithmetic are none.
    """
    outputs = {id(tensor) for tensor in graph.outputs}
    yield from _of_outputs(graph)
    for node in reversed(graph.nodes):
        join = None
        if node.domain:
            continue
        if node.op == "Concat":
            join = _of_concat(node, outputs)
        elif node.op in REDUCTIONS:
            ends = tuple(filter(is_computed, node.inputs))
            rest = tuple(tensor for tensor in node.inputs if not is_computed(tensor))
            join = Join(node.op, 0, ends, (node,), (node.outputs[0],), rest)
        elif node.op == "Add" and not _continues(node, outputs):
            join = _of_additions(node, outputs)
        if join is not None and len(join.tensors) > 1 and all(map(is_computed, join.tensors)):
            yield replace(join, indices=tuple(range(len(join.tensors))))


def is_computed(tensor: gs.Tensor) -> bool:
    """Whether a node computes ``tensor`` and it is not shape arithmetic."""
    if isinstance(tensor, gs.Constant) or not tensor.inputs:
        return False
    # GraphSurgeon keeps types that numpy lacks, all of them floats, as ONNX's numbers.
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return True
    return not np.issubdtype(np.dtype(tensor.dtype), np.integer)


def _of_outputs(graph: gs.Graph) -> Iterator[Join]:
    alike: dict[tuple[object, ...], list[gs.Tensor]] = {}
    for tensor in graph.outputs:
        if is_computed(tensor) and tensor.inputs[0].domain != ops.DOMAIN:
            key = (tensor.inputs[0].op, str(tensor.dtype), len(tensor.shape or ()))
            alike.setdefault(key, []).append(tensor)
    for group in alike.values():
        if len(group) > 1:
            ends = tuple(group)
            yield Join("tensors", 0, ends, (), ends, indices=tuple(range(len(ends))))


def _of_concat(concat: gs.Node, outputs: set[int]) -> Join:
    """The stack that ``concat`` ends, or what it and the Concats in front of it bring together."""
    axis = int(concat.attrs["axis"])
    if stacked := _of_stack(concat, axis):
        return stacked
    nodes = [concat]
    tensors: list[gs.Tensor] = []
    pending = list(concat.inputs)
    rank = _rank(concat.outputs[0])
    while pending:
        tensor = pending.pop(0)
        inner = tensor.inputs[0] if tensor.inputs else None
        if (
            inner is not None
            and inner.op == "Concat"
            and not inner.domain
            and _same_axis(int(inner.attrs["axis"]), axis, rank)
            and _only_for(concat, tensor, outputs)
        ):
            nodes.append(inner)
            pending = [*inner.inputs, *pending]
        else:
            tensors.append(tensor)
    return Join("concat", axis, tuple(tensors), tuple(nodes), (concat.outputs[0],))


def _of_stack(concat: gs.Node, axis: int) -> Join | None:
    """The join when every input of ``concat`` is an Unsqueeze along the concatenated axis."""
    parts = [tensor.inputs[0] for tensor in concat.inputs if tensor.inputs]
    if len(parts) != len(concat.inputs) or any(part.op != "Unsqueeze" for part in parts):
        return None
    rank = _rank(concat.outputs[0])
    for part in parts:
        axes = part.inputs[1] if len(part.inputs) > 1 else None
        if not isinstance(axes, gs.Constant) or len(part.outputs[0].outputs) != 1:
            return None
        if axes.values.size != 1 or not _same_axis(int(axes.values.reshape(-1)[0]), axis, rank):
            return None
    tensors = tuple(part.inputs[0] for part in parts)
    return Join("stack", axis, tensors, (*parts, concat), (concat.outputs[0],))


def _of_additions(root: gs.Node, outputs: set[int]) -> Join:
    """All that a chain or tree of Adds sums up; an Add of a vector is a bias and ends it."""
    nodes, leaves, pending = [], [], [root]
    while pending:
        node = pending.pop()
        nodes.append(node)
        for tensor in node.inputs:
            inner = tensor.inputs[0] if tensor.inputs else None
            chained = inner is not None and inner.op == "Add" and _only_for(node, tensor, outputs)
            if chained and not _adds_bias(inner):
                pending.append(inner)
            else:
                leaves.append(tensor)
    ends = tuple(filter(is_computed, leaves))
    rest = tuple(tensor for tensor in leaves if not is_computed(tensor))
    return Join("Sum", 0, ends, tuple(nodes), (root.outputs[0],), rest)


def _continues(add: gs.Node, outputs: set[int]) -> bool:
    """Whether ``add`` only feeds another Add, whose join it then belongs to."""
    tensor = add.outputs[0]
    users = tensor.outputs
    return (
        len(users) == 1
        and users[0].op == "Add"
        and id(tensor) not in outputs
        and not _adds_bias(add)
    )


def _adds_bias(add: gs.Node) -> bool:
    return any(isinstance(t, gs.Constant) and np.prod(t.shape) > 1 for t in add.inputs)


def _only_for(reader: gs.Node, tensor: gs.Tensor, outputs: set[int]) -> bool:
    """Whether nothing but ``reader`` or its like reads ``tensor``, and that once."""
    return len(tensor.outputs) == 1 and id(tensor) not in outputs


def _same_axis(a: int, b: int, rank: int | None) -> bool:
    return a == b or (rank is not None and a % rank == b % rank)


def _rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)
