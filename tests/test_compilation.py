"""A graph becomes an engine that answers as it does, or is refused in the backend's words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import Net, conv_student, feeds_for, linear, mlp_heads, student

from hydra_edge import compilation
from hydra_edge import lowering as lowerings
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import LOWERINGS, evaluate
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.errors import CompilationError, InputError
from hydra_edge.fusion import fuse
from hydra_edge.quantization import quantize
from hydra_edge.runtime import load


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not care which lowering is faster."""
    monkeypatch.setattr(compilation, "_TIMING_SECONDS", 0.003)


def test_a_student() -> None:
    graph = fuse(student())
    engine = compile(graph, "cpu", batch=(1, 4, 16))
    program = engine.programs["main"]
    assert (engine.target, engine.backend, engine.precision) == ("cpu", "onnxruntime", "fp32")
    assert (engine.task, engine.heads, engine.kind) == ("classification", 3, "model")
    assert engine.source_sha256 == graph.sha256
    assert set(engine.tools) == {"hydra-edge", "onnx", "onnxruntime"}
    assert program.batch == (1, 4, 16)
    assert program.optional == ("head_logits",)
    assert set(program.lowering_ms) == set(LOWERINGS)
    assert program.lowering == min(program.lowering_ms, key=program.lowering_ms.__getitem__)
    assert all(ms > 0 for ms in program.lowering_ms.values())
    assert program.graph.data == graph.data
    assert not onnx.ModelProto.FromString(program.payload).functions


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("make", [student, conv_student])
def test_the_engine_answers_like_its_graph(make: object, precision: str) -> None:
    graph = make()  # type: ignore[operator]
    graph = fuse(quantize(graph, precision, calibration=feeds_for(graph, 64)))
    feeds = feeds_for(graph, 9, seed=8)
    expected = evaluate(graph.model, feeds)
    with load(compile(graph)) as session:
        found = session.run(feeds, head_logits=True)
    assert list(found) == list(expected)
    for name in ("head_logits", "mean_prob"):
        scale = np.abs(expected[name]).max()
        # A halfway case may round the other way: one of 127 steps.
        np.testing.assert_allclose(found[name], expected[name], atol=0.02 * scale)


@pytest.mark.parametrize("name", LOWERINGS)
def test_a_forced_lowering(name: str) -> None:
    engine = compile(fuse(student()), options=CompileOptions(lowering=name))
    assert engine.programs["main"].lowering == name
    assert list(engine.programs["main"].lowering_ms) == [name]


def test_an_unknown_lowering() -> None:
    with pytest.raises(InputError, match="Unknown lowering 'best'"):
        compile(student(), options=CompileOptions(lowering="best"))


def test_an_unknown_target() -> None:
    with pytest.raises(InputError, match="Unknown target 'toaster'"):
        compile(student(), "toaster")


def test_a_graph_without_heads_has_one_lowering() -> None:
    net = Net()
    graph = net.graph({linear(net, net.input("x", ("batch", 6)), 6, 4): ("batch", 4)})
    program = compile(graph).programs["main"]
    assert list(program.lowering_ms) == ["grouped"]
    assert program.optional == ()


@pytest.mark.parametrize(
    "batch", [(0, 1, 2), (2, 1, 3), (1, 3, 2), (-1, 1, 1), (1, 2), (1, 2, 3, 4), ()]
)
def test_batch_ranges(batch: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="The batch range is"):
        compile(student(), batch=batch)  # type: ignore[arg-type]


def test_threads() -> None:
    with pytest.raises(InputError, match="0 threads were asked for"):
        CompileOptions(threads=0)
    assert compile(student(), options=CompileOptions(threads=1)).programs


def fixed(batch: int) -> Graph:
    net = Net()
    x = net.input("x", (batch, 6))
    return net.graph({linear(net, x, 6, 4): (batch, 4)})


def test_a_fixed_batch_is_the_range() -> None:
    engine = compile(fixed(5), batch=(1, 2, 3))
    assert engine.programs["main"].batch == (5, 5, 5)
    assert engine.programs["main"].golden.inputs["x"].shape == (5, 6)


def test_golden_inputs_are_recorded() -> None:
    graph = fuse(student())
    feeds = feeds_for(graph, 3)
    golden = compile(graph, golden=feeds).programs["main"].golden
    np.testing.assert_array_equal(golden.inputs["x"], feeds["x"])
    for name, array in evaluate(graph.model, feeds).items():
        np.testing.assert_array_equal(golden.outputs[name], array)
    with pytest.raises(InputError, match="The input 'x' is missing"):
        compile(graph, golden={})
    with pytest.raises(InputError, match=r"shape \[3, 5\]"):
        compile(graph, golden={"x": feeds["x"][:, :5]})


def test_engine_files_round_trip(tmp_path: object) -> None:
    engine = compile(fuse(student()))
    again = Engine.load(engine.save(f"{tmp_path}/e.hydra"))
    assert again.to_bytes() == engine.to_bytes()


def test_scalar_outputs_round_trip(tmp_path: object) -> None:
    """A shape of [] must not come back as [1]: the self-test would fail on it."""
    net = Net()
    x = net.input("x", ("batch", 6))
    graph = net.graph({net.op("ReduceMean", x, keepdims=0): ()})
    engine = Engine.load(compile(graph).save(f"{tmp_path}/e.hydra"))
    assert load(engine).self_test() == {"main": 0}


