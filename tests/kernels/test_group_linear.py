"""`group_linear` on the emulated device against numpy in float64."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from hydra_edge.errors import HydraError
from hydra_edge.kernels import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT4,
    INT8,
    LinearArguments,
    LinearConfig,
    LinearShape,
    SummaryOutputs,
)
from hydra_edge.ops import packing
from hydra_edge.ops.ensemble_summary import CLASSIFICATION_OUTPUTS, reference_classification
from kernels.emulation import INPUT, OUTPUT, Array, Machine

DTYPES = {
    FLOAT32: np.dtype(np.float32),
    FLOAT16: np.dtype(np.float16),
    BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    INT8: np.dtype(np.int8),
    INT4: np.dtype(ml_dtypes.int4),
}
VARIANTS = {
    "fp16": (FLOAT16, FLOAT16, 0),
    "bf16": (BFLOAT16, BFLOAT16, 0),
    "w8a8": (INT8, INT8, 0),
    "w8a8-quantizing": (FLOAT16, INT8, 1),
    "w8a8-quantizing-bf16": (BFLOAT16, INT8, 1),
    "w8a16": (FLOAT16, INT8, 0),
    "w8a16-bf16": (BFLOAT16, INT8, 0),
    "w4a16": (FLOAT16, INT4, 0),
    "w4a16-bf16": (BFLOAT16, INT4, 0),
}
ERF = np.vectorize(math.erf)
ACTIVATIONS = [
    lambda v: v,
    lambda v: np.maximum(v, 0),
    lambda v: 0.5 * v * (1 + ERF(v / math.sqrt(2))),
    lambda v: v / (1 + np.exp(-v)),
    np.tanh,
]


class Case:
    """Random arrays of one layer, and what float64 makes of them."""

    def __init__(self, variant: str, m: int, b: int, k: int, n: int, seed: int = 0, **how: object):
        rng = np.random.default_rng([seed, m, b, k, n])
        x_type, weight_type, quantize = VARIANTS[variant]
        self.group = int(how.get("group", 32))
        self.activation = int(how.get("activation", 0))
        self.y_type = int(how.get("y_type", FLOAT32))
        self.x_per_head, per_head_scale = (
            bool(how.get("x_per_head")),
            bool(how.get("per_head_scale")),
        )
        x_dims = (m, b, k) if self.x_per_head else (b, k)
        self.x_scale = None
        integer = x_type == INT8 or quantize
        if integer:
            self.x_scale = rng.uniform(0.01, 0.03, m if per_head_scale else 1).astype(np.float32)
        if x_type == INT8:
            self.x = rng.integers(-128, 128, x_dims).astype(np.int8)
            x = self.x.astype(np.float64)
        else:
            self.x = rng.standard_normal(x_dims).astype(DTYPES[x_type])
            x = self.x.astype(np.float64)
        self.weight_scale = self.group_scale = None
        bound = k**-0.5
        if weight_type in (FLOAT16, BFLOAT16):
            self.weight = (rng.standard_normal((m, k, n)) * bound).astype(DTYPES[weight_type])
            weight = self.weight.astype(np.float64)
        elif weight_type == INT8:
            self.weight = rng.integers(-127, 128, (m, k, n)).astype(np.int8)
            self.weight_scale = rng.uniform(0.5, 2, (m, n)).astype(np.float32) * bound / 70
            weight = self.weight * self.weight_scale[:, None].astype(np.float64)
        else:
            values = rng.integers(-8, 8, (m, k, n))
            self.weight = values.astype(np.int8).astype(ml_dtypes.int4)
            scale = rng.uniform(0.2, 2, (m, -(-k // self.group), n)).astype(np.float32) * bound / 5
            self.weight_scale, self.group_scale = packing.pack_group_scales(
                scale, self.group, DTYPES[x_type]
            )
            rounded = (scale / self.weight_scale[:, None]).astype(DTYPES[x_type]).astype(np.float64)
            rounded *= self.weight_scale[:, None]
            weight = values * np.repeat(rounded, self.group, 1)[:, :k]
        self.bias = (
            None if how.get("bias") is False else rng.standard_normal((m, n)).astype(np.float32)
        )
        if integer:
            scale = np.broadcast_to(self.x_scale, m)[:, None, None].astype(np.float64)
            if quantize:
                wide = np.broadcast_to(self.x.astype(np.float32), (m, b, k))
                x = np.clip(np.rint(wide / scale.astype(np.float32)), -128, 127).astype(np.float64)
            x = x * scale
        v = np.matmul(x, weight)
        if self.bias is not None:
            v = v + self.bias[:, None]
        self.largest_sum = np.abs(v).max()
        self.expected = ACTIVATIONS[self.activation](v)
        self.y_scale = None
        if self.y_type == INT8:
            self.y_scale = np.full(m if per_head_scale else 1, 0.02, np.float32)
        self.shape = LinearShape(
            m, b, k, n, x_type, weight_type, self.y_type,
            int(self.x_per_head), quantize, self.group, self.activation, 0,
        )  # fmt: skip

    def run(self, machine: Machine, config: LinearConfig | None = None) -> Array:
        shape = self.shape
        address, y = machine.output(
            (shape.heads, shape.batch, shape.outputs), DTYPES[self.y_type], "y"
        )
        arguments = LinearArguments(
            x=machine.array(self.x, "x", INPUT),
            weight=machine.array(packing.pack(self.weight), "weight"),
            weight_scale=machine.array(self.weight_scale, "weight_scale"),
            group_scale=machine.array(self.group_scale, "group_scale"),
            bias=machine.array(self.bias, "bias"),
            x_scale=machine.array(self.x_scale, "x_scale", INPUT),
            x_scale_per_head=int(self.x_scale is not None and len(self.x_scale) > 1),
            y=address,
            y_scale=machine.array(self.y_scale, "y_scale"),
            y_scale_per_head=int(self.y_scale is not None and len(self.y_scale) > 1),
        )
        try:
            machine.library.group_linear(shape, arguments, config)
        except HydraError as error:
            raise AssertionError(f"{error}\n{machine.fault}") from error
        return y

    def check(self, y: Array) -> None:
        if self.y_type == INT8:
            expected = np.clip(np.rint(self.expected / 0.02), -128, 127)
            # fp32 sums may fall on the other side of a half.
            assert np.abs(y.astype(np.float64) - expected).max() <= 1
            assert (y != expected).mean() < 0.01
            return
        # Relative to the largest sum: fp32 sums, which tensor cores truncate; bf16 weights times a
        # factor are rounded to 8 bits. No activation makes an error more than 1.13 times as large.
        tolerance = 2e-5 + 5e-8 * self.shape.inputs
        if self.shape.weight_type == INT4:
            tolerance = 4e-3 if self.shape.x_type == BFLOAT16 else 5e-4
        allowed = tolerance * self.largest_sum
        # Relative to the largest y: its rounding.
        rounding = {FLOAT16: 1e-3, BFLOAT16: 8e-3}.get(self.y_type, 0)
        allowed += rounding * np.abs(self.expected).max()
        assert np.abs(y.astype(np.float64) - self.expected).max() <= allowed


SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 50, 10),
    (3, 5, 64, 37),
    (2, 8, 128, 16),
    (2, 13, 200, 100),
    (1, 33, 129, 33),
    (2, 65, 40, 20),
]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_float64(
    machine: Machine, variant: str, shape: tuple[int, int, int, int], reverse: bool
) -> None:
    machine.reverse(reverse)
    case = Case(variant, *shape)
    case.check(case.run(machine))


@pytest.mark.parametrize("y_type", [FLOAT32, FLOAT16, BFLOAT16, INT8])
@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize("variant", ["fp16", "w8a8"])
def test_epilogues(machine: Machine, variant: str, activation: int, y_type: int) -> None:
    case = Case(
        variant, 2, 9, 72, 21, activation=activation, y_type=y_type, x_per_head=True,
        per_head_scale=True,
    )  # fmt: skip
    case.check(case.run(machine))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("k", [31, 128, 300])
def test_groups(machine: Machine, group: int, k: int) -> None:
    case = Case("w4a16", 2, 3, k, 18, group=group)
    case.check(case.run(machine))


CONFIGS = [
    LinearConfig(nt, rt, rows, ks)
    for nt, rt, (rows, ks) in itertools.product(
        (1, 2, 4, 8), (1, 2), ((1, 1), (8, 1), (1, 8), (2, 2), (3, 2))
    )
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_configuration_gives_the_same(machine: Machine, variant: str) -> None:
    ran = 0
    for config in CONFIGS:
        with machine:
            case = Case(variant, 2, 11, 330, 50, bias=False)
            try:
                machine.library.group_linear(case.shape, LinearArguments(), config)
            except HydraError as error:
                if "No such kernel" in str(error) or "shared memory" in str(error):
                    continue
            case.check(case.run(machine, config))
            ran += 1
    assert ran >= 10


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 20, 1), (5, 3, 64, 10), (20, 9, 50, 100), (300, 7, 200, 4)], ids=str
)
def test_with_its_summary(
    machine: Machine, shape: tuple[int, int, int, int], reverse: bool
) -> None:
    machine.reverse(reverse)
    m, b, _, c = shape
    case = Case("fp16", *shape)
    case.shape.summary = 1
    address, y = machine.output((m, b, c), np.float32, "y")
    outputs = {
        name: machine.output((b, c) if name == "mean_prob" else (b,), np.float32, name)
        for name in CLASSIFICATION_OUTPUTS
    }
    counters = machine.array(np.zeros(-(-b // 8), np.uint32), "counters", OUTPUT)
    counts = machine.arrays[-1]
    arguments = LinearArguments(
        x=machine.array(case.x, "x", INPUT),
        weight=machine.array(packing.pack(case.weight), "weight"),
        bias=machine.array(case.bias, "bias"),
        y=address,
        summary=SummaryOutputs(*(outputs[name][0] for name in CLASSIFICATION_OUTPUTS)),
        counters=counters,
    )
    for _ in range(2):  # the counters are ready again without a memset
        try:
            machine.library.group_linear(case.shape, arguments)
        except HydraError as error:
            raise AssertionError(f"{error}\n{machine.fault}") from error
        case.check(y)
        for name, expected in reference_classification(y).items():
            np.testing.assert_allclose(outputs[name][1], expected, rtol=2e-5, atol=2e-6)
        assert not counts.any()
