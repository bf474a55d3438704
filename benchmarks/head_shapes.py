"""The heads that are benchmarked, from published models, and graphs of them as exporters write."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from hydra_edge.artifacts.graph import Graph

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Shape:
    """M heads from K features through hidden layers to C outputs.

    Attributes:
        name: Where the shape comes from.
        heads: M.
        features: K.
        hidden: Sizes of the hidden layers.
        outputs: C.
        norm: LayerNorm and GELU behind each hidden layer instead of ReLU.
        image: Size of the feature map, for heads that begin with a 3x3 convolution of stride 2.
        rows: Batch sizes that occur.
    """

    name: str
    heads: int
    features: int
    hidden: tuple[int, ...]
    outputs: int
    norm: bool = False
    image: int = 0
    rows: tuple[int, ...] = (1, 8, 32)

    @property
    def parameters(self) -> int:
        """Weights of all heads, without biases."""
        sizes = (self.features, *self.hidden, self.outputs)
        first = 9 if self.image else 1
        products = [a * b for a, b in itertools.pairwise(sizes)]
        return self.heads * (sum(products) + (first - 1) * products[0])


SHAPES = (
    Shape("toy regression", 20, 50, (50,), 2, rows=(1, 256)),
    Shape("SVHN Hydra-20", 20, 512, (128, 128), 10, rows=(1, 256)),
    Shape("CIFAR-100 linear heads", 4, 64, (), 100, rows=(1, 128)),
    Shape("ResNet-18, many heads", 120, 512, (), 100, rows=(1, 32)),
    Shape("ResNet-50 ImageNet", 4, 2048, (), 1000),
    Shape("MobileNet / EfficientNet", 10, 1280, (), 1000, rows=(1,)),
    Shape("ViT-S, MLP heads", 8, 384, (768,), 1000, rows=(1, 8)),
    Shape("ViLT VQA", 5, 768, (1536,), 3129, norm=True, rows=(1, 8)),
    Shape("Up-Down VQA", 30, 1024, (2048,), 3129, rows=(1, 64)),
    Shape("caption transformer", 4, 512, (), 9488, rows=(5,)),
    Shape("BLIP-base LM head", 4, 768, (768,), 30524, rows=(3, 5)),
    Shape("dense captioning", 4, 512, (), 10500, rows=(300,)),
    Shape("paper scale", 50, 512, (128,), 10, rows=(1, 32)),
    Shape("CIFAR Hydra-20, conv heads", 20, 256, (128,), 10, image=8),
)


def heads_graph(shape: Shape, precision: str = "fp32", seed: int = 0) -> Graph:
    """Heads on the graph's input, joined by Unsqueeze and Concat, with random weights."""
    graph = _Writer(shape, seed).graph()
    if precision == "fp32":
        return graph
    from hydra_edge.quantization import quantize  # what only times kernels needs none of it

    rng = np.random.default_rng(seed + 1)
    size = [size if isinstance(size, int) else 64 for size in graph.inputs[0].shape]
    calibration = rng.standard_normal(size).astype(np.float32)
    return quantize(graph, precision, calibration=calibration)


class _Writer:
    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def graph(self) -> Graph:
        shape = self.shape
        self.weights.append(numpy_helper.from_array(np.asarray([0], np.int64), "axes"))
        for head in range(shape.heads):
            self._head(head)
        rows = [f"h{head}_row" for head in range(shape.heads)]
        self.nodes.append(helper.make_node("Concat", rows, ["logits"], "join", axis=0))
        size = [shape.image] * 2 if shape.image else []
        graph = helper.make_graph(
            self.nodes,
            "heads",
            [helper.make_tensor_value_info("features", 1, ["batch", shape.features, *size])],
            [
                helper.make_tensor_value_info(
                    "logits", TensorProto.FLOAT, [shape.heads, "batch", shape.outputs]
                )
            ],
            self.weights,
        )
        opset = [helper.make_opsetid("", 20)]
        return Graph(helper.make_model(graph, opset_imports=opset, ir_version=10))

    def _head(self, head: int) -> None:
        shape = self.shape
        name, width = "features", shape.features
        for layer, size in enumerate((*shape.hidden, shape.outputs)):
            stem = f"h{head}_{layer}"
            if shape.image and not layer:
                name = self._conv(stem, name, width, size)
            else:
                weight = self._weight(f"{stem}_w", size, width)
                bias = self._weight(f"{stem}_b", size)
                name = self._op("Gemm", stem, [name, weight, bias], transB=1)
                if layer < len(shape.hidden):
                    name = self._activation(stem, name, size)
            width = size
        self.nodes.append(
            helper.make_node("Unsqueeze", [name, "axes"], [f"h{head}_row"], f"h{head}_unsqueeze")
        )

    def _conv(self, stem: str, name: str, width: int, size: int) -> str:
        weight = self._weight(f"{stem}_w", size, width, 3, 3)
        bias = self._weight(f"{stem}_b", size)
        attrs = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
        name = self._op("Conv", stem, [name, weight, bias], **attrs)
        name = self._op("Relu", f"{stem}_act", [name])
        name = self._op("GlobalAveragePool", f"{stem}_pool", [name])
        return self._op("Flatten", f"{stem}_flat", [name])

    def _activation(self, stem: str, name: str, size: int) -> str:
        if not self.shape.norm:
            return self._op("Relu", f"{stem}_act", [name])
        scale, bias = self._weight(f"{stem}_scale", size), self._weight(f"{stem}_shift", size)
        name = self._op("LayerNormalization", f"{stem}_norm", [name, scale, bias])
        return self._op("Gelu", f"{stem}_act", [name])

    def _weight(self, name: str, *size: int) -> str:
        fan_in = max(1, int(np.prod(size[1:])))
        values = self.rng.standard_normal(size, np.float32) / np.float32(np.sqrt(fan_in))
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def _op(self, kind: str, stem: str, inputs: list[str], **attrs: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [f"{stem}_y"], stem, **attrs))
        return f"{stem}_y"
