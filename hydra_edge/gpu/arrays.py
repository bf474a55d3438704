"""Arrays on the GPU: what a run leaves there, and what other libraries hand in."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import InputError
from hydra_edge.gpu import dlpack
from hydra_edge.gpu.device import Device, Stream, leave_to_parent

Array = npt.NDArray[np.generic]
_LEGACY_STREAM = 1  # as __cuda_array_interface__ spells CUDA's default stream


class _Shaped:
    """What shape and type tell of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class DeviceArray(_Shaped):
    """An output that stayed on the GPU. It is complete: no stream has to be waited for.

    Torch, CuPy and others take it without a copy: ``torch.from_dlpack(array)``,
    ``cupy.asarray(array)``. Its memory lives as long as it, or whatever was made of it.

    Args:
        device: The GPU.
        shape: Sizes.
        dtype: Type of the elements.

    Attributes:
        shape: Sizes.
        dtype: Type of the elements.
        address: Device address of the first element.
    """

    def __init__(self, device: Device, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self._device = device
        allocation = device.driver.mem_alloc(max(self.nbytes, 1))
        self.address = int(allocation)
        self._scope = device.hold()
        weakref.finalize(self, _free, device, self._scope, allocation)

    def numpy(self) -> Array:
        """A copy on the CPU."""
        found = np.empty(self.nbytes, np.uint8)
        with self._scope:
            if self.nbytes:
                self._device.driver.memcpy_dtoh(found, self.address)
        return found.view(self.dtype).reshape(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({list(self.shape)}, {self.dtype}, {self._device.name})"

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self._device.ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("A DeviceArray is handed on where it is, without a copy.")
        return dlpack.write(self, self.address, self.shape, self.dtype, self.__dlpack_device__())


def _free(device: Device, scope: Any, allocation: Any) -> None:
    if device.is_forked:
        leave_to_parent(allocation)
        return
    with scope:
        allocation.free()
    device.release()


class Foreign(_Shaped):
    """An array that another library keeps on a GPU, to be read where it is.

    Args:
        value: Whatever has ``__dlpack__`` or ``__cuda_array_interface__``.
        name: The input it is for.

    Attributes:
        shape: Sizes.
        dtype: Type of the elements.
        address: Device address of the first element.
        ordinal: Which GPU; None if it does not say.

    Raises:
        InputError: It cannot be read as it is.
    """

    def __init__(self, value: Any, name: str) -> None:
        self._value = value
        self._stream: int | None = None
        self.name = name
        if hasattr(value, "__dlpack__"):
            strides = self._read_capsule(value)
        else:
            strides = self._read_interface(value.__cuda_array_interface__)
        if strides is not None and not _is_in_order(self.shape, strides):
            raise InputError(
                f"The value for '{name}' has the strides {list(strides)}.",
                "An engine reads consecutive elements.",
                "Make it contiguous first: x.contiguous(), or cupy.ascontiguousarray(x).",
            )

    def _read_capsule(self, value: Any) -> tuple[int, ...] | None:
        try:
            # -1: no waiting yet, which is for the stream that will read it.
            self._capsule = value.__dlpack__(stream=-1)
        except (BufferError, RuntimeError, TypeError, ValueError) as exc:
            raise InputError(
                f"The value for '{self.name}' cannot be read on the GPU.",
                f"{type(value).__name__} says: {str(exc).strip().rstrip('.')}.",
                "Detach it first, e.g. tensor.detach().",
            ) from exc
        content = dlpack.read(self._capsule)
        if content.dtype is None:
            raise InputError(
                f"The value for '{self.name}' has elements of a type that no engine takes.",
                "An engine takes floats, integers and booleans.",
                "Convert it first.",
            )
        self.address, self.shape, self.dtype = content.address, content.shape, content.dtype
        self.ordinal: int | None = content.device
        return content.strides

    def _read_interface(self, interface: dict[str, Any]) -> tuple[int, ...] | None:
        self.address, self.shape = int(interface["data"][0]), tuple(interface["shape"])
        self.dtype = np.dtype(interface["typestr"])
        self.ordinal = None
        # Version 2 and PyCUDA say nothing of streams; both work on the default one unless told.
        self._stream = interface.get("stream") or _LEGACY_STREAM
        strides = interface.get("strides")
        if strides is None:
            return None
        return tuple(step // self.dtype.itemsize for step in strides)

    def require_on(self, device: Device) -> None:
        """Check that it is where the engine is.

        Raises:
            InputError: It lies on another GPU.
        """
        if self.ordinal not in (None, device.ordinal):
            raise InputError(
                f"The value for '{self.name}' lies on GPU {self.ordinal}.",
                f"The engine runs on GPU {device.ordinal}, {device.name}.",
                "Move it there first.",
            )

    def wait(self, device: Device, stream: Stream) -> None:
        """Let ``stream`` go on only when the array is written; the context is current."""
        if self._stream is None:
            self._value.__dlpack__(stream=stream.handle)
        elif self._stream == _LEGACY_STREAM:
            stream.raw.wait_for_event(device.driver.Event().record())
        else:  # PyCUDA takes no stream of others
            device.driver.Context.synchronize()


def is_on_gpu(value: object) -> bool:
    """Whether a value is an array in the memory of a GPU."""
    if isinstance(value, np.ndarray):
        return False
    where = getattr(value, "__dlpack_device__", None)
    if where is not None:
        return int(where()[0]) in (dlpack.CUDA, dlpack.CUDA_MANAGED)
    return hasattr(value, "__cuda_array_interface__")


def _is_in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides, in elements, are those of C order; an axis of size 1 may have any."""
    return 0 in shape or all(
        size == 1 or step == math.prod(shape[axis + 1 :])
        for axis, (size, step) in enumerate(zip(shape, strides, strict=True))
    )
