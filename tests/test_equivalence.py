"""The judge of all rewrites must itself be right."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx_models import Net, mlp_heads, tiny_engine

from hydra_edge import equivalence
from hydra_edge.artifacts.engine import Golden
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.backends.onnxruntime import open as open_program
from hydra_edge.errors import GraphError


def test_equal_is_zero_and_a_percent_is_a_percent() -> None:
    a = np.random.default_rng(0).standard_normal((8, 5))
    assert equivalence.difference(a, a) == 0
    assert equivalence.difference(a * 1.01, a) == pytest.approx(0.01)


def test_the_worst_head_counts() -> None:
    b = np.random.default_rng(0).standard_normal((100, 8, 5))
    a = b.copy()
    a[42] *= 1.5
    assert equivalence.difference(a, b) == pytest.approx(0.5)


def test_a_quiet_head_is_measured_against_a_thousandth_of_the_whole() -> None:
    b = np.ones((2, 8, 5))
    b[1] = 0
    a = b.copy()
    a[1] += 1e-6
    assert equivalence.difference(a, b) < 2e-3


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), np.inf),
        (np.float32([1, np.nan]), np.float32([1, 2]), np.inf),
        (np.float32([1, np.inf]), np.float32([1, 2]), np.inf),
        (np.float32([1, np.nan]), np.float32([1, np.nan]), 0),
        (np.float32([1, -np.inf]), np.float32([1, -np.inf]), 0),
        (np.float32([1, -np.inf]), np.float32([1, np.inf]), np.inf),
        (np.float32([3, -np.inf]), np.float32([1, -np.inf]), pytest.approx(2)),
        (np.zeros((0, 3)), np.zeros((0, 3)), 0),
        (np.float32(2), np.float32(2), 0),
        (np.asarray([True, False]), np.asarray([True, False]), 0),
        (np.zeros(4), np.zeros(4), 0),
    ],
)
def test_corner_cases(a: np.ndarray, b: np.ndarray, expected: float) -> None:
    assert equivalence.difference(a, b) == expected


def test_random_inputs_fit_and_repeat() -> None:
    specs = (
        TensorSpec("x", "float32", ("batch", 3, "width")),
        TensorSpec("h", "float16", (2, 3)),
        TensorSpec("ids", "int64", ("batch", "length")),
        TensorSpec("mask", "bool", ("batch",)),
        TensorSpec("t", "float32", ()),
    )
    feeds = equivalence.random_inputs(specs, batch=5, seed=3)
    assert {n: (str(a.dtype), a.shape) for n, a in feeds.items()} == {
        "x": ("float32", (5, 3, 5)),
        "h": ("float16", (2, 3)),
        "ids": ("int64", (5, 5)),
        "mask": ("bool", (5,)),
        "t": ("float32", ()),
    }
    again = equivalence.random_inputs(specs, batch=5, seed=3)
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)
    assert set(np.unique(feeds["ids"])) <= {0, 1}


@pytest.mark.parametrize("dtype", ["unknown", "object"])
def test_inputs_without_numbers_say_so(dtype: str) -> None:
    with pytest.raises(GraphError, match=f"'x: {dtype}.* is not a tensor of numbers"):
        equivalence.random_inputs((TensorSpec("x", dtype, ("batch",)),))


def test_tolerance_follows_the_precision() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    int8 = net.graph({net.qdq(x): ("batch", 6)})
    assert equivalence.tolerance_of(mlp_heads().model) == equivalence.FLOAT_TOLERANCE
    assert equivalence.tolerance_of(int8.model) == equivalence.QUANTIZED_TOLERANCE
    half = onnx.ModelProto()
    half.graph.initializer.add(data_type=onnx.TensorProto.FLOAT16)
    assert equivalence.tolerance_of(half) == equivalence.HALF_TOLERANCE


def test_worst_difference_names_the_output() -> None:
    def graph(offset: float) -> onnx.ModelProto:
        net = Net()
        x = net.input("x", ("batch", 4))
        same, other = net.op("Relu", x), net.op("Add", x, net.const(offset))
        return net.graph({same: ("batch", 4), other: ("batch", 4)}).model

    feeds = {"x": np.ones((2, 4), np.float32)}
    name, error = equivalence.worst_difference(graph(1.5), evaluate(graph(1.0), feeds), feeds)
    assert (name, error) == ("t1", pytest.approx(0.25))
    assert equivalence.worst_difference(graph(1.5), evaluate(graph(1.0), feeds), feeds, "t0") == (
        "t0",
        0,
    )


def test_replay_ignores_votes() -> None:
    program = tiny_engine().programs["main"]
    runner = open_program(program.payload, None)
    assert equivalence.replay(runner, program.golden) == 0
    wrong = {"logits": program.golden.outputs["logits"] + 1}
    assert equivalence.replay(runner, Golden(program.golden.inputs, wrong, 0.1)) > 0.3


def test_entropies_near_zero_are_measured_in_nats_and_variances_against_the_total() -> None:
    sure = {"mutual_information": np.full(16, 1e-4, np.float32)}
    moved = {"mutual_information": np.full(16, 2e-4, np.float32)}  # twice as much of nothing
    record = Golden({}, sure, 0.0)
    assert equivalence.replay(_Says(moved), record) == pytest.approx(1e-4)
    variances = {
        "epistemic_variance": np.full((16, 1), 1e-4, np.float32),
        "aleatoric_variance": np.full((16, 1), 0.5, np.float32),
    }
    other = {**variances, "epistemic_variance": np.full((16, 1), 2e-4, np.float32)}
    assert equivalence.replay(_Says(other), Golden({}, variances, 0.0)) == pytest.approx(2e-4)
    # Anything else of that size is measured against itself.
    quiet = Golden({}, {"y": np.full(16, 1e-4, np.float32)}, 0.0)
    assert equivalence.replay(_Says({"y": np.full(16, 2e-4, np.float32)}), quiet) > 0.9


class _Says:
    threads = 1

    def __init__(self, outputs: dict[str, np.ndarray]) -> None:
        self.outputs = outputs

    def run(self, feeds: object, outputs: list[str]) -> list[np.ndarray]:
        return [self.outputs[name] for name in outputs]

    def close(self) -> None:
        pass
