"""What benchmarks/kernels.py times computes the same on both sides: here on the emulated device."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from kernels.emulation import CONSTANT, OUTPUT, Emulator

from hydra_edge.errors import HydraError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import kernel_work
from head_shapes import Shape
from kernel_model import FORMATS

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
    for left, right in zip(found, kernel_work.summary(h), strict=True):
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
