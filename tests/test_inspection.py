"""What people are shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from hydra_edge import inspection, kernels
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.prediction import Prediction
from hydra_edge.errors import CompilationError, MissingDependencyError


def text(table: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


ENGINE = Engine(
    target="cpu",
    backend="onnxruntime",
    task="classification",
    kind="student",
    heads=3,
    labels=("cat", "dog"),
    precision="fp32",
    source_sha256="",
    calibration_sha256=None,
    metrics={},
    tools={},
    programs={},
)


def test_without_a_task_only_shapes_are_shown() -> None:
    prediction = Prediction({"y": np.zeros((3, 50), np.float32)})
    rows = inspection.describe_prediction(prediction, replace(ENGINE, task=None))
    assert rows == [{"y": "float32 [3, 50]"}]


def test_predictions_show_answer_and_uncertainty() -> None:
    prediction = Prediction(
        {
            "mean_prob": np.array([[0.1, 0.9], [0.6, 0.4]], np.float32),
            "mutual_information": np.array([0.01, 0.5], np.float32),
            "head_logits": np.zeros((3, 2, 2), np.float32),
        }
    )
    rows = inspection.describe_prediction(prediction, ENGINE)
    assert rows[0]["answer"] == "dog"
    assert rows[1] == {"sample": 1, "answer": "cat", "probability": 0.6, "mutual_information": 0.5}
    shown = text(inspection.table(rows))
    assert "mutual information" in shown
    assert "dog" in shown


def test_long_predictions_are_cut() -> None:
    rows = inspection.describe_prediction(
        Prediction({"mean": np.zeros((50, 2), np.float32)}), ENGINE
    )
    assert len(rows) == 21
    assert rows[-1] == {"sample": "…", "answer": "30 more"}


def test_markup_in_file_content_is_not_interpreted() -> None:
    assert "[red]x" in text(inspection.table([{"labels": ["[red]x"]}]))


def test_doctor_names_the_command_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inspection,
        "_LIBRARIES",
        (("numpy", "numpy", None, "all"), ("no_such_library", "no-such", "train", "training")),
    )
    rows, healthy = inspection.describe_environment()
    assert healthy
    assert rows["to install"] == ["pip install 'hydra-edge[train]'  (for no-such)"]
    monkeypatch.setattr(inspection, "_LIBRARIES", (("no_such_library", "no-such", None, "all"),))
    assert not inspection.describe_environment()[1]


def test_doctor_tells_about_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Built and on a GPU, built without one, or why they are not there."""

    class Library:
        weight_layout = "hydra-mma16-2"

        def device(self) -> kernels.Device:
            return kernels.Device(87, 16, 163 * 1024)

    monkeypatch.setattr(kernels, "load", Library)
    found = inspection.describe_environment()[0]["cuda kernels"]
    assert found == "on this GPU: sm_87, 16 SMs, weights as hydra-mma16-2"

    def no_device(_: Library) -> kernels.Device:
        raise CompilationError("No CUDA device answers.", "Why.", "Fix.")

    monkeypatch.setattr(Library, "device", no_device)
    found = inspection.describe_environment()[0]["cuda kernels"]
    assert found == "built, weights as hydra-mma16-2; No CUDA device answers."

    def missing() -> Library:
        raise MissingDependencyError("It is not there.", "No nvcc.", "Install it again.")

    monkeypatch.setattr(kernels, "load", missing)
    found = inspection.describe_environment()[0]["cuda kernels"]
    assert found == "not there: No nvcc. Install it again."
