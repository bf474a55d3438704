"""`run --question`, and files stored in an engine by `compile --asset`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from questions import ANSWERS, SIZE, TEXTS, graph, tokenizer
from typer.testing import CliRunner, Result

from hydra_edge.artifacts.engine import Engine
from hydra_edge.cli import app


def hydra(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asking")
    graph().save(folder / "student.onnx")
    (folder / "words.json").write_bytes(tokenizer().to_bytes())
    Image.fromarray(np.full((9, 9, 3), 90, np.uint8)).save(folder / "image.png")
    made = hydra(
        *("compile", folder / "student.onnx", "--asset", f"tokenizer.json={folder}/words.json"),
        *("--threads", 1, "--lowering", "grouped", "-o", folder / "student.hydra"),
    )
    assert made.exit_code == 0, made.output
    assert "tokenizer.json" in made.stdout
    return folder


def test_a_table(folder: Path) -> None:
    found = hydra(
        *("run", folder / "student.hydra", folder / "image.png", "--question", "is the dog red?"),
        *("--defer", "probability=1.0"),
    )
    assert found.exit_code == 0, found.output
    assert all(answer in found.stdout for answer in ANSWERS)
    assert "mutual_information" in found.stdout
    assert "yes: ask somebody else" in found.stdout
    assert "dog" in found.stdout


def test_json(folder: Path) -> None:
    found = hydra(
        "run", folder / "student.hydra", folder / "image.png", "--question", TEXTS[0], "--json"
    )
    reply = json.loads(found.stdout)
    assert {answer["text"] for answer in reply["answers"]} == set(ANSWERS)
    assert sum(answer["probability"] for answer in reply["answers"]) == pytest.approx(1, abs=1e-5)
    assert reply["defer"] is None
    assert reply["unknown_words"] == []


def test_assets_stay_with_an_engine_that_is_built_again(folder: Path, tmp_path: Path) -> None:
    done = hydra("compile", folder / "student.hydra", "-o", tmp_path / "again.hydra")
    assert done.exit_code == 0, done.output
    assert set(Engine.load(tmp_path / "again.hydra").assets) == {"tokenizer.json"}
    assert Engine.load(folder / "student.hydra").inputs[1].shape[1] == SIZE + 2


def test_usage(folder: Path) -> None:
    args = ("run", folder / "student.hydra", folder / "image.png", "--question", TEXTS[0])
    both = hydra(*args, "-o", "x.npz")
    assert both.exit_code == 2
    assert "--output or --head-logits was given with --question" in both.stderr
    odd = hydra("compile", folder / "student.onnx", "--asset", "words.json", "-o", "x.hydra")
    assert odd.exit_code == 2
    assert "names no file" in odd.stderr
    rule = hydra(*args, "--defer", "luck=1")
    assert rule.exit_code == 1
    assert "probability, predictive_entropy, mutual_information" in rule.stderr
