"""Page-locked memory of one tensor, and where the GPU finds it.

A GPU with memory of its own gets copies, put on a stream. One that shares memory with the CPU reads
and writes small buffers in the page-locked memory itself: nothing is copied. Large ones it may read
several times, which can be slow there, so they are copied, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import InputError
from hydra_edge.gpu.device import Device, Stream

Array = npt.NDArray[np.generic]
MAPPED_BYTES = 64 * 1024


class Buffer:
    """Memory of one tensor, large enough for any batch. The device's context is current in use.

    Args:
        device: The GPU.
        name: The tensor.
        size_bytes: Of its largest batch.
        mapped_bytes: Up to which size a GPU that shares memory with the CPU works in it.

    Attributes:
        name: The tensor.
        size_bytes: How much it holds.
        address: Where the GPU finds it.
    """

    def __init__(
        self, device: Device, name: str, size_bytes: int, mapped_bytes: int = MAPPED_BYTES
    ) -> None:
        self.name, self.size_bytes = name, size_bytes
        self._driver = driver = device.driver
        self._allocation: Any = None
        is_mapped = device.integrated and size_bytes <= mapped_bytes
        flags = driver.host_alloc_flags.DEVICEMAP if is_mapped else 0
        # uint8, because numpy exports no buffer of bfloat16, which copies need.
        self._host = driver.pagelocked_empty((max(size_bytes, 1),), np.uint8, mem_flags=flags)
        try:
            if is_mapped:
                self.address = int(self._host.base.get_device_pointer())
            else:
                self._allocation = driver.mem_alloc(max(size_bytes, 1))
                self.address = int(self._allocation)
        except driver.Error:
            self.free()
            raise

    def view(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        """Its beginning as an array on the CPU.

        Raises:
            InputError: The array would be larger than the buffer.
        """
        size = math.prod(shape) * dtype.itemsize
        if size > self.size_bytes or any(axis < 0 for axis in shape):
            raise InputError(
                f"'{self.name}' of the shape {list(shape)} has {size} bytes.",
                f"Its buffer has {self.size_bytes}, the most that the engine declares.",
                "Run smaller batches, or compile the engine for larger ones.",
            )
        return self._bytes(size).view(dtype).reshape(shape)  # type: ignore[no-any-return]

    def upload(self, size: int, stream: Stream) -> None:
        """Put the copy of the first ``size`` bytes to the GPU on a stream."""
        if self._allocation is not None and size:
            self._driver.memcpy_htod_async(self.address, self._bytes(size), stream.raw)

    def download(self, size: int, stream: Stream) -> None:
        """Put the copy of the first ``size`` bytes from the GPU on a stream."""
        if self._allocation is not None and size:
            self._driver.memcpy_dtoh_async(self._bytes(size), self.address, stream.raw)

    def _bytes(self, size: int) -> Any:
        return self._host[:size]

    def free(self) -> None:
        """Release the memory, of which no view may be used any more."""
        host, self._host = self._host, None
        if host is not None:
            host.base.free()
        allocation, self._allocation = self._allocation, None
        if allocation is not None:
            allocation.free()
