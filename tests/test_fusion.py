"""Which heads must not fuse, and what the pass promises about all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import (
    Net,
    activate,
    assert_fuses,
    assert_same,
    assert_untouched,
    join,
    linear,
    mlp_heads,
    student,
)

from hydra_edge import fusion, stacking
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.branches import Step
from hydra_edge.errors import GraphError
from hydra_edge.fusion import fuse
from hydra_edge.stacking.stacker import Emitted, Stacker

NO_FORM = "no-stacked-form"

# near misses


def linears(net: Net, x: str, widths: tuple[int, ...]) -> str:
    width = 6
    for size in widths:
        x, width = net.op("Relu", linear(net, x, width, size)), size
    return linear(net, x, width, 4)


NEAR_MISSES: dict[str, tuple[Callable[[Net, str, int], str], str, str]] = {
    "other hidden width": (
        lambda net, x, head: linears(net, x, (5 + head,)),
        "branch 1 has a weight [6, 6] float32 where branch 0 has [6, 5] float32",
        "different-shapes",
    ),
    "other activation": (
        lambda net, x, head: linear(
            net, activate(net, linear(net, x, 6, 5), "Tanh" if head else "Relu"), 5, 4
        ),
        "branch 1 has Tanh where branch 0 has Relu",
        "different-structure",
    ),
    "other attribute": (
        lambda net, x, head: linear(
            net, net.op("LeakyRelu", linear(net, x, 6, 5), alpha=0.1 * (head + 1)), 5, 4
        ),
        "branch 1 has a LeakyRelu with other attributes than branch 0",
        "different-structure",
    ),
    "one more layer": (
        lambda net, x, head: linears(net, x, (5, 5) if head else (5,)),
        "branch 0 starts at the graph input 'x'",
        "different-structure",
    ),
    "one without bias": (
        lambda net, x, head: linear(net, x, 6, 4, "gemm_nobias" if head else "gemm"),
        "branch 1 has a Gemm with other inputs than branch 0",
        "different-structure",
    ),
    "a limit only in some": (
        lambda net, x, head: linear(
            net,
            net.op("Clip", linear(net, x, 6, 5), net.const(0) if head else "", net.const(1)),
            5,
            4,
        ),
        "some branches leave out input 1 of Clip",
        "different-structure",
    ),
    "an operator without a stacked form": (
        lambda net, x, _: linear(
            net,
            net.op(
                "Det", net.op("Reshape", linear(net, x, 6, 4), net.const([-1, 1, 2, 2], np.int64))
            ),
            1,
            4,
        ),
        "Det has no stacked form",
        "no-stacked-form",
    ),
    "drawn at random": (
        lambda net, x, _: linear(net, net.op("Bernoulli", linear(net, x, 6, 5)), 5, 4),
        "Bernoulli has no stacked form",
        "no-stacked-form",
    ),
    "weights the other way round": (
        lambda net, x, head: linear(net, x, 6, 4, "gemm_t" if head else "gemm"),
        "branch 1 has a Gemm with other attributes than branch 0",
        "different-structure",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_stay(case: str) -> None:
    make, reason, code = NEAR_MISSES[case]
    net = Net()
    x = net.input("x", ("batch", 6))
    heads = [make(net, x, head) for head in range(2)]
    graph = net.graph({net.op("Concat", *heads, axis=0): (None, None)})
    assert_untouched(graph, reason)
    assert fuse(graph).fusion[0].code == code


@pytest.mark.parametrize("kind", ["Sum", "Mean", "Add"])
def test_averaged_heads_that_stay_apart_say_why(kind: str) -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    make = NEAR_MISSES[next(n for n, (_, _, code) in NEAR_MISSES.items() if code == NO_FORM)][0]
    heads = [make(net, x, head) for head in range(3)]
    if kind == "Add":
        y = net.op("Add", net.op("Add", heads[0], heads[1]), heads[2])
    else:
        y = net.op(kind, *heads)
    fused = fuse(net.graph({y: ("batch", 4)}))
    assert [(group.fused, group.code) for group in fused.fusion] == [(False, NO_FORM)]
    # Two that are added are what every residual connection does.
    net = Net()
    x = net.input("x", ("batch", 6))
    y = net.op("Add", make(net, x, 0), make(net, x, 1))
    assert fuse(net.graph({y: ("batch", 4)})).fusion == ()


def test_equal_heads_find_each_other_among_others() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    heads = [linear(net, x, 6, width) for width in (4, 5, 4, 5, 7)]
    graph = net.graph({net.op("Concat", *heads, axis=1): ("batch", 25)})
    fused = fuse(graph)
    found = [(group.fused, group.members) for group in fused.fusion]
    assert sorted(found) == [(False, (4,)), (True, (0, 2)), (True, (1, 3))]
    (left,) = [group for group in fused.fusion if not group.fused]
    assert left.reason == "branch 1 has a weight [6, 5] float32 where branch 0 has [6, 4] float32"
    assert_same(fused, graph)
    assert fuse(fused).data == fused.data


@pytest.mark.parametrize("where", ["inside a head", "around the heads"])
def test_control_flow_stays(where: str) -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    flag = net.input("flag", (), TensorProto.BOOL)
    heads = [linear(net, x, 6, 4) for _ in range(2)]
    if where == "inside a head":
        heads = [choice(net, flag, head) for head in heads]
        outputs = {net.op("Concat", *heads, axis=1): ("batch", 8)}
    else:
        joined = net.op("Concat", *heads, axis=1)
        outputs = {joined: ("batch", 8), choice(net, flag, heads[1]): ("batch", 4)}
    graph = net.graph(outputs)
    if where == "inside a head":
        assert_untouched(graph, "holds the control flow operator If")
        assert fuse(graph).fusion[0].code == "control-flow"
    else:
        fused = fuse(graph)
        for value in (True, False):
            feeds = {"x": np.ones((2, 6), np.float32), "flag": np.asarray(value)}
            found, expected = evaluate(fused.model, feeds), evaluate(graph.model, feeds)
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def choice(net: Net, flag: str, tensor: str) -> str:
    """``tensor`` or its negative, in an If whose graphs capture it."""
    branches = []
    for op in ("Identity", "Neg"):
        node = helper.make_node(op, [tensor], [f"{tensor}_{op}"])
        value = helper.make_tensor_value_info(f"{tensor}_{op}", TensorProto.FLOAT, None)
        branches.append(helper.make_graph([node], op, [], [value]))
    return net.op("If", flag, then_branch=branches[0], else_branch=branches[1])


def test_axes_that_differ_stay() -> None:
    net = Net()
    x = net.input("x", (6, 6))
    heads = [
        net.op("ReduceMean", linear(net, x, 6, 6), net.const([axis], np.int64), keepdims=0)
        for axis in (0, 1)
    ]
    graph = net.graph({net.op("Concat", *heads, axis=0): (12,)})
    assert_untouched(graph, "ReduceMean has parameters that differ between branches")


def test_inner_value_read_elsewhere_stays() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    hidden = [net.op("Relu", linear(net, x, 6, 5)) for _ in range(3)]
    heads = [linear(net, h, 5, 4) for h in hidden]
    outputs = join(net, heads, 4)
    graph = net.graph({**outputs, net.op("Neg", hidden[1]): ("batch", 5)})
    assert_untouched(graph, "the Relu of branch 1 is also used by Neg")


def test_inner_value_as_graph_output_stays() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    hidden = [net.op("Relu", linear(net, x, 6, 5)) for _ in range(3)]
    heads = [linear(net, h, 5, 4) for h in hidden]
    graph = net.graph({**join(net, heads, 4), hidden[2]: ("batch", 5)})
    assert_untouched(graph, "the Relu of branch 2 is also used as a graph output")


def test_nodes_that_no_output_needs_are_no_users() -> None:
    """skl2onnx leaves the labels of every member behind, of which nothing reads the last node."""
    net = Net()
    x = net.input("x", ("batch", 6))
    hidden = [net.op("Relu", linear(net, x, 6, 5)) for _ in range(3)]
    for value in hidden:
        net.op("ArgMax", net.op("Neg", value), axis=1)
    assert_fuses(net.graph(join(net, [linear(net, h, 5, 4) for h in hidden], 4)))


def test_hidden_layers_that_are_stacked_too() -> None:
    """What the second layers read of the fused first ones is read by that stack as well."""
    net = Net()
    x = net.input("x", ("batch", 6))
    hidden = [net.op("Relu", linear(net, x, 6, 5)) for _ in range(3)]
    outputs = join(net, [linear(net, h, 5, 4) for h in hidden], 4)
    rows = [net.op("Unsqueeze", h, net.const([0], np.int64)) for h in hidden]
    graph = net.graph({**outputs, net.op("Concat", *rows, axis=0): (3, "batch", 5)})
    fused = fuse(graph)
    assert [group.heads for group in fused.fusion if group.fused] == [3, 3]
    nodes = fused.model.graph.node
    apart = {node.output[0] for node in nodes if node.op_type == "Gather"}
    assert not [n for n in nodes if n.op_type == "GroupedMatMul" and n.input[0] in apart]
    assert_same(fused, graph)
    assert fuse(fused).data == fused.data


def test_head_read_before_the_join_keeps_its_own_tensor() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    heads = [linear(net, x, 6, 4) for _ in range(3)]
    graph = net.graph({**join(net, heads, 4), net.op("Neg", heads[0]): ("batch", 4)})
    assert assert_fuses(graph).fusion[0].join == "tensors"


def test_constants_missing_in_one_branch_stay() -> None:
    net = Net()
    x, w = net.input("x", ("batch", 6)), net.input("w", (6, 4))
    heads = [net.op("MatMul", x, w if head == 1 else net.random(6, 4)) for head in range(2)]
    graph = net.graph(join(net, heads, 4))
    assert_untouched(graph, "branch 1 computes a value that is a constant in another branch")


def test_weights_that_are_inputs_stay() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    heads = [net.op("MatMul", x, net.input(f"w{head}", (6, 4))) for head in range(3)]
    assert_untouched(net.graph(join(net, heads, 4)), "starts at the graph input 'w0'")


@pytest.mark.parametrize("kind", ["stack0", "outputs"])
def test_one_head_is_no_group(kind: str) -> None:
    graph = mlp_heads(m=1, kind=kind)
    fused = fuse(graph)
    assert fused.fusion == ()
    assert fused.model.SerializeToString() == graph.model.SerializeToString()


def test_concat_of_features_is_no_group() -> None:
    net = Net()
    a, b = net.input("a", ("batch", 6)), net.input("b", ("batch", 6))
    graph = net.graph(
        {net.op("Concat", net.op("Relu", a), net.op("Relu", b), axis=1): ("batch", 12)}
    )
    assert not any(group.fused for group in fuse(graph).fusion)


# contracts of the pass


def test_source_is_not_changed() -> None:
    graph = student()
    before = graph.model.SerializeToString(deterministic=True)
    fuse(graph)
    assert graph.model.SerializeToString(deterministic=True) == before


def test_same_graph_same_bytes() -> None:
    assert fuse(student()).data == fuse(student()).data


def test_metadata_of_others_survives() -> None:
    graph = student()
    graph.model.metadata_props.add(key="author", value="someone")
    graph.model.producer_name = "their exporter"
    fused = fuse(graph)
    assert {p.key: p.value for p in fused.model.metadata_props}["author"] == "someone"
    assert fused.model.producer_name == "their exporter"
    assert fused.model.ir_version == graph.model.ir_version


def test_fused_file_is_valid_onnx(tmp_path: Path) -> None:
    fused = fuse(student())
    again = Graph.load(fused.save(tmp_path / "fused.onnx"))
    assert again.data == fused.data
    onnx.checker.check_model(again.model, full_check=True)


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in another order: the smallest lie a rule can tell."""

    def swapped(stacker: Stacker, step: Step) -> Emitted:
        right = stacking.RULES["Gemm"](stacker, step)
        stacker.nodes[-1].inputs[1] = stacker.constant(stacker.nodes[-1].inputs[1].values[::-1])
        return right

    monkeypatch.setattr(fusion, "RULES", {**stacking.RULES, "Gemm": swapped})
    assert_untouched(student(), "on 'head_logits'; up to 0.0001 is rounding. Please report")
    assert fuse(student()).fusion[0].code == "not-equal"


