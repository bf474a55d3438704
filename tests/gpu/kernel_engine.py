"""Our kernels' library as an engine: a layer of all heads and its summary, on a real GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hydra_edge import kernels
from hydra_edge.gpu.device import Device
from hydra_edge.gpu.engines import Context, Tensor
from hydra_edge.kernels import FLOAT16, FLOAT32, LinearArguments, LinearShape, SummaryOutputs
from hydra_edge.ops import packing
from hydra_edge.ops.ensemble_summary import CLASSIFICATION_OUTPUTS, reference_classification

HEADS, INPUTS, CLASSES, LARGEST = 8, 256, 100, 64
Array = npt.NDArray[np.generic]


class KernelEngine:
    """``x [B, 256]`` in fp16 to ``logits [8, B, 100]`` and what a classifier says of them.

    Args:
        device: The GPU; its context is current.
        library: The kernels.
    """

    device_memory_bytes = 4 * LARGEST  # the counters of blocks, which must begin as 0

    def __init__(self, device: Device, library: kernels.Library) -> None:
        rng = np.random.default_rng(0)
        self.device, self.library = device, library
        self.weight = (rng.standard_normal((HEADS, INPUTS, CLASSES)) / 16).astype(np.float16)
        self.bias = rng.standard_normal((HEADS, CLASSES)).astype(np.float32)
        self._memory: list[Any] = []
        self.arguments = {
            "weight": self.place(packing.pack(self.weight)),
            "bias": self.place(self.bias),
        }
        self.profiles = ((1, 8), (9, LARGEST))
        self.inputs = (Tensor("x", (-1, INPUTS), np.dtype(np.float16)),)
        single, float32 = (-1,), np.dtype(np.float32)
        self.outputs = (
            Tensor("logits", (HEADS, -1, CLASSES), float32),
            *(
                Tensor(name, (-1, CLASSES) if name == "mean_prob" else single, float32)
                for name in CLASSIFICATION_OUTPUTS
            ),
        )

    def place(self, values: Array) -> int:
        """A copy on the GPU."""
        self._memory.append(self.device.driver.mem_alloc(values.nbytes))
        self.device.driver.memcpy_htod(self._memory[-1], np.ascontiguousarray(values))
        return int(self._memory[-1])

    def expected(self, x: Array) -> dict[str, Array]:
        """In float64, as far as numpy goes."""
        logits = np.matmul(x.astype(np.float64), self.weight.astype(np.float64))
        logits = (logits + self.bias[:, None]).astype(np.float32)
        return {"logits": logits, **reference_classification(logits)}

    def create_context(self, profile: int, stream: int, memory: int) -> Context:
        self.device.driver.memset_d8(memory, 0, self.device_memory_bytes)
        return KernelContext(self, memory)

    def words(self) -> str:
        return "The kernels' library refused it."

    def close(self) -> None:
        for memory in self._memory:
            memory.free()
        self._memory.clear()


class KernelContext:
    """A context of `KernelEngine`."""

    def __init__(self, engine: KernelEngine, counters: int) -> None:
        self._kernels, self._counters = engine, counters
        self._batch = 0
        self._addresses: dict[str, int] = {}

    def set_profile(self, profile: int, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self._batch = shape[0]
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (tensor,) = (tensor for tensor in self._kernels.outputs if tensor.name == name)
        return tuple(self._batch if size < 0 else size for size in tensor.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async(self, stream: int) -> bool:
        shape = LinearShape(
            heads=HEADS,
            batch=self._batch,
            inputs=INPUTS,
            outputs=CLASSES,
            x_type=FLOAT16,
            weight_type=FLOAT16,
            y_type=FLOAT32,
            summary=kernels.SUMMARIES.index("softmax"),
        )
        arguments = LinearArguments(
            x=self._addresses["x"],
            y=self._addresses["logits"],
            summary=SummaryOutputs(*(self._addresses[name] for name in CLASSIFICATION_OUTPUTS)),
            counters=self._counters,
            **self._kernels.arguments,
        )
        self._kernels.library.group_linear(shape, arguments, stream=stream)
        return True

    def is_capturable(self, stream: int) -> bool:
        return True

    def close(self) -> None:
        pass
