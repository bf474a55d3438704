"""Engines of several programs, and captions of pictures, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from captioners import OPTIONS, engine, graphs, images
from typer.testing import CliRunner, Result

import hydra_edge as he
from hydra_edge.cli import app
from hydra_edge.cli.captions import describe_picture

pillow = pytest.importorskip("PIL.Image")


def hydra(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, graph in graphs("student").items():
        graph.save(tmp_path / f"{name}.onnx")
        he.only(engine(), name).save(tmp_path / f"{name}.hydra")
    engine().save(tmp_path / "scene.hydra")
    np.savez(tmp_path / "images.npz", image=images(8))
    width = graphs("student")["step"].inputs[1].shape[1]
    state = np.random.default_rng(0).normal(size=(20, int(width))).astype(np.float32)
    np.savez(tmp_path / "words.npz", word=np.arange(20) % 6, state=state)
    pixels = (images(1)[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    pillow.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path


def test_join(folder: Path) -> None:
    parts = [f"{name}={folder / name}.hydra" for name in ("encode", "step", "reorder")]
    done = hydra("join", *parts, "-o", folder / "joined.hydra", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["heads"] == 3
    joined = he.Engine.load(folder / "joined.hydra")
    for name, program in engine().programs.items():
        assert joined.programs[name].payload == program.payload
    with he.load(joined, threads=1) as session:
        session.self_test()
    rows = hydra("inspect", folder / "joined.hydra").stdout
    assert all(f"program {name}" in rows for name in engine().programs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scene.hydra"], "'scene.hydra' names no program"),
        (["a=step.hydra", "a=step.hydra"], "Two programs have the same name"),
    ],
)
def test_join_of_what_it_cannot(folder: Path, arguments: list[str], message: str) -> None:
    done = hydra("join", *arguments, "-o", folder / "out.hydra")
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (folder / "out.hydra").exists()


def test_verify_run_bench_and_refit_take_a_program(folder: Path) -> None:
    scene = folder / "scene.hydra"
    for name, data in (("encode", "images.npz"), ("step", "words.npz")):
        against = ("--against", folder / f"{name}.onnx", "--data", folder / data)
        assert hydra("verify", scene, *against, "--program", name).exit_code == 0
        done = hydra("run", scene, folder / data, "--program", name, "-o", folder / "out.npz")
        assert done.exit_code == 0, done.output
    with np.load(folder / "out.npz") as found:
        assert found["mean_prob"].shape == (20, 6)
    data = ("--data", folder / "words.npz", "--program", "step", "--batches", "1")
    done = hydra("bench", scene, *data, "--json")
    assert json.loads(done.stdout)["latencies"][0]["p50_ms"] > 0
    without = hydra("verify", scene, *against)
    assert without.exit_code == 1
    assert "It has: encode, reorder, step" in without.stderr
    weights = ("--weights", folder / "step.onnx", "-o", folder / "new.hydra")
    done = hydra("refit", scene, *weights, "--program", "step")
    assert "The graph has the weights that the engine has" in done.stderr


def test_a_picture_is_described_and_drawn(folder: Path) -> None:
    # An untrained captioner is sure of nothing, so what is drawn may be the picture alone.
    scene, picture = folder / "scene.hydra", folder / "image.png"
    done = hydra("run", scene, picture, "--draw", folder / "out.png", "-o", folder / "out.json")
    assert done.exit_code == 0, done.output
    with pillow.open(folder / "out.png") as drawn:
        assert drawn.size[0] > 640
    assert isinstance(json.loads((folder / "out.json").read_text()), list)
    done = hydra("run", scene, picture, "--json", "--beam", "2")
    assert isinstance(json.loads(done.stdout), list)


def test_pictures_are_for_captioners(folder: Path) -> None:
    he.compile(graphs("student")["step"], options=OPTIONS).save(folder / "single.hydra")
    done = hydra("run", folder / "single.hydra", folder / "image.png")
    assert done.exit_code == 1
    assert "The engine has no program 'encode'" in done.stderr
    done = hydra("run", folder / "scene.hydra", folder / "images.npz", "--draw", folder / "a.png")
    assert done.exit_code == 2
    assert "They are for image files" in done.stderr


def test_the_library_call_prints_regions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe_picture(
        folder / "scene.hydra",
        folder / "image.png",
        output=None,
        draw=None,
        beam=1,
        threads=1,
        as_json=False,
    )
    text = capsys.readouterr().out
    assert "nothing was found" in text or "total = data + model" in text
