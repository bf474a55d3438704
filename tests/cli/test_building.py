"""`compile` for GPUs that are not here, engines that are built again, and `refit`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx_models import feeds_for, student
from typer.testing import CliRunner, Result

from hydra_edge.artifacts.engine import Engine
from hydra_edge.cli import app
from hydra_edge.quantization import quantize
from hydra_edge.runtime import load


def hydra(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("building")
    for seed in (1, 2):
        graph = student(k=16, hidden=(32,), seed=seed)
        graph.save(folder / f"student{seed}.onnx")
        np.savez(folder / "calibration.npz", **feeds_for(graph, 64))
        stored = quantize(graph, "int8", calibration=feeds_for(graph, 64))
        stored.save(folder / f"int8-{seed}.onnx")
    return folder


INT8 = ("--precision", "int8", "--calibration")


def test_for_several_cards(files: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    target = ("--target", "rtx-3090,rtx-4090")
    done = hydra(
        *("compile", files / "student1.onnx", *INT8, files / "calibration.npz", *target),
        *("-o", tmp_path / "s.hydra", "--profile", "1,1,1"),
    )
    assert done.exit_code == 0, done.output
    assert "rtx-3090,rtx-4090" in done.stdout
    engine = Engine.load(tmp_path / "s.hydra")
    assert engine.is_built
    done = hydra("run", tmp_path / "s.hydra", files / "calibration.npz")
    assert done.exit_code == 4
    assert "error: The engine is for a GPU, sm_86, sm_89." in done.stderr
    assert "--target cpu" in done.stderr


def test_for_a_jetson_it_is_packed_up_and_says_what_to_do(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.hydra"
    done = hydra(
        *("compile", files / "student1.onnx", *INT8, files / "calibration.npz"),
        *("--target", "jetson-agx-orin", "--refittable", "-o", path),
    )
    assert done.exit_code == 0, done.output
    assert "not built yet: TensorRT builds on the GPU it builds for" in done.stderr
    assert "On the device: hydra-edge compile s.hydra -o s.hydra" in done.stderr
    assert "not built yet" in done.stdout
    assert "would be fused" in hydra("inspect", path).stdout
    before = path.read_bytes()
    done = hydra("compile", path, "-o", path)
    assert done.exit_code == 4
    assert "An engine for jetson-agx-orin cannot be built on this machine" in done.stderr
    assert "Copy the file to the device" in done.stderr
    assert path.read_bytes() == before
    done = hydra("run", path, files / "calibration.npz")
    assert done.exit_code == 4
    assert "The engine is not built yet" in done.stderr


def test_what_was_packed_up_is_built_for_another_target(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.hydra"
    made = hydra(
        *("compile", files / "student1.onnx", *INT8, files / "calibration.npz"),
        *("--target", "jetson-agx-orin", "--refittable", "--batch", "1,2,4", "-o", path),
    )
    assert made.exit_code == 0, made.output
    done = hydra("compile", path, "--target", "cpu", "-o", tmp_path / "cpu.hydra", "--json")
    assert done.exit_code == 0, done.output
    engine = Engine.load(tmp_path / "cpu.hydra")
    assert (engine.target, engine.precision) == ("cpu", "int8")
    assert engine.programs["main"].batch == (1, 2, 4)
    assert {"p50_ms", "p50_ms_fp32_twin"} <= set(engine.metrics)
    with load(engine) as session:
        assert session.self_test()["main"] < 0.05


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--refittable",), "The target 'cpu' was asked for refittable"),
        (("--profile", "1,2"), "--profile names 2 sizes"),
        (("--optimization-level", "9"), "The optimization level is 9"),
        (("--logits", "logits"), "--logits was given without --task"),
        (("--target", "rtx-4090,toaster"), "Unknown target 'toaster'"),
        (("--no-plugin", "--lowering", "wide"), "--no-plugin was given with --lowering wide"),
    ],
)
def test_options_that_do_not_fit(files: Path, tmp_path: Path, option: object, words: str) -> None:
    path = tmp_path / "s.hydra"
    done = hydra("compile", files / "student1.onnx", "-o", path, *option)  # type: ignore[misc]
    assert done.exit_code in (1, 2)
    assert words in done.stderr
    assert not path.exists()


def test_an_engine_is_not_quantized_again(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.hydra"
    assert hydra("compile", files / "student1.onnx", "-o", path).exit_code == 0
    done = hydra("compile", path, *INT8, files / "calibration.npz", "-o", tmp_path / "t.hydra")
    assert done.exit_code == 2
    assert "--precision, --calibration was given for an engine" in done.stderr


def test_refit(files: Path, tmp_path: Path) -> None:
    path, new = tmp_path / "s.hydra", tmp_path / "t.hydra"
    assert hydra("compile", files / "int8-1.onnx", "-o", path).exit_code == 0
    done = hydra("refit", path, "--weights", files / "int8-2.onnx", "-o", new, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["replaced in main"]
    with load(path) as old, load(new) as refitted:
        x = feeds_for(student(k=16), 5)
        assert not np.allclose(old.run(x)["mean_prob"], refitted.run(x)["mean_prob"])
    done = hydra("refit", path, "--weights", files / "student2.onnx", "-o", new)
    assert done.exit_code == 1
    assert "stored in fp32, the engine in int8" in done.stderr