# refusals


def test_an_unknown_operator_is_refused_in_onnxruntimes_words() -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="theirs")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 2]) for n in "xy")
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("theirs", 1)],
        ir_version=10,
    )
    with pytest.raises(CompilationError, match=r"cannot load the model.*NoSuchOperator"):
        compile(Graph(model))


@pytest.mark.parametrize("side", ["input", "output"])
def test_text_is_refused(side: str) -> None:
    net = Net()
    if side == "input":
        net.input("word", ("batch",), TensorProto.STRING)
        y = net.op("Relu", net.input("x", ("batch", 2)))
        graph = net.graph({y: ("batch", 2)})
    else:
        y = net.op("Cast", net.input("x", ("batch", 2)), to=TensorProto.STRING)
        graph = net.graph({y: ("batch", 2)}, dtypes={y: TensorProto.STRING})
    with pytest.raises(CompilationError, match="is not a tensor of numbers with a declared type"):
        compile(graph)


def test_an_untyped_input_is_refused() -> None:
    graph = fixed(5)
    graph.model.graph.input[0].type.tensor_type.elem_type = 0
    with pytest.raises(CompilationError, match="'x: unknown"):
        compile(Graph(graph.model))


@pytest.mark.parametrize(
    "shapes",
    [[()], [("batch", 6), ()], [("batch", 6), (1, 6)], [(4, 6), (1, 6)]],
)
def test_inputs_without_a_common_batch_are_refused(shapes: list[tuple[int | str, ...]]) -> None:
    net = Net()
    names = [net.input(f"x{index}", shape) for index, shape in enumerate(shapes)]
    y = net.op("Sum", *names)
    graph = net.graph({y: shapes[0]})
    with pytest.raises(CompilationError, match="Axis 0 of every input is the batch"):
        compile(graph)


def test_a_graph_without_inputs_is_refused() -> None:
    net = Net()
    graph = net.graph({net.op("Relu", net.random(3)): (3,)})
    with pytest.raises(CompilationError, match="The inputs are none"):
        compile(graph)


def test_inputs_the_graph_cannot_take() -> None:
    net = Net()
    x = net.input("x", ("batch", "any"))
    graph = net.graph({net.op("MatMul", x, net.random(7, 2)): ("batch", 2)})
    with pytest.raises(InputError, match=r"ONNX Runtime failed on these inputs. It says"):
        compile(graph)


def test_a_wrong_lowering_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lowerings.lower

    def wrong(graph: Graph, name: str) -> Graph:
        lowered = right(graph, name)
        if name != "separate":
            for tensor in lowered.model.graph.initializer:
                if len(tensor.dims) == 3 or tensor.dims == [6, 15]:
                    values = onnx.numpy_helper.to_array(tensor) * 1.1
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return lowered

    monkeypatch.setattr(lowerings, "lower", wrong)
    graph = fuse(student())
    assert list(compile(graph).programs["main"].lowering_ms) == ["separate"]
    with pytest.raises(CompilationError, match="No lowering reproduces the graph: wide 0"):
        compile(graph, options=CompileOptions(lowering="wide"))


def test_metadata_comes_along() -> None:
    graph = student()
    metadata = replace(graph.metadata, kind="student", labels=tuple("abcd"))
    graph = Graph(graph.model, metadata)
    int8 = quantize(graph, "body=fp32,heads=int8", calibration=feeds_for(graph))
    engine = compile(fuse(int8))
    assert (engine.kind, engine.labels) == ("student", ("a", "b", "c", "d"))
    assert engine.precision == "body=fp32,heads=int8"
    assert engine.calibration_sha256 == int8.metadata.calibration_sha256 is not None
    assert mlp_heads().metadata.task is None


def test_fusing_never_costs_time() -> None:
    """The graph before fusion competes; its program answers for the fused graph's engine."""
    graph = student()
    fused = fuse(graph)
    engine = compile(fused, unfused=graph, options=CompileOptions(threads=1, lowering="unfused"))
    (program,) = engine.programs.values()
    assert program.lowering == "unfused"
    operators = [n.op_type for n in onnx.load_from_string(program.payload).graph.node]
    assert operators.count("Gemm") > 3
    with load(engine) as session:
        assert max(session.self_test().values()) < 1e-4
    every = compile(fused, unfused=graph).programs["main"].lowering_ms
    assert set(every) == {"grouped", "wide", "separate", "unfused"}


def test_unfused_must_be_given_to_be_kept() -> None:
    with pytest.raises(InputError, match="It needs the graph before fusion"):
        compile(fuse(student()), options=CompileOptions(lowering="unfused"))


@pytest.mark.parametrize(
    ("timings", "kept"),
    [
        ({"grouped": 1.0, "wide": 0.8, "unfused": 0.9}, "wide"),
        ({"grouped": 1.0, "wide": 0.89, "unfused": 0.9}, "unfused"),  # within the noise
        ({"grouped": 1.0, "wide": 1.2, "unfused": 0.9}, "unfused"),
        ({"grouped": 1.0, "wide": 0.9}, "wide"),
        ({"unfused": 0.9}, "unfused"),
    ],
)
def test_fused_is_kept_only_where_it_is_clearly_faster(
    timings: dict[str, float], kept: str
) -> None:
    assert compilation._choose(timings) == kept
