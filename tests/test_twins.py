"""The float twin has the layers of the graph, and no trace of fewer bits."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import conv_student, feeds_for, ops_of, student

from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.equivalence import difference
from hydra_edge.errors import GraphError
from hydra_edge.fusion import fuse
from hydra_edge.quantization import quantize
from hydra_edge.twins import in_floats

FEW_BITS = {"QuantizeLinear", "DequantizeLinear", "Cast"}
PRECISIONS = [
    "int8",
    "fp16",
    "fp8",
    "int8-weight-only",
    "int4-weight-only",
    "body=fp16,heads=int8",
    "body=int8,heads=fp16",
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("source", [student(k=16), conv_student()], ids=["mlp", "conv"])
def test_it_is_the_graph_before_it_was_quantized(source, precision: str) -> None:  # type: ignore[no-untyped-def]
    stored = quantize(source, precision, calibration=feeds_for(source, 60))
    twin = in_floats(stored)
    assert not FEW_BITS & set(ops_of(twin))
    count = {op: ops_of(source).count(op) for op in ("Gemm", "MatMul", "Conv")}
    assert {op: ops_of(twin).count(op) for op in count} == count
    assert (twin.inputs, twin.outputs) == (source.inputs, source.outputs)
    assert twin.metadata.precision == "fp32"
    feeds = feeds_for(source, 9)
    found, expected = (evaluate(graph.model, feeds) for graph in (twin, source))
    error = difference(found["head_logits"], expected["head_logits"])
    assert error < (0.3 if "int4" in precision else 0.08)  # weights stay rounded


def test_it_can_be_stored_in_fp16_and_fused() -> None:
    source = student(k=16)
    twin = in_floats(quantize(source, "body=fp16,heads=int8", calibration=feeds_for(source, 60)))
    half = fuse(quantize(twin, "fp16"))
    assert any(group.fused for group in half.fusion)
    feeds = feeds_for(source, 9)
    error = difference(
        evaluate(half.model, feeds)["head_logits"], evaluate(source.model, feeds)["head_logits"]
    )
    assert np.isfinite(error)
    assert error < 0.05


@pytest.mark.parametrize("precision", ["int8", "int8-weight-only"])
def test_fused_integers_have_no_twin(precision: str) -> None:
    fused = fuse(quantize(student(k=16), precision, calibration=feeds_for(student(k=16), 60)))
    with pytest.raises(GraphError, match="GroupedMatMul stays in it"):
        in_floats(fused)


def test_a_float_graph_stays() -> None:
    source = student()
    assert ops_of(in_floats(source)) == ops_of(source)
