"""How a teacher's outputs are kept on disk: fp32, fp16 or top-k, and what that costs.

    fp32     the outputs as they are
    fp16     the outputs in half precision
    top-k    per sample the k largest log-probabilities in fp16, which classes they are, and the
             log-probability of all other classes together; 4k + 2 bytes. Read back, the other
             classes share that probability evenly.

The error is measured on the data that is written: on the probabilities where outputs are logits of
a softmax, on the outputs themselves elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from hydra_edge import tasks
from hydra_edge.errors import DistillationError, InputError

_SOFTMAX = "EnsembleSummary"  # tasks that end in this op take the softmax of each head's outputs
_MOST_CLASSES = 65536  # numbers of classes are kept in 16 bits
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Format:
    """A way to keep one sample's outputs of one member.

    Attributes:
        name: ``"fp32"``, ``"fp16"`` or ``"top-k"``.
        top_k: k of ``"top-k"``.

    Raises:
        InputError: A value is out of range.
    """

    name: Literal["fp32", "fp16", "top-k"] = "fp16"
    top_k: int = 32

    def __post_init__(self) -> None:
        if self.name not in ("fp32", "fp16", "top-k"):
            raise InputError(
                f"Unknown format '{self.name}'.", "There are fp32, fp16 and top-k.", "Pick one."
            )
        if self.top_k < 1:
            raise InputError(
                f"top_k is {self.top_k}.", "At least one class is kept.", "Give 1 or more."
            )

    def check(self, task: str, shape: Sequence[int]) -> None:
        """Check that outputs ``[…, C]`` of one sample can be kept so.

        Raises:
            InputError: Top-k does not fit the task or the number of classes.
        """
        if self.name != "top-k":
            return
        if not is_softmax(task):
            raise InputError(
                f"The format is top-k, the task {task}.",
                "Only a softmax can be restored from its largest outputs.",
                "Use fp16.",
            )
        if not self.top_k < shape[-1] <= _MOST_CLASSES:
            raise InputError(
                f"top_k is {self.top_k} for {shape[-1]} classes.",
                f"It must leave some out, of {_MOST_CLASSES} classes at most.",
                "Lower it, or use fp16.",
            )

    def dtype(self, shape: Sequence[int]) -> np.dtype[Any]:
        """Of the array ``[N]`` or ``[N, …, C]`` that is written, for outputs ``[…, C]``."""
        if self.name != "top-k":
            return np.dtype("<f4" if self.name == "fp32" else "<f2")
        inner = tuple(shape[:-1])
        parts = [("value", "<f2", (*inner, self.top_k)), ("which", "<u2", (*inner, self.top_k))]
        return np.dtype([*parts, ("rest", "<f2", inner)])

    def bytes_per_sample(self, shape: Sequence[int]) -> int:
        """Bytes that one member's outputs ``[…, C]`` for one sample take."""
        itemsize = self.dtype(shape).itemsize
        return itemsize if self.name == "top-k" else itemsize * math.prod(shape)

    def encode(self, outputs: torch.Tensor) -> npt.NDArray[Any]:
        """``[B, …, C]`` as it is written.

        Raises:
            DistillationError: A value is too large for fp16.
        """
        if self.name == "fp32":
            return outputs.cpu().numpy()
        if self.name == "fp16":
            largest = float(outputs.abs().max())
            if largest > _LARGEST_HALF:
                raise DistillationError(
                    f"A member gives {largest:.6g}.",
                    f"fp16 ends at {_LARGEST_HALF:g}.",
                    "Keep the outputs in fp32, or scale the member's outputs.",
                )
            return outputs.half().cpu().numpy()
        log_prob = outputs.log_softmax(-1)
        value, which = log_prob.topk(self.top_k, -1)
        rest = log_prob.scatter(-1, which, -math.inf).logsumexp(-1)
        kept = np.empty(len(outputs), self.dtype(outputs.shape[1:]))
        floor = -_LARGEST_HALF
        kept["value"] = value.clamp_min(floor).half().cpu().numpy()
        kept["which"] = which.cpu().numpy()
        kept["rest"] = rest.clamp_min(floor).half().cpu().numpy()
        return kept

    def decode(self, kept: npt.NDArray[Any], classes: int) -> npt.NDArray[np.float32]:
        """What was written as ``[B, …, C]`` in float32; logits for top-k, up to a constant."""
        if self.name != "top-k":
            return kept.astype(np.float32)
        value, rest = kept["value"].astype(np.float32), kept["rest"].astype(np.float32)
        even = rest - np.float32(math.log(classes - self.top_k))
        outputs = np.repeat(even[..., None], classes, -1)
        np.put_along_axis(outputs, kept["which"].astype(np.int64), value, -1)
        return outputs


def is_softmax(task: str) -> bool:
    """Whether the task takes the softmax of each head's outputs."""
    return tasks.find(task).summary_op == _SOFTMAX


class Errors:
    """Sums and maxima of what a format changes, over all that was written.

    Args:
        softmax: Whether outputs are logits.
        temperatures: Softmax temperatures to measure at.
    """

    def __init__(self, softmax: bool, temperatures: Sequence[float]) -> None:
        self.temperatures = tuple(temperatures) if softmax else ()
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}
        self._count = 0

    def add(self, outputs: torch.Tensor, restored: torch.Tensor) -> None:
        """Measure one batch ``[B, …, C]`` against what is read back."""
        size = len(outputs)
        self._count += size
        if not self.temperatures:
            self._note("output_error", (outputs - restored).abs().flatten(1), size)
        for temperature in self.temperatures:
            name = f"at temperature {temperature:g}"
            expected = (outputs / temperature).log_softmax(-1)
            got = (restored / temperature).log_softmax(-1)
            prob = expected.exp()
            self._note(f"probability_error {name}", (prob - got.exp()).abs().flatten(1), size)
            # Rounding makes some of these a little negative.
            divergence = (prob * (expected - got)).sum(-1).clamp_min(0)
            self._note(f"kl_nats {name}", divergence.reshape(size, -1), size)

    def _note(self, name: str, values: torch.Tensor, size: int) -> None:
        mean, most = float(values.mean()), float(values.max())
        self._sums[name] = self._sums.get(name, 0.0) + mean * size
        self._maxima[name] = max(self._maxima.get(name, 0.0), most)

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean over samples and maximum by name."""
        return {
            name: {"mean": value / self._count, "max": self._maxima[name]}
            for name, value in self._sums.items()
        }


def merged(parts: Sequence[tuple[int, Mapping[str, Mapping[str, float]]]]) -> dict[str, Any]:
    """The summary of several summaries, each with its number of samples."""
    total = sum(count for count, _ in parts)
    names = parts[0][1] if parts else ()
    return {
        name: {
            "mean": sum(count * summary[name]["mean"] for count, summary in parts) / total,
            "max": max(summary[name]["max"] for _, summary in parts),
        }
        for name in names
    }
