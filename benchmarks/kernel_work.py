"""What `kernels.py` measures: heads and their summary, by our kernels and by torch.

Both start from the same weights, rounded to what each format stores, and return the same five
outputs of the summary. Everything is allocated beforehand: `run` only launches.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from head_shapes import Shape
from kernel_model import Format, linear_shape

from hydra_edge import torch_kernels
from hydra_edge.errors import CompilationError
from hydra_edge.kernels import (
    ACTIVATIONS,
    FLOAT16,
    FLOAT32,
    INT8,
    MAX_LAYERS,
    SUMMARIES,
    ChainArguments,
    ChainLayer,
    ChainShape,
    Library,
    LinearArguments,
    LinearShape,
    SummaryOutputs,
    SummaryShape,
)

KINDS = {code: kind for kind, code in torch_kernels.KINDS.items()}
NONE, RELU, GELU = map(ACTIVATIONS.index, ("none", "relu", "gelu"))
SOFTMAX = SUMMARIES.index("softmax")
X_SCALE = 0.03  # of int8 activations, which are about normal
EPSILON = 1e-5


class Work(Protocol):
    """Something to launch.

    Attributes:
        name: In the table.
        weight_bytes: That one run reads.
        copies: Of the weights, so that they come from DRAM.
    """

    name: str
    weight_bytes: int
    copies: int

    def run(self, copy: int) -> tuple[torch.Tensor, ...]:
        """Enqueue everything, with one copy of the weights; the five outputs."""
        ...


@dataclass
class Heads:
    """Random heads of a shape, in fp16.

    Attributes:
        shape: Which.
        weights: Per layer ``[M, K, N]``, as large as keeps activations about normal.
        biases: Per layer float32 ``[M, N]``.
    """

    shape: Shape
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    packed_as: dict[tuple[str, int], list[torch_kernels.PackedWeights]] = field(
        default_factory=dict
    )

    def packed(self, kind: str, group: int) -> list[torch_kernels.PackedWeights]:
        """Each layer in the order of the kernels; packed once, one head per CPU core at a time."""
        if (kind, group) not in self.packed_as:
            with ThreadPoolExecutor() as pool:
                self.packed_as[kind, group] = [
                    _joined(
                        list(
                            pool.map(
                                lambda head: torch_kernels.pack(head, kind, group=group or 128),
                                weight.cpu().split(1),
                            )
                        ),
                        weight.device,
                    )
                    for weight in self.weights
                ]
        return self.packed_as[kind, group]

    @classmethod
    def random(cls, shape: Shape, device: str, seed: int = 0) -> Heads:
        """Heads whose layers keep the size of what they are given."""
        generator = torch.Generator(device).manual_seed(seed)
        sizes = (shape.features, *shape.hidden, shape.outputs)
        weights, biases = [], []
        for inputs, outputs in itertools.pairwise(sizes):
            size = (shape.heads, inputs, outputs)
            weight = torch.randn(size, generator=generator, device=device, dtype=torch.float16)
            weights.append(weight.mul_((2 / inputs) ** 0.5))
            bias = torch.randn((shape.heads, outputs), generator=generator, device=device)
            biases.append(bias * 0.1)
        return cls(shape, weights, biases)

    def input(self, batch: int, seed: int = 1) -> torch.Tensor:
        """fp16 ``[B, K]``."""
        device = self.weights[0].device
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn((batch, self.shape.features), generator=generator, device=device)
        return x.clamp(-3.5, 3.5).half()


def normalised(h: torch.Tensor) -> torch.Tensor:
    """LayerNorm and GELU between the layers of heads that have them."""
    return torch.nn.functional.gelu(torch.nn.functional.layer_norm(h, h.shape[-1:]))


def chain_shape(shape: Shape, batch: int, format: Format) -> ChainShape:
    """Whole heads as `head_chain` sees them."""
    sizes = (shape.features, *shape.hidden, shape.outputs)
    chain = ChainShape(
        heads=shape.heads,
        batch=batch,
        layers=len(sizes) - 1,
        x_type=format.x_type,
        weight_type=format.weight_type,
        group=format.group,
    )
    chain.widths[: len(sizes)] = sizes
    for i in range(len(shape.hidden)):
        chain.activations[i] = GELU if shape.norm else RELU
        chain.norms[i] = int(shape.norm)
    return chain


def paths(library: Library, shape: Shape, batch: int, format: Format) -> list[str]:
    """The ways to run these heads, "layers" and "chain"; what the heuristics prefer comes first."""
    if not shape.hidden:
        return ["layers"]
    try:
        config = library.choose_chain(chain_shape(shape, batch, format), library.device())
    except CompilationError:  # activations do not fit into shared memory
        return ["layers"]
    return ["layers", "chain"] if config.prefer_layers else ["chain", "layers"]


class Ours:
    """`group_linear` per layer, or `head_chain`, and the summary where the heuristics want it.

    Args:
        path: "layers" or "chain".
    """

    def __init__(
        self, library: Library, heads: Heads, batch: int, format: Format, path: str, copies: int
    ) -> None:
        self.name, self.copies, self.library = f"{format.name} {path}", copies, library
        self.heads, self.batch, self.format, self.path = heads, batch, format, path
        shape, device = heads.shape, heads.weights[0].device
        packed = heads.packed(KINDS[format.weight_type], format.group)
        # Everything that a launch points at.
        self.constants: list[torch.Tensor] = []
        self.buffers: list[torch.Tensor] = []
        self.weight_bytes = sum(p.weight.numel() for p in packed)
        self.weights = [[p.weight.clone() for _ in range(copies)] for p in packed]
        self.packed = packed
        x = heads.input(batch)
        if format.x_type == INT8:
            x = torch.clamp(torch.round(x / X_SCALE), -128, 127).to(torch.int8)
        self.x = x
        self.x_scale = torch.tensor([X_SCALE], device=device)
        options = {"device": device, "dtype": torch.float32}
        self.logits = torch.empty((shape.heads, batch, shape.outputs), **options)
        self.outputs = (
            torch.empty((batch, shape.outputs), **options),
            *(torch.empty(batch, **options) for _ in range(4)),
        )
        self.into = SummaryOutputs(*(output.data_ptr() for output in self.outputs))
        self.counters = torch.zeros(-(-batch // 8), device=device, dtype=torch.int32)
        self.constants += [self.x_scale, *heads.biases]
        self.constants += [tensor for layer in self.weights for tensor in layer]
        self.constants += [
            scale for p in packed for scale in (p.scale, p.group_scale) if scale is not None
        ]
        self.buffers += [self.x, self.logits, *self.outputs, self.counters]
        if path == "chain":
            self._prepare_chain()
        else:
            self._prepare_layers()
        self.summary_alone = bool(self.config.prefer_summary_alone)
        last = self.chain if path == "chain" else self.layers[-1][0]
        last.summary = 0 if self.summary_alone else SOFTMAX
        self.summary_shape = SummaryShape(SOFTMAX, shape.heads, batch, shape.outputs, FLOAT32)
        self.summary_config = library.choose_summary(self.summary_shape, library.device())
        room = library.summary_workspace(self.summary_shape, self.summary_config)
        self.workspace = torch.zeros(max(room, 16), device=device, dtype=torch.uint8)
        self.buffers.append(self.workspace)

    @property
    def launches(self) -> int:
        """Kernels per run, of which torch's LayerNorm and GELU are two per hidden layer."""
        layers = 1 if self.path == "chain" else len(self.layers)
        norms = 2 * (layers - 1) if self.heads.shape.norm and self.path == "layers" else 0
        alone = 1 + (self.summary_config.slices > 1) if self.summary_alone else 0
        return layers + norms + alone

    def _prepare_layers(self) -> None:
        shape, device, batch = self.heads.shape, self.x.device, self.batch
        self.layers: list[tuple[LinearShape, LinearArguments]] = []
        self.between: list[torch.Tensor] = []
        x = self.x
        for i, packed in enumerate(self.packed):
            linear = linear_shape(shape, batch, i, self.format)
            last = i == len(self.packed) - 1
            if last:
                y = self.logits
            else:
                integer = self.format.x_type == INT8 and not shape.norm
                dtype = torch.int8 if integer else torch.float16
                y = torch.empty((shape.heads, batch, packed.outputs), device=device, dtype=dtype)
                linear.y_type = INT8 if integer else FLOAT16
                linear.activation = NONE if shape.norm else RELU
            if x.dtype == torch.float16 and self.format.x_type == INT8:
                linear.x_type, linear.quantize_x = FLOAT16, 1
            arguments = LinearArguments(
                x=x.data_ptr(),
                weight_scale=_address(packed.scale),
                group_scale=_address(packed.group_scale),
                bias=self.heads.biases[i].data_ptr(),
                x_scale=self.x_scale.data_ptr(),
                y=y.data_ptr(),
                y_scale=self.x_scale.data_ptr(),
                summary=self.into,
                counters=self.counters.data_ptr(),
            )
            if not last:
                self.buffers.append(y)
            self.layers.append((linear, arguments))
            self.between.append(y)
            x = y
        self.config: Any = self.library.choose_linear(self.layers[-1][0], self.library.device())

    def _prepare_chain(self) -> None:
        shape, device = self.heads.shape, self.x.device
        self.chain = chain_shape(shape, self.batch, self.format)
        layers = []
        for i, packed in enumerate(self.packed):
            ones = torch.ones((shape.heads, packed.outputs), device=device)
            zeros = torch.zeros_like(ones)
            layers.append(
                ChainLayer(
                    weight_scale=_address(packed.scale),
                    group_scale=_address(packed.group_scale),
                    bias=self.heads.biases[i].data_ptr(),
                    x_scale=self.x_scale.data_ptr(),
                    gamma=ones.data_ptr(),
                    beta=zeros.data_ptr(),
                    epsilon=EPSILON,
                )
            )
            self.constants += [ones, zeros]
        self.chain_arguments = ChainArguments(
            x=self.x.data_ptr(),
            layers=(ChainLayer * MAX_LAYERS)(*layers),
            y=self.logits.data_ptr(),
            summary=self.into,
            counters=self.counters.data_ptr(),
        )
        self.config = self.library.choose_chain(self.chain, self.library.device())

    def run(self, copy: int) -> tuple[torch.Tensor, ...]:
        """See `Work`."""
        stream = _stream(self.x)
        if self.path == "chain":
            for i, weights in enumerate(self.weights):
                self.chain_arguments.layers[i].weight = weights[copy].data_ptr()
            self.library.head_chain(self.chain, self.chain_arguments, self.config, stream)
        else:
            for i, (shape, arguments) in enumerate(self.layers):
                arguments.weight = self.weights[i][copy].data_ptr()
                self.library.group_linear(shape, arguments, stream=stream)
                if self.heads.shape.norm and i < len(self.layers) - 1:
                    self.between[i].copy_(normalised(self.between[i]))
        if self.summary_alone:
            self.library.ensemble_summary(
                self.summary_shape,
                self.logits.data_ptr(),
                self.into,
                self.summary_config,
                self.workspace.data_ptr(),
                stream,
            )
        return self.outputs


