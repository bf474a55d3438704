"""Through GraphSurgeon and back without losses."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import Net, assert_same, linear, mlp_heads, student

from hydra_edge import surgery
from hydra_edge.artifacts.graph import Graph


def round_trip(graph: Graph) -> Graph:
    return Graph(surgery.close_model(surgery.open_model(graph.model), like=graph.model))


@pytest.mark.parametrize("graph", [student(), mlp_heads(kind="outputs"), mlp_heads(kind="concat0")])
def test_round_trip_keeps_function_interface_and_version(graph: Graph) -> None:
    again = round_trip(graph)
    assert_same(again, graph)
    assert (again.inputs, again.outputs) == (graph.inputs, graph.outputs)
    assert again.model.ir_version == graph.model.ir_version
    assert {(e.domain, e.version) for e in again.model.opset_import} == {
        (e.domain, e.version) for e in graph.model.opset_import
    }
    onnx.checker.check_model(again.model)


def test_axes_without_a_name_stay_without() -> None:
    net = Net()
    x = net.input("x", (None, 6))
    graph = net.graph({net.op("Relu", x): (None, 6)})
    again = round_trip(graph)
    assert (again.inputs, again.outputs) == (graph.inputs, graph.outputs)


def test_unused_inputs_stay() -> None:
    net = Net()
    x, _ = net.input("x", ("batch", 6)), net.input("unused", ("batch", 2))
    graph = net.graph({net.op("Relu", x): ("batch", 6)})
    assert [spec.name for spec in round_trip(graph).inputs] == ["x", "unused"]


def test_shapes_cut_where_arithmetic_on_constants_says() -> None:
    """TorchScript's exporter writes ``x.unflatten(-1, (2, 3))`` so, also in every attention."""
    net = Net(opset=18)
    x = net.input("x", ("batch", 6))
    one = net.const([1], np.int64)
    cut = net.op("Mod", net.const([3], np.int64), net.const([2], np.int64))
    lead = net.op(
        "Slice", net.op("Shape", x), net.const([0], np.int64), net.op("Reshape", cut, one)
    )
    target = net.op("Concat", lead, net.const([2, 3], np.int64), axis=0)
    graph = net.graph({net.op("Relu", net.op("Reshape", x, target)): ("batch", 2, 3)})
    surgeon = surgery.open_model(graph.model)
    assert [node.op for node in surgeon.nodes] == [node.op_type for node in graph.model.graph.node]
    (relu,) = [node for node in surgeon.nodes if node.op == "Relu"]
    assert relu.inputs[0].shape == ["batch", 2, 3]
    assert_same(round_trip(graph), graph)


def test_functions_of_others_are_inlined() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    y = net.op("Twice", x, domain="theirs")
    graph = helper.make_graph(
        net.nodes, "g", net.inputs, [helper.make_tensor_value_info(y, 1, ("batch", 6))]
    )
    twice = helper.make_function(
        "theirs",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )
    model = helper.make_model(
        graph,
        functions=[twice],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("theirs", 1)],
        ir_version=10,
    )
    source = Graph(model)
    again = round_trip(source)
    assert list(again.model.functions) == []
    assert {entry.domain for entry in again.model.opset_import} == {"", "theirs"}
    assert_same(again, source)


def test_constant_nodes_become_weights_but_not_outputs() -> None:
    net = Net()
    x = net.input("x", ("batch", 2))
    value = onnx.numpy_helper.from_array(np.float32([1, 2]))
    two = net.op("Constant", value=value)
    kept = net.op("Constant", value_floats=[3.0, 4.0])
    graph = net.graph({net.op("Add", x, two): ("batch", 2), kept: (2,)})
    again = round_trip(graph)
    assert [n.op_type for n in again.model.graph.node] == ["Constant", "Add"]
    assert_same(again, graph)


def test_fresh_name_looks_below_prefixes() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    y = net.op("Relu", linear(net, x, 6, 4), name="hydra_0/Relu_1")
    graph = surgery.open_model(net.graph({y: ("batch", 4)}).model)
    assert surgery.fresh_name(graph, "hydra") == "hydra_1"
    assert surgery.fresh_name(graph, "other") == "other_0"


@pytest.mark.parametrize(
    "dtype",
    [
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e5m2fnuz,
        ml_dtypes.int4,
        ml_dtypes.uint4,
    ],
)
def test_weights_of_any_type_keep_it(dtype: type) -> None:
    net = Net(opset=21)
    x = net.input("x", ("batch", 5))
    w = net.op("Cast", net.const([[1, 2, 3, 0, 1]] * 3, dtype), to=1)
    graph = net.graph({net.op("MatMul", x, net.op("Transpose", w)): ("batch", 3)})
    again = round_trip(graph)
    (before,), (after,) = graph.model.graph.initializer, again.model.graph.initializer
    assert (after.data_type, after.raw_data) == (before.data_type, before.raw_data)
    assert_same(again, graph)


def test_unused_names() -> None:
    taken = {"a", "a_"}
    names = [surgery.unused(name, taken) for name in ("a", "a", "b")]
    assert names == ["a__", "a___", "b"]
