"""Every precision on the right nodes, from every kind of calibration data, the same each time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx_models import (
    Net,
    assert_same,
    conv_student,
    feeds_for,
    linear,
    mlp_heads,
    student,
)

from hydra_edge import anatomy, branches, surgery
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.errors import ArtifactError, HydraError, InputError, QuantizationError
from hydra_edge.exporting import summarize
from hydra_edge.fusion import fuse
from hydra_edge.quantization import (
    PRECISIONS,
    CalibrationOptions,
    Precision,
    prepare,
    quantize,
)

X = np.random.default_rng(7).standard_normal((70, 6)).astype(np.float32)


def precision_of(node: gs.Node) -> str:
    """What stands in front of a layer."""
    x, weight = node.inputs[:2]
    stored = weight.inputs[0].inputs[0] if weight.inputs else None
    if stored is None:
        return {"float32": "fp32", "float16": "fp16"}[str(x.dtype)]
    kinds = {np.dtype(np.int8): "int8", np.dtype(ml_dtypes.int4): "int4"}
    kind = kinds.get(np.asarray(stored.values).dtype, "fp8")
    quantized = x.inputs and x.inputs[0].op == "DequantizeLinear"
    return kind if quantized else f"{kind}-weight-only"


def matmul_precisions(graph: Graph) -> dict[str, str]:
    """What every Gemm, MatMul and Conv computes in, with ``body`` and ``heads`` told apart."""
    surgeon = surgery.open_model(graph.model)
    heads = anatomy.head_nodes(surgeon)
    found: dict[str, set[str]] = {"body": set(), "heads": set()}
    for node in surgeon.nodes:
        if node.op in branches.MATMULS:
            found["heads" if node.name in heads else "body"].add(precision_of(node))
    return {part: "+".join(sorted(kinds)) for part, kinds in found.items()}


@pytest.mark.parametrize(("body", "heads"), list(itertools.product(PRECISIONS, PRECISIONS)))
@pytest.mark.parametrize("make", [student, conv_student])
def test_every_precision_lands_on_its_part(
    make: Callable[[], Graph], body: str, heads: str
) -> None:
    graph = make()
    found = quantize(graph, Precision(body, heads), calibration=feeds_for(graph, 64))
    if make is conv_student and body == "int4-weight-only":
        assert "int8-weight-only" in matmul_precisions(found)["body"]  # convolutions have no blocks
    else:
        assert matmul_precisions(found) == {"body": body, "heads": heads}
    assert (found.inputs, found.outputs) == (graph.inputs, graph.outputs)
    assert found.metadata.precision == str(Precision(body, heads))
    onnx.checker.check_model(found.model, full_check=True)
    feeds = feeds_for(graph, 16, seed=9)
    expected, actual = evaluate(graph.model, feeds), evaluate(found.model, feeds)
    for name in ("head_logits", "mean_prob"):
        # int8 has 127 steps of the largest value, fp8 steps of 6 % at every size, int4 7 steps.
        error = {"int4-weight-only": 0.35, "fp8": 0.15}
        atol = max(error.get(part, 0.06) for part in (body, heads))
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(actual[name], expected[name], atol=atol * scale)
    assert fuse(found).fusion[0].fused


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_summary_stays_in_fp32(precision: str) -> None:
    found = quantize(student(), precision, calibration=X)
    surgeon = surgery.open_model(found.model)
    (summary,) = [node for node in surgeon.nodes if node.op == "EnsembleSummary"]
    assert summary.inputs[0].name == "head_logits"
    assert summary.inputs[0].dtype == np.float32
    assert summary.inputs[0].inputs[0].op in ("Concat", "Cast")
    body = found.model.functions[0]
    assert "QuantizeLinear" not in {node.op_type for node in body.node}


def test_without_head_logits() -> None:
    graph = summarize(mlp_heads(), "classification", "logits", head_logits=False)
    found = quantize(graph, "int8", calibration=X)
    assert found.outputs == graph.outputs
    assert fuse(found).fusion[0].fused


def test_a_graph_without_summary() -> None:
    graph = mlp_heads(kind="outputs")
    found = quantize(graph, "int8", calibration=X)
    assert found.outputs == graph.outputs
    assert matmul_precisions(found) == {"body": "int8", "heads": "int8"}


def test_weights_have_one_scale_per_output_channel_and_zero_points_are_zero() -> None:
    found = quantize(conv_student(), "int8", calibration=feeds_for(conv_student(), 64))
    arrays = {t.name: numpy_helper.to_array(t) for t in found.model.graph.initializer}
    channels = []
    for node in found.model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not arrays[node.input[2]].any()
            assert arrays[node.input[2]].dtype == np.int8
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays:
            weight, scale = arrays[node.input[0]], arrays[node.input[1]]
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            assert weight.dtype == np.int8
            assert scale.shape == (weight.shape[axis],)
            assert np.abs(weight).max(tuple(set(range(weight.ndim)) - {axis})).min() >= 126
            channels.append(weight.shape[axis])
    assert sorted(channels) == [4, 4, 4, 6, 6, 6, 8, 8]


def test_q_dq_stand_only_in_front() -> None:
    """Behind a matmul TensorRT would have to requantize; the head's output stays fp32."""
    found = quantize(conv_student(), "int8", calibration=feeds_for(conv_student(), 64))
    readers: dict[str, set[str]] = {}
    for node in found.model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for node in found.model.graph.node:
        if node.op_type == "DequantizeLinear":
            assert readers[node.output[0]] <= {"Conv", "Gemm", "MatMul", "GlobalAveragePool"}
        if node.op_type == "QuantizeLinear":
            assert readers[node.output[0]] == {"DequantizeLinear"}


