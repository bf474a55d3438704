"""An engine that computes in other types than its graph asks for is found out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from onnx_models import conv_student, feeds_for, mlp_heads

from hydra_edge.errors import CompilationError
from hydra_edge.fusion import fuse
from hydra_edge.gpu import layers
from hydra_edge.lowering import EXPLICIT, PLUGIN, lower
from hydra_edge.quantization import quantize


def lowered(precision: str, how: str = EXPLICIT) -> Any:
    source = mlp_heads(k=16, hidden=(8,))
    return lower(fuse(quantize(source, precision, calibration=feeds_for(source, 20))), how).model


def layer(kind: str, *formats: str, **more: object) -> dict[str, object]:
    return {
        "Name": f"a {kind}",
        "LayerType": kind,
        "Inputs": [{"Name": "x", "Format/Datatype": text} for text in formats],
        **more,
    }


class FakeInspector:
    """The shape of TensorRT's answer."""

    def __init__(self, found: list[object]) -> None:
        self.found = found

    def create_engine_inspector(self) -> FakeInspector:
        return self

    def get_engine_information(self, kind: str) -> str:
        assert kind == "json"
        return json.dumps({"Layers": self.found, "Bindings": ["x", "y"]})


class LayerInformationFormat:
    JSON = "json"


class FakeTensorRT:
    LayerInformationFormat = LayerInformationFormat


def test_layers_are_those_of_the_inspector() -> None:
    found = [layer("gemm", "Int8"), "only a name: built without details"]
    assert layers.inspect(FakeTensorRT, FakeInspector(found)) == [found[0]]  # type: ignore[arg-type]


def test_types_by_every_name_that_versions_gave_them() -> None:
    found = layers.delivered(
        [
            layer("CaskGemm", "Row major linear INT8 format"),
            layer("kgen", "Int8", "Half"),
            layer("CaskConvolution", "Row major linear FP16 format", Weights={"Type": "Int8"}),
            layer("gemm", "FP8"),
            layer("gemm", "Row major linear FP32"),
            layer("gemm", "BFloat16"),
            layer("Reformat", "Row major linear INT4 format"),
        ]
    )
    assert found == {"int8": 3, "fp16": 2, "fp8": 1, "fp32": 1, "bf16": 1}


@pytest.mark.parametrize(
    ("precision", "how", "types"),
    [
        ("fp16", EXPLICIT, {"fp16"}),
        ("int8", EXPLICIT, {"int8"}),
        ("body=fp16,heads=int8", EXPLICIT, {"fp16", "int8"}),
        ("body=fp16,heads=int8", PLUGIN, {"fp16"}),  # the heads are the plugin's own affair
        ("int8-weight-only", EXPLICIT, set()),  # stored in int8, multiplied in floats
    ],
)
def test_what_a_model_multiplies_in(precision: str, how: str, types: set[str]) -> None:
    assert layers.asked(lowered(precision, how)) == types


def test_fp8_and_convolutions() -> None:
    source = conv_student()
    stored = quantize(source, "int8", calibration=feeds_for(source, 20))
    assert layers.asked(lower(fuse(stored), EXPLICIT).model) == {"int8"}
    eight = quantize(mlp_heads(), "fp8", calibration=feeds_for(mlp_heads(), 20))
    assert layers.asked(lower(eight, EXPLICIT).model) == {"fp8"}


def test_the_right_types_are_told() -> None:
    found = [layer("gemm", "Int8"), layer("gemm", "Int8"), layer("kgen", "Float")]
    said = layers.check(lowered("int8"), found, "TensorRT")
    assert said == "layers by the types they read: 1 in fp32, 2 in int8"


def test_reading_int8_is_not_multiplying_in_it() -> None:
    found = [
        layer("Quantize", "Row major linear FP32"),
        layer("Dequantize", "Int8"),
        layer("gemm", "Row major linear FP32", "Row major linear FP32"),
    ]
    assert layers.delivered(found) == {"fp32": 1}
    with pytest.raises(CompilationError, match="multiplies nothing in int8"):
        layers.check(lowered("int8"), found, "TensorRT")


def test_fp32_instead_of_int8_is_an_error() -> None:
    found = [layer("gemm", "Row major linear FP32"), layer("Reformat", "Int8")]
    with pytest.raises(CompilationError, match="multiplies nothing in int8") as caught:
        layers.check(lowered("int8"), found, "TensorRT")
    assert "1 in fp32" in caught.value.why
