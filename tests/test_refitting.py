"""New weights for an engine: proved on the CPU, where engines can be changed, too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx_models import feeds_for, mlp_heads, student

from hydra_edge import pipeline
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends import onnxruntime
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.errors import CompilationError, DeviceMismatchError, GateError, InputError
from hydra_edge.fusion import fuse
from hydra_edge.programs import Built
from hydra_edge.quantization import quantize
from hydra_edge.refitting import refit
from hydra_edge.runtime import load


def stored(seed: int, precision: str) -> Graph:
    graph = student(k=16, hidden=(32,), seed=seed)
    return quantize(graph, precision, calibration=feeds_for(graph, 60))


def engine_of(graph: Graph, lowering: str) -> Engine:
    options = CompileOptions(lowering=lowering)
    return compile(fuse(graph), options=options, unfused=graph)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-weight-only"])
@pytest.mark.parametrize("lowering", ["grouped", "wide", "separate", "unfused"])
def test_a_refitted_engine_is_one_compiled_anew(lowering: str, precision: str) -> None:
    old, new = stored(1, precision), stored(2, precision)
    found = refit(engine_of(old, lowering), new)
    anew = engine_of(new, lowering)
    feeds = feeds_for(new, 9)
    with load(found.engine) as left, load(anew) as right:
        for name, array in right.run(feeds).items():
            np.testing.assert_array_equal(left.run(feeds)[name], array)
        left.self_test()  # against the new graph
    assert found.engine.source_sha256 in (anew.source_sha256, new.sha256)
    assert found.engine.calibration_sha256 == anew.calibration_sha256
    assert "p50_ms" not in found.engine.metrics


def test_only_what_differs_is_replaced() -> None:
    old = student(k=16)
    model = type(old.model)()
    model.CopyFrom(old.model)
    heads = [t for t in model.graph.initializer if list(t.dims) == [16, 5]]
    assert len(heads) == 3
    values = np.zeros((16, 5), np.float32)
    heads[1].raw_data = values.tobytes()
    new = old.derive(model, "retrain")
    found = refit(engine_of(old, "grouped"), new)
    assert found.changed == {"main": ("hydra_0/weight_1",)}  # one stack; the body stays
    feeds = feeds_for(new, 5)
    expected = evaluate(new.model, feeds)
    with load(found.engine) as session:
        np.testing.assert_allclose(
            session.run(feeds)["mean_prob"], expected["mean_prob"], rtol=1e-5, atol=1e-6
        )


def test_a_file_can_be_refitted(tmp_path: object) -> None:
    engine = pipeline.build(student(k=16), data=feeds_for(student(k=16), 40))
    assert engine.metrics["top1_agreement"] == 1
    found = refit(engine, student(k=16, seed=3)).engine
    assert set(found.metrics) == {"p50_ms"}  # agreement was with the old graph
    assert type(found).load(found.save(f"{tmp_path}/s.hydra")).metrics == found.metrics


def test_an_engine_stored_without_weights_is_filled_when_it_is_loaded() -> None:
    """As TensorRT stores it: here a program whose weights were all set to 0."""
    engine = engine_of(student(k=16), "wide")
    program = engine.programs["main"]
    tensors = onnx.ModelProto.FromString(program.payload).graph.initializer
    zeros = {
        t.name: np.zeros_like(onnx.numpy_helper.to_array(t)) for t in tensors if len(t.dims) > 1
    }
    empty = onnxruntime.refit(program.payload, zeros, {}).payload
    hollow = replace(program, payload=empty)
    with load(replace(engine, programs={"main": hollow})) as session, pytest.raises(GateError):
        session.self_test()
    stripped = replace(hollow, facts={"build_options": {"strip_weights": True}})
    with load(replace(engine, programs={"main": stripped})) as session:
        assert session.self_test()["main"] < 1e-6
    new = student(k=16, seed=2)
    again = refit(replace(engine, programs={"main": stripped}), new).engine
    with load(again) as session:
        session.self_test()


def test_the_same_weights() -> None:
    graph = student(k=16)
    with pytest.raises(InputError, match="The graph has the weights that the engine has"):
        refit(engine_of(graph, "wide"), graph)


@pytest.mark.parametrize(
    "other", [student(k=16, c=7), student(k=16, hidden=(5, 5)), student(k=16, m=4)]
)
def test_other_layers(other: Graph) -> None:
    with pytest.raises(InputError, match="The graph has other layers than the engine"):
        refit(engine_of(student(k=16), "wide"), other)


def test_another_precision() -> None:
    with pytest.raises(InputError, match="stored in fp32, the engine in int8") as caught:
        refit(engine_of(stored(1, "int8"), "wide"), student(k=16, hidden=(32,), seed=2))
    assert "hydra-edge quantize --precision int8" in caught.value.fix


def test_another_program() -> None:
    engine = engine_of(student(k=16), "wide")
    with pytest.raises(InputError, match="The engine has no program 'step'"):
        refit(engine, {"step": student(k=16, seed=2)})


def test_what_is_not_built() -> None:
    engine = compile(fuse(student(k=16)), "jetson-agx-orin")
    with pytest.raises(DeviceMismatchError, match="The engine is not built yet"):
        refit(engine, student(k=16, seed=2))


def test_tensorrt_rtx_changes_no_weights() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    engine = compile(fuse(mlp_heads(k=16)), "rtx-4090")
    with pytest.raises(DeviceMismatchError, match="of TensorRT-RTX were to be replaced"):
        refit(engine, mlp_heads(k=16, seed=2))


def test_a_backend_that_forgets_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.refit

    def forgetful(payload: bytes, weights: dict[str, np.ndarray], facts: object) -> Built:
        rest = dict(list(weights.items())[1:])
        return real(payload, rest, {})

    monkeypatch.setattr(onnxruntime, "refit", forgetful)
    with pytest.raises(CompilationError, match="With the new weights the engine differs"):
        refit(engine_of(student(k=16), "wide"), student(k=16, seed=2))


def test_a_weight_that_the_program_lacks() -> None:
    engine = engine_of(student(k=16), "wide")
    payload = engine.programs["main"].payload
    with pytest.raises(InputError, match="The program has no weight 'lost'"):
        onnxruntime.refit(payload, {"lost": np.zeros(3)}, {})


def test_an_engine_that_was_changed_by_hand_is_found_out() -> None:
    """Its payload is not what its graph lowers to: a weight has another name."""
    engine = engine_of(student(k=16), "wide")
    program = engine.programs["main"]
    model = program.graph.model
    odd = replace(program, payload=onnxruntime.build(model).payload)
    with pytest.raises(InputError, match="The program has no weight"):
        refit(replace(engine, programs={"main": odd}), student(k=16, seed=2))
