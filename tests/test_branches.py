"""Heads are found by structure alone."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import Net, join, linear, mlp_heads, student

from hydra_edge import branches, surgery
from hydra_edge.artifacts.graph import Graph


def find(graph: Graph) -> list[branches.Branches]:
    return branches.find(surgery.open_model(graph.model))


@pytest.mark.parametrize(
    ("kind", "found", "axis"),
    [
        ("stack0", "stack", 0),
        ("stack1", "stack", 1),
        ("stack2", "stack", 2),
        ("concat0", "concat", 0),
        ("concat1", "concat", 1),
        ("concat-1", "concat", -1),
        ("outputs", "tensors", 0),
    ],
)
def test_joins(kind: str, found: str, axis: int) -> None:
    (candidate,) = find(mlp_heads(m=4, kind=kind))
    assert (candidate.join.kind, candidate.join.axis, candidate.heads) == (found, axis, 4)
    assert [step.op for step in candidate.steps] == ["Gemm", "Relu", "Gemm"]
    assert candidate.problem == ""


def test_steps_line_up_branch_by_branch() -> None:
    graph = mlp_heads(m=3, body=False)
    (candidate,) = find(graph)
    written = [[node.outputs[0].name for node in step.nodes] for step in candidate.steps]
    assert written == [["t0", "t3", "t6"], ["t1", "t4", "t7"], ["t2", "t5", "t8"]]
    weights = candidate.steps[0].inputs[1]
    assert isinstance(weights, branches.Weights)
    assert [tensor.name for tensor in weights.tensors] == ["c0", "c4", "c8"]
    assert candidate.source() == "x"


def test_the_body_is_where_branches_become_one_tensor() -> None:
    graph = mlp_heads()
    (candidate,) = find(graph)
    source = candidate.source()
    assert source == next(n.output[0] for n in graph.model.graph.node if n.op_type == "Tanh")


def test_summary_outputs_are_no_branches() -> None:
    assert len(find(student())) == 1


def test_outputs_of_other_kinds_are_no_branches() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    a, b = linear(net, x, 6, 4), net.op("Relu", linear(net, x, 6, 4))
    assert find(net.graph({a: ("batch", 4), b: ("batch", 4)})) == []


def test_shape_arithmetic_is_no_join() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    size = net.op("Gather", net.op("Shape", x), net.const([0], np.int64))
    shape = net.op("Concat", size, net.op("Add", size, size), axis=0)
    graph = net.graph({net.op("ConstantOfShape", shape): ("a", "b")})
    assert find(graph) == []


def test_branches_without_matmul_are_no_heads() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    parts = [net.op("Mul", x, net.random(6)) for _ in range(3)]
    assert find(net.graph({net.op("Concat", *parts, axis=1): ("batch", 18)})) == []


def test_one_node_that_feeds_two_branches_is_reported() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    a, b = linear(net, x, 6, 4), linear(net, x, 6, 4)
    graph = net.graph({net.op("Concat", a, b, a, axis=1): ("batch", 12)})
    (candidate,) = find(graph)
    assert candidate.problem == "two branches share one Gemm"


def test_another_output_of_a_node_is_reported() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    heads = []
    for index in range(2):
        net.nodes.append(
            __import__("onnx").helper.make_node(
                "Split", [linear(net, x, 6, 4)], [f"a{index}", f"b{index}"], axis=1, num_outputs=2
            )
        )
        heads.append(f"{'ab'[index]}{index}")
    graph = net.graph({net.op("Concat", *heads, axis=1): ("batch", 4)})
    (candidate,) = find(graph)
    assert candidate.problem == "branch 1 uses another output of Split than branch 0"


def test_nested_joins_are_found_outermost_first() -> None:
    """An ensemble of students: each has heads, and their means meet again."""
    net = Net()
    x = net.input("x", ("batch", 6))
    means = []
    for _ in range(2):
        heads = [linear(net, x, 6, 4) for _ in range(3)]
        axes = net.const([0], np.int64)
        rows = [net.op("Unsqueeze", head, axes) for head in heads]
        means.append(net.op("ReduceMean", net.op("Concat", *rows, axis=0), axes, keepdims=0))
    graph = net.graph(join(net, means, 4))
    assert [candidate.heads for candidate in find(graph)] == [2, 3, 3]
