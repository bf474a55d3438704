"""What a `HydraHeads` node says is what it was made of."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from hydra_edge.ops import packing
from hydra_edge.ops.grouped_matmul import reference_quantized, reference_weight_only
from hydra_edge.ops.heads import Heads, Layer, activate

M, B = 3, 5
RNG = np.random.default_rng(1)


def layer(inputs: int, outputs: int, dtype: object, **more: object) -> Layer:
    if np.dtype(dtype) in (np.int8, ml_dtypes.int4):  # type: ignore[arg-type]
        top = 127 if np.dtype(dtype) == np.int8 else 7  # type: ignore[arg-type]
        weight = RNG.integers(-top, top, (M, inputs, outputs)).astype(dtype)  # type: ignore[call-overload]
    else:
        weight = RNG.standard_normal((M, inputs, outputs)).astype(dtype)  # type: ignore[call-overload]
    bias = RNG.standard_normal((M, outputs)).astype(np.float32)
    return Layer(weight, bias, **more)  # type: ignore[arg-type]


def scales(*shape: int) -> np.ndarray:
    return RNG.uniform(0.01, 0.1, shape).astype(np.float32)


def variants() -> dict[str, Heads]:
    norm = {"gamma": scales(M, 20), "beta": scales(M, 20), "epsilon": 1e-4, "activation": "gelu"}
    int8 = {"scale": scales(M, 20), "x_scale": scales(1)}
    last = {"scale": scales(M, 7), "x_scale": scales(M)}
    int4 = {"scale": scales(M, 2, 20)}
    return {
        "fp16": Heads(
            (layer(40, 20, np.float16, **norm), layer(20, 7, np.float16)),
            np.float16,
            False,
            summary="softmax",
        ),
        "bf16": Heads(
            (layer(40, 20, ml_dtypes.bfloat16),),
            ml_dtypes.bfloat16,
            True,
            y_type=ml_dtypes.bfloat16,
        ),
        "int8": Heads(
            (layer(40, 20, np.int8, **int8, activation="relu"), layer(20, 7, np.int8, **last)),
            np.int8,
            False,
        ),
        "quantize_x": Heads(
            (layer(40, 20, np.int8, **int8, activation="silu"), layer(20, 7, np.int8, **last)),
            np.float16,
            False,
        ),
        "w8a16": Heads(
            (layer(40, 20, np.int8, scale=scales(M, 20)),), np.float16, False, summary="gaussian"
        ),
        "w4a16": Heads(
            (layer(40, 20, ml_dtypes.int4, **int4),),
            np.float16,
            False,
            group=32,
            summary="sigmoid",
        ),
    }


@pytest.mark.parametrize("name", variants())
def test_a_node_can_be_read_again(name: str) -> None:
    heads = variants()[name]
    again = Heads.read(heads.attributes(), [values for _, values in heads.parameters()])
    assert again.attributes() == heads.attributes()
    for (label, ours), (_, theirs) in zip(heads.parameters(), again.parameters(), strict=True):
        if label.endswith("group_scale") or (name == "w4a16" and label.endswith("weight_scale")):
            np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=1e-3)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=label)
    for ours_, theirs_ in zip(heads.layers, again.layers, strict=True):
        np.testing.assert_array_equal(ours_.weight, theirs_.weight)


def test_fields_are_those_of_the_plugin() -> None:
    heads = variants()["int8"]
    assert heads.attributes() == {
        "plugin_version": "1",
        "plugin_namespace": "hydra",
        "layout": packing.LAYOUT,
        "heads": 3,
        "widths": [40, 20, 7],
        "x_type": 3,
        "weight_type": 3,
        "x_per_head": 0,
        "quantize_x": 0,
        "group": 0,
        "activations": [1, 0],
        "norms": [0, 0],
        "epsilons": [0.0, 0.0],
        "x_scales": [1, 3],
        "y_type": 0,
        "y_scales": 0,
        "summary": 0,
    }
    assert [label for label, _ in heads.parameters()] == [
        "layer_0/weight",
        "layer_0/bias",
        "layer_0/weight_scale",
        "layer_0/x_scale",
        "layer_1/weight",
        "layer_1/bias",
        "layer_1/weight_scale",
        "layer_1/x_scale",
    ]
    words = dict(heads.parameters())["layer_0/weight"]
    assert (words.dtype, words.shape) == (np.int32, (3, 2, 1, 256))
    assert variants()["quantize_x"].attributes()["quantize_x"] == 1


def test_int8_layers_are_those_of_the_grouped_op() -> None:
    """The reference of the node against that of `QuantizedGroupedMatMul`, layer after layer."""
    heads = variants()["quantize_x"]
    x = RNG.standard_normal((B, 40)).astype(np.float16)
    first, last = heads.layers
    h = reference_quantized(
        x,
        first.weight,
        first.bias[:, None],
        first.scale[:, None],
        first.x_scale,  # type: ignore[index, arg-type]
    )
    h = activate("silu", h)
    expected = reference_quantized(
        h,
        last.weight,
        last.bias[:, None],
        last.scale[:, None],
        last.x_scale.reshape(-1, 1, 1),  # type: ignore[index, union-attr, arg-type]
    )
    np.testing.assert_allclose(heads.reference(x)["y"], expected, rtol=1e-6, atol=1e-6)
    stored = variants()["int8"]
    integers = RNG.integers(-127, 127, (B, 40)).astype(np.int8)
    scale = stored.layers[0].x_scale
    assert scale is not None
    one = Heads(stored.layers[:1], np.int8, False).reference(integers)["y"]
    real = integers * scale.astype(np.float64)
    same = Heads(stored.layers[:1], np.float16, False).reference(real.astype(np.float32))["y"]
    np.testing.assert_allclose(one, same, rtol=1e-6, atol=1e-6)


def test_int4_layers_are_those_of_the_grouped_op() -> None:
    heads = variants()["w4a16"]
    x = RNG.standard_normal((B, 40)).astype(np.float16)
    (only,) = heads.layers
    zero = np.zeros((1, 1, 1))
    expected = reference_weight_only(x, only.weight, only.bias[:, None], only.scale, zero, 32)  # type: ignore[arg-type]
    np.testing.assert_allclose(heads.reference(x)["y"], expected, rtol=1e-6)


def test_the_summary_is_of_the_logits() -> None:
    found = variants()["fp16"].reference(RNG.standard_normal((B, 40)).astype(np.float16))
    assert list(found) == list(variants()["fp16"].outputs)
    assert found["y"].shape == (M, B, 7)
    assert found["mean_prob"].shape == (B, 7)
    np.testing.assert_allclose(found["mean_prob"].sum(-1), 1)
    found = variants()["w8a16"].reference(RNG.standard_normal((B, 40)).astype(np.float16))
    assert found["aleatoric_variance"].shape == (B, 10)


def test_activations_at_known_points() -> None:
    for name, expected in (
        ("none", -1.0),
        ("relu", 0.0),
        ("gelu", -0.15865525),
        ("silu", -0.26894142),
        ("tanh", -0.76159416),
    ):
        np.testing.assert_allclose(activate(name, [-1.0]), [expected], rtol=1e-6)
