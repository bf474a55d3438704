"""`HydraHeads`: all layers of M heads and the summary of their logits, as the plugin takes them.

    h_0 = x            h_{l+1} = activation_l(norm_l(h_l @ weight_l * scales + bias_l))
    y = h_L [M, B, N], and of it the outputs of a summary

    x        [B, K], or [M, B, K]; float16 or bfloat16, or int8 with x_scale
    weight   int32: the packed bytes of hydra_edge/ops/packing.py, four to a word,
             [M, ceil(N/16), ceil(K/k), 256]
    bias, weight_scale, gamma, beta   fp32 [M, N]
    group_scale   of int4, in the type of x: see `packing.pack_group_scales`
    x_scale       fp32 [1] or [M], of the layer's int8 input

Inputs are x; then of each layer weight, bias, and as they apply weight_scale, group_scale, x_scale,
gamma and beta. Outputs are y, then those of the summary. Words, not bytes, because TensorRT takes
int8 tensors for quantized ones. The attributes are the fields of kernels/plugin/heads.h.

It has no function body: only the plugin computes it. `hydra_edge.plugin_restore` turns the node
back into the ops that it was made of, for whoever has no plugin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hydra_edge.kernels import ACTIVATIONS, SUMMARIES
from hydra_edge.ops import packing
from hydra_edge.ops.ensemble_summary import (
    CLASSIFICATION_OUTPUTS,
    GAUSSIAN_OUTPUTS,
    reference_classification,
    reference_gaussian,
    reference_sigmoid,
)

Array = npt.NDArray[np.generic]
Float = npt.NDArray[np.float64]

OP = "HydraHeads"
DOMAIN = "trt.plugins"  # as Polygraphy calls it: TensorRT's parser looks at the attributes below
PLUGIN = {"plugin_version": "1", "plugin_namespace": "hydra"}
# hydra_type of hydra_kernels.h, by its numbers
TYPES = tuple(
    np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, ml_dtypes.int4)
)
_INT8, _INT4 = TYPES[3:]
# What the kernels call the summary ops of `hydra_edge.ops.ensemble_summary`.
SUMMARY_OPS = {
    "EnsembleSummary": "softmax",
    "SigmoidSummary": "sigmoid",
    "GaussianSummary": "gaussian",
}
_OUTPUTS = {
    "none": (),
    "softmax": CLASSIFICATION_OUTPUTS,
    "sigmoid": CLASSIFICATION_OUTPUTS,
    "gaussian": GAUSSIAN_OUTPUTS,
}


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of all heads.

    Attributes:
        weight: ``[M, K, N]`` in float16, bfloat16, int8 or int4.
        bias: ``[M, N]``.
        scale: Of int8 ``[M, N]``, of int4 ``[M, ceil(K/group), N]``, else None.
        x_scale: ``[1]`` or ``[M]`` where the input is multiplied as int8, else None.
        gamma: ``[M, N]`` of a LayerNorm before the activation, else None.
        beta: The same.
        epsilon: The same, one for all heads.
        activation: One of `hydra_edge.kernels.ACTIVATIONS`.
    """

    weight: Array
    bias: Array
    scale: Array | None = None
    x_scale: Array | None = None
    gamma: Array | None = None
    beta: Array | None = None
    epsilon: float = 0.0
    activation: str = "none"


