"""Cases for the plugin: heads with inputs, as files that the programs of kernels/plugin read.

What a case should give is what `hydra_edge.ops.heads` says in float64.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import ml_dtypes
import numpy as np

from hydra_edge.kernels import INT4, MAX_LAYERS, ChainConfig, LinearConfig, SummaryConfig
from hydra_edge.ops import heads, packing
from hydra_edge.ops.ensemble_summary import (
    reference_classification,
    reference_gaussian,
    reference_sigmoid,
)
from kernels.emulation import Array
from kernels.test_group_linear import DTYPES, VARIANTS

NAMES = {
    np.dtype(np.int32): "words",
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.int8): "int8",
}
KINDS = {name: kind for kind, name in NAMES.items()}
SUMMARIES = {
    "none": None,
    "softmax": reference_classification,
    "sigmoid": reference_sigmoid,
    "gaussian": reference_gaussian,
}
EPSILON = 0.1
T = TypeVar("T", ChainConfig, LinearConfig, SummaryConfig)


@dataclass
class Case:
    """Heads with random weights, and a batch of each of some sizes."""

    variant: str
    widths: tuple[int, ...]
    m: int = 2
    rows: tuple[int, ...] = (5,)
    activation: str = "relu"
    norm: bool = False
    summary: str = "none"
    per_head: bool = False  # x and scales of activations
    y_type: int = 0
    group: int = 32
    device: tuple[int, int, int] = (87, 16, 163 * 1024)
    only: tuple[int, ...] = ()
    most: int = 0  # rows that the engine is for; 0: the largest of `rows`
    fields: dict[str, object] = field(default_factory=dict)  # instead of what is right

    def __post_init__(self) -> None:
        self.x_type, self.weight_type, self.quantize = VARIANTS[self.variant]
        self.integer = self.variant.startswith("w8a8")
        rng = np.random.default_rng([self.m, *self.widths, *self.rows])
        self.heads = heads.Heads(
            layers=tuple(self._layer(rng, index) for index in range(len(self.widths) - 1)),
            x_type=DTYPES[self.x_type],
            x_per_head=self.per_head,
            group=self.group if self.weight_type == INT4 else 0,
        )
        self.xs = [self._x(rng, rows) for rows in self.rows]

    def _layer(self, rng: np.random.Generator, index: int) -> heads.Layer:
        k, n = self.widths[index : index + 2]
        m, kind, last = self.m, DTYPES[self.weight_type], index == len(self.widths) - 2
        scale = None
        if self.weight_type == INT4:
            weight = rng.integers(-8, 8, (m, k, n)).astype(np.int8).astype(kind)
            scale = rng.uniform(0.2, 1, (m, -(-k // self.group), n)) * k**-0.5 / 5
            packed = packing.pack_group_scales(scale, self.group, DTYPES[self.x_type])
            scale = packing.unpack_group_scales(*packed, self.group, k)  # rounded
        elif kind == np.int8:
            weight = rng.integers(-127, 128, (m, k, n)).astype(np.int8)
            scale = rng.uniform(0.5, 2, (m, n)).astype(np.float32) * k**-0.5 / 70
        else:
            weight = (rng.standard_normal((m, k, n)) * k**-0.5).astype(kind)
        norm = self.norm and not last
        scales = m if self.per_head or index else 1
        return heads.Layer(
            weight=weight,
            bias=rng.standard_normal((m, n)).astype(np.float32),
            scale=scale,
            x_scale=rng.uniform(0.02, 0.04, scales).astype(np.float32) if self.integer else None,
            gamma=rng.uniform(0.5, 2, (m, n)).astype(np.float32) if norm else None,
            beta=rng.standard_normal((m, n)).astype(np.float32) if norm else None,
            epsilon=EPSILON if norm else 0.0,
            activation="none" if last else self.activation,
        )

    def _x(self, rng: np.random.Generator, rows: int) -> Array:
        dims = (self.m, rows, self.widths[0]) if self.per_head else (rows, self.widths[0])
        if DTYPES[self.x_type] == np.int8:
            return rng.integers(-128, 128, dims).astype(np.int8)
        return rng.standard_normal(dims).astype(DTYPES[self.x_type])

    @property
    def y_scale(self) -> Array | None:
        """Of int8 y, one per head."""
        if DTYPES[self.y_type] != np.int8:
            return None
        return np.linspace(0.02, 0.03, self.m, dtype=np.float32)

    def attributes(self) -> Mapping[str, object]:
        """The fields of the node."""
        found = {
            **self.heads.attributes(),
            "y_type": self.y_type,
            "y_scales": 0 if self.y_scale is None else self.m,
            "summary": list(SUMMARIES).index(self.summary),
            **self.fields,
        }
        return {name: value for name, value in found.items() if name not in heads.PLUGIN}

    def write(self, path: Path) -> Path:
        """The file that the programs read."""
        with path.open("wb") as to:
            for name, value in self.attributes().items():
                if value is not None:
                    _write_field(to, name, value)
            most = self.most or max(self.rows)
            to.write(f"rows {min(self.rows)} {self.rows[0]} {most}\n".encode())
            to.write(f"device {' '.join(map(str, self.device))}\n".encode())
            for name, values in self.heads.parameters():
                _write_array(to, f"tensor {name}", values)
            if self.y_scale is not None:
                _write_array(to, "tensor y_scale", self.y_scale)
            for x in self.xs:
                _write_array(to, "x", x)
            for tactic in self.only:
                to.write(f"only {tactic}\n".encode())
        return path

    def check(self, outputs: list[Array], x: Array) -> None:
        """Compare the outputs of one run with float64."""
        y, *summary = outputs
        expected = self.heads.reference(x)["y"]
        assert y.shape == expected.shape
        if self.y_scale is not None:
            steps = np.clip(np.rint(expected / self.y_scale[:, None, None]), -128, 127)
            # fp32 sums may fall on the other side of a half.
            assert np.abs(y.astype(np.float64) - steps).max() <= 1
            assert (y != steps).mean() < 0.01
            return
        error = np.abs(y.astype(np.float64) - expected) / np.abs(expected).max()
        if self.integer and len(self.widths) > 2:
            # Where fp32 sums fall on the other side of a half, one step of int8.
            assert error.max() < 0.02
            assert np.median(error) < 1e-6
        else:
            assert error.max() < self.tolerance
        reference = SUMMARIES[self.summary]
        wanted = {} if reference is None else reference(y)
        assert len(summary) == len(wanted)
        for found, values in zip(summary, wanted.values(), strict=True):
            np.testing.assert_allclose(found, values, rtol=2e-5, atol=2e-6)

    @property
    def tolerance(self) -> float:
        """Relative to the largest: of hidden activations, of weights times factors, or of y."""
        bfloat = ml_dtypes.bfloat16 in (DTYPES[self.x_type], DTYPES[self.y_type])
        if len(self.widths) > 2 or self.weight_type == INT4 or self.y_type:
            return 1e-2 if bfloat else 1e-3
        return 2e-5


def _write_field(to: BinaryIO, name: str, value: object) -> None:
    if isinstance(value, str):
        to.write(f"field {name} text {len(value)}\n".encode() + value.encode())
        return
    values = np.atleast_1d(np.asarray(value))
    kind = "ints" if values.dtype.kind == "i" else "floats"
    to.write(f"field {name} {kind} {values.size}\n".encode())
    to.write(values.astype(np.int32 if kind == "ints" else np.float32).tobytes())


def _write_array(to: BinaryIO, what: str, values: Array) -> None:
    dims = " ".join(map(str, values.shape))
    to.write(f"{what} {NAMES[values.dtype]} {values.ndim} {dims}\n".encode())
    to.write(values.tobytes())


@dataclass
class Run:
    """One tactic on one batch."""

    how: str  # "attached" to a context, or "detached"
    tactic: int
    rows: int
    launches: int
    blocks: int
    memsets: int
    touched: int  # bytes of the workspace
    outputs: list[Array] = field(default_factory=list)


@dataclass
class Plan:
    """How a tactic runs a batch: ``Launches`` of plan.h."""

    chain: bool
    summary_alone: bool
    chain_config: ChainConfig
    layer_configs: list[LinearConfig]  # those of the layers that there are
    summary_config: SummaryConfig

    @classmethod
    def read(cls, words: list[str]) -> Plan:
        numbers = iter(map(int, words))

        def configuration(kind: type[T]) -> T:
            return kind(*itertools.islice(numbers, len(kind._fields_)))

        chain, alone = next(numbers), next(numbers)
        chain_config = configuration(ChainConfig)
        layers = [configuration(LinearConfig) for _ in range(MAX_LAYERS)]
        used = [layer for layer in layers if layer.batch_tiles]
        return cls(bool(chain), bool(alone), chain_config, used, configuration(SummaryConfig))


@dataclass
class Results:
    """What a program wrote."""

    refused: str = ""
    identity: str = ""
    workspace: int = 0
    allocations: int = 0
    frees: int = 0
    logs: list[str] = field(default_factory=list)
    tactics: list[int] = field(default_factory=list)
    plans: dict[tuple[int, int], Plan] = field(default_factory=dict)  # of tactic and rows
    runs: list[Run] = field(default_factory=list)

    def check(self, case: Case) -> None:
        """Every run of a case against float64."""
        assert not self.refused
        assert self.runs
        xs = dict(zip(case.rows, case.xs, strict=True))
        for run in self.runs:
            case.check(run.outputs, xs[run.rows])


def read(path: Path) -> Results:
    """The results of a program."""
    found = Results()
    with path.open("rb") as file:
        for words in _lines(file):
            what, text = words[0], " ".join(words[1:])
            if what == "log":
                found.logs.append(text)
            elif what in ("refused", "identity"):
                setattr(found, what, text)
            elif what == "workspace":
                found.workspace = int(text)
            elif what == "memory":
                found.allocations, found.frees = map(int, words[1:])
            elif what == "tactic":
                found.tactics.append(int(text))
            elif what == "plan":
                found.plans[int(words[1]), int(words[2])] = Plan.read(words[3:])
            elif what == "run":
                found.runs.append(Run(words[1], *map(int, words[2:])))
            else:
                assert what == "output"
                kind, dims = KINDS[words[1]], tuple(map(int, words[3:]))
                count = int(np.prod(dims)) * kind.itemsize
                values = np.frombuffer(file.read(count), kind).reshape(dims)
                found.runs[-1].outputs.append(values)
    return found


def _lines(file: BinaryIO) -> Iterator[list[str]]:
    while line := file.readline():
        yield line.decode().rstrip("\n").split(" ")


def run_program(program: list[Path | str], case: Case, folder: Path) -> Results:
    """Let a program run a case."""
    given, results = case.write(folder / "case"), folder / "results"
    done = subprocess.run([*program, given, results], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return read(results)
