"""Batch normalisation over the batches of all processes, so that their number changes no result.

On GPUs it is torch's own `SyncBatchNorm`, which refuses CPUs; there it is the class below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import distributed, nn

_Source: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def synchronized(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with every batch normalisation replaced by a synchronized one.

    Parameters, buffers and their names stay; the other submodules are the same objects.

    Args:
        module: Any module; what holds a batch normalisation is changed.
        device: Where it will be trained.
    """
    if device.type != "cpu":
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        converted = convert(module)
        return converted
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        return _SynchronizedBatchNorm(module)
    for name, child in module.named_children():
        setattr(module, name, synchronized(child, device))
    return module


class _SynchronizedBatchNorm(nn.Module):
    """Takes over the parameters and buffers of a batch normalisation.

    The mean and the variance come from sums that are added up over the processes; so do their
    gradients, by the backward pass of that sum.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None

    def __init__(self, source: _Source) -> None:
        super().__init__()
        self.eps, self.momentum = source.eps, source.momentum
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(source, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(source, name))
        self.training = source.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[B, C, …]`` with the statistics of all processes, or the running ones."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        if self.training or self.running_mean is None or self.running_var is None:
            mean, variance = self._statistics(x)
        else:
            mean, variance = self.running_mean, self.running_var
        scale = (variance + self.eps).rsqrt()
        y = (x - mean.view(shape)) * scale.view(shape)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        values = x.float()
        count = values.new_full((1,), values.numel() // values.shape[1])
        sums = _total(torch.cat([count, values.sum(axes)]))
        count, mean = sums[:1].detach(), sums[1:] / sums[:1].detach()
        # Around the mean, in a second exchange: E[x²] - E[x]² would lose digits.
        centred = values - mean.view(1, -1, *[1] * (x.ndim - 2))
        variance = _total(centred.square().sum(axes)) / count
        if self.training and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                rate = self.momentum
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                    rate = 1 / self.num_batches_tracked.item() if rate is None else rate
                unbiased = variance * count / (count - 1)
                self.running_mean.lerp_(mean, rate or 0.0)
                self.running_var.lerp_(unbiased, rate or 0.0)
        return mean, variance


class _Total(torch.autograd.Function):
    """Sum over the processes; so is its gradient, as every process's loss depends on the sum."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return _Total.forward(ctx, gradients[0])


def _total(value: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor = _Total.apply(value)  # type: ignore[no-untyped-call]
    return total