@dataclass(frozen=True, eq=False)
class Heads:
    """What one node computes.

    Attributes:
        layers: One to four.
        x_type: float16, bfloat16 or int8.
        x_per_head: Whether x is ``[M, B, K]``.
        y_type: float32; of one layer without summary also float16 or bfloat16.
        group: K that share a scale, of int4: 32, 64 or 128; else 0.
        summary: One of `hydra_edge.kernels.SUMMARIES`.
    """

    layers: tuple[Layer, ...]
    x_type: npt.DTypeLike
    x_per_head: bool
    y_type: npt.DTypeLike = np.float32
    group: int = 0
    summary: str = "none"

    @property
    def quantize_x(self) -> bool:
        """Whether 16-bit x and hidden activations are quantized on the way."""
        return np.dtype(self.x_type) != _INT8 and self.layers[0].x_scale is not None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return ("y", *_OUTPUTS[self.summary])

    def attributes(self) -> dict[str, object]:
        """The node's attributes, which are the plugin's fields."""
        layers = self.layers
        return {
            **PLUGIN,
            "layout": packing.LAYOUT,
            "heads": len(layers[0].weight),
            "widths": [layers[0].weight.shape[1], *(layer.weight.shape[2] for layer in layers)],
            "x_type": TYPES.index(np.dtype(self.x_type)),
            "weight_type": TYPES.index(layers[0].weight.dtype),
            "x_per_head": int(self.x_per_head),
            "quantize_x": int(self.quantize_x),
            "group": self.group,
            "activations": [ACTIVATIONS.index(layer.activation) for layer in layers],
            "norms": [int(layer.gamma is not None) for layer in layers],
            "epsilons": [float(layer.epsilon) for layer in layers],
            "x_scales": [0 if layer.x_scale is None else layer.x_scale.size for layer in layers],
            "y_type": TYPES.index(np.dtype(self.y_type)),
            "y_scales": 0,
            "summary": SUMMARIES.index(self.summary),
        }

    def parameters(self) -> list[tuple[str, Array]]:
        """All inputs but x, named, in order."""
        found: list[tuple[str, Array]] = []
        for index, layer in enumerate(self.layers):
            parts: dict[str, Array | None] = {
                "weight": packing.pack(layer.weight).view(np.int32),
                "bias": layer.bias,
                "weight_scale": layer.scale,
            }
            if layer.weight.dtype == _INT4:
                assert layer.scale is not None
                column, factors = packing.pack_group_scales(layer.scale, self.group, self.x_type)
                parts |= {"weight_scale": column, "group_scale": factors}
            parts |= {"x_scale": layer.x_scale, "gamma": layer.gamma, "beta": layer.beta}
            for name, values in parts.items():
                if values is not None:
                    exact = values.dtype if name in ("weight", "group_scale") else np.float32
                    found.append((f"layer_{index}/{name}", np.asarray(values, exact)))
        return found

    @classmethod
    def read(cls, attributes: Mapping[str, object], parameters: Sequence[Array]) -> Heads:
        """The inverse of `attributes` and `parameters`."""
        of = _Attributes(attributes)
        widths, heads, kind = (
            of.numbers("widths"),
            of.number("heads"),
            TYPES[of.number("weight_type")],
        )
        group, x_type = of.number("group"), TYPES[of.number("x_type")]
        rest = iter(parameters)
        layers = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            packed = np.ascontiguousarray(next(rest)).view(np.uint8)
            bias = next(rest)
            scale = next(rest) if kind in (_INT8, _INT4) else None
            if kind == _INT4:
                assert scale is not None
                scale = packing.unpack_group_scales(scale, next(rest), group, inputs)
            x_scale = next(rest) if of.numbers("x_scales")[index] else None
            norm = of.numbers("norms")[index]
            layers.append(
                Layer(
                    weight=packing.unpack(packed, inputs, outputs, kind),
                    bias=bias,
                    scale=scale,
                    x_scale=x_scale,
                    gamma=next(rest) if norm else None,
                    beta=next(rest) if norm else None,
                    epsilon=of.reals("epsilons")[index],
                    activation=ACTIVATIONS[of.numbers("activations")[index]],
                )
            )
        assert len(layers[0].weight) == heads
        return cls(
            layers=tuple(layers),
            x_type=x_type,
            x_per_head=bool(of.number("x_per_head")),
            y_type=TYPES[of.number("y_type")],
            group=group,
            summary=SUMMARIES[of.number("summary")],
        )

    def reference(self, x: Array) -> dict[str, Float]:
        """The outputs in numpy float64, hidden activations rounded as the kernels store them.

        Args:
            x: ``[B, K]`` or ``[M, B, K]``.

        Returns:
            Outputs by name.
        """
        h = np.asarray(x, np.float64)
        for index, layer in enumerate(self.layers):
            h = self._multiplied(layer, h, first=index == 0)
            h = h + np.asarray(layer.bias, np.float64)[:, None]
            if layer.gamma is not None:
                assert layer.beta is not None
                centred = h - h.mean(-1, keepdims=True)
                h = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + layer.epsilon)
                h = h * layer.gamma[:, None] + layer.beta[:, None]
            h = activate(layer.activation, h)
        found = {"y": h}
        if self.summary == "softmax":
            found |= reference_classification(h)
        elif self.summary == "sigmoid":
            found |= reference_sigmoid(h)
        elif self.summary == "gaussian":
            found |= reference_gaussian(h)
        return found

    def _multiplied(self, layer: Layer, h: Float, *, first: bool) -> Float:
        weight = layer.weight.astype(np.float64)
        scale = None if layer.scale is None else np.asarray(layer.scale, np.float64)
        if layer.x_scale is not None:
            assert scale is not None
            x_scale = np.asarray(layer.x_scale, np.float32).reshape(-1, 1, 1)
            if not first or np.dtype(self.x_type) != _INT8:
                h = np.clip(np.rint(h.astype(np.float32) / x_scale), -128, 127).astype(np.float64)
            return np.asarray((h @ weight) * (scale[:, None] * x_scale))
        h = h.astype(self.x_type).astype(np.float64)
        if scale is not None and self.group:
            weight = weight * scale[:, np.arange(weight.shape[1]) // self.group]
        elif scale is not None:
            weight = weight * scale[:, None]
        return np.asarray(h @ weight)


class _Attributes:
    """Attributes of a node by kind, of onnx or of onnx-graphsurgeon."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def number(self, name: str) -> int:
        return int(self._values[name])  # type: ignore[call-overload,no-any-return]

    def numbers(self, name: str) -> list[int]:
        return [int(value) for value in self._list(name)]  # type: ignore[call-overload]

    def reals(self, name: str) -> list[float]:
        return [float(value) for value in self._list(name)]  # type: ignore[arg-type]

    def _list(self, name: str) -> Iterator[object]:
        return iter(self._values[name])  # type: ignore[call-overload,no-any-return]


_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(name: str, x: npt.ArrayLike) -> Float:
    """One of `hydra_edge.kernels.ACTIVATIONS`, in float64; GELU is the one with erf."""
    h = np.asarray(x, np.float64)
    if name == "relu":
        return np.maximum(h, 0)
    if name == "gelu":
        return np.asarray(0.5 * h * (1 + _erf(h / math.sqrt(2))))
    if name == "silu":
        return np.asarray(h / (1 + np.exp(-h)))
    return np.tanh(h) if name == "tanh" else h
