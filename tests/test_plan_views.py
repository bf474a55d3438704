"""Plans and targets as they are shown."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from onnx_models import mlp_heads
from rich.console import Console

from hydra_edge import deployment, plan_views, targets
from hydra_edge.artifacts.graph import Graph
from hydra_edge.detection import Detection
from hydra_edge.planning import Plan, plan


def shown(*parts: object) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
    return capture.get()


def student() -> Graph:
    return mlp_heads(4, 256, (512,), 10)


def lines(found: Plan, asked: str) -> str:
    steps = deployment.steps(found.target, asked, Path("a[b].onnx"), "fp16")
    return shown(*plan_views.plan_lines(found, steps))


def test_rows_of_a_jetson() -> None:
    rows = plan_views.describe_plan(plan(student(), "jetson-orin-nx@jp6.2"))
    assert rows["target"] == "Jetson Orin NX 16 GB Super."
    assert rows["gpu"] == "sm_87, 8 SMs at 1.173 GHz, 16 GB at 102.4 GB/s, 2 DLA"
    assert rows["power modes"] == "MAXN_SUPER (0), 40W (4), 25W (3), 15W (2), 10W (1)"
    assert rows["software"] == ["jetson-orin-nx@jp6.2: TensorRT 10.3, CUDA 12.6, Python 3.10"]
    assert "no  fp8: tensor cores of sm_87 do not multiply it" in rows["features"]
    assert "yes plugin: layers of all heads and the summary in our own kernels" in rows["features"]
    assert rows["its ensemble"] == (
        "4 members of one body and one head each: 1.61 MFLOP per sample, 1.32 times as many"
    )
    assert "engine" not in rows


def test_rows_of_others() -> None:
    rows = plan_views.describe_plan(plan(student(), "rtx-4090"))
    assert rows["software"] == ["rtx-4090@rtx1.7: TensorRT-RTX 1.7, CUDA 13.2"]
    assert "no  DLA" in rows["features"]
    assert not {"power modes", "engine"} & set(rows)
    rows = plan_views.describe_plan(plan(student(), "cpu"))
    assert rows["software"] == ["ONNX Runtime"]
    assert not {"gpu", "source", "power"} & set(rows)


def test_what_is_not_known_is_left_out() -> None:
    row = targets.find("l4")
    assert row.gpu is not None
    gpu = replace(row.gpu, sm_count=0, clock_ghz=0, bandwidth_gb_s=0)
    rows = plan_views.describe_plan(plan(student(), replace(row, gpu=gpu)))
    assert rows["gpu"] == "sm_89, 24 GB"


def test_without_heads_there_is_no_ensemble() -> None:
    found = replace(plan(student(), "l4"), ensemble=None)
    assert "its ensemble" not in plan_views.describe_plan(found)


def test_a_target_without_a_backend() -> None:
    found = plan(student(), replace(targets.find("l4"), backend="tpu"))
    assert plan_views.describe_plan(found)["engine"] == (
        "not built by this version, which has no backend 'tpu'"
    )
    steps = (deployment.Step("here", "true", "why"),)
    assert "to do" not in shown(*plan_views.plan_lines(found, steps))


def test_batches_that_take_the_same_time_share_a_line() -> None:
    found = plan(student(), "jetson-agx-orin", batches=(1, 8, 5000))
    text = shown(plan_views.plan_table(found))
    (line,) = [line for line in text.splitlines() if line.startswith("int8 ")]
    assert line.split()[:4] == ["int8", "613", "kB", "810"]
    assert "1, 8" in line
    assert line.split()[-3:] == ["memory", "batch", "209"]
    assert plan_views.plan_table(found).row_count == 2 * len(found.precisions)
    assert text.count("compute") == 1 + len(found.precisions)  # and the title


def test_times_below_a_microsecond_have_no_digits() -> None:
    text = shown(plan_views.plan_table(plan(mlp_heads(4, 8, (8,), 10), "h200")))
    assert "722 B       944 B  1, 8, 32     <0.001      <0.001" in text
    assert not re.search(r"\de-", text)


def test_the_cpu_has_bytes_alone() -> None:
    found = plan(student(), "cpu")
    table = plan_views.plan_table(found)
    assert table.row_count == len(found.precisions)
    assert "memory" not in shown(table)
    assert "A floor is" not in lines(found, "cpu")


def test_a_rate_that_is_not_known() -> None:
    assert shown(plan_views.plan_table(plan(student(), "jetson-thor"))).count("no rate") == 1


def test_notes_and_commands() -> None:
    found = plan(student(), "jetson-thor")
    text = lines(found, "jetson-thor")
    assert "A floor is the least time" in text
    assert "mind: No tensor rate of int8" in text
    assert "    scp 'a[b].hydra' DEVICE:\n" in text
    assert "  on the device: MAXN, as" in text
    assert text.endswith("    hydra-edge compile 'a[b].hydra' -o 'a[b].hydra'\n")


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_every_target_is_shown(target: targets.Target) -> None:
    found = plan(student(), target)
    text = shown(plan_views.plan_table(found)) + lines(found, target.name)
    assert f"--target {target.name} " in text


def test_the_table_marks_this_machine() -> None:
    text = shown(plan_views.targets_table(Detection(targets.find("rtx-4090"), "")))
    (marked,) = [line for line in text.splitlines() if "*" in line]
    assert marked.split()[:2] == ["*", "rtx-4090"]
    assert "plan only" not in text
    assert len(text.splitlines()) == 1 + len(targets.TARGETS)  # a line each


def test_a_machine_that_is_not_in_the_table() -> None:
    row = targets.find("l4")
    other = replace(row, name="nvidia-a40", backend="tpu", precisions=("fp32", "fp16"))
    here = Detection(other, "")
    assert plan_views.known_targets(here) == (*targets.TARGETS, other)
    last = shown(plan_views.targets_table(here)).splitlines()[-1]
    assert last.split()[:2] == ["*", "nvidia-a40"]
    assert "fp32, fp16" in last
    assert "plan only" in last


def test_few_words_for_precisions() -> None:
    text = shown(plan_views.targets_table(Detection(targets.find("cpu"), "")))
    of = {line[2:].split()[0]: line for line in text.splitlines()}
    assert "all but fp8" in of["jetson-agx-orin"]
    assert " all " in of["h200"]
    assert "fp32, fp16, int8" in of["cpu"]
