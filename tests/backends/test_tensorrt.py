"""TensorRT as far as it can be had without a GPU: its real bindings, and every refusal.

What it builds has never run on a device here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorrt_cpu
from onnx_models import student

from hydra_edge import detection, targets
from hydra_edge.backends import tensorrt
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.errors import (
    DeviceMismatchError,
    InputError,
    MissingDependencyError,
)
from hydra_edge.programs import BuildOptions, BuildRequest

BUILD = """
import json
from pathlib import Path
from onnx_models import feeds_for, student
import tensorrt as trt
from hydra_edge import lowering, targets
from hydra_edge.backends import tensorrt
from hydra_edge.errors import HydraError
from hydra_edge.fusion import fuse
from hydra_edge.gpu import building
from hydra_edge.programs import BuildOptions, BuildRequest
from hydra_edge.quantization import quantize

how = json.loads(sys.argv[1])
source = student(k=16, hidden=(32,))
precision = how.pop("precision", "fp32")
if precision != "fp32":
    source = quantize(source, precision, calibration=feeds_for(source, 40))
model = lowering.lower(fuse(source), how.pop("lowering", "qdq")).model
batch = tuple(how.pop("batch", (1, 4, 8)))
if "timing_cache" in how:
    how["timing_cache"] = Path(how["timing_cache"])
if "profiles" in how:
    how["profiles"] = tuple(map(tuple, how["profiles"]))
free = how.pop("free", None)
orin = targets.find("jetson-agx-orin")
request = BuildRequest((orin,), source.inputs, batch, BuildOptions(**how))
seen = {}

def configure(builder, network, config):
    tensorrt._configure(trt, request)(builder, network, config)
    seen["profiles"] = config.num_optimization_profiles
    seen["workspace"] = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    seen["level"] = config.builder_optimization_level
    seen["flags"] = [n for n in ("TF32", "REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE")
                     if config.get_flag(getattr(trt.BuilderFlag, n))]
    seen["verbosity"] = str(config.profiling_verbosity)
    seen["monitored"] = config.progress_monitor is not None

product = building.Product("TensorRT", trt, configure, free)
try:
    plan = building.build(product, model, request)
    seen |= {"bytes": len(plan.data), "notes": plan.notes}
except HydraError as refused:
    seen["refused"] = str(refused)
print(json.dumps(seen))
"""


def built(**how: object) -> dict[str, object]:
    found: dict[str, object] = json.loads(tensorrt_cpu.run(BUILD, json.dumps(how)))
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-weight-only"])
def test_the_real_bindings_take_every_precision(precision: str) -> None:
    found = built(precision=precision)
    assert found["bytes"] > 10_000  # type: ignore[operator]
    assert found["profiles"] == 1
    assert found["flags"] == []  # fp32 is fp32
    assert found["verbosity"] == "ProfilingVerbosity.DETAILED"
    assert found["monitored"]


def test_options_reach_the_builder() -> None:
    found = built(tf32=True, workspace_mb=64, optimization_level=1, profiles=[[1, 1, 1], [2, 2, 2]])
    assert found["flags"] == ["TF32"]
    assert found["workspace"] == 64 << 20
    assert found["level"] == 1
    assert found["profiles"] == 3


def test_the_workspace_is_half_of_what_is_free() -> None:
    assert built(free=1 << 30)["workspace"] == 1 << 29
    assert built(free=1 << 30, workspace_mb=10)["workspace"] == 10 << 20
    assert built(free=1 << 30, workspace_mb=900)["workspace"] == 1 << 29


def test_refit_reaches_the_builder() -> None:
    """The builder behind the bindings gives nothing then; TensorRT's does."""
    for option in ("refittable", "strip_weights"):
        found = built(**{option: True})
        assert found["flags"] == ["REFIT"]
    assert "TensorRT built no engine for jetson-agx-orin. It said:" in str(found["refused"])


def test_a_timing_cache_is_written_read_and_merged(tmp_path: Path) -> None:
    cache = tmp_path / "device.cache"
    first = built(timing_cache=str(cache))
    assert first["notes"] == []
    assert cache.stat().st_size > 0
    assert built(timing_cache=str(cache))["notes"] == []


