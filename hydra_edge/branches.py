"""Finds M isomorphic branches that leave one tensor and meet again: heads, by structure alone.

The M tensors that meet are walked backwards in lockstep. Where all M are one tensor, the branches
leave it; where all M are constants of one shape, they are weights; where all M come from nodes that
agree in operator and attributes, the walk goes on through their inputs. Anything else ends it with
a reason. The result is one tree for all M branches, found in time linear in M. Branches of several
structures that meet in one place are told apart first, so that equal ones still find each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from hydra_edge import joins
from hydra_edge.folding import Folder
from hydra_edge.joins import Join

MATMULS = ("Gemm", "MatMul", "Conv", "ConvTranspose", "Einsum")

# Why branches are left alone, for programs; a sentence for people stands beside it.
STRUCTURE, SHAPES, USED, OPERATOR, CONTROL_FLOW, UNKNOWN = (
    "different-structure",
    "different-shapes",
    "used-elsewhere",
    "no-stacked-form",
    "control-flow",
    "unknown-shape",
)


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
    """M nodes of the same operator and attributes; an absent optional input is None.

    ``output`` is what branch 0 reads of its node, and ``position`` which of the node's outputs.
    """

    nodes: tuple[gs.Node, ...]
    inputs: tuple[Shared | Weights | Step | None, ...]
    output: gs.Tensor
    position: int = 0

    @property
    def op(self) -> str:
        """The operator."""
        return str(self.nodes[0].op)

    @property
    def attrs(self) -> Mapping[str, object]:
        """The attributes all nodes have."""
        attrs: Mapping[str, object] = self.nodes[0].attrs
        return attrs


Value = Shared | Weights | Step


@dataclass(frozen=True, eq=False)
class Branches:
    """One candidate: a join and the common tree of its branches.

    Attributes:
        join: Where they meet.
        value: The root of the tree, or None when the branches differ.
        steps: All steps of the tree in topological order.
        problem: Why the branches cannot be treated as one; empty when they can.
        code: The same for programs.
    """

    join: Join
    value: Step | None
    steps: tuple[Step, ...] = ()
    problem: str = ""
    code: str = ""

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
    def __init__(self, problem: str, code: str = STRUCTURE) -> None:
        super().__init__(problem)
        self.code = code


def find(graph: gs.Graph) -> list[Branches]:
    """All candidates in ``graph``: outer ones before those inside them, otherwise last ones first.

    Joins of constants, of shape arithmetic and of single branches are no candidates.
    """
    folder = Folder(graph)
    kinds = _structures(graph, folder)
    return [
        branches
        for join in joins.find(graph)
        for branches in _candidates(graph, join, folder, kinds)
    ]


def _candidates(
    graph: gs.Graph, join: Join, folder: Folder, kinds: Mapping[int, int]
) -> Iterator[Branches]:
    """The groups of equal branches in a join, and what is left over, with the reason."""
    groups: dict[int, list[int]] = {}
    for index, tensor in enumerate(join.tensors):
        groups.setdefault(kinds[id(tensor)], []).append(index)
    sizes = [len(group) for group in groups.values()]
    if join.is_reduction:
        largest = max(groups.values(), key=len)
        rest = len(largest) < len(join.tensors) or join.rest
        if len(largest) > 1 and not (join.kind == "Mean" and rest):
            found = _examine(graph, join.part(largest), folder)
            if found is not None and (join.is_worth_a_reason or not found.problem):
                yield found
        return
    if len(groups) == 1 or max(sizes) == 1:
        found = _examine(graph, join, folder)
        yield from (found,) if found is not None else ()
        return
    for group in groups.values():
        if len(group) > 1 and (found := _examine(graph, join.part(group), folder)) is not None:
            yield found
    left = join.part([index for group in groups.values() if len(group) == 1 for index in group])
    if left.tensors:
        problem, code = _difference(join, folder)
        yield Branches(left, None, problem=problem, code=code)


def _difference(join: Join, folder: Folder) -> tuple[str, str]:
    try:
        _align(join.tensors, folder)
    except _MismatchError as exc:
        return str(exc), exc.code
    return "the branches differ in what they share", STRUCTURE  # pragma: no cover


def _examine(graph: gs.Graph, join: Join, folder: Folder) -> Branches | None:
    try:
        value, steps = _align(join.tensors, folder)
    except _MismatchError as exc:
        return Branches(join, None, problem=str(exc), code=exc.code)
    if not isinstance(value, Step) or not any(step.op in MATMULS for step in steps):
        return None
    branches = Branches(join, value, steps)
    problem = _escape(graph, branches, folder)
    if problem and join.kind != "tensors":
        apart = Branches(join.apart(), value, steps)
        if not _escape(graph, apart, folder):
            return apart
    return Branches(join, value, steps, problem, USED if problem else "")


def _structures(graph: gs.Graph, folder: Folder) -> dict[int, int]:
    """A number for every computed tensor; equal numbers mean equal structure down to the inputs."""
    numbers: dict[tuple[object, ...], int] = {}
    found: dict[int, int] = {}

    def number(*key: object) -> int:
        return numbers.setdefault(key, len(numbers))

    def of(tensor: gs.Tensor) -> int:
        constant = folder.constant(tensor)
        if constant is not None:
            return number("constant", str(constant.dtype), tuple(constant.shape))
        return found[id(tensor)] if id(tensor) in found else number("tensor", id(tensor))

    for node in graph.nodes:
        inputs = tuple(None if tensor.is_empty() else of(tensor) for tensor in node.inputs)
        attrs = tuple(sorted((name, _text(value)) for name, value in node.attrs.items()))
        kind = (node.op, node.domain, attrs, inputs)
        for position, tensor in enumerate(node.outputs):
            found[id(tensor)] = number(*kind, position)
    return found


def _text(value: object) -> str:
    """An attribute as text that is equal for equal attributes; graphs equal only themselves."""
    if isinstance(value, gs.Constant):
        return f"{value.dtype} {value.shape} {np.asarray(value.values).tobytes().hex()}"
    return f"{type(value).__name__} {id(value) if isinstance(value, gs.Graph) else value!r}"


def _align(root: tuple[gs.Tensor, ...], folder: Folder) -> tuple[Value, tuple[Step, ...]]:
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
        leaf = _leaf(tensors, folder)
        if leaf is not None:
            seen[key] = leaf
            continue
        nodes = _matching_nodes(tensors, folder)
        groups = _matching_inputs(nodes)
        missing = [group for group in groups if group and tuple(map(id, group)) not in seen]
        if missing:
            pending.extend(reversed(missing))
            continue
        inputs = tuple(seen[tuple(map(id, group))] if group else None for group in groups)
        step = Step(nodes, inputs, tensors[0], _position(nodes[0], tensors[0]))
        seen[key] = step
        steps.append(step)
    return seen[tuple(map(id, root))], tuple(steps)


def _leaf(tensors: tuple[gs.Tensor, ...], folder: Folder) -> Shared | Weights | None:
    first = tensors[0]
    if all(tensor is first for tensor in tensors):
        constant = folder.constant(first)
        if constant is not None:
            return Shared(constant)
        return None if folder.is_derived(first) else Shared(first)
    constants = [folder.constant(tensor) for tensor in tensors]
    return None if all(c is None for c in constants) else _align_constants(constants)


def _matching_nodes(tensors: tuple[gs.Tensor, ...], folder: Folder) -> tuple[gs.Node, ...]:
    """The nodes that compute ``tensors``, all of one operator with the same attributes."""
    for index, tensor in enumerate(tensors):
        if not tensor.inputs:
            raise _MismatchError(f"branch {index} starts at the graph input '{tensor.name}'")
        if any(isinstance(value, gs.Graph) for value in tensor.inputs[0].attrs.values()):
            raise _MismatchError(
                f"branch {index} holds the control flow operator {tensor.inputs[0].op}",
                CONTROL_FLOW,
            )
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
    # One dequantized weight may serve several branches.
    shared = len({id(node) for node in nodes}) < len(nodes)
    if shared and not all(folder.is_derived(tensor) for tensor in tensors):
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


def _align_constants(found: list[gs.Constant | None]) -> Weights:
    constants = []
    first = next(constant for constant in found if constant is not None)
    for index, tensor in enumerate(found):
        if tensor is None:
            raise _MismatchError(
                f"branch {index} computes a value that is a constant in another branch"
            )
        if tuple(tensor.shape) != tuple(first.shape) or tensor.dtype != first.dtype:
            raise _MismatchError(
                f"branch {index} has a weight {list(tensor.shape)} {tensor.dtype} where branch 0 "
                f"has {list(first.shape)} {first.dtype}",
                SHAPES,
            )
        constants.append(tensor)
    return Weights(tuple(constants))


def _same_attributes(node: gs.Node, lead: gs.Node) -> bool:
    if set(node.attrs) != set(lead.attrs):
        return False
    return all(
        value is node.attrs[name] or _text(value) == _text(node.attrs[name])
        for name, value in lead.attrs.items()
    )


def _position(node: gs.Node, tensor: gs.Tensor) -> int:
    return next(index for index, output in enumerate(node.outputs) if output is tensor)


def _picks_its_part(step: Step) -> bool:
    """Whether a branch begins here, with its part of a shared tensor: others may read that, too."""
    return step.op == "Gather" and not any(isinstance(value, Step) for value in step.inputs)


def _escape(graph: gs.Graph, branches: Branches, folder: Folder) -> str:
    """Why an inner value is needed outside the branches, or an empty string."""
    steps = [
        step
        for step in branches.steps
        if not folder.is_derived(step.output) and not _picks_its_part(step)
    ]
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
