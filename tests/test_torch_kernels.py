"""The torch operators: on the CPU everywhere, on the GPU against the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hydra_edge import kernels, torch_kernels
from hydra_edge.errors import InputError
from hydra_edge.ops.ensemble_summary import reference_classification
from hydra_edge.torch_kernels import KINDS, ensemble_summary, grouped_linear, pack
from kernels import gpu

# Largest error of a rounded weight, relative to the largest weight of its column.
STEP = {"fp16": 2**-11, "bf16": 2**-8, "int8": 0.5 / 127, "int4": 0.5 / 6.5}


def layer(m: int = 3, b: int = 5, k: int = 70, n: int = 20) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn((m, k, n), generator=random) / k**0.5
    return torch.randn((b, k), generator=random), weight, torch.randn((m, n), generator=random)


def of_kind(x: torch.Tensor, kind: str) -> torch.Tensor:
    return x.to(torch.bfloat16 if kind == "bf16" else torch.float16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_head", [False, True])
def test_weights_are_rounded_by_less_than_a_step(kind: str, per_head: bool) -> None:
    x, weight, bias = layer()
    x = of_kind(x, kind)
    if per_head:
        x = torch.stack([x, 2 * x, -x])
    y = grouped_linear(x, pack(weight, kind), bias, activation="gelu")
    exact = torch.nn.functional.gelu(x.double() @ weight.double() + bias[:, None].double())
    bound = STEP[kind] * weight.abs().max() * x.double().abs().sum(-1).max() * 1.2
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() < bound
    assert (y - exact).abs().max() > 0


def test_integers() -> None:
    """int8 x and int8 weights multiply exactly; so does 16-bit x that is quantized on the way."""
    _, weight, _ = layer()
    packed = pack(weight, "int8")
    assert packed.scale is not None
    x = torch.randint(-128, 128, (5, 70), dtype=torch.int8)
    scale = torch.tensor([0.25])
    y = grouped_linear(x, packed, x_scale=scale)
    integers = torch.round(weight / packed.scale[:, None]).double()
    exact = x.double() * 0.25 @ (integers * packed.scale[:, None])
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    again = grouped_linear((x.float() * 0.25).half(), packed, x_scale=scale)
    torch.testing.assert_close(again, y)
    requantized = grouped_linear(
        x, packed, x_scale=scale, y_scale=torch.tensor([0.5]), y_dtype=torch.int8
    )
    expected = torch.clamp(torch.round(y / 0.5), -128, 127).to(torch.int8)
    torch.testing.assert_close(requantized, expected)


def test_summary_is_the_reference() -> None:
    logits = torch.randn((4, 6, 10), generator=torch.Generator().manual_seed(1)) * 3
    expected = reference_classification(logits.numpy())
    for found, reference in zip(ensemble_summary(logits), expected.values(), strict=True):
        np.testing.assert_allclose(found.numpy(), reference, rtol=1e-5, atol=1e-6)


def test_operators_are_what_torch_expects() -> None:
    x, weight, bias = layer()
    packed = pack(weight, "int4", group=32)
    arguments = (
        x.half(), packed.weight, bias, packed.scale, packed.group_scale, None, None,
        "int4", 20, 32, "relu", torch.float32,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.hydra.grouped_linear.default, arguments)
    torch.library.opcheck(torch.ops.hydra.ensemble_summary.default, (torch.randn(2, 3, 4),))


def test_bad_input() -> None:
    x, weight, bias = layer()
    packed = pack(weight, "fp16")
    with pytest.raises(InputError, match="kind 'fp8'"):
        pack(weight, "fp8")
    with pytest.raises(InputError, match=r"Weights of shape \[70, 20\]"):
        pack(weight[0], "int8")
    with pytest.raises(InputError, match=r"x of shape \[5, 69\] for 3 heads of K=70"):
        grouped_linear(x[:, 1:].half(), packed)
    with pytest.raises(InputError, match=r"x in torch\.float64"):
        grouped_linear(x.double(), packed)
    with pytest.raises(InputError, match="activation 'elu'"):
        grouped_linear(x.half(), packed, activation="elu")
    with pytest.raises(InputError, match=r"shape \[20\]"):
        grouped_linear(x.half(), packed, bias[0])
    with pytest.raises(InputError, match=r"x in torch\.bfloat16 for int4 weights"):
        grouped_linear(x.bfloat16(), pack(weight, "int4"))
    grouped_linear(x.bfloat16(), pack(weight, "int4", bfloat16=True))
    with pytest.raises(InputError, match="a scale for every 48 values"):
        pack(weight, "int4", group=48)
    with pytest.raises(InputError, match=r"x in torch\.float32 for weights of kind 'fp16'"):
        grouped_linear(x, packed)
    with pytest.raises(InputError, match=r"x in torch\.int8 for weights of kind 'int4'"):
        grouped_linear(x.to(torch.int8), pack(weight, "int4"), x_scale=torch.ones(1))
    with pytest.raises(InputError, match="in int8, without a scale"):
        grouped_linear(x.to(torch.int8), pack(weight, "int8"))
    with pytest.raises(InputError, match="in int8, without a scale"):
        grouped_linear(x.half(), packed, y_dtype=torch.int8)
    with pytest.raises(InputError, match=r"A scale of shape \[2\]"):
        grouped_linear(x.half(), packed, x_scale=torch.ones(2))
    elsewhere = replace(packed, weight=packed.weight.to("meta"))
    with pytest.raises(InputError, match="x is on cpu, and weights"):
        grouped_linear(x.half(), elsewhere)
    with pytest.raises(InputError, match=r"Logits of shape \[2, 3\]"):
        ensemble_summary(torch.ones(2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_against_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason, path = gpu.missing(), gpu.library_path()
    if reason or path is None:
        pytest.skip(reason or "no library")
    library = kernels.Library(path)
    monkeypatch.setattr(torch_kernels, "_library", lambda: library)
    x, weight, bias = layer(8, 9, 256, 100)
    x = of_kind(x, kind)
    expected = grouped_linear(x, pack(weight, kind), bias)
    packed = pack(weight, kind, device="cuda")
    found = grouped_linear(x.cuda(), packed, bias.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=5e-3, atol=5e-3)
    compiled = torch.compile(lambda x: ensemble_summary(grouped_linear(x, packed, bias.cuda())))
    for left, right in zip(compiled(x.cuda()), ensemble_summary(expected), strict=True):
        torch.testing.assert_close(left.cpu(), right, rtol=1e-2, atol=1e-3)