def test_only_used_domains_are_imported() -> None:
    found = quantize(student(), "int8", calibration=X)
    assert {entry.domain for entry in found.model.opset_import} == {"", "hydra"}


# calibration


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile", "mse"])
def test_methods(method: str) -> None:
    graph = student()
    options = CalibrationOptions(method, percentile=99.9)
    found = quantize(graph, "int8", calibration=X, options=options)
    expected, actual = (evaluate(g.model, {"x": X})["head_logits"] for g in (graph, found))
    np.testing.assert_allclose(actual, expected, atol=0.15 * np.abs(expected).max())


def input_scale(graph: Graph) -> float:
    node = next(n for n in graph.model.graph.node if n.op_type == "QuantizeLinear")
    assert node.input[0] == "x"
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.model.graph.initializer}
    return float(arrays[node.input[1]])


def test_methods_treat_outliers_as_they_should() -> None:
    data = X.copy()
    data[3, 2] = 1000.0
    scales = {
        method: input_scale(
            quantize(student(), "int8", calibration=data, options=CalibrationOptions(method, 99.0))
        )
        for method in ("minmax", "entropy", "percentile")
    }
    assert scales["minmax"] == pytest.approx(1000 / 127, rel=0.01)
    assert scales["percentile"] < 0.02 * scales["minmax"]


def npz(folder: Path) -> Path:
    np.savez(folder / "calibration.npz", images=X)
    return folder / "calibration.npz"


def npy(folder: Path) -> Path:
    np.save(folder / "calibration.npy", X)
    return folder / "calibration.npy"


SOURCES: dict[str, Callable[[Path], object]] = {
    "array": lambda _: X,
    "mapping": lambda _: {"x": X},
    "npz path": npz,
    "npy path": npy,
    "path as text": lambda folder: str(npz(folder)),
    "batches": lambda _: [X[:32], X[32:64], X[64:]],
    "ragged batches": lambda _: [X[:1], X[1:64], X[64:]],
    "batches of mappings": lambda _: [{"x": X[:40]}, {"x": X[40:]}],
    "generator": lambda _: (X[i : i + 7] for i in range(0, 70, 7)),
    "tensor": lambda _: torch.from_numpy(X),
    "tensors": lambda _: [torch.from_numpy(X[:40]), torch.from_numpy(X[40:])],
    "mapping of tensors": lambda _: {"x": torch.from_numpy(X)},
    "labelled": lambda _: {"x": X},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_every_source_gives_the_same_graph(source: str, method: str, tmp_path: Path) -> None:
    options = CalibrationOptions(method)
    expected = quantize(student(), "int8", calibration=X, options=options)
    found = quantize(student(), "int8", calibration=SOURCES[source](tmp_path), options=options)  # type: ignore[arg-type]
    assert found.metadata.calibration_sha256 == expected.metadata.calibration_sha256
    assert found.data == expected.data


def test_labels_in_the_file_are_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=X, labels=np.arange(70))
    found = quantize(student(), "int8", calibration=tmp_path / "data.npz")
    assert found.data == quantize(student(), "int8", calibration=X).data


