"""What benchmarks/kernels.py times computes the same on both sides: here on the emulated device."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hydra_edge import torch_kernels
from hydra_edge.errors import HydraError
from kernels.emulation import CONSTANT, OUTPUT, Emulator

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import kernel_work
from head_shapes import Shape
from kernel_model import FORMATS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPES = (
    Shape("linear", 4, 64, (), 10),
    Shape("MLP", 3, 50, (40,), 7),
    Shape("normed", 2, 64, (48,), 20, norm=True),
    Shape("many logits", 9, 32, (), 4000),
)
TOLERANCE = {"fp16": 4e-3, "w8a8": 0.06, "w8a16": 0.03, "w4a16": 0.4}


def registered(emulator: Emulator, work: kernel_work.Ours) -> kernel_work.Ours:
    for kind, tensors in ((CONSTANT, work.constants), (OUTPUT, work.buffers)):
        for i, tensor in enumerate(tensors):
            emulator.handle.hydra_emulator_register(
                ctypes.c_void_p(tensor.data_ptr()),
                ctypes.c_size_t(tensor.numel() * tensor.element_size()),
                f"{kind} {i}".encode(),
                kind,
            )
    return work


@pytest.mark.parametrize("how", ["separate", "bmm"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_baselines_agree(shape: Shape, how: str) -> None:
    heads = kernel_work.Heads.random(shape, "cpu")
    found = kernel_work.Torch(heads, 5, how, copies=2).run(1)
    h = heads.input(5).double()
    for i, weight in enumerate(heads.weights):
        h = h @ weight.double() + heads.biases[i][:, None]
        if i < len(heads.weights) - 1:
            h = kernel_work.normalised(h) if shape.norm else h.relu()
    for left, right in zip(found, torch_kernels.summarize(h), strict=True):
        torch.testing.assert_close(left, right, rtol=0.02, atol=4e-3)


@pytest.mark.parametrize("path", ["layers", "chain"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_ours_agree_with_torch(emulator: Emulator, shape: Shape, format, path: str) -> None:
    if path == "chain" and not shape.hidden:
        pytest.skip("one layer is no chain")
    heads = kernel_work.Heads.random(shape, "cpu")
    expected = kernel_work.Torch(heads, 5, "bmm", copies=1).run(0)
    ours = registered(
        emulator, kernel_work.Ours(emulator.library, heads, 5, format, path, copies=2)
    )
    for copy in (0, 1):
        try:
            found = ours.run(copy)
        except HydraError as error:
            raise AssertionError(f"{error}\n{emulator.fault}") from error
        for left, right in zip(found[:4], expected[:4], strict=True):
            torch.testing.assert_close(left, right, rtol=0.02, atol=TOLERANCE[format.name])
    assert ours.summary_alone == (shape.name == "many logits")
    assert ours.launches >= 1


def test_paths(emulator: Emulator) -> None:
    linear, mlp, _, _ = SHAPES
    wide = Shape("wide", 2, 64, (100_000,), 10)
    fp16 = FORMATS[0]
    assert kernel_work.paths(emulator.library, linear, 4, fp16) == ["layers"]
    assert kernel_work.paths(emulator.library, mlp, 4, fp16) == ["chain", "layers"]
    assert kernel_work.paths(emulator.library, wide, 4, fp16) == ["layers"]


def benchmark() -> ModuleType:
    """benchmarks/kernels.py, whose name is that of this package."""
    spec = importlib.util.spec_from_file_location("benchmark", BENCHMARKS / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def side(name: str, megabytes: float, us: float, **more: object) -> dict[str, object]:
    times = {"median_us": us, "gb_per_s": megabytes / us, "fraction": 0.8, "of_floor": 0.9}
    return {"name": name, "weight_bytes": int(megabytes * 1e6), "cold": times, "warm": times} | more


def test_what_the_record_says(tmp_path: Path) -> None:
    """Two rows made by hand: 2x and 1.5x over the best baseline, int8 1.6x over fp16."""
    module = benchmark()
    rows = [
        {
            "shape": {"name": "large"},
            "batch": 8,
            "sides": [
                side("separate", 50, 400.0),
                side("bmm", 50, 200.0),
                side("fp16 layers", 50, 100.0, preferred=True),
                side("w8a8 layers", 25, 62.5, preferred=True),
                side("w8a16 layers", 25, 10.0, preferred=False),
            ],
        },
        {
            "shape": {"name": "small"},
            "batch": 1,
            "sides": [side("bmm", 0.1, 6.0), side("fp16 chain", 0.1, 4.0, preferred=True)],
        },
    ]
    targets = module.targets(rows)
    assert list(targets.values()) == pytest.approx([0.8, 1 / 0.9, 1.5, 3**0.5, 1.6])
    machine = {"gpu": "a GPU", "copy_bandwidth": 1e12, "empty_kernel_us": 1.5}
    record = {"rows": rows, "targets": targets, "machine": machine}
    lines = module.table(record).splitlines()
    assert lines[3].endswith("2.00 *")
    assert len(lines) == 1 + 7 + 1 + 5
    module.plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert all(value is None for value in module.targets([]).values())


def test_copies_take_twice_the_cache() -> None:
    copies_for, l2 = benchmark().copies_for, 50 << 20
    for weight_bytes in (4_000_000, 20_000_000, 510_000_000):
        assert (copies_for(weight_bytes, l2) - 1) * weight_bytes > 2 * l2
    assert copies_for(1000, l2) == 256  # which then stay in the cache


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    output = tmp_path / "kernels.json"
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    record = json.loads(output.read_text())
    assert record["measured"] is False
    assert record["why"] == "no CUDA device on this machine"
    committed = json.loads((BENCHMARKS / "results" / "kernels.json").read_text())
    assert committed["measured"] or committed["targets"] == record["targets"]
