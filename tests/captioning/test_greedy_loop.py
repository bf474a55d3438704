"""Captions spoken in one run are those of single steps."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from captioners import engine, images

import hydra_edge as he
from hydra_edge.captioning.decoding import _step_by_step, decode
from hydra_edge.captioning.greedy_loop import looped
from hydra_edge.captioning.models import EngineModel, MembersModel
from hydra_edge.errors import CompilationError, InputError


def loud(model: EngineModel, rows: int) -> np.ndarray:
    """States with which untrained captioners say captions of several lengths."""
    width = model.encode(images(1)).states[0].shape[-1]
    return np.random.default_rng(0).normal(0, 6, (rows, width)).astype(np.float32)


@pytest.mark.parametrize("kind", ["student", "ensemble", "member"])
@pytest.mark.parametrize(("rows", "words"), [(1, 1), (1, 12), (5, 3), (16, 12)])
def test_one_run_says_what_steps_say(kind: str, rows: int, words: int) -> None:
    with he.load(engine(kind), threads=1) as session:
        model = EngineModel(session)
        states = loud(model, rows)
        spoken = model.speak([states], words)
        assert spoken is not None
        stepped = _step_by_step(model, [states], words)
    np.testing.assert_array_equal(spoken.words, stepped.words)
    np.testing.assert_allclose(spoken.prob, stepped.prob, rtol=1e-6)
    np.testing.assert_allclose(spoken.doubts, stepped.doubts, rtol=1e-5, atol=1e-6)
    assert spoken.words.shape == spoken.prob.shape == (len(spoken.words), rows)


def test_some_captions_end_before_others() -> None:
    """Else the tests above would not say what becomes of those."""
    with he.load(engine(), threads=1) as session:
        model = EngineModel(session)
        captions = decode(model, [loud(model, 16)], words=12)
    assert len({len(caption.words) for caption in captions}) > 2
    for caption in captions:
        assert np.flatnonzero(caption.words == 0).tolist() in ([], [len(caption.words) - 1])


def test_the_loop_belongs_to_the_session() -> None:
    with he.load(engine(), threads=1) as session:
        first, second = EngineModel(session), EngineModel(session)
        rows = [loud(first, 2)]
        assert first.speak(rows, 3) is not None
        loop = session.derived("greedy", lambda: b"")
        assert second.speak(rows, 3) is not None
        assert session.derived("greedy", lambda: b"") is loop
    with pytest.raises(InputError, match="session is closed"):
        first.speak(rows, 3)


def test_members_one_by_one_take_steps() -> None:
    with he.load(engine("member"), threads=1) as session:
        model = MembersModel([EngineModel(session)] * 2)
        states = model.encode(images(1)).states
        rows = [one.reshape(16, -1) for one in states]
        assert model.speak(rows, 5) is None
        alone = decode(EngineModel(session), rows[:1], words=5)
        together = decode(model, rows, words=5)
    for one, both in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.words, both.words)


def test_a_program_that_says_no_words() -> None:
    value = onnx.helper.make_tensor_value_info("state", onnx.TensorProto.FLOAT, ["R", 4])
    graph = onnx.helper.make_graph([], "g", [value], [value])
    model = onnx.helper.make_model(graph)
    with pytest.raises(CompilationError, match=r"'step' has no 'expected_entropy'.*export_capt"):
        looped(model.SerializeToString())


def test_describing_needs_no_torch(tmp_path: Path) -> None:
    path = engine().save(tmp_path / "scene.hydra")
    np.save(tmp_path / "x.npy", images(2))
    script = f"""
        import sys
        sys.modules["torch"] = None  # importing it fails
        import numpy as np
        import hydra_edge as he
        from hydra_edge.captioning.captioner import CaptionOptions, Describer
        from hydra_edge.captioning.models import EngineModel

        with he.load({str(path)!r}) as session:
            describer = Describer(EngineModel(session), CaptionOptions(score=0.01))
            print(sum(map(len, describer.describe(np.load({str(tmp_path / "x.npy")!r})))))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
