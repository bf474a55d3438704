"""The commands until an engine lies on its device."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hydra_edge import detection, targets
from hydra_edge.cli import app
from hydra_edge.deployment import steps
from hydra_edge.errors import InputError

GRAPH = Path("models/student.onnx")


def commands(
    asked: str, precision: str = "fp16", batches: tuple[int, ...] = (1, 8, 32)
) -> list[str]:
    found = steps(targets.find(asked), asked, GRAPH, precision, batches)
    return [f"{step.where}$ {step.command}" for step in found]


def test_a_jetson_gets_a_packed_up_file_and_builds_at_full_speed() -> None:
    assert commands("jetson-orin-nano@jp6.2") == [
        "here$ hydra-edge compile models/student.onnx --target jetson-orin-nano@jp6.2 "
        "--precision fp16 -o student.hydra",
        "here$ scp student.hydra DEVICE:",
        "device$ hydra-edge doctor",
        "device$ sudo nvpmodel -m 2",
        "device$ sudo jetson_clocks",
        "device$ hydra-edge compile student.hydra -o student.hydra",
    ]


def test_other_gpus_of_tensorrt_have_no_power_modes() -> None:
    assert commands("l4") == [
        "here$ hydra-edge compile models/student.onnx --target l4 --precision fp16 "
        "-o student.hydra",
        "here$ scp student.hydra DEVICE:",
        "device$ hydra-edge doctor",
        "device$ hydra-edge compile student.hydra -o student.hydra",
    ]


def test_calibration_is_done_here() -> None:
    first, *rest = commands("jetson-thor", "int8")
    assert "--precision int8 --calibration calibration.npz -o student.hydra" in first
    assert "calibration" not in " ".join(rest)
    assert "calibration" not in " ".join(commands("jetson-thor", "int8-weight-only"))


def test_rtx_is_built_here_and_copied() -> None:
    assert commands("rtx-4090", "fp8") == [
        "here$ hydra-edge compile models/student.onnx --target rtx-4090 --precision fp8 "
        "--calibration calibration.npz -o student.hydra",
        "here$ scp student.hydra DEVICE:",
    ]


def test_the_cpu_is_built_for_here() -> None:
    assert commands("cpu", "fp32") == [
        "here$ hydra-edge compile models/student.onnx --target cpu -o student.hydra"
    ]


@pytest.mark.parametrize(
    ("batches", "option"), [((4,), "4,4,4"), ((16, 1), "1,16,16"), ((64, 1, 8, 2), "1,8,64")]
)
def test_batches(batches: tuple[int, ...], option: str) -> None:
    assert f" --batch {option} -o" in commands("cpu", batches=batches)[0]


@pytest.mark.parametrize("name", ["jetson-agx-orin", "rtx-4090", "l4", "cpu"])
def test_on_this_machine_nothing_is_copied(name: str) -> None:
    found = steps(targets.find(name), "local@jp6.2", GRAPH, "fp16")
    assert {step.where for step in found} == {"here"}
    assert not any("scp" in step.command for step in found)
    assert "compile models/student.onnx --target local@jp6.2" in found[-1].command
    assert (len(found) == 3) == name.startswith("jetson")


def test_a_module_whose_modes_are_not_known() -> None:
    like = targets.find("jetson-agx-orin")
    unknown = detection._jetson_like(like, "a board", 2**34)
    assert not any("nvpmodel" in step.command for step in steps(unknown, "local", GRAPH, "fp16"))


def test_a_precision_it_does_not_have() -> None:
    with pytest.raises(InputError, match=r"jetson-agx-orin has no fp8\. It has: fp32, fp16"):
        commands("jetson-agx-orin", "fp8")


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_our_own_commands_are_ones_that_we_take(target: targets.Target) -> None:
    """Every option exists: nothing is missing but the file."""
    for precision in target.precisions:
        found = steps(target, target.name, GRAPH, precision, (1, 4))
        assert all(step.why for step in found)
        compiling = [step for step in found if "hydra-edge compile" in step.command]
        assert len(compiling) == (2 if target.backend == "tensorrt" else 1)
        for step in compiling:
            done = CliRunner().invoke(app, shlex.split(step.command)[1:])
            assert done.exit_code == 1
            assert re.search(r"student\.(onnx|hydra)' does not exist", done.stderr)