class Torch:
    """The same heads as an engineer writes them in torch, in fp16.

    Args:
        how: "separate": a Linear per head and layer. "bmm": the first layer as one wide GEMM, then
            ``torch.bmm``, which is cuBLAS batched. "compiled": that, through torch.compile.
    """

    def __init__(self, heads: Heads, batch: int, how: str, copies: int) -> None:
        self.name, self.how, self.copies, self.heads = how, how, copies, heads
        self.x = heads.input(batch)
        self.weight_bytes = sum(2 * weight.numel() for weight in heads.weights)
        first, *rest = heads.weights
        wide = first.permute(1, 0, 2).reshape(first.shape[1], -1).contiguous()  # [K, M N]
        split = how == "separate"
        self.weights = [
            [w.clone() for w in (first if split else wide, *rest)] for _ in range(copies)
        ]
        self.biases = [bias.half() for bias in heads.biases]
        self.function = self._concatenated
        if how == "compiled":  # with Triton's GEMMs, where they are faster than cuBLAS's
            # Of all sides one code object: without a reset later shapes would silently run eager.
            torch._dynamo.reset()
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            self.function = torch.compile(
                self._concatenated, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True
            )

    def run(self, copy: int) -> tuple[torch.Tensor, ...]:
        """See `Work`."""
        if self.how == "separate":
            return torch_kernels.summarize(torch.stack(self._separate(self.weights[copy])))
        return self.function(self.weights[copy], self.x)

    def _between(self, h: torch.Tensor) -> torch.Tensor:
        return normalised(h) if self.heads.shape.norm else torch.relu(h)

    def _separate(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        logits = []
        for head in range(self.heads.shape.heads):
            h = self.x
            for i, weight in enumerate(weights):
                h = torch.addmm(self.biases[i][head], h, weight[head])
                if i < len(weights) - 1:
                    h = self._between(h)
            logits.append(h)
        return logits

    def _concatenated(
        self, weights: list[torch.Tensor], x: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        heads = self.heads.shape.heads
        h = torch.addmm(self.biases[0].reshape(-1), x, weights[0])
        h = h.view(len(x), heads, -1).transpose(0, 1)
        for weight, bias in zip(weights[1:], self.biases[1:], strict=True):
            h = torch.baddbmm(bias[:, None], self._between(h), weight)
        return torch_kernels.summarize(h)


def _joined(
    heads: list[torch_kernels.PackedWeights], device: torch.device
) -> torch_kernels.PackedWeights:
    def joined(name: str) -> torch.Tensor | None:
        parts = [getattr(head, name) for head in heads]
        return None if parts[0] is None else torch.cat(parts).to(device)

    weight = joined("weight")
    assert weight is not None
    return replace(
        heads[0], weight=weight, scale=joined("scale"), group_scale=joined("group_scale")
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stream(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream().cuda_stream if tensor.is_cuda else 0
