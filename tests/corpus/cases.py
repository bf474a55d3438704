"""Which of `networks` are exported, in which opsets, by `make`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from networks import (
    Attention,
    Batched,
    Block,
    Cascade,
    Cosine,
    Detector,
    Experts,
    Gated,
    Gaussian,
    Heads,
    Hidden,
    Inception,
    Loop,
    Members,
    Recurrent,
    Residual,
    ResNeXt,
    cat,
    conv,
    flat_body,
    image_body,
    mean,
    mean_softmax,
    mlp,
    moments,
    segmentation,
    separable,
    stack,
    stack_last,
    text_body,
    times,
    total,
    vqa,
)
from torch import nn


@dataclass(frozen=True)
class Case:
    """A module, and the opsets in which each of torch's two exporters writes it."""

    about: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dynamo: int | None = None
    script: int | None = None
    fixed: bool = False  # the batch is no open size
    half: bool = False
    plain: bool = False  # no constant folding, no optimizer


FLAT, IMAGE, TEXT = (2, 12), (2, 3, 8, 8), (2, 5, 8)


CASES: dict[str, Case] = {
    "linear_stack": Case(
        "five linear heads, torch.stack",
        lambda: Heads(image_body(pool=True), times(5, lambda: nn.Linear(8, 6)), stack),
        IMAGE, dynamo=18, script=13,
    ),
    "mlp_stack": Case(
        "four MLP heads with ReLU and dropout, torch.stack along dim 1",
        lambda: Heads(flat_body(), times(4, mlp), lambda ys: torch.stack(ys, 1)),
        FLAT, dynamo=18, script=17,
    ),
    "mlp_outputs": Case(
        "three MLP heads, three outputs, batch fixed",
        lambda: Heads(flat_body(), times(3, mlp)),
        FLAT, dynamo=20, script=13, fixed=True,
    ),
    "mlp_plain": Case(
        "four MLP heads, exported without constant folding and optimizer",
        lambda: Heads(flat_body(), times(4, mlp), stack),
        FLAT, dynamo=18, script=18, plain=True,
    ),
    "wide_stack": Case(
        "three MLP heads of layers that quantizers do not find too small",
        lambda: Heads(flat_body(hidden=32), times(3, lambda: mlp(32, 24, 16)), stack),
        FLAT, dynamo=18,
    ),
    "mlp_half": Case(
        "three MLP heads in float16",
        lambda: Heads(flat_body(), times(3, mlp), stack),
        FLAT, dynamo=18, half=True,
    ),
    "vqa_cat": Case(
        "four heads of Linear, LayerNorm, GELU, Linear, torch.cat",
        lambda: Heads(flat_body(), times(4, vqa), cat),
        FLAT, dynamo=20,
    ),
    "vqa_opset13": Case(
        "the same in an opset without LayerNormalization and Gelu",
        lambda: Heads(flat_body(), times(3, vqa), stack),
        FLAT, script=13,
    ),
    "residual_stack": Case(
        "three ResNet stages as heads",
        lambda: Heads(image_body(4), times(3, lambda: Residual(4)), stack),
        IMAGE, dynamo=18,
    ),
    "conv_cat": Case(
        "four convolutional heads with a grouped convolution, torch.cat",
        lambda: Heads(image_body(), times(4, conv), cat),
        IMAGE, dynamo=18,
    ),
    "separable_mean": Case(
        "four depthwise separable heads, averaged by a sum",
        lambda: Heads(image_body(), times(4, separable), total),
        IMAGE, dynamo=20,
    ),
    "segmentation_outputs": Case(
        "three dense heads with GroupNorm and bilinear upsampling",
        lambda: Heads(image_body(), times(3, segmentation)),
        IMAGE, dynamo=20,
    ),
    "mean": Case(
        "three MLP heads, the mean of their stack",
        lambda: Heads(flat_body(), times(3, mlp), mean),
        FLAT, script=17,
    ),
    "mean_softmax": Case(
        "five linear heads, the mean of their probabilities",
        lambda: Heads(flat_body(), times(5, lambda: nn.Linear(16, 5)), mean_softmax),
        FLAT, dynamo=18,
    ),
    "moments": Case(
        "four Gaussian heads with softplus; mean and variance over the heads",
        lambda: Heads(flat_body(), times(4, Gaussian), moments),
        FLAT, dynamo=18,
    ),
    "attention_stack": Case(
        "three heads of nn.MultiheadAttention, LayerNorm and Linear",
        lambda: Heads(nn.Linear(8, 8), times(3, Attention), stack),
        TEXT, dynamo=18, script=17,
    ),
    "block_outputs": Case(
        "three transformer blocks as heads, an answer per token",
        lambda: Heads(nn.Linear(8, 8), times(3, Block)),
        TEXT, dynamo=20,
    ),
    "sequence_stack": Case(
        "four vqa heads on the sequence [B, T, K] of a transformer block, stacked last",
        lambda: Heads(text_body(), times(4, lambda: vqa(8)), stack_last),
        TEXT, dynamo=18,
    ),
    "gated_stack": Case(
        "three gated linear units, chunk of one wide layer",
        lambda: Heads(flat_body(), times(3, Gated), stack),
        FLAT, dynamo=18, script=17,
    ),
    "cosine_cat": Case(
        "four cosine classifiers",
        lambda: Heads(flat_body(), times(4, Cosine), cat),
        FLAT, dynamo=18,
    ),
    "recurrent_stack": Case(
        "three heads with a GRU",
        lambda: Heads(nn.Linear(8, 8), times(3, Recurrent), stack),
        TEXT, script=17,
    ),
    "ensemble_cnn": Case(
        "an ensemble of three whole CNNs, torch.stack",
        lambda: Members(times(3, lambda: nn.Sequential(image_body(pool=True), mlp(8))), stack),
        IMAGE, script=13,
    ),
    "ensemble_outputs": Case(
        "an ensemble of four MLPs, four outputs",
        lambda: Members(times(4, lambda: nn.Sequential(flat_body(), mlp())), tuple),
        FLAT, dynamo=20,
    ),
    "loop": Case(
        "three MLP heads, each written into its slice of a tensor",
        Loop,
        FLAT, dynamo=18, script=17,
    ),
    "two_shapes": Case(
        "three heads for 5 classes and two for 7, all outputs",
        lambda: Heads(flat_body(), [*times(3, mlp), *times(2, lambda: mlp(c=7))]),
        FLAT, dynamo=18,
    ),
    "experts": Case(
        "multi-gate mixture of experts: four experts, three gates, three towers",
        Experts, FLAT, dynamo=18,
    ),
    "inception": Case(
        "paths of different kernels: no heads", Inception, IMAGE, dynamo=18
    ),
    "resnext": Case(
        "four equal paths summed around a shortcut", ResNeXt, IMAGE, dynamo=18
    ),
    "detector": Case(
        "class and box branches on two scales", Detector, IMAGE, dynamo=18
    ),
    "batched": Case(
        "four heads that are one einsum already", Batched, FLAT, dynamo=18
    ),
    "hidden": Case(
        "three heads whose hidden layers are stacked into an output, too", Hidden, FLAT, dynamo=18
    ),
    "cascade": Case("heads that read each other: not parallel", Cascade, FLAT, dynamo=18),
    "widths": Case(
        "three heads of hidden sizes 6, 8 and 10",
        lambda: Heads(flat_body(), [mlp(hidden=n) for n in (6, 8, 10)], stack),
        FLAT, dynamo=18,
    ),
    "activations": Case(
        "three heads with three activations",
        lambda: Heads(flat_body(), [mlp(act=a) for a in (nn.ReLU, nn.Tanh, nn.SiLU)], stack),
        FLAT, dynamo=18,
    ),
}  # fmt: skip
