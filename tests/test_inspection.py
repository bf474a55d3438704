"""What people are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hydra_edge import detection, inspection, kernels, targets
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.prediction import Prediction
from hydra_edge.errors import CompilationError, MissingDependencyError
from hydra_edge.gpu import plugin


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


def jetson(root: Path, model: str = "NVIDIA Jetson AGX Orin Developer Kit") -> Path:
    """The files by which a Jetson says what it is."""
    for name, text in {
        "proc/device-tree/model": f"{model}\0",
        "proc/device-tree/compatible": "nvidia,p3737-0000\0nvidia,tegra234\0",
        "proc/meminfo": f"MemTotal: {61 * 2**20} kB\n",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_30W >\n",
        "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_doctor_tells_about_the_machine(tmp_path: Path) -> None:
    rows, _ = inspection.describe_environment(jetson(tmp_path))
    assert rows["gpu"] == ("NVIDIA Jetson AGX Orin Developer Kit, 61.0 GiB, Jetson Linux 36.4.3.")
    assert rows["system"] == "Jetson Linux 36.4.3, power mode MODE_30W"
    assert rows["local target"] == "jetson-agx-orin"


def test_doctor_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        detection, "detect", lambda root: detection.Detection(targets.find("cpu"), "None here.")
    )
    rows, _ = inspection.describe_environment(tmp_path)
    assert (rows["gpu"], rows["system"]) == ("None here.", "no NVIDIA driver")
    assert rows["local target"] == "cpu"


NOT_THERE = (
    ("no_tensorrt", "tensorrt", "tensorrt", "engines"),
    ("no_pycuda.driver", "pycuda", "tensorrt", "running them"),
)


@pytest.mark.parametrize(
    ("on_jetson", "commands"),
    [
        (False, ["pip install 'hydra-edge[tensorrt]'  (for tensorrt, pycuda)"]),
        (
            True,
            ["sudo apt install nvidia-jetpack  (for tensorrt)", "pip install pycuda  (for pycuda)"],
        ),
    ],
)
def test_on_a_jetson_tensorrt_is_that_of_its_jetpack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_jetson: bool, commands: list[str]
) -> None:
    monkeypatch.setattr(inspection, "_LIBRARIES", NOT_THERE)
    rows, healthy = inspection.describe_environment(jetson(tmp_path) if on_jetson else tmp_path)
    assert healthy
    assert rows["to install"] == commands
    assert rows["pycuda"] == ("missing (No module named 'no_pycuda'): needed for running them")


def test_doctor_sees_what_a_virtual_environment_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_LIBRARIES", NOT_THERE[:1])
    (tmp_path / "usr/lib/python3.10/dist-packages/no_tensorrt").mkdir(parents=True)
    rows, _ = inspection.describe_environment(jetson(tmp_path))
    assert "usr/lib/python3.10/dist-packages, which this virtual environment" in rows["tensorrt"]
    assert "--system-site-packages" in rows["tensorrt"]
    assert rows["to install"] == "nothing is missing"


def test_doctor_survives_a_library_that_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT without its driver raises an OSError."""
    (tmp_path / "broken_library.py").write_text("raise OSError('libnvinfer.so.10: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        inspection, "_LIBRARIES", (("broken_library", "broken", "tensorrt", "engines"),)
    )
    rows, _ = inspection.describe_environment(tmp_path)
    assert rows["broken"] == (
        "installed, but does not load (libnvinfer.so.10: not found): for engines"
    )
    assert rows["to install"] == "nothing is missing"


def test_versions_that_only_python_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_the_system.py").write_text("__version__ = '10.3.0'")
    (tmp_path / "of_nobody.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("of_the_system", "of_nobody")
    monkeypatch.setattr(
        inspection, "_LIBRARIES", tuple((name, name, "tensorrt", "engines") for name in names)
    )
    rows, _ = inspection.describe_environment(tmp_path)
    assert [rows[name] for name in names] == ["10.3.0 (engines)", "of unknown version (engines)"]


def test_doctor_tells_for_which_tensorrt_the_plugin_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "path_for", lambda version: tmp_path / f"plugin{version}.so")
    assert inspection.describe_environment(tmp_path)[0]["tensorrt plugin"] == (
        "not there: heads are MatMuls of TensorRT without it; see kernels/README.md"
    )
    (tmp_path / "plugin11.so").touch()
    assert inspection.describe_environment(tmp_path)[0]["tensorrt plugin"] == "for TensorRT 11"
    (tmp_path / "plugin10.so").touch()
    rows = inspection.describe_environment(tmp_path)[0]
    assert rows["tensorrt plugin"] == "for TensorRT 10 and 11"