def test_same_data_same_bytes_and_digest() -> None:
    first, second = (quantize(student(), "int8", calibration=X.copy()) for _ in range(2))
    assert first.data == second.data
    other = quantize(student(), "int8", calibration=X + 1)
    assert other.metadata.calibration_sha256 != first.metadata.calibration_sha256
    assert len(first.metadata.calibration_sha256 or "") == 64
    assert quantize(student(), "fp16").metadata.calibration_sha256 is None


def two_inputs() -> Graph:
    net = Net()
    a, b = net.input("a", ("batch", 6)), net.input("b", ("batch", 4))
    h = net.op("Add", linear(net, a, 6, 5), linear(net, b, 4, 5))
    return net.graph({linear(net, net.op("Relu", h), 5, 3): ("batch", 3)})


def test_two_inputs() -> None:
    feeds = feeds_for(two_inputs(), 50)
    whole = quantize(two_inputs(), "int8", calibration=feeds)
    parts = [{name: array[i : i + 20] for name, array in feeds.items()} for i in (0, 20, 40)]
    assert quantize(two_inputs(), "int8", calibration=parts).data == whole.data
    with pytest.raises(InputError, match="The input 'b' is missing"):
        quantize(two_inputs(), "int8", calibration=feeds["a"])


@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_a_fixed_batch_is_cut_to_size(method: str) -> None:
    net = Net()
    x = net.input("x", (5, 6))
    graph = net.graph({linear(net, net.op("Relu", linear(net, x, 6, 5)), 5, 3): (5, 3)})
    options = CalibrationOptions(method)
    assert quantize(graph, "int8", calibration=X, options=options).inputs == graph.inputs
    with pytest.raises(InputError, match=r"shape \[3, 6\]"):
        quantize(graph, "int8", calibration=X[:68], options=options)


def empty() -> Iterator[np.ndarray]:
    yield from ()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "int8 needs calibration data, and none was given"),
        ([], "The calibration data is empty"),
        (empty(), "The calibration data is empty"),
        (X[:0], "The batch is empty"),
        ({}, "The input 'x' is missing"),
        ({"y": X}, "There is no input 'y'"),
        (X[:, :5], r"shape \[70, 5\]"),
        (X[0], r"shape \[6\]"),
        (X.astype(np.float64), "dtype float64"),
        ([X, X[:, :2]], r"shape \[70, 2\]"),
        ([{"x": X}, {"z": X}], "There is no input 'z'"),
        (["text"], "not an array of numbers"),
    ],
)
def test_bad_calibration(calibration: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(student(), "int8", calibration=calibration)  # type: ignore[arg-type]


def test_a_missing_calibration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nothing.npz' does not exist"):
        quantize(student(), "int8", calibration=tmp_path / "nothing.npz")


@pytest.mark.parametrize("calibration", [3, object()])
def test_what_is_no_data_at_all(calibration: object) -> None:
    with pytest.raises(HydraError):
        quantize(student(), "int8", calibration=calibration)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_without_a_range(value: float) -> None:
    data = X.copy()
    data[0, 0] = value
    with pytest.raises(InputError, match="calibration data for 'x' holds NaN or infinity"):
        quantize(student(), "int8", calibration=data)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_fp8_keeps_the_largest_value_whatever_the_method(method: str) -> None:
    """Its steps shrink with the values, so cutting makes none of them finer."""
    data = X.copy()
    data[3, 2] = 1000.0
    options = CalibrationOptions(method, 99.0)
    found = quantize(student(), "fp8", calibration=data, options=options)
    assert found.data == quantize(student(), "fp8", calibration=data).data
    prepared = prepare(student(), data, options)  # int8 of the same tensors has its own ranges
    assert prepared.apply(Precision("int8", "int8")).data != prepared.apply(Precision()).data
    assert prepared.apply(Precision("fp8", "fp8")).data == found.data


@pytest.mark.parametrize("correct", [True, False])
def test_the_digest_is_that_of_data_that_was_used(correct: bool) -> None:
    options = CalibrationOptions(correct_bias=correct)
    found = quantize(student(), "int8-weight-only", calibration=X, options=options)
    assert (found.metadata.calibration_sha256 is not None) == correct


# refusals


@pytest.mark.parametrize("precision", ["int8", "fp8", "heads=int8", "fp32,layer.n0=fp8"])
def test_without_data(precision: str) -> None:
    message = r"needs calibration data, and none was given.*Pass calibration="
    with pytest.raises(InputError, match=message):
        quantize(student(), precision)
    with pytest.raises(InputError, match=message):
        prepare(student(), None).apply(Precision.parse(precision))


def test_without_data_biases_are_not_corrected() -> None:
    with pytest.raises(InputError, match="int8-weight-only needs calibration data"):
        quantize(student(), "int8-weight-only", options=CalibrationOptions(correct_bias=True))


def test_heads_and_layers_that_do_not_exist() -> None:
    with pytest.raises(InputError, match=r"There is no head 3\. The graph has 3 heads"):
        quantize(student(), Precision("int8", "int8", {3: "fp32"}), calibration=X)
    with pytest.raises(InputError, match=r"There is no layer 'nothing'\. The graph's layers are"):
        quantize(student(), "int8,layer.nothing=fp32", calibration=X)


def test_a_fused_graph_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"fused already.*Quantize first, then fuse"):
        quantize(fuse(student()), "fp16")
    with pytest.raises(QuantizationError, match=r"fused already.*Quantize first, then fuse"):
        quantize(fuse(quantize(student(body=False), "int8-weight-only")), "fp16")


