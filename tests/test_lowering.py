"""All lowerings compute what the fused graph computes."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper
from onnx_models import (
    Net,
    assert_same,
    conv_student,
    feeds_for,
    heads_of,
    join,
    linear,
    mlp_heads,
    ops_of,
    student,
)

from hydra_edge import ops
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.errors import CompilationError, InputError
from hydra_edge.exporting import summarize
from hydra_edge.fusion import fuse
from hydra_edge.lowering import EXPLICIT, LOWERINGS, has_heads, lower
from hydra_edge.quantization import quantize

# The lowered integers are the same; the scaling rounds in another order.
EXACT = 1e-5


def assert_lowers(fused: Graph, *, rtol: float = EXACT) -> dict[str, Graph]:
    lowered = {name: lower(fused, name) for name in LOWERINGS}
    for graph in lowered.values():
        assert_same(graph, fused, batches=(1, 2, 9), rtol=rtol)
        assert (graph.inputs, graph.outputs) == (fused.inputs, fused.outputs)
        assert "QuantizedGroupedMatMul" not in ops_of(graph)
        assert not ops.inline(graph.model).functions
    return lowered


@pytest.mark.parametrize("hidden", [(), (5,), (5, 7)])
@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "layer", "activation": "Gelu"}, {"norm": "batch", "activation": "Silu"}],
)
@pytest.mark.parametrize("kind", ["stack0", "stack1", "concat1", "outputs"])
def test_fp32(hidden: tuple[int, ...], options: dict[str, str], kind: str) -> None:
    assert_lowers(fuse(mlp_heads(hidden=hidden, kind=kind, **options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden", [(), (5,), (5, 7)])
@pytest.mark.parametrize("options", [{}, {"norm": "layer", "activation": "Gelu"}])
def test_int8(hidden: tuple[int, ...], options: dict[str, str]) -> None:
    graph = mlp_heads(hidden=hidden, **options)  # type: ignore[arg-type]
    fused = fuse(quantize(graph, "int8", calibration=feeds_for(graph, 40)))
    assert ops_of(fused).count("QuantizedGroupedMatMul") == len(hidden) + 1
    for lowered in assert_lowers(fused).values():
        assert "MatMulInteger" in ops_of(lowered)


def test_what_each_lowering_is() -> None:
    lowered = assert_lowers(fuse(mlp_heads(m=3)))
    assert {name: ops_of(graph).count("GroupedMatMul") for name, graph in lowered.items()} == {
        "grouped": 2,
        "wide": 1,
        "separate": 0,
    }
    shapes = {
        name: sorted(
            tuple(t.dims)
            for t in graph.model.graph.initializer
            if len(t.dims) >= 2 and 1 not in t.dims
        )
        for name, graph in lowered.items()
    }
    body, first, second = (6, 6), (3, 6, 5), (3, 5, 4)
    assert shapes["grouped"] == sorted([body, first, second])
    assert shapes["wide"] == sorted([body, (6, 15), second])
    assert shapes["separate"] == sorted([body, *[(6, 5)] * 3, *[(5, 4)] * 3])


def test_separate_never_stacks_between_layers() -> None:
    lowered = lower(fuse(mlp_heads(m=3, hidden=(5, 5))), "separate")
    assert ops_of(lowered).count("Concat") == 1
    assert "Gather" not in ops_of(lowered)


def heads_int8(*, shared_q: bool, scales: tuple[float, ...]) -> Graph:
    """Quantized linear heads whose activation scales may differ, on a shared 2-D input."""

    def head(net: Net, x: str, index: int) -> str:
        weight = net.const(net.rng.integers(-99, 99, (6, 4)), np.int8)
        w = net.op("DequantizeLinear", weight, net.const(net.rng.random(4) * 0.01), axis=1)
        return net.op("Gemm", net.qdq(x, scales[index]), w, net.random(4))

    def relu_head(net: Net, x: str, index: int) -> str:
        return head(net, net.op("Relu", linear(net, x, 6, 6)), index)

    return fuse(heads_of(head if shared_q else relu_head))


@pytest.mark.parametrize("shared_q", [True, False])
@pytest.mark.parametrize("scales", [(0.05, 0.05, 0.05), (0.05, 0.1, 0.02)])
def test_scales_per_head(shared_q: bool, scales: tuple[float, ...]) -> None:
    fused = heads_int8(shared_q=shared_q, scales=scales)
    node = next(n for n in fused.model.graph.node if n.op_type == "QuantizedGroupedMatMul")
    sizes = {t.name: numpy_helper.to_array(t).size for t in fused.model.graph.initializer}
    assert sizes[node.input[4]] == len(set(scales))
    assert_lowers(fused)


def test_summary_and_head_logits_as_outputs() -> None:
    fused = fuse(student())
    for lowered in assert_lowers(fused).values():
        assert ops_of(lowered)[-1] == "EnsembleSummary"
        assert [spec.name for spec in lowered.outputs][-1] == "head_logits"


def test_without_head_logits() -> None:
    graph = summarize(mlp_heads(), "classification", "logits", head_logits=False)
    fused = fuse(graph)
    assert fused.metadata.logits is None
    assert_lowers(fused)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4), (3, 1, 1), (3, 1, 4), (1, 1, 1, 4)])
@pytest.mark.parametrize("m", [3, 4])  # with 4 heads of 4 outputs no axis can be told by its size
def test_constants_of_any_rank_behind_the_join(shape: tuple[int, ...], m: int) -> None:
    shape = tuple(m if size == 3 else size for size in shape)
    net = Net()
    x = net.input("x", ("batch", 6))
    join(net, [linear(net, x, 6, 4) for _ in range(m)], 4)
    y = net.op("Mul", "logits", net.random(*shape))
    result: tuple[int | str, ...] = (m, "batch", 4)
    assert_lowers(fuse(net.graph({y: (1, *result) if len(shape) == 4 else result})))


def test_two_groups() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    first = join(net, [linear(net, x, 6, 4) for _ in range(3)], 4)
    mean = net.op("ReduceMean", "logits", net.const([0], np.int64), keepdims=0)
    heads = [linear(net, mean, 4, 2) for _ in range(2)]
    fused = fuse(net.graph({**first, net.op("Concat", *heads, axis=1): ("batch", 4)}))
    assert [group.fused for group in fused.fusion] == [True, True]
    assert_lowers(fused)


def test_sum_of_two_head_layers() -> None:
    """Both operands of an elementwise op are separated heads."""

    def head(net: Net, x: str, _: int) -> str:
        return net.op("Mul", linear(net, x, 6, 4), net.op("Sigmoid", linear(net, x, 6, 4)))

    assert_lowers(fuse(heads_of(head)))


def test_a_graph_without_grouped_ops() -> None:
    graph = conv_student()
    assert_same(lower(graph, "grouped"), graph)
    assert not has_heads(graph)
    assert has_heads(fuse(graph))


def test_source_is_not_changed_and_bytes_repeat() -> None:
    fused = fuse(student())
    before = fused.model.SerializeToString(deterministic=True)
    for name in LOWERINGS:
        assert lower(fused, name).data == lower(fused, name).data
    assert fused.model.SerializeToString(deterministic=True) == before


def test_provenance_names_the_lowering() -> None:
    assert lower(fuse(student()), "wide").metadata.provenance[-1] == "lower:wide"


def test_unknown_lowering() -> None:
    with pytest.raises(InputError, match=r"Unknown lowering 'best'. There are: grouped, wide, sep"):
        lower(student(), "best")


def test_wide_int8_equals_integer_arithmetic() -> None:
    """Every lowering of one quantized layer, against numpy integers in float64."""
    graph = mlp_heads(hidden=(), body=False)
    fused = fuse(quantize(graph, "int8", calibration=feeds_for(graph, 40)))
    node = fused.model.graph.node[0]
    arrays = {t.name: numpy_helper.to_array(t) for t in fused.model.graph.initializer}
    feeds = feeds_for(graph)
    weight, bias, weight_scale, x_scale = (arrays[name] for name in node.input[1:])
    expected = ops.grouped_matmul.reference_quantized(
        feeds["x"], weight, bias, weight_scale, x_scale
    )
    for name in LOWERINGS:
        found = evaluate(lower(fused, name).model, feeds)["logits"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def explicit(fused: Graph) -> list[str]:
    """The ops of the lowering for TensorRT, which computes the same."""
    lowered = lower(fused, EXPLICIT)
    assert_same(lowered, fused, batches=(1, 2, 9), rtol=EXACT)
    assert (lowered.inputs, lowered.outputs) == (fused.inputs, fused.outputs)
    names = ops_of(lowered)
    assert not {"QuantizedGroupedMatMul", "WeightOnlyGroupedMatMul", "MatMulInteger"} & set(names)
    return names


@pytest.mark.parametrize("hidden", [(), (5,), (5, 7)])
@pytest.mark.parametrize("options", [{}, {"norm": "layer", "activation": "Gelu"}])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-weight-only"])
def test_explicit(hidden: tuple[int, ...], options: dict[str, str], precision: str) -> None:
    graph = mlp_heads(hidden=hidden, **options)  # type: ignore[arg-type]
    if precision != "fp32":
        graph = quantize(graph, precision, calibration=feeds_for(graph, 40))
    names = explicit(fuse(graph))
    layers = len(hidden) + 2  # with the body's
    dequantized = {"fp32": 0, "int8": 2 * layers, "int8-weight-only": layers}[precision]
    assert names.count("DequantizeLinear") == dequantized


def test_explicit_needs_columns_of_int8() -> None:
    graph = mlp_heads(hidden=(64,))
    fused = fuse(quantize(graph, "int4-weight-only"))
    with pytest.raises(CompilationError, match="stored in"):
        lower(fused, EXPLICIT)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-weight-only"])
def test_tensorrt_rtx_builds_what_is_explicit(precision: str) -> None:
    """Without a GPU, for the three generations of cards; the fused graph itself it refuses."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    graph = mlp_heads(hidden=(64,), k=64)
    fused = fuse(quantize(graph, precision, calibration=feeds_for(graph, 40)))
    model = ops.inline(lower(fused, EXPLICIT).model)
    logger = trt.Logger(trt.Logger.ERROR)
    for capability in ("SM86", "SM89", "SM120"):
        builder = trt.Builder(logger)
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        name, (_, features) = network.get_input(0).name, network.get_input(0).shape
        profile.set_shape(name, (1, features), (8, features), (32, features))
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
        assert builder.build_serialized_network(network, config) is not None
