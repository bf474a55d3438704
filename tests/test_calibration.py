"""What tensors are measured to be, whatever the batches, and what is remembered of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from onnx import numpy_helper
from onnx_models import Net, linear

from hydra_edge import scales
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.calibration import Calibration, CalibrationOptions, Samples, thresholds
from hydra_edge.errors import ArtifactError, InputError
from hydra_edge.precision import Precision
from hydra_edge.quantization import quantize

X = np.random.default_rng(7).standard_normal((70, 6)).astype(np.float32)
MINMAX = CalibrationOptions()


def chain(k: int = 6, hidden: int = 5, batch: int | str = "batch") -> Graph:
    """x -> Gemm t0 -> Relu t1 -> Gemm t2 -> Relu t3 -> Gemm."""
    net = Net()
    h = net.input("x", (batch, k))
    for width in (k, hidden):
        h = net.op("Relu", linear(net, h, width, hidden))
    return net.graph({linear(net, h, hidden, 3): (batch, 3)})


TENSORS = ("x", "t1", "t3")


def measure(
    graph: Graph,
    data: Calibration,
    options: CalibrationOptions = MINMAX,
    tensors: Sequence[str] = TENSORS,
) -> dict[str, float]:
    return thresholds(graph.model, tensors, Samples(data, graph.inputs), options)


# thresholds


def test_minmax_is_the_largest_magnitude() -> None:
    graph = chain()
    weights = [numpy_helper.to_array(t).astype(np.float64) for t in graph.model.graph.initializer]
    one = np.maximum(X @ weights[0] + weights[1], 0)
    two = np.maximum(one @ weights[2] + weights[3], 0)
    expected = {"x": np.abs(X).max(), "t1": one.max(), "t3": two.max()}
    assert measure(graph, X) == pytest.approx(expected, rel=1e-6)  # fp32 against float64


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_histograms_of_batches_add_up(method: str) -> None:
    data = np.random.default_rng(0).standard_normal((500, 6)).astype(np.float32)
    options = CalibrationOptions(method, percentile=98.0)
    peak = float(np.abs(data).max())
    whole = scales.histogram(data, peak)
    found = measure(chain(), data, options, ["x"])["x"]
    assert found == scales.threshold(whole, peak, method, 98.0, 127.0)
    assert found < peak


@pytest.mark.parametrize("method", scales.METHODS)
def test_other_batches_change_no_bit(method: str) -> None:
    """A matmul of one row sums in another order than one of many."""
    graph = chain(700, 300)
    data = np.random.default_rng(0).standard_normal((70, 700)).astype(np.float32)
    options = CalibrationOptions(method)
    whole = measure(graph, data, options)
    for cuts in (range(1, 70), (1, 64), (33,)):
        assert measure(graph, np.split(data, list(cuts)), options) == whole
    assert len(set(whole.values())) == len(TENSORS)


@pytest.mark.parametrize("method", scales.METHODS)
def test_one_sample(method: str) -> None:
    found = measure(chain(), X[:1], CalibrationOptions(method))
    peak = float(np.abs(X[0]).max())
    assert 0.5 * peak <= found["x"] <= peak


@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e30])
def test_percentile_next_to_a_far_outlier(outlier: float) -> None:
    """One histogram over all of it would hold everything else in its first bin."""
    data = np.random.default_rng(0).standard_normal((500, 6)).astype(np.float32)
    data[3, 2] = outlier
    net = Net()
    graph = net.graph({net.op("Relu", net.input("x", ("batch", 6))): ("batch", 6)})
    found = measure(graph, data, CalibrationOptions("percentile", 99.0), ["x"])["x"]
    ordered = np.sort(np.abs(data), axis=None).astype(np.float64)
    expected = ordered[math.ceil(0.99 * len(ordered)) - 1]
    assert expected <= found <= 1.02 * expected


@pytest.mark.parametrize("method", scales.METHODS)
def test_a_tensor_of_zeros_and_one_of_denormals(method: str) -> None:
    graph = chain()
    assert measure(graph, 0 * X, CalibrationOptions(method), ["x"]) == {"x": 0.0}
    for data in (0 * X, X * np.float32(1e-42)):
        found = quantize(graph, "int8", calibration=data, options=CalibrationOptions(method))
        expected, actual = (evaluate(g.model, {"x": data}) for g in (graph, found))
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], atol=0.05)


@pytest.mark.parametrize("op", ["Log", "Reciprocal"])
def test_tensors_without_a_range(op: str) -> None:
    """NaN in the second batch only, infinity in the first."""
    net = Net()
    y = net.op(op, net.input("x", ("batch", 6)), name="y")
    graph = net.graph({linear(net, y, 6, 3): ("batch", 3)})
    data = np.abs(X) + 1
    data[0 if op == "Reciprocal" else 40, 3] = 0 if op == "Reciprocal" else -1
    with pytest.raises(InputError, match=r"The tensor 'y' holds NaN or infinity.*in fp32 first"):
        quantize(graph, "int8", calibration=data)


# samples


@pytest.mark.parametrize("cuts", [[], [1], [31, 33], [32, 64], range(1, 70)])
def test_batches_are_filled_up(cuts: list[int]) -> None:
    samples = Samples(np.split(X, cuts), chain().inputs)
    assert [len(feeds["x"]) for feeds in samples.batches] == [32, 32, 6]
    assert len(samples) == 70
    np.testing.assert_array_equal(np.concatenate([feeds["x"] for feeds in samples.batches]), X)


def test_a_fixed_batch_is_filled_up() -> None:
    samples = Samples([X[:3], X[3:20], X[20:]], chain(batch=14).inputs)
    assert [len(feeds["x"]) for feeds in samples.batches] == [14] * 5


def sequences() -> Graph:
    net = Net()
    y = net.op("MatMul", net.input("x", ("batch", "time", 4)), net.random(4, 3))
    return net.graph({y: ("batch", "time", 3)})


def test_samples_of_other_shapes_stay_apart() -> None:
    data = np.random.default_rng(0).standard_normal((6, 6, 4)).astype(np.float32)
    samples = Samples([data[:2], data[2:5], data[:, :5], data[5:]], sequences().inputs)
    found = [feeds["x"].shape for feeds in samples.batches]
    assert found == [(5, 6, 4), (6, 5, 4), (1, 6, 4)]


def test_the_digest_tells_shapes_apart() -> None:
    data = np.zeros((6, 4, 4), np.float32)
    one, other = (Samples(data.reshape(n, -1, 4), sequences().inputs) for n in (6, 4))
    assert one.digest != other.digest
    assert one.digest == Samples([data[:1], data[1:]], sequences().inputs).digest


def test_no_data() -> None:
    def nothing() -> Iterator[npt.NDArray[np.float32]]:
        yield from ()

    with pytest.raises(InputError, match=r"data is empty.*at least one batch.*few hundred"):
        Samples(nothing(), chain().inputs)
    with pytest.raises(InputError, match=r"The calibration data is 3\. It is an array, arrays by"):
        Samples(3, chain().inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_data_without_a_range(value: float) -> None:
    data = X.copy()
    data[69, 5] = value
    with pytest.raises(InputError, match=r"data for 'x' holds NaN or infinity.*Remove those"):
        Samples(data, chain().inputs)


# the cache


def tampered(path: Path) -> None:
    """Every value in the file becomes 5, which shows where it is read."""
    data = json.loads(path.read_text())
    data["measured"] = {key: dict.fromkeys(found, 5.0) for key, found in data["measured"].items()}
    path.write_text(json.dumps(data))


def test_the_cache_answers_the_same_question(tmp_path: Path) -> None:
    options = CalibrationOptions("mse", cache=tmp_path / "cache.json")
    fresh = measure(chain(), X, options)
    assert fresh == measure(chain(), X, CalibrationOptions("mse"))
    assert measure(chain(), X, options) == fresh
    tampered(tmp_path / "cache.json")
    batches = [X[:9], X[9:]]
    assert measure(chain(), batches, options) == dict.fromkeys(TENSORS, 5.0)
    assert measure(chain(), X, replace(options, percentile=70.0)) == dict.fromkeys(TENSORS, 5.0)


def test_the_cache_answers_no_other_question(tmp_path: Path) -> None:
    options = CalibrationOptions("percentile", cache=str(tmp_path / "cache.json"))
    measure(chain(), X, options)
    tampered(tmp_path / "cache.json")
    for other in (
        measure(chain(hidden=7), X, options),
        measure(chain(), X + 1, options),
        measure(chain(), X, replace(options, method="entropy")),
        measure(chain(), X, replace(options, percentile=98.0)),
        measure(chain(), X, options, ["x", "t1"]),
    ):
        assert 5.0 not in other.values()
    assert 5.0 in measure(chain(), X, options).values()  # the first one is still there


def test_the_cache_holds_both_of_a_mix(tmp_path: Path) -> None:
    options = CalibrationOptions("mse", cache=tmp_path / "cache.json")
    precision = Precision("int8", "int8", layers={"n2": "fp8"})
    quantize(chain(), precision, calibration=X, options=options)
    assert len(json.loads((tmp_path / "cache.json").read_text())["measured"]) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "3", '{"name": 1}', '{"schema": 2, "measured": {"a": {"x": "y"}}}', "\x00"],
)
def test_a_damaged_cache(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    path.write_text(text)
    message = r"cache.json' is not a calibration cache.*Name another file, or delete this one"
    with pytest.raises(ArtifactError, match=message):
        measure(chain(), X, CalibrationOptions(cache=path))
    assert path.read_text() == text


def test_a_cache_of_an_older_version_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    path.write_text('{"schema": 1, "key": "a", "thresholds": {}}')
    found = measure(chain(), X, CalibrationOptions(cache=path))
    (known,) = json.loads(path.read_text())["measured"].values()
    assert known == found


# options


def test_options_refuse() -> None:
    with pytest.raises(InputError, match=r"Unknown calibration method 'guess'.*minmax.*entropy"):
        CalibrationOptions("guess")
    with pytest.raises(InputError, match=r"Unknown method for weights 'entropy'.*minmax, mse"):
        CalibrationOptions(weights="entropy")
    for percentile in (50.0, 100.1, float("nan")):
        with pytest.raises(InputError, match=r"The calibration percentile is .*above 50"):
            CalibrationOptions(percentile=percentile)
