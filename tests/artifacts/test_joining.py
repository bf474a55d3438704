"""Engines of several programs: put together, taken apart, saved, run, changed and built again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx_models import feeds_for, mlp_heads, student

import hydra_edge as he
from hydra_edge import pipeline
from hydra_edge.artifacts.joining import find, join, only
from hydra_edge.errors import InputError
from hydra_edge.refitting import refit
from hydra_edge.verification import verify

OPTIONS = he.CompileOptions(batch=(1, 4, 8), threads=1)


def fresh(seed: int) -> he.Graph:
    return student(k=16, hidden=(32,), seed=seed)


GRAPHS = {"first": fresh(1), "second": fresh(2)}


@pytest.fixture(scope="module")
def engine() -> he.Engine:
    fused = {name: he.fuse(graph) for name, graph in GRAPHS.items()}
    return he.compile(fused, unfused=GRAPHS, options=OPTIONS)


def test_each_program_answers_as_by_itself(engine: he.Engine, tmp_path: Path) -> None:
    path = engine.save(tmp_path / "both.hydra")
    with he.load(path, threads=1) as session:
        assert list(session.programs) == ["first", "second"]
        assert set(session.self_test()) == {"first", "second"}
        for name, graph in GRAPHS.items():
            feeds = feeds_for(graph, 5)
            program = session.programs[name]
            assert program.inputs == graph.inputs
            with he.load(he.compile(he.fuse(graph), options=OPTIONS), threads=1) as alone:
                expected = alone.run(feeds)
            for output in {spec.name for spec in program.outputs} - {"head_logits"}:
                found = program.run(feeds)[output]
                np.testing.assert_allclose(found, expected[output], atol=1e-5)  # another lowering
            again = session.run(feeds, program=name)
            np.testing.assert_array_equal(again["mean_prob"], program.run(feeds)["mean_prob"])
        assert not session.programs["first"].on_device
        with pytest.raises(InputError, match="It has: first, second"):
            session.run(feeds)


def test_batches_and_goldens_may_differ(engine: he.Engine) -> None:
    golden = {"second": feeds_for(GRAPHS["second"], 3)}
    made = he.compile(GRAPHS, batch={"first": (1, 2, 4), "second": (2, 2, 2)}, golden=golden)
    assert made.programs["first"].batch == (1, 2, 4)
    assert made.programs["second"].batch == (2, 2, 2)
    recorded = made.programs["second"].golden.inputs
    np.testing.assert_array_equal(recorded["x"], golden["second"]["x"][:2])
    with pytest.raises(InputError, match="batch has an entry for 'third'"):
        he.compile(GRAPHS, batch={"third": (1, 1, 1)})


def test_taken_apart_and_put_together_again(engine: he.Engine) -> None:
    parts = {name: only(engine, name) for name in engine.programs}
    assert all(set(part.programs) == {"main"} for part in parts.values())
    again = join(parts)
    assert again.programs == engine.programs
    assert (again.task, again.heads, again.labels) == (engine.task, engine.heads, engine.labels)
    assert only(parts["first"], "main") is parts["first"]
    assert join({"main": parts["first"]}) is parts["first"]


def test_every_program_counts(engine: he.Engine) -> None:
    others = he.compile({"first": GRAPHS["first"], "second": fresh(3)}, options=OPTIONS)
    assert others.source_sha256 != engine.source_sha256
    assert engine.size_bytes == sum(len(p.payload) for p in engine.programs.values())


def test_precisions_and_metrics_are_told_by_program() -> None:
    int8 = he.quantize(GRAPHS["second"], "int8", calibration=feeds_for(GRAPHS["second"], 40))
    built = he.build(GRAPHS["first"], options=OPTIONS)
    joined = join({"first": built, "second": he.compile(he.fuse(int8), options=OPTIONS)})
    assert joined.precision == "first: fp32; second: int8"
    assert only(joined, "second").precision == "int8"
    assert joined.metrics == {f"first.{key}": value for key, value in built.metrics.items()}
    assert only(joined, "first").metrics == built.metrics
    assert joined.calibration_sha256 is not None


def test_one_program_is_verified_by_itself(engine: he.Engine) -> None:
    inputs = feeds_for(GRAPHS["second"], 40)
    assert verify(only(engine, "second"), GRAPHS["second"], inputs).passed
    assert not verify(only(engine, "second"), GRAPHS["first"], inputs).passed


def test_one_program_gets_new_weights(engine: he.Engine) -> None:
    new = fresh(9)
    found = refit(engine, {"second": new})
    assert set(found.changed) == {"second"}
    feeds = feeds_for(new, 4)
    with he.load(found.engine) as changed, he.load(engine) as old, he.load(he.compile(new)) as anew:
        wanted = anew.run(feeds)["mean_prob"]
        np.testing.assert_allclose(
            changed.run(feeds, program="second")["mean_prob"], wanted, atol=1e-5
        )
        first = [one.run(feeds, program="first")["mean_prob"] for one in (changed, old)]
        np.testing.assert_array_equal(*first)
        changed.self_test()
    with pytest.raises(InputError, match="Say which one it is for"):
        refit(engine, new)
    with pytest.raises(InputError, match="The engine has no program 'third'"):
        refit(engine, {"third": new})


def test_all_programs_are_built_again(engine: he.Engine) -> None:
    steps: list[str] = []
    again = pipeline.rebuild(engine, on_step=steps.append)
    assert steps == ["compile first for cpu", "compile second for cpu"]
    assert set(again.programs) == set(engine.programs)
    assert {p.batch for p in again.programs.values()} == {(1, 4, 8)}
    with he.load(again) as session:
        session.self_test()


def test_what_cannot_be_joined(engine: he.Engine) -> None:
    part = only(engine, "first")
    with pytest.raises(InputError, match="There is no program"):
        join({})
    with pytest.raises(InputError, match="is not a name of a program"):
        join({"No": part})
    with pytest.raises(InputError, match="an engine of the programs first, second"):
        join({"both": engine})
    with pytest.raises(InputError, match="for different targets"):
        join({"first": part, "second": replace(part, target="jetson-agx-orin")})
    with pytest.raises(InputError, match="for different tasks"):
        join({"first": part, "second": replace(part, task="regression")})
    with pytest.raises(InputError, match="The engine has no program 'third'"):
        find(engine, "third")


def test_heads_of_any_program_name_the_engine() -> None:
    plain = he.compile(mlp_heads(), options=OPTIONS)
    headed = he.compile(he.fuse(GRAPHS["first"]), options=OPTIONS)
    joined = join({"encode": replace(plain, task=None, heads=None), "step": headed})
    assert (joined.heads, joined.task, joined.kind) == (headed.heads, headed.task, headed.kind)