def test_only_the_wrong_group_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_of_five(stacker: Stacker, step: Step) -> Emitted:
        right = stacking.RULES["Gemm"](stacker, step)
        if stacker.heads_count == 5:
            stacker.nodes[-1].inputs[1] = stacker.constant(stacker.nodes[-1].inputs[1].values * 2)
        return right

    monkeypatch.setattr(fusion, "RULES", {**stacking.RULES, "Gemm": wrong_of_five})
    net = Net()
    x = net.input("x", ("batch", 6))
    first = net.op("Concat", *[linear(net, x, 6, 2) for _ in range(5)], axis=1)
    second = net.op("Concat", *[linear(net, first, 10, 2) for _ in range(3)], axis=1)
    graph = net.graph({second: ("batch", 6)})
    fused = fuse(graph)
    assert {group.heads: group.fused for group in fused.fusion} == {5: False, 3: True}
    assert_same(fused, graph)


def test_a_result_that_does_not_load_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stacker: Stacker, step: Step) -> Emitted:
        return stacker.emit("NoSuchOperator", [stacker.constant(np.ones(3))], step, "heads")

    monkeypatch.setattr(fusion, "RULES", {**stacking.RULES, "Gemm": broken})
    assert_untouched(student(), "fused, it does not run")


def test_one_slightly_wrong_head_among_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(stacker: Stacker, step: Step) -> Emitted:
        right = stacking.RULES["Gemm"](stacker, step)
        values = stacker.nodes[-1].inputs[1].values.copy()
        values[7] *= 1.001
        stacker.nodes[-1].inputs[1] = stacker.constant(values)
        return right

    monkeypatch.setattr(fusion, "RULES", {**stacking.RULES, "Gemm": off})
    assert_untouched(mlp_heads(m=50, hidden=()), "fused, it differs by")


