"""The CUDA kernels as torch operators, for tests and for evaluation on a GPU.

    packed = pack(weight, "int8", device="cuda")               # [M, K, N]
    logits = grouped_linear(x, packed, bias)                   # [M, B, N], float32
    mean_prob, predictive, expected, mutual, variation = ensemble_summary(logits)

`grouped_linear` and `ensemble_summary` call ``torch.ops.hydra.*``, which torch.compile and CUDA
graphs take as they are. On the CPU torch computes the same in float32 from the same packed weights:
the reference of the tests, and what a machine without a GPU can do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from hydra_edge import kernels
from hydra_edge.errors import InputError
from hydra_edge.kernels import ACTIVATIONS, BFLOAT16, FLOAT16, FLOAT32, INT4, INT8
from hydra_edge.ops import packing

GROUPS = (32, 64, 128)
KINDS = {"fp16": FLOAT16, "bf16": BFLOAT16, "int8": INT8, "int4": INT4}
_TORCH = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
_TORCH |= {torch.int8: INT8}
_OF_INT4 = (torch.float16, torch.bfloat16)
_OF_INT8 = (*_OF_INT4, torch.int8)
_NUMPY = {
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "int4": ml_dtypes.int4,
}


@dataclass(frozen=True)
class PackedWeights:
    """Weights of M heads in the order of the kernels.

    Attributes:
        kind: "fp16", "bf16", "int8" or "int4".
        inputs: K.
        outputs: N.
        group: Of int4, how many consecutive K share a scale; else 0.
        weight: uint8 ``[M, ceil(N/16), tiles of K, 1024]``.
        scale: float32 ``[M, N]`` of int8 and int4.
        group_scale: Of int4, see `packing.pack_group_scales`; in the type of x.
    """

    kind: str
    inputs: int
    outputs: int
    group: int
    weight: torch.Tensor
    scale: torch.Tensor | None = None
    group_scale: torch.Tensor | None = None


def pack(
    weight: torch.Tensor,
    kind: str,
    *,
    group: int = 128,
    bfloat16: bool = False,
    device: str | torch.device = "cpu",
) -> PackedWeights:
    """Quantize weights, symmetric and rounded to nearest, and pack them.

    Args:
        weight: ``[M, K, N]``, floating point.
        kind: "fp16", "bf16", "int8" (a scale per head and column) or "int4" (and group of K).
        group: 32, 64 or 128, of int4.
        bfloat16: The x of int4 weights is bfloat16; group scales have its type.
        device: Where the packed weights go.

    Raises:
        InputError: There is no such kind, or no kernel for these weights.
    """
    if kind not in KINDS:
        raise InputError(
            f"Weights of kind '{kind}'.",
            f"The kernels know {', '.join(KINDS)}.",
            "Choose one of those.",
        )
    if group not in GROUPS:
        raise InputError(
            f"int4 weights with a scale for every {group} values.",
            f"The kernels know {', '.join(map(str, GROUPS))}.",
            "Choose one of those.",
        )
    values = weight.detach().to("cpu", torch.float32).numpy()
    if values.ndim != 3 or 0 in values.shape:
        packing.pack(values.astype(np.float16))  # raises: says what weights look like
    _, inputs, outputs = values.shape
    scale = group_scale = None
    if kind == "int8":
        scale = _nonzero(np.abs(values).max(1) / 127)
        values = np.rint(values / scale[:, None])
    elif kind == "int4":
        padded = np.pad(values, ((0, 0), (0, -inputs % group), (0, 0)))
        groups = np.abs(padded).reshape(len(values), -1, group, outputs).max(2)
        x_type = ml_dtypes.bfloat16 if bfloat16 else np.float16
        scale, group_scale = packing.pack_group_scales(_nonzero(groups / 7), group, x_type)
        exact = scale[:, None] * _unpacked_groups(group_scale, outputs)
        values = np.rint(values / np.repeat(exact, group, 1)[:, :inputs])
        values = np.clip(values, -8, 7).astype(np.int8)
    to = functools.partial(torch.Tensor.to, device=device)
    return PackedWeights(
        kind=kind,
        inputs=inputs,
        outputs=outputs,
        group=group if kind == "int4" else 0,
        weight=to(torch.from_numpy(packing.pack(values.astype(_NUMPY[kind])))),
        scale=None if scale is None else to(torch.from_numpy(scale)),
        group_scale=None if group_scale is None else to(_as_torch(group_scale, bfloat16)),
    )


def grouped_linear(
    x: torch.Tensor,
    weight: PackedWeights,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    y_scale: torch.Tensor | None = None,
    y_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One linear layer of M heads: ``activation(x[m] @ weight[m] + bias[m])``.

    Args:
        x: ``[B, K]``, shared by the heads, or ``[M, B, K]``; fp16, bf16 or int8. 16-bit x with
            `x_scale` and int8 weights is quantized on the way.
        weight: Of `pack`.
        bias: float32 ``[M, N]``.
        activation: One of `ACTIVATIONS`.
        x_scale: float32 ``[1]`` or ``[M]``, of int8 x.
        y_scale: The same, of int8 y.
        y_dtype: float32, float16, bfloat16 or int8.

    Returns:
        ``[M, B, N]``.

    Raises:
        InputError: Shapes or types do not fit each other.
        CompilationError: There is no kernel for them on this device.
    """
    heads = weight.weight.shape[0]
    if x.ndim not in (2, 3) or x.shape[-1] != weight.inputs or (x.ndim == 3 and len(x) != heads):
        raise InputError(
            f"x of shape {list(x.shape)} for {heads} heads of K={weight.inputs}.",
            "x is [B, K], shared by the heads, or [M, B, K].",
            "Check which features the heads were given.",
        )
    if activation not in ACTIVATIONS or x.dtype not in _TORCH or y_dtype not in _TORCH:
        raise InputError(
            f"x in {x.dtype}, y in {y_dtype}, activation '{activation}'.",
            f"The kernels know float16, bfloat16 and int8, and {', '.join(ACTIVATIONS)}.",
            "Cast x, or apply the activation yourself.",
        )
    expected = {"fp16": (torch.float16,), "bf16": (torch.bfloat16,), "int8": _OF_INT8}
    if x.dtype not in expected.get(weight.kind, _OF_INT4):
        raise InputError(
            f"x in {x.dtype} for weights of kind '{weight.kind}'.",
            "The kernels multiply 16-bit x by weights of its type, int8 or int4, and int8 by int8.",
            "Cast x, or pack the weights differently.",
        )
    if (x.dtype == torch.int8 and x_scale is None) or (y_dtype == torch.int8 and y_scale is None):
        raise InputError(
            "x or y in int8, without a scale.",
            "Integers are multiples of one.",
            "Pass x_scale for x, y_scale for y.",
        )
    if weight.group_scale is not None and x.dtype != weight.group_scale.dtype:
        raise InputError(
            f"x in {x.dtype} for int4 weights whose scales are {weight.group_scale.dtype}.",
            "The kernels multiply weights by their scales in the type of x.",
            "Cast x, or pack with bfloat16=True for bfloat16.",
        )
    tensors = (bias, weight.scale, weight.group_scale, x_scale, y_scale)
    shapes = ((heads, weight.outputs),) * 2
    for tensor, shape in zip(tensors[:2], shapes, strict=True):
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != torch.float32):
            raise InputError(
                f"A bias or scale of shape {list(tensor.shape)} in {tensor.dtype}.",
                f"Here it is float32 {list(shape)}: one for each head and output.",
                "Reshape or cast it.",
            )
    for tensor in (x_scale, y_scale):
        if tensor is not None and (
            tensor.numel() not in (1, heads) or tensor.dtype != torch.float32
        ):
            raise InputError(
                f"A scale of shape {list(tensor.shape)} in {tensor.dtype}.",
                f"It is float32, one number or one for each of {heads} heads.",
                "Reshape or cast it.",
            )
    for tensor in (weight.weight, *tensors):
        if tensor is not None and tensor.device != x.device:
            raise InputError(
                f"x is on {x.device}, and weights, bias or a scale on {tensor.device}.",
                "One launch reads memory of one device.",
                "Pack with device=x.device, and move the rest there.",
            )
    result: torch.Tensor = torch.ops.hydra.grouped_linear(
        x.contiguous(),
        weight.weight.contiguous(),
        *(None if tensor is None else tensor.contiguous() for tensor in tensors),
        weight.kind,
        weight.outputs,
        weight.group,
        activation,
        y_dtype,
    )
    return result


