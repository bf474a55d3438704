"""fp16 where asked, one cast per tensor that crosses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_models import Net, assert_same, linear, mlp_heads, ops_of, student

from hydra_edge.artifacts.graph import Graph
from hydra_edge.errors import QuantizationError
from hydra_edge.half_precision import to_fp16


def names(graph: Graph, *kinds: str) -> set[str]:
    return {n.name for n in graph.model.graph.node if not kinds or n.op_type in kinds}


def halved(graph: Graph, *kinds: str) -> Graph:
    found = Graph(to_fp16(graph.model, names(graph, *kinds)))
    onnx.checker.check_model(found.model, full_check=True)
    assert (found.inputs, found.outputs) == (graph.inputs, graph.outputs)
    assert_same(found, graph, rtol=5e-3)  # fp16 keeps 11 bits, a few layers deep
    return found


def test_everything_casts_once_in_and_once_out() -> None:
    found = halved(mlp_heads())
    assert Counter(ops_of(found))["Cast"] == 2
    weights = {t.data_type for t in found.model.graph.initializer if len(t.dims) == 2}
    assert weights == {TensorProto.FLOAT16}


def test_one_cast_per_crossing_tensor() -> None:
    """The body stays: three heads read one tensor, which is cast once."""
    graph = mlp_heads(hidden=())
    heads = {n.name for n in graph.model.graph.node if n.op_type in ("Unsqueeze", "Concat")}
    gemms = [n.name for n in graph.model.graph.node if n.op_type == "Gemm"][1:]
    found = Graph(to_fp16(graph.model, heads | set(gemms)))
    casts = [n for n in found.model.graph.node if n.op_type == "Cast"]
    assert len(casts) == 2
    assert len({n.input[0] for n in casts}) == 2
    assert_same(found, graph, rtol=5e-3)


def test_a_value_read_in_both_precisions() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    h = net.op("Relu", x)
    a, b = net.op("Exp", h), net.op("Tanh", h)
    graph = net.graph({a: ("batch", 6), b: ("batch", 6), h: ("batch", 6)})
    for kinds in (["Exp"], ["Relu"], ["Relu", "Exp"], ["Exp", "Tanh"]):
        found = halved(graph, *kinds)
        casts = [n for n in found.model.graph.node if n.op_type == "Cast"]
        crossing = [(n.input[0], n.attribute[0].i) for n in casts]
        assert len(set(crossing)) == len(crossing)


def test_the_summary_stays_in_fp32() -> None:
    found = halved(student())
    summary = next(n for n in found.model.graph.node if n.op_type == "EnsembleSummary")
    types = {v.name: v.type.tensor_type.elem_type for v in found.model.graph.output}
    assert types[summary.input[0]] == TensorProto.FLOAT


def test_integers_and_shapes_are_not_touched() -> None:
    net = Net()
    x = net.input("x", ("batch", 2, 3))
    size = net.op("Gather", net.op("Shape", x), net.const([0], np.int64))
    shape = net.op("Concat", size, net.const([6], np.int64), axis=0)
    flat = net.op("Relu", net.op("Reshape", x, shape))
    halved(net.graph({flat: ("batch", 6)}))


def test_casts_and_resizes_stay() -> None:
    net = Net()
    x = net.input("x", ("batch", 2, 4, 4))
    big = net.op("Resize", x, "", net.const([1, 1, 2, 2]), mode="nearest")
    whole = net.op("Cast", net.op("Relu", big), to=TensorProto.INT32)
    graph = net.graph(
        {net.op("Neg", big): ("batch", 2, 8, 8), whole: ("batch", 2, 8, 8)},
        dtypes={whole: TensorProto.INT32},
    )
    found = halved(graph)
    assert found.outputs[1].dtype == "int32"


def test_an_optional_input_stays_absent() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    y = net.op("Clip", x, "", net.const(0.5))
    halved(net.graph({y: ("batch", 6)}))


@pytest.mark.parametrize("value", [7e4, -1e38])
def test_too_large_a_weight(value: float) -> None:
    net = Net()
    x = net.input("x", ("batch", 2))
    y = net.op("Mul", x, net.const([1.0, value]))
    graph = net.graph({y: ("batch", 2)})
    with pytest.raises(QuantizationError, match=r"The weight 'c0' holds .* fp16 ends at 65504"):
        to_fp16(graph.model, names(graph))


def test_infinite_masks_stay_infinite() -> None:
    net = Net()
    x = net.input("x", ("batch", 2))
    y = net.op("Add", x, net.const([0.0, -np.inf]))
    graph = net.graph({y: ("batch", 2)})
    found = to_fp16(graph.model, names(graph))
    weights = [onnx.numpy_helper.to_array(t) for t in found.graph.initializer]
    assert any(np.isneginf(w).any() for w in weights)


def test_nothing_chosen_changes_nothing() -> None:
    graph = mlp_heads()
    found = Graph(to_fp16(graph.model, set()))
    assert sorted(ops_of(found)) == sorted(ops_of(graph))


def test_source_is_not_changed_and_bytes_repeat() -> None:
    graph = student()
    before = graph.model.SerializeToString(deterministic=True)
    first, second = (to_fp16(graph.model, names(graph)) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )
    assert graph.model.SerializeToString(deterministic=True) == before


def test_half_of_a_half_model() -> None:
    """Names of the first pass must not clash with those of the second."""
    net = Net()
    x = net.input("x", ("batch", 6))
    h = net.op("Relu", linear(net, x, 6, 5))
    graph = net.graph({net.op("Tanh", linear(net, h, 5, 4)): ("batch", 4)})
    once = halved(graph, "Relu")
    halved(once, "Gemm", "Tanh")


def test_operators_of_other_domains_stay() -> None:
    """ONNX does not know the type of what they write, nor of anything behind it."""
    net = Net()
    x = net.input("x", ("batch", 6))
    attrs = {"domain": "com.microsoft", "activation": "Relu"}
    h = net.op("FusedGemm", net.op("Tanh", x), net.random(6, 5), net.random(5), **attrs)
    y = net.op("Gemm", net.op("Neg", h), net.random(5, 4))
    ends = [onnx.helper.make_tensor_value_info(y, TensorProto.FLOAT, ("batch", 4))]
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph(net.nodes, "net", net.inputs, ends, net.constants)
    source = Graph(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    for kinds in ((), ("Tanh", "FusedGemm"), ("Gemm",)):
        found = Graph(to_fp16(source.model, names(source, *kinds)))
        assert_same(found, source, rtol=5e-3)
