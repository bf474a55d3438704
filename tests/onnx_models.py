"""Small ONNX models made by hand, a hundred times faster than exporting them from torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from hydra_edge.artifacts.engine import Engine, Golden, Program
from hydra_edge.artifacts.graph import Graph, Metadata
from hydra_edge.backends.onnxruntime import build, evaluate
from hydra_edge.exporting import summarize
from hydra_edge.fusion import fuse

Array = npt.NDArray[np.generic]
Shape = Sequence[int | str] | None


class Net:
    """Writes one graph node by node; every method returns the name of the tensor it made."""

    def __init__(self, *, opset: int = 20, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Shape, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, values: object, dtype: npt.DTypeLike = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def random(self, *shape: int, scale: float = 1.0) -> str:
        return self.const(self.rng.standard_normal(shape) * scale)

    def op(self, kind: str, *inputs: str, name: str | None = None, **attrs: object) -> str:
        output = name or f"t{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [output], f"n{len(self.nodes)}", **attrs)
        self.nodes.append(node)
        return output

    def qdq(
        self, x: str, scale: object = 0.05, dtype: npt.DTypeLike = np.int8, zero: int = 0
    ) -> str:
        """QuantizeLinear and DequantizeLinear of an activation."""
        s, z = self.const(scale), self.const(zero, dtype)
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, s, z), s, z)

    def graph(
        self,
        outputs: Mapping[str, Shape],
        metadata: Metadata | None = None,
        dtypes: Mapping[str, int] | None = None,
    ) -> Graph:
        ends = [
            helper.make_tensor_value_info(n, (dtypes or {}).get(n, TensorProto.FLOAT), shape)
            for n, shape in outputs.items()
        ]
        graph = helper.make_graph(self.nodes, "net", self.inputs, ends, self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10
        )
        onnx.checker.check_model(model)
        return Graph(model, metadata or Metadata())


def linear(net: Net, x: str, k: int, n: int, style: str = "gemm") -> str:
    """One linear layer, written as exporters write it."""
    scale = 1.0 / np.sqrt(k)
    if style == "gemm":
        return net.op("Gemm", x, net.random(k, n, scale=scale), net.random(n))
    if style == "gemm_t":
        return net.op("Gemm", x, net.random(n, k, scale=scale), net.random(n), transB=1)
    if style == "gemm_scaled":
        return net.op("Gemm", x, net.random(k, n, scale=scale), net.random(n), alpha=0.5, beta=2.0)
    if style == "gemm_row":
        return net.op("Gemm", x, net.random(k, n, scale=scale), net.random(1, n))
    if style == "gemm_scalar":
        return net.op("Gemm", x, net.random(k, n, scale=scale), net.random())
    if style == "gemm_nobias":
        return net.op("Gemm", x, net.random(k, n, scale=scale))
    product = net.op("MatMul", x, net.random(k, n, scale=scale))
    if style == "matmul_add":
        return net.op("Add", product, net.random(n))
    if style == "add_matmul":
        return net.op("Add", net.random(n), product)
    assert style == "matmul", style
    return product


def join(net: Net, heads: Sequence[str], c: int, kind: str = "stack0") -> dict[str, Shape]:
    """Bring heads ``[B, C]`` together; returns the graph outputs."""
    m = len(heads)
    if kind == "outputs":
        return dict.fromkeys(heads, ("batch", c))
    if kind.startswith("stack"):
        axis = int(kind[5:])
        axes = net.const([axis], np.int64)
        rows = [net.op("Unsqueeze", head, axes) for head in heads]
        y = net.op("Concat", *rows, axis=axis, name="logits")
        shape: list[int | str] = ["batch", c]
        shape.insert(axis, m)
        return {y: shape}
    axis = int(kind[6:])
    y = net.op("Concat", *heads, axis=axis, name="logits")
    return {y: ("batch", m * c) if axis in (1, -1) else (None, c)}


def mlp_heads(
    m: int = 3,
    k: int = 6,
    hidden: Sequence[int] = (5,),
    c: int = 4,
    *,
    activation: str = "Relu",
    norm: str = "",
    style: str = "gemm",
    kind: str = "stack0",
    body: bool = True,
    seed: int = 0,
) -> Graph:
    """A student: optional one-layer body, then M MLP heads."""
    net = Net(seed=seed)
    x = net.input("x", ("batch", k))
    features = net.op("Tanh", linear(net, x, k, k)) if body else x
    heads = []
    for _ in range(m):
        h, width = features, k
        for size in hidden:
            h = linear(net, h, width, size, style)
            if norm == "layer":
                h = net.op("LayerNormalization", h, net.random(size), net.random(size))
            elif norm == "batch":
                var = net.const(np.abs(net.rng.standard_normal(size)) + 0.5)
                rest = (net.random(size), net.random(size), net.random(size), var)
                h = net.op("BatchNormalization", h, *rest)
            h = activate(net, h, activation)
            width = size
        heads.append(linear(net, h, width, c, style))
    return net.graph(join(net, heads, c, kind))


def activate(net: Net, x: str, activation: str) -> str:
    """An activation as exporters write it: SiLU is two nodes."""
    if activation == "Silu":
        return net.op("Mul", x, net.op("Sigmoid", x))
    return net.op(activation, x)


def student(
    m: int = 3, k: int = 6, hidden: Sequence[int] = (5,), c: int = 4, **kwargs: object
) -> Graph:
    """MLP heads that end in the summary of classification."""
    graph = mlp_heads(m, k, hidden, c, **kwargs)  # type: ignore[arg-type]
    return summarize(graph, "classification", "logits")


def conv_student(m: int = 3, c: int = 4) -> Graph:
    """An image classifier: conv, relu, maxpool, conv, relu, global pooling, two-layer heads."""
    net = Net(seed=1)
    x = net.input("x", ("batch", 3, 8, 8))
    h = net.op("Conv", x, net.random(8, 3, 3, 3, scale=0.3), net.random(8), pads=[1, 1, 1, 1])
    h = net.op("MaxPool", net.op("Relu", h), kernel_shape=[2, 2], strides=[2, 2])
    h = net.op("Conv", h, net.random(8, 8, 3, 3, scale=0.2), net.random(8), pads=[1, 1, 1, 1])
    h = net.op("Flatten", net.op("GlobalAveragePool", net.op("Relu", h)))
    heads = [linear(net, net.op("Relu", linear(net, h, 8, 6)), 6, c) for _ in range(m)]
    graph = net.graph(join(net, heads, c))
    return summarize(graph, "classification", "logits")


# What sensitivity is measured on.
SAMPLES = np.random.default_rng(3).standard_normal((200, 6)).astype(np.float32)


def logits_of(graph: Graph) -> np.ndarray:
    return evaluate(graph.model, {"x": SAMPLES})["head_logits"]


def labels_for(graph: Graph) -> np.ndarray:
    """Drawn from what the graph says, so that its quality is neither perfect nor chance."""
    prob = evaluate(graph.model, {"x": SAMPLES})["mean_prob"]
    rng = np.random.default_rng(0)
    return np.asarray([rng.choice(len(p), p=p / p.sum()) for p in prob.astype(np.float64)])


def loud_head(m: int = 4, loud: int = 2) -> Graph:
    """Alike heads, but one has an outlier in every column, for a feature that is always 0."""
    net = Net()
    body = net.rng.standard_normal((6, 6))
    body[:, 0] = 0
    features = net.op("Tanh", net.op("MatMul", net.input("x", ("batch", 6)), net.const(body)))
    heads = []
    for head in range(m):
        weight = net.rng.standard_normal((6, 5))
        if head == loud:
            weight[0] = 60.0 * np.sign(weight[0])
        hidden = net.op("Relu", net.op("Gemm", features, net.const(weight), net.random(5)))
        heads.append(linear(net, hidden, 5, 3))
    return summarize(net.graph(join(net, heads, 3)), "classification", "logits")


def feeds_for(graph: Graph, batch: int = 7, seed: int = 5) -> dict[str, Array]:
    """Normal inputs; every named axis has size ``batch``."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.standard_normal(
            [size if isinstance(size, int) else batch for size in spec.shape]
        ).astype(spec.dtype)
        for spec in graph.inputs
    }