def test_a_plugin_node_without_its_library() -> None:
    said = str(built(precision="fp16", lowering="plugin")["refused"])
    assert "TensorRT built no engine" in said
    assert "HydraHeads" in said


def test_a_dla_that_is_not_there() -> None:
    said = str(built(dla_core=1, batch=(4, 4, 4))["refused"])
    assert "The DLA core 1 was asked for. TensorRT 11.4" in said
    assert "finds 0 of them here" in said


def request(target: str = "jetson-agx-orin", **options: object) -> BuildRequest:
    batch = options.pop("batch", (1, 8, 32))
    return BuildRequest(
        (targets.find(target),),
        student().inputs,
        batch,  # type: ignore[arg-type]
        BuildOptions(**options),  # type: ignore[arg-type]
    )


def test_without_a_gpu_everything_is_packed_up_for_the_device(tmp_path: Path) -> None:
    source = student(k=16)
    options = CompileOptions(build=BuildOptions(workspace_mb=100, profiles=((1, 1, 1),)))
    engine = compile(source, "jetson-agx-orin@jp6.2", options=options)
    assert not engine.is_built
    program = engine.programs["main"]
    assert (program.payload, program.lowering) == (b"", "")
    assert program.notes[0].startswith("TensorRT builds on the GPU it builds for")
    again = type(engine).load(engine.save(tmp_path / "s.hydra")).programs["main"]
    assert BuildOptions.from_json(again.facts["build_options"]) == options.build
    assert again.notes == program.notes


def here(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    found = detection.Detection(targets.find(target), f"This is a {target}.")
    monkeypatch.setattr(detection, "detect", lambda: found)


def test_a_gpu_of_another_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "h200")
    assert tensorrt.builds_elsewhere(request()) == (
        "TensorRT builds on the GPU it builds for, sm_87; here is This is a h200."
    )
    assert "sm_80" in tensorrt.builds_elsewhere(request("a100"))
    said = tensorrt.builds_elsewhere(request("a100", hardware_compatible=True))
    assert "sm_80" not in said  # TensorRT itself is what is missing then


def test_the_right_gpu_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "h200")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    said = tensorrt.builds_elsewhere(request("h100"))  # of the same generation
    assert said.startswith("The library 'tensorrt' is not installed.")
    assert "pip install 'hydra-edge[tensorrt]'" in said


def test_an_old_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    old = types.ModuleType("tensorrt")
    old.__version__ = "8.6.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(DeviceMismatchError, match=r"TensorRT 8\.6\.1 is installed") as caught:
        tensorrt.versions()
    assert "10.3" in caught.value.why
    assert "JetPack 6.2" in caught.value.fix


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("jetson-orin-nano", {"dla_core": 0}, "It has 0 of them"),
        ("jetson-agx-orin", {"dla_core": 2}, "It has 2 of them"),
        ("jetson-agx-orin", {"dla_core": 0}, "A DLA runs one size"),
        ("jetson-agx-orin", {"hardware_compatible": True}, "for cards alone"),
    ],
)
def test_options_that_do_not_fit(target: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        tensorrt.builds_elsewhere(request(target, **options))


def test_a_batch_of_one_size_fits_a_dla() -> None:
    assert tensorrt.builds_elsewhere(request(dla_core=0, batch=(4, 4, 4)))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match="tensorrt"):
        tensorrt.versions()


def test_memory_that_cpu_and_gpu_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system caches is free for a build; CUDA does not count it."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 7800000 kB\nMemAvailable:    5000000 kB\n")
    monkeypatch.setattr(tensorrt, "_MEMORY", meminfo)
    jetson = SimpleNamespace(integrated=True, free_bytes=lambda: 300 << 20)
    card = SimpleNamespace(integrated=False, free_bytes=lambda: 300 << 20)
    assert tensorrt._free_bytes(jetson) == 5000000 * 1024  # type: ignore[arg-type]
    assert tensorrt._free_bytes(card) == 300 << 20  # type: ignore[arg-type]
    monkeypatch.setattr(tensorrt, "_MEMORY", tmp_path / "not there")
    assert tensorrt._free_bytes(jetson) == 300 << 20  # type: ignore[arg-type]