def ensemble_summary(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Mean and uncertainty of the heads' softmax; see `hydra_edge.ops.ensemble_summary`.

    Args:
        logits: ``[M, B, C]``, float32, float16 or bfloat16.

    Returns:
        mean_prob ``[B, C]``; predictive entropy, expected entropy, mutual information and variation
        ratio, each ``[B]``; float32, entropies in nats.

    Raises:
        InputError: Logits have another shape.
    """
    if logits.ndim != 3 or 0 in logits.shape:
        raise InputError(
            f"Logits of shape {list(logits.shape)}.",
            "A summary is over the M heads of [M, B, C].",
            "Stack the heads' logits along axis 0.",
        )
    result: tuple[torch.Tensor, ...] = torch.ops.hydra.ensemble_summary(logits.contiguous())
    return result


@torch.library.custom_op("hydra::grouped_linear", mutates_args=(), device_types="cpu")
def _grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    group_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    y_scale: torch.Tensor | None,
    kind: str,
    outputs: int,
    group: int,
    activation: str,
    y_dtype: torch.dtype,
) -> torch.Tensor:
    inputs = x.shape[-1]
    values = packing.unpack(weight.numpy(), inputs, outputs, _NUMPY[kind]).astype(np.float32)
    if group_scale is not None:
        factors = _unpacked_groups(group_scale.float().numpy(), outputs)
        values *= np.repeat(factors, group, 1)[:, :inputs]
    matrix = torch.from_numpy(values)
    if weight_scale is not None:
        matrix = matrix * weight_scale[:, None]
    wide = x.float()
    if x_scale is not None:
        if x.dtype != torch.int8:
            wide = torch.clamp(torch.round(wide / x_scale[:, None, None]), -128, 127)
        wide = wide * x_scale[:, None, None]
    y = torch.matmul(wide, matrix)
    if bias is not None:
        y = y + bias[:, None]
    y = {
        "none": lambda v: v,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
    }[activation](y)
    if y_scale is not None:
        y = torch.clamp(torch.round(y / y_scale[:, None, None]), -128, 127)
    return y.to(y_dtype)


@_grouped_linear.register_fake
def _(x, weight, *rest):  # type: ignore[no-untyped-def]
    outputs, y_dtype = rest[6], rest[9]
    return x.new_empty((weight.shape[0], x.shape[-2], outputs), dtype=y_dtype)


@_grouped_linear.register_kernel("cuda")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    group_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    y_scale: torch.Tensor | None,
    kind: str,
    outputs: int,
    group: int,
    activation: str,
    y_dtype: torch.dtype,
) -> torch.Tensor:
    heads, batch = weight.shape[0], x.shape[-2]
    y = torch.empty((heads, batch, outputs), dtype=y_dtype, device=x.device)
    shape = kernels.LinearShape(
        heads=heads,
        batch=batch,
        inputs=x.shape[-1],
        outputs=outputs,
        x_type=_TORCH[x.dtype],
        weight_type=KINDS[kind],
        y_type=_TORCH[y_dtype],
        x_per_head=int(x.ndim == 3),
        quantize_x=int(x_scale is not None and x.dtype != torch.int8),
        group=group,
        activation=ACTIVATIONS.index(activation),
    )
    arguments = kernels.LinearArguments(
        x=kernels.address(x),
        weight=kernels.address(weight),
        weight_scale=kernels.address(weight_scale),
        group_scale=kernels.address(group_scale),
        bias=kernels.address(bias),
        x_scale=kernels.address(x_scale),
        x_scale_per_head=int(x_scale is not None and x_scale.numel() > 1),
        y=y.data_ptr(),
        y_scale=kernels.address(y_scale),
        y_scale_per_head=int(y_scale is not None and y_scale.numel() > 1),
    )
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _library().group_linear(shape, arguments, stream=stream)
    return y


@torch.library.custom_op("hydra::ensemble_summary", mutates_args=(), device_types="cpu")
def _ensemble_summary(
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return summarize(logits)


def summarize(
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ensemble_summary` in the operators of torch itself, on any device."""
    p = torch.softmax(logits.float(), -1)
    mean = p.mean(0)
    predictive = torch.special.entr(mean).sum(-1)
    expected = torch.special.entr(p).sum(-1).mean(0)
    agrees = p.argmax(-1) == mean.argmax(-1)
    mutual = torch.clamp(predictive - expected, min=0)
    return mean, predictive, expected, mutual, 1 - agrees.float().mean(0)


@_ensemble_summary.register_fake
def _(logits):  # type: ignore[no-untyped-def]
    _, batch, classes = logits.shape
    rows = [logits.new_empty(batch, dtype=torch.float32) for _ in range(4)]
    return logits.new_empty((batch, classes), dtype=torch.float32), *rows


@_ensemble_summary.register_kernel("cuda")
def _(
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, batch, classes = logits.shape
    mean = torch.empty((batch, classes), dtype=torch.float32, device=logits.device)
    rows = [torch.empty(batch, dtype=torch.float32, device=logits.device) for _ in range(4)]
    outputs = kernels.SummaryOutputs(mean.data_ptr(), *(row.data_ptr() for row in rows))
    shape = kernels.SummaryShape(
        kernels.SUMMARIES.index("softmax"), heads, batch, classes, _TORCH[logits.dtype]
    )
    with torch.cuda.device(logits.device):
        library, stream = _library(), torch.cuda.current_stream().cuda_stream
        config = library.choose_summary(shape, library.device())
        room = library.summary_workspace(shape, config)
        workspace = torch.zeros(room, dtype=torch.uint8, device=logits.device) if room else None
        library.ensemble_summary(
            shape, logits.data_ptr(), outputs, config, kernels.address(workspace), stream
        )
    return mean, rows[0], rows[1], rows[2], rows[3]


@functools.cache
def _library() -> kernels.Library:
    library = kernels.load()
    if library.weight_layout != packing.LAYOUT:
        raise InputError(
            f"The kernels' library reads weights in the layout '{library.weight_layout}'.",
            f"This hydra-edge packs them as '{packing.LAYOUT}': they are of different versions.",
            "Install hydra-edge again where nvcc is on the PATH.",
        )
    return library


def _as_torch(values: np.ndarray, bfloat16: bool) -> torch.Tensor:
    """Numpy knows no bfloat16 that torch takes: by way of the bits."""
    kind = torch.bfloat16 if bfloat16 else torch.float16
    return torch.from_numpy(values.view(np.int16)).view(kind)


def _nonzero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > 0, scale, 1).astype(np.float32)


def _unpacked_groups(group_scale: np.ndarray, outputs: int) -> np.ndarray:
    """``[M, groups of K, N]`` again, as float32."""
    heads, tiles, blocks, per_tile, _, _ = group_scale.shape
    rows = group_scale.astype(np.float32).transpose(0, 2, 3, 1, 5, 4)
    return rows.reshape(heads, blocks * per_tile, tiles * 16)[:, :, :outputs]