def assert_same(a: Graph, b: Graph, *, batches: Sequence[int] = (1, 7), rtol: float = 2e-5) -> None:
    """Two graphs give the same outputs; fp32 sums in another order differ by about 1e-6."""
    assert [spec.name for spec in a.outputs] == [spec.name for spec in b.outputs]
    for batch in batches:
        feeds = feeds_for(a, batch)
        left, right = evaluate(a.model, feeds), evaluate(b.model, feeds)
        for name, expected in right.items():
            assert left[name].shape == expected.shape, name
            np.testing.assert_allclose(left[name], expected, rtol=rtol, atol=rtol, err_msg=name)


def assert_fuses(graph: Graph, *, heads: int = 3, rtol: float = 2e-5) -> Graph:
    """One group, equal numbers, same interface, and no trace of the separate heads."""
    fused = fuse(graph)
    assert [(group.fused, group.heads, group.reason) for group in fused.fusion] == [
        (True, heads, "")
    ]
    assert fused.inputs == graph.inputs
    assert fused.outputs == graph.outputs
    assert_same(fused, graph, rtol=rtol)
    assert fuse(fused).data == fused.data
    return fused


def assert_untouched(graph: Graph, reason: str) -> None:
    """The same model comes back, with the reason."""
    fused = fuse(graph)
    assert [group.fused for group in fused.fusion] == [False]
    assert reason in fused.fusion[0].reason
    assert fused.model.SerializeToString() == graph.model.SerializeToString()
    assert fuse(fused).data == fused.data


def heads_of(make: Callable[[Net, str, int], str], m: int = 3, c: int = 4, k: int = 6) -> Graph:
    """A graph whose heads ``make(net, x, head)`` writes, stacked."""
    net = Net()
    x = net.input("x", ("batch", k))
    return net.graph(join(net, [make(net, x, head) for head in range(m)], c))


def ops_of(graph: Graph) -> list[str]:
    """Operators in order."""
    return [node.op_type for node in graph.model.graph.node]


def tiny_engine() -> Engine:
    """The smallest engine: no compile, so no timing."""
    net = Net()
    x = net.input("x", ("batch", 2))
    graph = net.graph({net.op("Relu", x, name="logits"): ("batch", 2)})
    feeds = {"x": np.float32([[1, -1], [2, 3]])}
    program = Program(
        inputs=graph.inputs,
        outputs=graph.outputs,
        batch=(1, 2, 4),
        optional=(),
        lowering="grouped",
        lowering_ms={"grouped": 0.5},
        graph=graph,
        payload=build(graph.model).payload,
        golden=Golden(feeds, evaluate(graph.model, feeds), 1e-4),
    )
    return Engine(
        target="cpu",
        backend="onnxruntime",
        task=None,
        kind="model",
        heads=None,
        labels=("no", "yes"),
        precision="fp32",
        source_sha256=graph.sha256,
        calibration_sha256=None,
        metrics={"p50_ms": 0.5},
        tools={"onnxruntime": "1"},
        programs={"main": program},
    )
