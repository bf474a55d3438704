"""Heads become nodes for the plugin, and what they compute stays what it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx_models import Net, feeds_for, heads_of, join, linear, mlp_heads, ops_of, student

from hydra_edge import ops
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.equivalence import difference, random_inputs, tolerance_of
from hydra_edge.errors import CompilationError, HydraError
from hydra_edge.fusion import fuse
from hydra_edge.lowering import EXPLICIT, PLUGIN, lower
from hydra_edge.ops import heads
from hydra_edge.ops.heads import Heads
from hydra_edge.quantization import quantize

CORPUS = Path(__file__).parent / "corpus"
FLOATS = [
    name
    for name, entry in json.loads((CORPUS / "manifest.json").read_text()).items()
    if "error" not in entry and "int8" not in name and entry["fused"]
]
HALF = 3e-3  # hidden activations and inputs round to 11 bits
PRECISIONS = [
    "fp16",
    "int8",
    "int8-weight-only",
    "int4-weight-only",
    "body=fp16,heads=int8",
    "body=fp16,heads=int8-weight-only",
]


def fused(graph: Graph, precision: str) -> Graph:
    return fuse(quantize(graph, precision, calibration=feeds_for(graph, 40)))


def nodes(graph: Graph) -> list[Heads]:
    """The plugin's nodes, read from the file."""
    weights = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    found = []
    for node in graph.model.graph.node:
        if node.op_type == heads.OP:
            assert node.domain == heads.DOMAIN
            attributes = {a.name: onnx_value(a) for a in node.attribute}
            values = [numpy_of(weights[name]) for name in node.input[1:]]
            found.append(Heads.read(attributes, values))
    return found


def onnx_value(attribute: object) -> object:
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def numpy_of(tensor: object) -> np.ndarray:
    import onnx

    return np.asarray(onnx.numpy_helper.to_array(tensor))


def assert_same(lowered: Graph, graph: Graph, tolerance: float) -> None:
    """Both lowerings for TensorRT and the graph, by ONNX Runtime."""
    for batch in (1, 5):
        feeds = random_inputs(graph.inputs, batch=batch)
        expected = evaluate(graph.model, feeds)
        found = evaluate(lower(lowered, "grouped").model, feeds)
        assert list(found) == list(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            if name != "variation_ratio" and np.issubdtype(array.dtype, np.floating):
                assert difference(found[name], array, 0.1) <= tolerance, name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "layer", "activation": "Gelu"}, {"activation": "Silu"}, {"activation": "Tanh"}],
)
def test_a_head_is_one_node(precision: str, options: dict[str, str]) -> None:
    graph = fused(student(k=16, hidden=(40, 33), c=5, **options), precision)
    lowered = lower(graph, PLUGIN)
    (node,) = nodes(lowered)
    assert len(node.layers) == 3
    activation = options.get("activation", "Relu").lower()
    assert [layer.activation for layer in node.layers] == [activation, activation, "none"]
    assert [layer.gamma is not None for layer in node.layers] == [bool(options.get("norm"))] * 2 + [
        False
    ]
    assert node.summary == "softmax"
    assert not {"EnsembleSummary", "GroupedMatMul"} & set(ops_of(lowered))
    assert_same(lowered, graph, 1e-5 if precision.endswith("int8") else HALF)


def test_formats() -> None:
    graph = student(k=16, hidden=(32,), c=5)
    found = {p: nodes(lower(fused(graph, p), PLUGIN))[0] for p in PRECISIONS}
    kinds = {p: (np.dtype(h.x_type).name, h.layers[0].weight.dtype.name) for p, h in found.items()}
    assert kinds == {
        "fp16": ("float16", "float16"),
        "int8": ("int8", "int8"),
        "int8-weight-only": ("float16", "int8"),
        "int4-weight-only": ("float16", "int4"),
        "body=fp16,heads=int8": ("float16", "int8"),  # quantized on the way: no node in between
        "body=fp16,heads=int8-weight-only": ("float16", "int8"),
    }
    assert found["body=fp16,heads=int8"].quantize_x
    assert not found["int8"].quantize_x
    assert found["int4-weight-only"].group == 128


def test_no_cast_is_left_between_a_body_and_heads_of_16_bits() -> None:
    lowered = lower(fused(student(k=16, hidden=(32,)), "body=fp16,heads=int8"), PLUGIN)
    assert ops_of(lowered) == ["Cast", "Gemm", "Tanh", heads.OP]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_five_layers_are_two_nodes(precision: str) -> None:
    graph = fused(student(k=16, hidden=(8, 9, 10, 11), c=5), precision)
    lowered = lower(graph, PLUGIN)
    first, second = nodes(lowered)
    assert (len(first.layers), len(second.layers)) == (4, 1)
    assert (first.x_per_head, second.x_per_head) == (False, True)
    assert (first.summary, second.summary) == ("none", "softmax")
    assert_same(lowered, graph, 1e-5 if precision == "int8" else HALF)


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_results_in_16_bits(hidden: tuple[int, ...]) -> None:
    """One layer writes what the graph has; several write fp32, and a Cast the rest."""

    def head(net: Net, x: str, _: int) -> str:
        width = 6
        for size in (*hidden, 8):
            x, width = net.op("Relu", linear(net, x, width, size)), size
        return linear(net, net.op("Elu", x), 8, 4)

    graph = fused(heads_of(head), "fp16")
    lowered = lower(graph, PLUGIN)
    first, last = nodes(lowered)
    assert np.dtype(first.y_type) == (np.float32 if hidden else np.float16)
    assert np.dtype(last.y_type) == np.float32
    casts = ops_of(lowered).count("Cast")
    assert casts == (2 if hidden else 1)  # of x, and behind the first node
    assert_same(lowered, graph, HALF)