def test_a_quantized_graph_is_refused() -> None:
    int8 = quantize(student(), "int8", calibration=X)
    with pytest.raises(QuantizationError, match="holds QuantizeLinear or DequantizeLinear already"):
        quantize(int8, "int8", calibration=X)


def test_nothing_to_quantize() -> None:
    net = Net()
    graph = net.graph({net.op("Relu", net.input("x", ("batch", 6))): ("batch", 6)})
    with pytest.raises(QuantizationError, match="Nothing in the graph can be quantized to int8"):
        quantize(graph, "int8", calibration=X)


def test_a_graph_that_does_not_run() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    graph = net.graph({net.op("MatMul", x, net.random(5, 4)): ("batch", 4)})
    with pytest.raises(QuantizationError, match="ONNX Runtime could not load the graph"):
        quantize(graph, "int8", calibration=X)


def test_fp32_changes_nothing() -> None:
    graph = student()
    found = quantize(graph, "fp32")
    assert found.model.SerializeToString() == graph.model.SerializeToString()
    assert found.metadata.provenance[-1] == "quantize:fp32"


def test_source_is_not_changed() -> None:
    graph = student()
    before = graph.model.SerializeToString(deterministic=True)
    quantize(graph, "body=int8,heads=fp16", calibration=X)
    assert graph.model.SerializeToString(deterministic=True) == before


def test_metadata_of_others_survives_and_ours_does_not_leak() -> None:
    graph = student()
    graph.model.metadata_props.add(key="author", value="someone")
    found = quantize(graph, "int8", calibration=X)
    assert [p.key for p in found.model.metadata_props] == ["author"]


def test_fp16_weights_are_stored_in_fp16() -> None:
    found = quantize(student(), "fp16")
    kinds = {t.data_type for t in found.model.graph.initializer if len(t.dims) == 2}
    assert kinds == {TensorProto.FLOAT16}
    assert_same(found, student(), rtol=5e-3)


def test_names_given_to_unnamed_nodes_never_clash() -> None:
    """The optimizer drops nodes, so an index may come up twice."""
    graph = student()
    for node in graph.model.graph.node:
        node.name = ""
    graph.model.graph.node[-1].name = "node_0"
    found = quantize(graph, "body=fp32,heads=int8", calibration=X)
    assert matmul_precisions(found) == {"body": "fp32", "heads": "int8"}
    names = [node.name for node in found.model.graph.node]
    assert len(set(names)) == len(names)
