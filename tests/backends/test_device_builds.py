"""What `compile` and `rebuild` do on a device, where plugin and standard lowerings compete."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from onnx_models import conv_student, feeds_for, mlp_heads, student
from simulated_tensorrt import Simulated

from hydra_edge import backends, pipeline
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import Graph
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.errors import ArtifactError, CompilationError, InputError
from hydra_edge.fusion import fuse
from hydra_edge.programs import BuildOptions
from hydra_edge.quantization import quantize
from hydra_edge.runtime import load

TARGET = "jetson-agx-orin"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    return use(monkeypatch, Simulated())


def use(monkeypatch: pytest.MonkeyPatch, backend: Simulated) -> Simulated:
    real = backends.find
    monkeypatch.setattr(
        backends, "find", lambda name: backend if name == "tensorrt" else real(name)
    )
    return backend


def stored(precision: str = "int8") -> Graph:
    source = student(k=16, hidden=(32,))
    return quantize(source, precision, calibration=feeds_for(source, 40))


def packed(options: CompileOptions) -> Engine:
    """What was packed up where there is no GPU."""
    graph = stored()
    return compile(fuse(graph), TARGET, options=options, unfused=graph)


def test_plugin_and_standard_ops_compete(device: Simulated) -> None:
    graph = stored()
    program = compile(fuse(graph), TARGET, unfused=graph).programs["main"]
    assert set(program.lowering_ms) == {"plugin", "qdq", "unfused"}
    assert program.notes == ("simulated",)


def test_without_the_plugin_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Simulated(has_plugin=False))
    program = compile(fuse(stored()), TARGET).programs["main"]
    assert set(program.lowering_ms) == {"qdq"}
    assert program.notes == ("simulated", "not as 'plugin': No plugin. It was not built.")


@pytest.mark.parametrize("source", [mlp_heads(m=1), student(k=16), conv_student()])
def test_graphs_without_fused_heads(device: Simulated, source: Graph) -> None:
    """A single member, or an ensemble as a baseline."""
    program = compile(source, TARGET).programs["main"]
    assert program.lowering == "qdq"


def test_int4_heads_without_the_plugin_stay_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Simulated(has_plugin=False))
    graph = stored("int4-weight-only")
    program = compile(fuse(graph), TARGET, unfused=graph).programs["main"]
    assert program.lowering == "unfused"


@pytest.mark.parametrize("batch", [(1, 4, 8), (20, 20, 20), (16, 16, 16), (2, 2, 2)])
@pytest.mark.parametrize("given", [None, 5, 40])
def test_the_recorded_batch_lies_in_the_range(
    device: Simulated, batch: tuple[int, int, int], given: int | None
) -> None:
    graph = fuse(stored())
    golden = None if given is None else feeds_for(graph, given)
    engine = compile(graph, TARGET, batch=batch, golden=golden)
    recorded = len(engine.programs["main"].golden.inputs["x"])
    assert batch[0] <= recorded <= batch[2]
    with load(engine) as session:
        assert session.self_test()["main"] < 0.05


def test_what_the_plugin_leaves_is_said(device: Simulated) -> None:
    graph = stored("int8-weight-only")
    options = CompileOptions(lowering="plugin")
    notes = compile(fuse(graph), TARGET, options=options).programs["main"].notes
    assert "is float32 in the graph and float16 in the plugin" in notes[-1]
    halves = ",".join(f"head.{index}=fp16" for index in range(3))
    mixed = fuse(quantize(student(m=6, k=16, hidden=(32,)), f"fp32,{halves}"))
    assert [group.heads for group in mixed.fusion if group.fused] == [3, 3]
    (_, note) = compile(mixed, TARGET, options=options).programs["main"].notes
    assert note.count("multiplies float32, the kernels float16 and bfloat16") == 2


def test_a_packed_up_engine_is_built_as_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = BuildOptions(refittable=True, profiles=((1, 1, 1),))
    engine = packed(CompileOptions((1, 2, 4), lowering="qdq", build=asked))
    assert not engine.is_built
    device = use(monkeypatch, Simulated())
    built = pipeline.rebuild(engine)
    assert built.programs["main"].lowering == "qdq"
    assert device.requests[0].options == asked
    assert device.requests[0].batch == (1, 2, 4)
    assert {"p50_ms", "p50_ms_fp16_twin"} <= set(built.metrics)
    assert pipeline.twin_of(built) == ("fp16", built.metrics["p50_ms_fp16_twin"])
    more = BuildOptions(workspace_mb=9).over(asked)
    assert more == replace(asked, workspace_mb=9)


def test_a_built_engine_is_built_again_from_its_fused_graph(device: Simulated) -> None:
    graph = stored()
    engine = compile(fuse(graph), TARGET, unfused=graph, options=CompileOptions(lowering="plugin"))
    again = pipeline.rebuild(engine)
    assert set(again.programs["main"].lowering_ms) == {"plugin", "qdq"}  # nothing to unfuse
    assert "p50_ms_fp16_twin" not in again.metrics  # and no twin: nothing is claimed
    feeds = feeds_for(graph, 5)
    with load(engine) as old, load(again) as new:
        np.testing.assert_allclose(
            old.run(feeds)["mean_prob"], new.run(feeds)["mean_prob"], atol=0.02
        )


def test_options_go_with_the_backend(device: Simulated) -> None:
    asked = BuildOptions(refittable=True)
    engine = compile(fuse(stored()), TARGET, options=CompileOptions(build=asked))
    program = engine.programs["main"]
    assert pipeline.kept_options(engine, program, "jetson-orin-nano").build == asked
    assert pipeline.kept_options(engine, program, "cpu") == CompileOptions(program.batch)


def test_stripped_payloads_are_what_is_stored(device: Simulated) -> None:
    options = CompileOptions(build=BuildOptions(strip_weights=True))
    program = compile(fuse(stored()), TARGET, options=options).programs["main"]
    assert program.payload == b"stripped"  # but the whole one was proved and timed
    assert program.is_stripped


def test_tf32_may_round_more(device: Simulated) -> None:
    graph = fuse(student(k=16))
    options = CompileOptions(build=BuildOptions(tf32=True))
    tolerances = [
        compile(graph, TARGET, options=how).programs["main"].golden.tolerance
        for how in (CompileOptions(), options)
    ]
    assert tolerances == [1e-4, 1e-2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (CompileOptions(lowering="wide"), "Unknown lowering 'wide'"),
        (CompileOptions(build=BuildOptions(profiles=((64, 64, 64),))), "batches 64 to 64"),
    ],
)
def test_what_makes_no_sense_is_refused_before_it_is_packed_up(
    options: CompileOptions, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        packed(options)


def test_an_open_axis_is_refused_before_it_is_packed_up() -> None:
    source = student(k=16)
    spec = source.inputs[0]
    model = type(source.model)()
    model.CopyFrom(source.model)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    assert spec.shape == ("batch", 16)
    with pytest.raises(CompilationError, match="has the open axes length"):
        compile(source.derive(model, "open"), TARGET)


def test_a_file_of_a_later_version() -> None:
    engine = packed(CompileOptions())
    odd = replace(engine.programs["main"], facts={"build_options": {"later": 1}})
    with pytest.raises(ArtifactError, match="does not understand that"):
        pipeline.rebuild(replace(engine, programs={"main": odd}))


def test_every_program_is_built_again(device: Simulated) -> None:
    program = packed(CompileOptions()).programs["main"]
    engine = replace(packed(CompileOptions()), programs={"encode": program, "step": program})
    again = pipeline.rebuild(engine)
    assert list(again.programs) == ["encode", "step"]
    assert {"encode.p50_ms", "step.p50_ms"} <= set(again.metrics)  # and of their twins, if any


def test_loading_says_that_it_builds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), load(packed(CompileOptions()), rebuild=True) as session:
        session.self_test()
    assert "it is not built yet" in caplog.text
