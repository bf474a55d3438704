"""`head_chain` on the emulated device against numpy, which rounds where the kernel rounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hydra_edge.errors import CompilationError, HydraError
from hydra_edge.kernels import (
    BFLOAT16,
    FLOAT16,
    INT8,
    MAX_LAYERS,
    ChainArguments,
    ChainConfig,
    ChainLayer,
    ChainShape,
    SummaryOutputs,
)
from hydra_edge.ops import packing
from hydra_edge.ops.ensemble_summary import CLASSIFICATION_OUTPUTS, reference_classification
from kernels.emulation import CONSTANT, INPUT, OUTPUT, Array, Machine
from kernels.test_group_linear import ACTIVATIONS, DTYPES, VARIANTS

GELU, RELU = 2, 1


class Chain:
    """Random MLP heads, and what float64 makes of them."""

    def __init__(self, variant: str, m: int, b: int, widths: tuple[int, ...], norm: bool = False):
        rng = np.random.default_rng([m, b, *widths])
        self.x_type, self.weight_type, self.quantize = VARIANTS[variant]
        self.m, self.b, self.widths, self.norm = m, b, widths, norm
        self.activation = GELU if norm else RELU
        self.integer = self.x_type == INT8 or bool(self.quantize)
        if self.x_type == INT8:
            self.x = rng.integers(-128, 128, (b, widths[0])).astype(np.int8)
        else:
            self.x = rng.standard_normal((b, widths[0])).astype(DTYPES[self.x_type])
        self.layers: list[dict[str, Array]] = []
        for k, n in itertools.pairwise(widths):
            layer: dict[str, Array] = {"bias": rng.standard_normal((m, n)).astype(np.float32)}
            if self.weight_type == INT8:
                layer["weight"] = rng.integers(-127, 128, (m, k, n)).astype(np.int8)
                layer["weight_scale"] = np.full((m, n), k**-0.5 / 70, np.float32)
            elif self.weight_type in (FLOAT16, BFLOAT16):
                weight = rng.standard_normal((m, k, n)) * k**-0.5
                layer["weight"] = weight.astype(DTYPES[self.weight_type])
            else:
                values = rng.integers(-8, 8, (m, k, n)).astype(np.int8)
                layer["weight"] = values.astype(DTYPES[self.weight_type])
                scale = np.full((m, -(-k // 32), n), k**-0.5 / 5, np.float32)
                layer["weight_scale"], layer["group_scale"] = packing.pack_group_scales(
                    scale, 32, DTYPES[self.x_type]
                )
            if self.integer:
                layer["x_scale"] = rng.uniform(0.02, 0.04, m).astype(np.float32)
            if norm:
                layer["gamma"] = rng.uniform(0.5, 2, (m, n)).astype(np.float32)
                layer["beta"] = rng.standard_normal((m, n)).astype(np.float32)
            self.layers.append(layer)

    def rounded(self, v: Array, layer: dict[str, Array]) -> Array:
        """As the kernel keeps the input of a layer."""
        if not self.integer:
            return v.astype(DTYPES[self.x_type]).astype(np.float64)
        scale = layer["x_scale"][:, None, None]
        return np.clip(np.rint(v.astype(np.float32) / scale), -128, 127) * scale.astype(np.float64)

    def expected(self) -> Array:
        v = np.broadcast_to(self.x, (self.m, *self.x.shape)).astype(np.float64)
        if self.x_type == INT8:
            v = v * self.layers[0]["x_scale"][:, None, None]
        for number, layer in enumerate(self.layers):
            if not (number == 0 and self.x_type == INT8):
                v = self.rounded(v, layer)
            weight = layer["weight"].astype(np.float64)
            if "weight_scale" in layer:
                weight = weight * layer["weight_scale"][:, None].astype(np.float64)
            v = v @ weight + layer["bias"][:, None]
            if number == len(self.layers) - 1:
                break
            if self.norm:
                offset = v - v.mean(-1, keepdims=True)
                v = offset / np.sqrt((offset**2).mean(-1, keepdims=True) + 1e-5)
                v = v * layer["gamma"][:, None] + layer["beta"][:, None]
            v = ACTIVATIONS[self.activation](v)
        return v

    def shape(self, summary: int = 0) -> ChainShape:
        hidden = len(self.layers) - 1
        return ChainShape(
            self.m,
            self.b,
            len(self.layers),
            (ChainShape._fields_[3][1])(*self.widths),
            self.x_type,
            self.weight_type,
            0,
            self.quantize,
            32,
            (ChainShape._fields_[9][1])(*[self.activation] * hidden),
            (ChainShape._fields_[10][1])(*[int(self.norm)] * hidden),
            summary,
        )

    def arguments(self, machine: Machine, y: int) -> ChainArguments:
        layers = []
        for number, layer in enumerate(self.layers):
            arrays = {"weight": packing.pack(layer["weight"])}
            arrays |= {name: values for name, values in layer.items() if name != "weight"}
            pointers = {
                name: machine.array(
                    values, f"layer {number} {name}", INPUT if name == "x_scale" else CONSTANT
                )
                for name, values in arrays.items()
            }
            layers.append(ChainLayer(**pointers, x_scale_per_head=int(self.integer), epsilon=1e-5))
        return ChainArguments(
            x=machine.array(self.x, "x", INPUT), layers=(ChainLayer * MAX_LAYERS)(*layers), y=y
        )

    def check(self, y: Array) -> None:
        expected = self.expected()
        error = np.abs(y - expected) / np.abs(expected).max()
        if self.integer:  # where fp32 sums fall on the other side of a half, one step of int8
            assert error.max() < 0.02
            assert np.median(error) < 1e-6
        else:  # one step of the hidden activations' 11 or 8 bits, here and there
            assert error.max() < (1e-2 if self.x_type == BFLOAT16 else 1e-3)


def launch(
    machine: Machine, shape: ChainShape, arguments: ChainArguments, config: ChainConfig | None
) -> None:
    try:
        machine.library.head_chain(shape, arguments, config)
    except HydraError as error:
        raise AssertionError(f"{error}\n{machine.fault}") from error


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("widths", [(50, 50, 2), (33, 140, 65, 10), (64, 7, 20, 31, 5)], ids=str)
def test_against_float64(
    machine: Machine, variant: str, widths: tuple[int, ...], norm: bool, reverse: bool
) -> None:
    machine.reverse(reverse)
    chain = Chain(variant, 2, 5, widths, norm)
    address, y = machine.output((2, 5, widths[-1]), np.float32, "y")
    launch(machine, chain.shape(), chain.arguments(machine, address), None)
    chain.check(y)


@pytest.mark.parametrize("config", [(1, 4, 1), (1, 8, 3), (2, 8, 5), (4, 8, 2)], ids=str)
def test_every_configuration(machine: Machine, config: tuple[int, int, int]) -> None:
    chain = Chain("fp16", 2, 37, (40, 24, 100))
    address, y = machine.output((2, 37, 100), np.float32, "y")
    launch(machine, chain.shape(), chain.arguments(machine, address), ChainConfig(*config))
    chain.check(y)


def test_with_its_summary(machine: Machine) -> None:
    chain = Chain("fp16", 6, 19, (40, 24, 10))
    address, y = machine.output((6, 19, 10), np.float32, "y")
    arguments = chain.arguments(machine, address)
    outputs = {
        name: machine.output((19, 10) if name == "mean_prob" else (19,), np.float32, name)
        for name in CLASSIFICATION_OUTPUTS
    }
    arguments.summary = SummaryOutputs(*(address for address, _ in outputs.values()))
    arguments.counters = machine.array(np.zeros(3, np.uint32), "counters", OUTPUT)
    counters = machine.arrays[-1]
    for _ in range(2):
        launch(machine, chain.shape(summary=1), arguments, None)
        chain.check(y)
        for name, expected in reference_classification(y).items():
            np.testing.assert_allclose(outputs[name][1], expected, rtol=2e-5, atol=2e-6)
        assert not counters.any()


def test_a_chain_too_wide_for_shared_memory_says_so(machine: Machine) -> None:
    chain = Chain("fp16", 1, 1, (20000, 20000, 2))
    with pytest.raises(CompilationError, match="Launch one hydra_group_linear per layer"):
        machine.library.choose_chain(chain.shape(), machine.library.device())
