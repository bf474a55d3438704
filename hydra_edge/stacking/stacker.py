"""`Stacker`: emits one node for the M equal nodes of every step, for all branches at once.

A value of the branches is emitted in one of three layouts:

    shared    [B, ...]       all branches have the same value: it is computed once
    heads     [M, B, ...]    a new leading axis M
    channels  [B, M·C, ...]  head m holds channels m·C to (m+1)·C, which is how grouped convolutions
                             want them; axes behind the channels are the spatial ones

Rules ask for the layout they can work with; changing it is a Reshape and a Transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from hydra_edge import ops, surgery, weightless
from hydra_edge.branches import OPERATOR, UNKNOWN, Branches, Shared, Step, Value, Weights
from hydra_edge.folding import evaluate, is_plain

Array = npt.NDArray[np.generic]
Attribute = int | float | str | list[int]
Sizes = tuple[int | str | None, ...]
SHARED, HEADS, CHANNELS = "shared", "heads", "channels"
_LAZY = ("MatMul", "QuantizeLinear", "DequantizeLinear")  # what later rules usually absorb


class UnsupportedError(Exception):
    """Why a set of branches is left alone. Never leaves the fusion pass."""

    def __init__(self, problem: str, code: str = OPERATOR) -> None:
        super().__init__(problem)
        self.code = code


@dataclass(frozen=True, eq=False)
class Emitted:
    """A tensor of the stacked graph; ``shape`` is that of one branch."""

    tensor: gs.Tensor
    shape: Sizes
    layout: str

    @property
    def rank(self) -> int:
        """Number of axes in one branch."""
        return len(self.shape)

    @property
    def is_stacked(self) -> bool:
        """Whether it differs between branches."""
        return self.layout != SHARED


@dataclass(frozen=True)
class Size:
    """The size of one axis of a tensor, for `Stacker.reshape`."""

    tensor: gs.Tensor
    axis: int


Rule = Callable[["Stacker", Step], Emitted]


class Stacker:
    """Emits the stacked form of one candidate; the nodes enter the graph when all went well."""

    def __init__(self, candidate: Branches, prefix: str, rules: Mapping[str, Rule], opset: int):
        self.candidate = candidate
        self.heads_count = candidate.heads
        self.opset = opset
        self.nodes: list[gs.Node] = []
        self.deferred: list[surgery.Deferred] = []  # the weights of those nodes
        self._rules = rules
        self._prefix = prefix
        self._names = 0
        self._done: dict[int, Emitted | UnsupportedError] = {}
        self._leaves: dict[int, Emitted] = {}
        self._alike: dict[int, bool] = {}
        self._outputs: dict[tuple[int, ...], list[gs.Variable]] = {}
        self._as_heads: dict[int, Emitted] = {}
        self._as_channels: dict[int, Emitted] = {}

    def result(self) -> Emitted:
        """Emit all steps and return the value that meets at the join.

        Raises:
            UnsupportedError: Some operator of the branches has no stacked form here.
        """
        for step in self.candidate.steps:
            if step.op not in _LAZY and not is_constant(step):
                self._emit_step(step)
        assert self.candidate.value is not None
        return self.emitted(self.candidate.value)

    def discard(self) -> None:
        """Take everything back: the nodes read tensors of the graph from their first moment on."""
        for node in self.nodes:
            node.inputs.clear()
            node.outputs.clear()

    def _emit_step(self, step: Step) -> Emitted | UnsupportedError:
        """What a rule emits, or why it cannot, which matters only if a later rule reads it."""
        if id(step) not in self._done:
            try:
                self._done[id(step)] = self._apply(step)
            except UnsupportedError as exc:
                self._done[id(step)] = exc
        return self._done[id(step)]

    def _apply(self, step: Step) -> Emitted:
        if not is_plain(step.nodes[0]):
            raise UnsupportedError(f"{step.op} has no stacked form")
        if not any(map(self._differs, step.inputs)):
            return self._once(step)
        rule = self._rules.get(step.op)
        if rule is None:
            raise UnsupportedError(f"{step.op} has no stacked form")
        return rule(self, step)

    def _differs(self, value: Value | None) -> bool:
        """Whether an operand differs between branches; weights are compared, not stacked."""
        if value is None or isinstance(value, Shared):
            return False
        if isinstance(value, Step):
            if is_constant(value):
                return any(map(self._differs, value.inputs))
            return self.emitted(value).is_stacked
        if id(value) not in self._alike:
            first = np.asarray(value.tensors[0].values)
            self._alike[id(value)] = all(
                np.array_equal(np.asarray(tensor.values), first) for tensor in value.tensors[1:]
            )
        return not self._alike[id(value)]

    def _once(self, step: Step) -> Emitted:
        """All branches compute the same from what they share."""
        inputs = [
            gs.Variable.empty() if value is None else self.emitted(value).tensor
            for value in step.inputs
        ]
        return self.emit(step.op, inputs, step, SHARED, **attributes(step))

    # what rules read

    def emitted(self, value: Value | None) -> Emitted:
        """The stacked form of an operand."""
        if isinstance(value, Step):
            done = self._emit_step(value)
            if isinstance(done, UnsupportedError):
                raise done
            return done
        assert value is not None
        if id(value) not in self._leaves:
            self._leaves[id(value)] = self._leaf(value)
        return self._leaves[id(value)]

    def _leaf(self, value: Shared | Weights) -> Emitted:
        if isinstance(value, Shared):
            tensor = value.tensor
            if isinstance(tensor, gs.Constant) and not tensor.outputs:  # folded: not in the graph
                tensor = self.constant(tensor.values)
            return Emitted(tensor, shape_of(tensor), SHARED)
        if self._differs(value):
            rows = self.arrays(value)
            return Emitted(self.constant(rows), rows.shape[1:], HEADS)
        first = np.asarray(value.tensors[0].values)
        return Emitted(self.constant(first), first.shape, SHARED)

    def arrays(self, value: Value | None, *, swapped: bool = False) -> Array:
        """The constant of every branch, ``[M, ...]``; dequantized weights as floats.

        ``swapped`` matrices are ``[M, columns, rows]``.

        Raises:
            UnsupportedError: The operand is computed from an input.
        """
        if value is None or not is_constant(value):
            raise UnsupportedError("an operand that must be constant is computed")
        if isinstance(value, Weights):
            first = surgery.read(value.tensors[0])
            shape = first.shape[::-1] if swapped else first.shape
            stacked = np.empty((len(value.tensors), *shape), first.dtype)
            for head, tensor in enumerate(value.tensors):
                array = surgery.read(tensor)
                stacked[head] = array.T if swapped else array
            return stacked
        if swapped:
            return self.arrays(value).swapaxes(1, 2)
        if isinstance(value, Shared):
            values = np.asarray(value.tensor.values)
            return np.broadcast_to(values, (self.heads_count, *values.shape))
        operands = [None if v is None else self.arrays(v) for v in value.inputs]
        try:
            rows = [
                evaluate(node, [None if o is None else o[head] for o in operands], self.opset)
                for head, node in enumerate(value.nodes)
            ]
        except Exception as exc:  # the reference implementation raises whatever its parts raise
            raise UnsupportedError(f"the constant {value.op} cannot be computed: {exc}") from exc
        return np.stack([row[value.position] for row in rows])

    def same(self, value: Value | None, step: Step) -> gs.Tensor:
        """A parameter that is one for all branches, or left out by all of them."""
        if value is None:
            return gs.Variable.empty()
        parameter = self.emitted(value)
        if parameter.is_stacked:
            raise UnsupportedError(f"{step.op} has parameters that differ between branches")
        return parameter.tensor

    def integers(self, value: Value | None, step: Step) -> list[int]:
        """A constant list of integers that is one for all branches."""
        tensor = self.same(value, step)
        if not isinstance(tensor, gs.Constant):
            raise UnsupportedError(f"{step.op} has computed parameters")
        return [int(number) for number in np.asarray(tensor.values).reshape(-1)]

    # layouts

    def heads(self, x: Emitted, *, always: bool = False) -> Emitted:
        """``x`` in the layout "heads"; what is shared stays so unless ``always``."""
        if x.layout == HEADS or (x.layout == SHARED and not always):
            return x
        if id(x.tensor) not in self._as_heads:
            found = self._expanded(x) if x.layout == SHARED else self._from_channels(x)
            self._as_heads[id(x.tensor)] = found
            if x.layout == CHANNELS:
                self._as_channels[id(found.tensor)] = x
        return self._as_heads[id(x.tensor)]

    def _expanded(self, x: Emitted) -> Emitted:
        if isinstance(x.tensor, gs.Constant):
            values = np.broadcast_to(x.tensor.values, (self.heads_count, *x.tensor.values.shape))
            return Emitted(self.constant(values), x.shape, HEADS)
        target = self.constant(np.asarray([self.heads_count] + [1] * x.rank, np.int64))
        y = self.node("Expand", [x.tensor, target], x.tensor.dtype, [self.heads_count, *x.shape])
        return Emitted(y, x.shape, HEADS)

    def _from_channels(self, x: Emitted) -> Emitted:
        sizes = [Size(x.tensor, axis) for axis in range(2, x.rank)]
        y = self.reshape(x.tensor, [Size(x.tensor, 0), self.heads_count, channels_of(x), *sizes])
        order = [1, 0, *range(2, x.rank + 1)]
        return Emitted(self.transpose(y, order), x.shape, HEADS)

    def channels(self, x: Emitted) -> Emitted:
        """``x`` in the layout "channels"; what is shared is repeated M times."""
        if x.layout == CHANNELS:
            return x
        if x.rank < 2:
            raise UnsupportedError("channels of a tensor with less than two axes")
        if id(x.tensor) not in self._as_channels:
            if x.layout == SHARED:
                shape = [x.shape[0], self.heads_count * channels_of(x), *x.shape[2:]]
                copies = [x.tensor] * self.heads_count
                y: gs.Tensor = self.node("Concat", copies, x.tensor.dtype, shape, axis=1)
            else:
                y = self.transpose(x.tensor, [1, 0, *range(2, x.rank + 1)])
                sizes = [Size(y, axis + 1) for axis in range(2, x.rank)]
                y = self.reshape(y, [Size(y, 0), self.heads_count * channels_of(x), *sizes])
            found = Emitted(y, x.shape, CHANNELS)
            self._as_channels[id(x.tensor)] = found
            if x.layout == HEADS:
                self._as_heads[id(y)] = x
        return self._as_channels[id(x.tensor)]

    def aligned(self, x: Emitted, rank: int) -> gs.Tensor:
        """``x`` so that it broadcasts against tensors of ``rank`` + 1 axes in layout "heads"."""
        x = self.heads(x)
        if not x.is_stacked or x.rank == rank:
            return x.tensor
        if isinstance(x.tensor, gs.Constant):
            values = x.tensor.values
            padding = (1,) * (rank - x.rank)
            return self.constant(values.reshape(self.heads_count, *padding, *values.shape[1:]))
        missing = list(range(1, rank - x.rank + 1))
        shape = [self.heads_count, *[1] * len(missing), *x.shape]
        axes = self.constant(np.asarray(missing, np.int64))
        return self.node("Unsqueeze", [x.tensor, axes], x.tensor.dtype, shape)

    # what rules write

    def emit(
        self, op: str, inputs: Sequence[gs.Tensor], step: Step, layout: str, **attrs: Attribute
    ) -> Emitted:
        """A new node that does for all branches what ``step`` does for one."""
        shape = shape_of(step.output)
        count = len(step.nodes[0].outputs)
        if count == 1 or op != step.op:
            tensor = self.node(
                op, inputs, step.output.dtype, self.stacked_shape(shape, layout), **attrs
            )
            return Emitted(tensor, shape, layout)
        key = tuple(map(id, step.nodes))
        if key not in self._outputs:
            self._outputs[key] = [
                gs.Variable.empty()
                if o.is_empty()
                else gs.Variable(self._name(op), o.dtype, self.stacked_shape(shape_of(o), layout))
                for o in step.nodes[0].outputs
            ]
            self._append(op, inputs, self._outputs[key], attrs)
        return Emitted(self._outputs[key][step.position], shape, layout)

    def node_of(
        self, step: Step, inputs: Sequence[gs.Tensor], layout: str, **changes: Attribute
    ) -> Emitted:
        """`emit` with the operator and the attributes of ``step``, but for ``changes``."""
        return self.emit(step.op, inputs, step, layout, **{**attributes(step), **changes})

    def stacked_shape(self, shape: Sizes, layout: str) -> list[int | str | None]:
        """The full shape of a tensor whose branches have ``shape``."""
        if layout == HEADS:
            return [self.heads_count, *shape]
        if layout == CHANNELS and isinstance(shape[1], int):
            return [shape[0], self.heads_count * shape[1], *shape[2:]]
        return list(shape)

    def node(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        dtype: object,
        shape: Sequence[int | str | None] | None,
        **attrs: Attribute,
    ) -> gs.Variable:
        """A new node with one output."""
        output = gs.Variable(self._name(op), dtype, None if shape is None else list(shape))
        self._append(op, inputs, [output], attrs)
        return output

    def _append(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        outputs: list[gs.Variable],
        attrs: Mapping[str, Attribute],
    ) -> None:
        domain = ops.DOMAIN if op in ops.NAMES else None
        name = f"{outputs[0].name}_node"
        self.nodes.append(gs.Node(op, name, dict(attrs), list(inputs), outputs, domain=domain))

    def reshape(self, x: gs.Tensor, dims: Sequence[int | Size]) -> gs.Variable:
        """Reshape with sizes that are read at run time only where that cannot be avoided.

        Args:
            x: Any tensor.
            dims: Sizes; an int (-1 to infer, at most once) or the size of an axis of some tensor.
        """
        found: list[int | Size] = []
        for position, dim in enumerate(dims):
            size = known(dim)
            if size is None and isinstance(dim, Size):
                kept = dim.tensor is x and dim.axis == position
                found.append(0 if kept else dim)
            else:
                assert size is not None
                found.append(size)
        open_sizes = [index for index, size in enumerate(found) if isinstance(size, Size)]
        if len(open_sizes) == 1 and -1 not in found:
            found[open_sizes[0]] = -1
            open_sizes = []
        shape = [size if isinstance(size, int) and size > 0 else None for size in map(known, dims)]
        if not open_sizes:
            target: gs.Tensor = self.constant(np.asarray(found, np.int64))
        else:
            parts = [
                self.constant(np.asarray([size], np.int64))
                if isinstance(size, int)
                else self.node("Shape", [size.tensor], np.int64, [1],
                               start=size.axis, end=size.axis + 1)
                for size in found
            ]  # fmt: skip
            target = self.node("Concat", parts, np.int64, [len(parts)], axis=0)
        return self.node("Reshape", [x, target], x.dtype, shape)

    def transpose(self, x: gs.Tensor, perm: list[int]) -> gs.Variable:
        """Transpose."""
        shape = None if x.shape is None else [x.shape[axis] for axis in perm]
        return self.node("Transpose", [x], x.dtype, shape, perm=perm)

    def constant(self, values: Array) -> gs.Constant:
        """A new constant."""
        array = np.asarray(values, order="C")
        name = self._name("weight")
        if array.nbytes <= weightless.SMALL_BYTES:
            return gs.Constant(name, array.copy())
        self.deferred.append(surgery.Deferred(name, array))
        return gs.Constant(name, self.deferred[-1])

    def _name(self, stem: str) -> str:
        self._names += 1
        return f"{self._prefix}/{stem}_{self._names}"


def attributes(step: Step) -> dict[str, Attribute]:
    """The attributes all nodes of a step have."""
    return dict(step.attrs)  # type: ignore[arg-type]


def shape_of(tensor: gs.Tensor) -> Sizes:
    """Shape of one branch's tensor.

    Raises:
        UnsupportedError: Not even the number of axes is known.
    """
    if tensor.shape is None:
        raise UnsupportedError(f"the shape of '{tensor.name}' is unknown", UNKNOWN)
    return tuple(tensor.shape)


def channels_of(x: Emitted) -> int:
    """C of one branch."""
    size = x.shape[1]
    if not isinstance(size, int):
        raise UnsupportedError(f"the channels of '{x.tensor.name}' are unknown", UNKNOWN)
    return size


def known(dim: int | Size) -> int | None:
    """The size, if it is known before the graph runs."""
    if isinstance(dim, int):
        return dim
    shape = dim.tensor.shape
    size = None if shape is None else shape[dim.axis]
    return size if isinstance(size, int) else None


def is_constant(value: Value | None) -> bool:
    """Whether an operand is the same for every input of the graph, in every branch."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Shared):
            if not isinstance(item.tensor, gs.Constant):
                return False
        elif isinstance(item, Step):
            if not item.inputs:
                return False
            pending.extend(item.inputs)
    return True
