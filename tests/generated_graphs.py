"""Random graphs with parallel branches, as exporters may write them, for hypothesis.

A generated head is a list of blocks; a block maps a tensor to a tensor and draws its weights from
the net's generator, so every head gets its own. What is drawn by hypothesis is the structure, and
it shrinks; weights follow from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import Net

from hydra_edge.artifacts.graph import Graph

Draw = Callable[[st.SearchStrategy[object]], object]
Shape = tuple[int | str | None, ...]


@dataclass
class Value:
    """A tensor while a head is written: its name and the shape of one sample."""

    name: str
    shape: tuple[int, ...]  # without the batch


Write = Callable[[Value, int], Value]


@dataclass
class Case:
    """A generated graph and what is known about it.

    Attributes:
        graph: The graph.
        must_fuse: Whether all heads are alike and made of operators with a stacked form.
        tolerance: Relative error that rounding explains.
        notes: What was drawn, for statistics.
    """

    graph: Graph
    must_fuse: bool
    tolerance: float
    notes: list[str] = field(default_factory=list)


_ACTIVATIONS = (
    "Relu Tanh Sigmoid Elu Selu LeakyRelu Softplus Softsign HardSigmoid HardSwish Gelu "
    "Mish Erf Abs Neg Identity gelu_erf gelu_tanh silu clip"
)
ACTIVATIONS = _ACTIVATIONS.split()
_LINEAR = "gemm gemm_t gemm_scaled gemm_nobias gemm_row gemm_scalar matmul matmul_add add_matmul"
LINEAR = _LINEAR.split()
_WEIGHTS = "plain transpose identity cast reshape constant shared"
WEIGHTS = _WEIGHTS.split()
_VECTOR_BLOCKS = (
    "linear linear linear activation activation layer_norm batch_norm softmax residual "
    "slice concat reshape unsqueeze reduce scale split pad where shape_reshape"
)
VECTOR_BLOCKS = _VECTOR_BLOCKS.split()
_IMAGE_BLOCKS = (
    "conv conv conv activation batch_norm instance_norm depthwise max_pool average_pool "
    "residual scale prelu pad resize concat conv_transpose"
)
IMAGE_BLOCKS = _IMAGE_BLOCKS.split()
_SEQUENCE_BLOCKS = (
    "linear linear activation layer_norm attention residual transpose scale softmax concat einsum"
)
SEQUENCE_BLOCKS = _SEQUENCE_BLOCKS.split()
_JOINS = "stack concat concat_last concat_batch outputs sum mean chain permuted stack_then_summary"
JOINS = _JOINS.split()
_QUANTIZED = "none none none int8 per_tensor uint8 weight_only folded_float asymmetric"
QUANTIZED = _QUANTIZED.split()


class Writer:
    """Writes one graph."""

    def __init__(self, opset: int, seed: int, quantized: str, weights: str) -> None:
        self.net = Net(opset=opset, seed=seed)
        self.quantized = quantized
        self.weights = weights
        self.shared: dict[tuple[object, ...], str] = {}
        self.stable = True

    def op(self, kind: str, *inputs: str, **attrs: object) -> str:
        return self.net.op(kind, *inputs, **attrs)

    def ints(self, *values: int) -> str:
        return self.net.const(list(values), np.int64)

    def weight(self, where: tuple[object, ...], *shape: int, fan: int = 1) -> str:
        """A weight, written in the drawn way; ``where`` tells shared ones apart."""
        net, scale = self.net, 1 / np.sqrt(fan)
        if self.weights == "shared":
            if where not in self.shared:
                self.shared[where] = net.random(*shape, scale=scale)
            return self.shared[where]
        if self.weights == "transpose":
            return self.op("Transpose", net.random(*shape[::-1], scale=scale))
        if self.weights == "identity":
            return self.op("Identity", net.random(*shape, scale=scale))
        if self.weights == "cast":
            values = net.rng.standard_normal(shape) * scale
            return self.op("Cast", net.const(values, np.float16), to=TensorProto.FLOAT)
        if self.weights == "reshape":
            flat = net.random(int(np.prod(shape)), scale=scale)
            return self.op("Reshape", flat, self.ints(*shape))
        if self.weights == "constant":
            values = (net.rng.standard_normal(shape) * scale).astype(np.float32)
            tensor = helper.make_tensor("v", TensorProto.FLOAT, shape, values.tobytes(), raw=True)
            return self.op("Constant", value=tensor)
        return net.random(*shape, scale=scale)

    def quantized_weight(self, axis: int, *shape: int) -> str:
        """A weight behind DequantizeLinear."""
        net, kind = self.net, self.quantized
        dtype = np.uint8 if kind == "asymmetric" else np.int8
        zero = 120 if kind == "asymmetric" else 0
        size = () if kind in ("per_tensor", "asymmetric") else (shape[axis],)
        scale = net.const(0.01 + net.rng.random(size) * 0.01)
        zeros = net.const(np.full(size, zero), dtype)
        attrs = {"axis": axis} if size else {}
        if kind == "folded_float":  # as NVIDIA's tools write it: Q and DQ of a float
            weight = net.random(*shape, scale=0.5)
            stored = self.op("QuantizeLinear", weight, scale, zeros, **attrs)
        else:
            values = net.rng.integers(0, 120, shape) if zero else net.rng.integers(-100, 100, shape)
            stored = net.const(values, dtype)
        return self.op("DequantizeLinear", stored, scale, zeros, **attrs)

    def quantize(self, x: str, head: int) -> str:
        """Q and DQ of an activation."""
        kind = self.quantized
        if kind in ("none", "weight_only"):
            return x
        zero, dtype = (0, np.int8)
        if kind in ("uint8", "asymmetric"):
            zero, dtype = 111, np.uint8
        scale = 0.04 if kind == "int8" else 0.03 + 0.01 * head
        return self.net.qdq(x, scale, dtype, zero)

    # blocks

    def linear(self, x: Value, head: int, style: str, width: int, place: int) -> Value:
        net, k = self.net, x.shape[-1]
        vector = len(x.shape) == 1
        source = self.quantize(x.name, head)
        if self.quantized != "none":
            transposed = style == "gemm_t" and vector
            shape = (width, k) if transposed else (k, width)
            w = self.quantized_weight(0 if transposed else 1, *shape)
            if vector:
                y = self.op("Gemm", source, w, net.random(width), transB=int(transposed))
            else:
                y = self.op("Add", self.op("MatMul", source, w), net.random(width))
            return Value(y, (*x.shape[:-1], width))
        where = ("linear", place)
        if style.startswith("gemm") and vector:
            transposed = style == "gemm_t"
            shape = (width, k) if transposed else (k, width)
            w = self.weight(where, *shape, fan=k)
            attrs: dict[str, object] = {"transB": 1} if transposed else {}
            if style == "gemm_scaled":
                attrs |= {"alpha": 0.5, "beta": 2.0}
            sizes = {"gemm_row": (1, width), "gemm_scalar": ()}
            bias = [] if style == "gemm_nobias" else [net.random(*sizes.get(style, (width,)))]
            return Value(self.op("Gemm", source, w, *bias, **attrs), (width,))
        y = self.op("MatMul", source, self.weight(where, k, width, fan=k))
        if style == "add_matmul":
            y = self.op("Add", net.random(width), y)
        elif style not in ("matmul", "gemm_nobias"):
            y = self.op("Add", y, net.random(width))
        return Value(y, (*x.shape[:-1], width))

    def activation(self, x: Value, kind: str) -> Value:
        net, name = self.net, x.name
        if kind == "gelu_erf":
            y = self.op("Erf", self.op("Div", name, net.const(np.sqrt(2))))
            y = self.op(
                "Mul", self.op("Mul", name, self.op("Add", y, net.const(1))), net.const(0.5)
            )
        elif kind == "gelu_tanh":
            cube = self.op("Mul", self.op("Pow", name, net.const(3)), net.const(0.044715))
            y = self.op("Tanh", self.op("Mul", self.op("Add", name, cube), net.const(0.79788)))
            y = self.op(
                "Mul", self.op("Mul", name, net.const(0.5)), self.op("Add", y, net.const(1))
            )
        elif kind == "silu":
            y = self.op("Mul", name, self.op("Sigmoid", name))
        elif kind == "clip":
            y = self.op("Clip", name, net.const(-1), net.const(2))
        else:
            y = self.op(kind, name)
        return Value(y, x.shape)

    def conv(
        self,
        x: Value,
        head: int,
        out: int,
        place: int,
        *,
        k: int = 3,
        group: int = 1,
        stride: int = 1,
    ) -> Value:
        c, h, w = x.shape
        source = self.quantize(x.name, head)
        shape = (out, c // group, k, k)
        weight = (
            self.weight(("conv", place), *shape, fan=c // group * k * k)
            if self.quantized == "none"
            else self.quantized_weight(0, *shape)
        )
        pad = k // 2
        bias = [self.net.random(out)] if place % 2 else []
        y = self.op(
            "Conv", source, weight, *bias, group=group, strides=[stride] * 2, pads=[pad] * 4
        )
        size = [(s + 2 * pad - k) // stride + 1 for s in (h, w)]
        return Value(y, (out, *size))

    def block(
        self, draw: Draw, kind: str, plan: dict[str, object]
    ) -> Callable[[Value, int], Value]:
        """Draw the parameters of a block once; the result writes it for every head."""
        place = len(plan)
        plan[f"{place} {kind}"] = True
        width = draw(st.integers(1, 6))
        style = draw(st.sampled_from(LINEAR))
        activation = draw(st.sampled_from(ACTIVATIONS))
        axis = draw(st.integers(0, 2))
        assert isinstance(width, int)
        assert isinstance(axis, int)

        def write(x: Value, head: int) -> Value:
            return self._write(kind, x, head, place, width, str(style), str(activation), axis)

        return write

    def _write(
        self, kind: str, x: Value, head: int, place: int, width: int, style: str, activation: str,
        axis: int,
    ) -> Value:  # fmt: skip
        net, name, shape = self.net, x.name, x.shape
        rank = len(shape)
        same = lambda y: Value(y, shape)  # noqa: E731
        if kind == "linear":
            return self.linear(x, head, style, width, place)
        if kind == "activation":
            return self.activation(x, activation)
        if kind == "layer_norm":
            k = shape[-1]
            return same(self.op("LayerNormalization", name, net.random(k), net.random(k)))
        if kind == "batch_norm":
            c = shape[0]
            var = net.const(net.rng.random(c) + 0.5)
            rest = (net.random(c), net.random(c), net.random(c), var)
            return same(self.op("BatchNormalization", name, *rest))
        if kind == "instance_norm":
            c = shape[0]
            return same(self.op("InstanceNormalization", name, net.random(c), net.random(c)))
        if kind == "softmax":
            return same(self.op("Softmax", name, axis=1 + axis % rank if head >= 0 else -1))
        if kind == "residual":
            return same(self.op("Add", name, self.activation(x, activation).name))
        if kind == "scale":
            vector = (shape[0],) + (1,) * (rank - 1) if rank == 3 else (shape[-1],)
            return same(self.op("Mul", net.random(*vector), name))
        if kind == "prelu":
            return same(self.op("PRelu", name, net.random(shape[0], 1, 1)))
        if kind == "concat":
            return Value(
                self.op("Concat", name, self.op("Tanh", name), axis=1), (2 * shape[0], *shape[1:])
            )
        if kind == "slice":
            k = max(1, shape[-1] - 1)
            return Value(self.op("Slice", name, self.ints(0), self.ints(k), self.ints(rank)),
                         (*shape[:-1], k))  # fmt: skip
        if kind == "reshape":
            y = self.op("Reshape", name, self.ints(0, -1, 1))
            return Value(self.op("Squeeze", y, self.ints(2)), shape)
        if kind == "shape_reshape":
            size = self.op("Slice", self.op("Shape", name), self.ints(0), self.ints(1))
            target = self.op("Concat", size, self.ints(-1), axis=0)
            return same(self.op("Reshape", self.op("Neg", name), target))
        if kind == "unsqueeze":
            y = self.op("Unsqueeze", name, self.ints(-1 if axis else 1))
            return Value(self.op("Squeeze", y, self.ints(-1 if axis else 1)), shape)
        if kind == "reduce":
            mean = self.op("ReduceMean", name, self.ints(rank if axis else -1))
            return same(self.op("Sub", name, mean))
        if kind == "split":
            a, b = f"a{len(net.nodes)}", f"b{len(net.nodes)}"
            both = self.op("Concat", name, name, axis=rank)
            net.nodes.append(
                helper.make_node("Split", [both], [a, b], f"n{len(net.nodes)}", axis=rank,
                                 num_outputs=2)
            )  # fmt: skip
            return same(self.op("Mul", a, self.op("Sigmoid", b)))
        if kind == "pad" and rank == 1:
            return Value(self.op("Pad", name, self.ints(0, 0, 0, 1)), (shape[0] + 1,))
        if kind == "pad":
            y = self.op("Pad", name, self.ints(0, 0, 1, 0, 0, 0, 0, 1))
            return Value(y, (shape[0], shape[1] + 1, shape[2] + 1))
        if kind == "where":
            below = self.op("Less", name, net.const(0.1))
            return same(self.op("Where", below, self.op("Mul", name, net.const(0.1)), name))
        if kind == "conv":
            return self.conv(x, head, width, place, k=(1, 3)[axis % 2], stride=1 + axis // 2)
        if kind == "depthwise":
            return self.conv(x, head, shape[0], place, group=shape[0])
        if kind == "conv_transpose":
            w = net.random(shape[0], width, 2, 2, scale=0.5)
            y = self.op("ConvTranspose", name, w, net.random(width), strides=[2, 2])
            return Value(y, (width, 2 * shape[1], 2 * shape[2]))
        if kind in ("max_pool", "average_pool"):
            op = "MaxPool" if kind == "max_pool" else "AveragePool"
            y = self.op(op, name, kernel_shape=[2, 2], strides=[1, 1], pads=[0, 0, 1, 1])
            return same(y)
        if kind == "resize":
            y = self.op("Resize", name, "", net.const([1, 1, 2, 2]))
            return Value(y, (shape[0], 2 * shape[1], 2 * shape[2]))
        if kind == "attention":
            k = shape[-1]
            q = self.linear(x, head, "matmul_add", k, place)
            v = self.linear(x, head, "matmul", k, place)
            scores = self.op("MatMul", q.name, self.op("Transpose", name, perm=[0, 2, 1]))
            return same(self.op("MatMul", self.op("Softmax", scores, axis=-1), v.name))
        if kind == "transpose":
            return Value(self.op("Transpose", name, perm=[0, 2, 1]), shape[::-1])
        if kind == "einsum":
            w = net.random(shape[-1], width, scale=0.5)
            return Value(self.op("Einsum", name, w, equation="btk,kc->btc"), (shape[0], width))
        raise AssertionError(kind)

    def classify(self, x: Value, head: int, c: int) -> Value:
        """Whatever the head holds, to ``[B, C]``."""
        name, shape = x.name, x.shape
        if len(shape) == 3:
            name, shape = self.op("GlobalAveragePool", name), (shape[0], 1, 1)
            name, shape = self.op("Flatten", name), (shape[0],)
        elif len(shape) == 2:
            name, shape = self.op("ReduceMean", name, self.ints(1), keepdims=0), (shape[1],)
        return self.linear(Value(name, shape), head, "gemm", c, 99)


@st.composite
def cases(draw: Draw) -> Case:
    """Any graph."""
    kind = draw(st.sampled_from(["vector", "vector", "image", "sequence"]))
    quantized = str(draw(st.sampled_from(QUANTIZED)))
    weights = str(draw(st.sampled_from(WEIGHTS))) if quantized == "none" else "plain"
    opset = draw(st.sampled_from([18, 20, 21, 22]))
    batch = draw(st.sampled_from(["batch", "batch", 3]))
    m = draw(st.integers(2, 5))
    how = str(draw(st.sampled_from(JOINS)))
    odd = draw(st.sampled_from(["", "", "", "other activation", "other width", "read elsewhere"]))
    seed = draw(st.integers(0, 2**16))
    assert isinstance(opset, int)
    assert isinstance(seed, int)
    assert isinstance(m, int)
    opset = max(opset, 20)  # Gelu
    writer = Writer(opset, seed, quantized, weights)
    net = writer.net
    shape = {"vector": (5,), "image": (3, 6, 6), "sequence": (4, 5)}[kind]
    x = Value(net.input("x", (batch, *shape)), shape)
    blocks = {"vector": VECTOR_BLOCKS, "image": IMAGE_BLOCKS, "sequence": SEQUENCE_BLOCKS}[
        str(kind)
    ]
    plan: dict[str, object] = {}

    def sequence(longest: int) -> list[Write]:
        kinds = draw(st.lists(st.sampled_from(blocks), max_size=longest))
        assert isinstance(kinds, list)
        return [writer.block(draw, str(kind), plan) for kind in kinds]

    with_body, head_blocks = sequence(2), sequence(4)
    for write in with_body:
        x = write(x, 0)
    heads = []
    c = 3
    for head in range(m):
        value = x
        for write in head_blocks:
            value = write(value, head)
        if odd == "other activation" and head == m - 1:
            value = writer.activation(value, "Tanh")
        heads.append(writer.classify(value, head, c + (odd == "other width" and head == m - 1)))
    outputs = join(writer, heads, how, m, c, odd == "other width", batch)
    if odd == "read elsewhere":
        inner = writer.op("Neg", heads[0].name)
        outputs[inner] = (batch, c)
    must = not odd and weights != "shared" and how != "mean"
    tolerance = 1e-3 if quantized == "none" else 3e-2
    dtype = "float32"
    if quantized == "none" and weights not in ("cast", "constant"):
        dtype = str(draw(st.sampled_from(["float32", "float32", "float16", "float64"])))
        tolerance = 3e-2 if dtype == "float16" else tolerance
    notes = [str(kind), quantized, how, str(odd) or "alike", dtype]
    return Case(of_type(net.graph(outputs), dtype), must, tolerance, notes)


def of_type(graph: Graph, dtype: str) -> Graph:
    """A float32 graph with all floats of another type."""
    number = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for index, tensor in enumerate(model.graph.initializer):
        # Scales and region of Resize are float32 whatever it resizes.
        readers = {n.op_type for n in model.graph.node if tensor.name in n.input}
        if tensor.data_type == TensorProto.FLOAT and "Resize" not in readers:
            array = numpy_helper.to_array(tensor).astype(dtype)
            model.graph.initializer[index].CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = number
    return Graph(model, graph.metadata)


def join(
    writer: Writer, heads: list[Value], how: str, m: int, c: int, ragged: bool, batch: int | str
) -> dict[str, Shape]:
    """Bring heads together; the graph's outputs."""
    net, names = writer.net, [head.name for head in heads]
    if how == "permuted":
        names = names[1:] + names[:1]
    if ragged or how in ("concat", "concat_last", "permuted"):
        total = sum(head.shape[0] for head in heads)
        axis = -1 if how == "concat_last" else 1
        return {writer.op("Concat", *names, axis=axis): (batch, total)}
    if how in ("stack", "stack_then_summary"):
        axes = writer.ints(0)
        y = writer.op("Concat", *[writer.op("Unsqueeze", n, axes) for n in names], axis=0)
        if how == "stack":
            return {y: (m, batch, c)}
        mean = writer.op("ReduceMean", writer.op("Softmax", y, axis=-1), writer.ints(0), keepdims=0)
        return {mean: (batch, c), y: (m, batch, c)}
    if how == "concat_batch":
        return {writer.op("Concat", *names, axis=0): (None, c)}
    if how in ("sum", "mean"):
        return {writer.op(how.title(), *names): (batch, c)}
    if how == "chain":
        total_name = names[0]
        for name in names[1:]:
            total_name = writer.op("Add", total_name, name)
        return {writer.op("Div", total_name, net.const(m)): (batch, c)}
    return dict.fromkeys(names, (batch, c))