def test_a_source_that_does_not_run_says_so() -> None:
    """The size of an open axis is free to choose, and here every choice but one is wrong."""
    net = Net()
    x = net.input("x", ("batch", "features"))
    graph = net.graph(join(net, [linear(net, x, 6, 4) for _ in range(3)], 4))
    assert_untouched(graph, "the source does not run on random inputs")
    assert fuse(graph).fusion[0].code == "not-checked"


def test_an_unknown_size_behind_the_concatenated_axis() -> None:
    net = Net()
    x, y = net.input("x", ("batch", 6)), net.input("y", ("batch", "n"))
    heads = [net.op("Add", linear(net, x, 6, 1), y) for _ in range(3)]
    graph = net.graph({net.op("Concat", *heads, axis=0): (None, "n")})
    fused = fuse(graph)
    feeds = {"x": np.ones((2, 6), np.float32), "y": np.ones((2, 5), np.float32)}
    (found,), (expected,) = (evaluate(g.model, feeds).values() for g in (fused, graph))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_heads_that_meet_twice() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    heads = [linear(net, x, 6, 4) for _ in range(3)]
    graph = net.graph({**join(net, heads, 4), net.op("Concat", *heads, axis=1): ("batch", 12)})
    assert_fuses(graph)


def test_a_text_input_says_so() -> None:
    net = Net()
    x, _ = net.input("x", ("batch", 6)), net.input("word", ("batch",), TensorProto.STRING)
    graph = net.graph(join(net, [linear(net, x, 6, 4) for _ in range(3)], 4))
    with pytest.raises(GraphError, match=r"'word: object.* is not a tensor of numbers"):
        fuse(graph)