def test_a_norm_behind_the_last_layer_stays() -> None:
    def head(net: Net, x: str, _: int) -> str:
        h = linear(net, net.op("Relu", linear(net, x, 6, 8)), 8, 4)
        return net.op("LayerNormalization", h, net.random(4), net.random(4))

    graph = fused(heads_of(head), "int8")
    lowered = lower(graph, PLUGIN)
    (node,) = nodes(lowered)
    assert node.layers[-1].gamma is None
    assert "LayerNormalization" in ops_of(lowered)
    assert_same(lowered, graph, 1e-5)


def test_hidden_activations_that_others_read_end_a_node() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    hidden = [net.op("Relu", linear(net, x, 6, 8)) for _ in range(3)]
    logits = join(net, [linear(net, h, 8, 4) for h in hidden], 4)
    seen = net.op(
        "Concat", *[net.op("Unsqueeze", h, net.const([0], np.int64)) for h in hidden], axis=0
    )
    graph = fused(net.graph({**logits, seen: (3, "batch", 8)}), "int8")
    lowered = lower(graph, PLUGIN)
    assert [len(node.layers) for node in nodes(lowered)] == [1, 1]
    assert_same(lowered, graph, 1e-5)


@pytest.mark.parametrize(
    ("task", "summary"), [("regression", "gaussian"), ("vqa_sigmoid", "sigmoid")]
)
def test_heads_of_other_tasks(task: str, summary: str) -> None:
    from hydra_edge.exporting import summarize

    graph = summarize(mlp_heads(k=16, hidden=(8,), c=6), task, "logits")
    lowered = lower(fused(graph, "int8"), PLUGIN)
    (node,) = nodes(lowered)
    assert node.summary == summary
    assert_same(lowered, fused(graph, "int8"), 1e-5)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", FLOATS)
def test_both_lowerings_of_other_exporters_graphs(name: str, precision: str) -> None:
    """Plugin and standard ops compute what the fused graph computes."""
    source = Graph.load(CORPUS / f"{name}.onnx")
    try:
        stored = quantize(source, precision, calibration=random_inputs(source.inputs, batch=2))
        graph = fuse(stored)
        lowered = lower(graph, PLUGIN)
    except HydraError as refused:
        pytest.skip(f"nothing for the plugin: {refused.what}")
    tolerance = max(tolerance_of(graph.model), tolerance_of(lowered.model))
    feeds = random_inputs(graph.inputs, batch=2)
    expected = evaluate(graph.model, feeds)
    for variant in (lowered, lower(graph, EXPLICIT)):
        found = evaluate(ops.inline(lower(variant, "grouped").model), feeds)
        for output, array in expected.items():
            if output != "variation_ratio" and np.issubdtype(array.dtype, np.floating):
                assert difference(found[output], array) <= tolerance, output


def test_layers_in_fp32_are_refused_with_the_reason() -> None:
    with pytest.raises(CompilationError, match="No heads of the graph") as caught:
        lower(fuse(student()), PLUGIN)
    assert "multiplies float32, the kernels float16 and bfloat16" in caught.value.why


def test_weights_in_fp8_are_refused() -> None:
    with pytest.raises(CompilationError, match="float8_e4m3fn, which the kernels do not read"):
        lower(fused(student(k=16), "fp8"), PLUGIN)


def test_nothing_fused() -> None:
    with pytest.raises(CompilationError, match="It has no fused heads"):
        lower(student(), PLUGIN)


def test_equal_graphs_give_equal_files() -> None:
    graph = fused(student(k=16), "int8")
    assert lower(graph, PLUGIN).data == lower(graph, PLUGIN).data


@pytest.mark.parametrize("heads_in", ["bfloat16", "int8"])
def test_bfloat16(heads_in: str) -> None:
    """GraphSurgeon has no type for it, only a number."""
    import ml_dtypes
    import onnx
    from onnx import TensorProto

    half = heads_in == "bfloat16"
    source = fused(student(k=16, hidden=(32,)), "fp16" if half else "body=fp16,heads=int8")
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            values = numpy_of(tensor).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    graph = source.derive(model, "bfloat16")
    lowered = lower(graph, PLUGIN)
    (node,) = nodes(lowered)
    assert np.dtype(node.x_type) == ml_dtypes.bfloat16
    assert node.quantize_x == (not half)
    assert tolerance_of(graph.model) >= 4e-2
    assert node.layers[0].weight.dtype == (ml_dtypes.bfloat16 if half else np.int8)
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(ml_dtypes.bfloat16)
    (same,) = nodes(lower(source, PLUGIN))
    error = difference(node.reference(x)["y"], same.reference(x.astype(np.float16))["y"])
    assert error < 0.05


def test_int4_scales_of_zero_are_left() -> None:
    graph = fused(student(k=16, hidden=(32,)), "int4-weight-only")
    model = type(graph.model)()
    model.CopyFrom(graph.model)
    names = {
        node.input[3] for node in model.graph.node if node.op_type == "WeightOnlyGroupedMatMul"
    }
    for tensor in model.graph.initializer:
        if tensor.name in names:
            values = numpy_of(tensor).copy()
            values[0, 0, 0] = 0
            tensor.raw_data = values.tobytes()
    with pytest.raises(CompilationError, match="scales that are not positive"):
        lower(graph.derive(model, "dead"), PLUGIN)
