"""Graphs as other exporters write them: what must fuse does, and nothing computes anything else.

``corpus/make.py`` wrote them; ``corpus/manifest.json`` says what each is and must become.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hydra_edge import compilation
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import LOWERINGS, evaluate
from hydra_edge.compilation import compile
from hydra_edge.equivalence import difference, random_inputs, tolerance_of
from hydra_edge.errors import ArtifactError, HydraError
from hydra_edge.fusion import explain, fuse
from hydra_edge.lowering import lower
from hydra_edge.quantization import quantize
from hydra_edge.runtime import load

CORPUS = Path(__file__).parent / "corpus"
MANIFEST = json.loads((CORPUS / "manifest.json").read_text())
GRAPHS = sorted(name for name, entry in MANIFEST.items() if "error" not in entry)
# Tools quantized these, or they take token numbers, or they are half precision already.
PLAIN = [
    name
    for name in GRAPHS
    if not any(part in name for part in ("int8", "half", "bert", "vilt", "_extended_"))
]
NOTHING_TO_QUANTIZE = ("skl2onnx_voting_logistic",)
Arrays = dict[str, npt.NDArray[np.generic]]


@cache
def graph_of(name: str) -> Graph:
    return Graph.load(CORPUS / f"{name}.onnx")


@cache
def fused_of(name: str) -> Graph:
    return fuse(graph_of(name))


def batches_of(graph: Graph) -> tuple[int, ...]:
    return (2,) if isinstance(graph.inputs[0].shape[0], int) else (1, 3, 8)


def assert_close(found: Arrays, expected: Arrays, tolerance: float, what: str) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        if np.issubdtype(array.dtype, np.floating):
            assert difference(found[name], array) <= tolerance, (what, name)
        else:
            assert np.array_equal(found[name], array), (what, name)


def test_the_manifest_knows_every_file_and_they_are_small() -> None:
    files = {path.stem: path.stat().st_size for path in CORPUS.glob("*.onnx")}
    assert set(files) == set(MANIFEST)
    assert max(files.values()) <= 100_000
    assert sum(files.values()) <= 1_000_000
    for name, entry in MANIFEST.items():
        assert {"about", "exporter", "producer"} <= set(entry), name
        assert "error" in entry or {"fused", "left"} <= set(entry), name


def test_no_file_tells_where_it_was_made() -> None:
    for path in CORPUS.iterdir():
        if path.is_file():
            data = path.read_bytes()
            assert not [word for word in (b"/home/", b"/tmp/", b"site-packages") if word in data]


@pytest.mark.parametrize("name", sorted(set(MANIFEST) - set(GRAPHS)))
def test_what_is_no_valid_model_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match=MANIFEST[name]["error"]):
        graph_of(name)


@pytest.mark.parametrize("name", GRAPHS)
def test_what_fuses_and_what_is_left_alone(name: str) -> None:
    graph, fused, expected = graph_of(name), fused_of(name), MANIFEST[name]
    groups = fused.fusion
    assert sorted(group.heads for group in groups if group.fused) == sorted(expected["fused"])
    left = [group for group in groups if not group.fused]
    assert sorted(group.code for group in left) == sorted(expected["left"]), left
    assert all(group.reason for group in left)
    assert fused.inputs == graph.inputs
    assert fused.outputs == graph.outputs
    if not expected["fused"]:
        assert fused.model.SerializeToString() == graph.model.SerializeToString()


@pytest.mark.parametrize("name", GRAPHS)
def test_once_is_twice_and_always_the_same(name: str) -> None:
    fused = fused_of(name)
    assert fuse(fused).data == fused.data
    assert fuse(Graph.load(CORPUS / f"{name}.onnx")).data == fused.data
    assert {group.source for group in explain(graph_of(name))} <= {
        group.source for group in fused.fusion
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_fused_and_lowered_compute_the_same(name: str) -> None:
    graph, fused = graph_of(name), fused_of(name)
    tolerance = tolerance_of(graph.model)
    lowered = {kind: lower(fused, kind) for kind in LOWERINGS}
    for batch in batches_of(graph):
        feeds = random_inputs(graph.inputs, batch=batch, seed=batch)
        expected = evaluate(graph.model, feeds)
        assert_close(evaluate(fused.model, feeds), expected, tolerance, "fused")
        for kind, other in lowered.items():
            assert_close(evaluate(other.model, feeds), expected, tolerance, kind)


@pytest.mark.parametrize("name", PLAIN)
def test_int8_works_or_says_why_not(name: str) -> None:
    graph = graph_of(name)
    calibration = random_inputs(graph.inputs, batch=batches_of(graph)[-1])
    if name in NOTHING_TO_QUANTIZE:
        with pytest.raises(HydraError):
            quantize(graph, "int8", calibration=calibration)
        return
    int8 = quantize(graph, "int8", calibration=calibration)
    fused = fuse(int8)
    assert [g.heads for g in fused.fusion if g.fused] == MANIFEST[name]["fused"], fused.fusion
    feeds = random_inputs(graph.inputs, batch=batches_of(graph)[0], seed=1)
    expected = evaluate(int8.model, feeds)
    assert_close(evaluate(fused.model, feeds), expected, tolerance_of(int8.model), "fused")


@pytest.mark.parametrize(
    "name", ["torch_dynamo_vqa_cat", "skl2onnx_bagging_mlp", "ort_int8_mlp_stack_symmetric"]
)
def test_an_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_TIMING_SECONDS", 0.003)
    graph = graph_of(name)
    engine = compile(fused_of(name), "cpu", batch=(1, 2, 8))
    feeds = random_inputs(graph.inputs, batch=5)
    with load(engine) as session:
        found = session.run(*feeds.values())
    for output, array in evaluate(graph.model, feeds).items():
        if np.issubdtype(array.dtype, np.floating):
            assert difference(np.asarray(found[output]), array) <= tolerance_of(graph.model)
