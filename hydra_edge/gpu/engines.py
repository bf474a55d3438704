"""What a runner needs of an engine and its execution contexts, whoever made them.

The names are TensorRT's, so that its objects fit with little in between. Every call happens in the
thread of the caller, with the device's context current.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Attributes:
        name: Its name.
        shape: Its sizes; -1 where they follow from the batch. Axis 0 of an input is the batch.
        dtype: Type of its elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        sizes = ", ".join("batch" if size < 0 else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype}[{sizes}]"


class Context(Protocol):
    """What runs an engine for one caller at a time. Methods that return a bool may refuse."""

    def set_profile(self, profile: int, stream: int) -> bool:
        """Switch to another optimization profile; input shapes must be set again."""
        ...

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """Say how large an input is."""
        ...

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """How large a tensor is, once the shapes of all inputs are set; -1 where nobody knows."""
        ...

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Say where a tensor lies."""
        ...

    def execute_async(self, stream: int) -> bool:
        """Put the program on a stream."""
        ...

    def is_capturable(self, stream: int) -> bool:
        """Whether what `execute_async` would put on a stream now may be kept as a CUDA graph."""
        ...

    def close(self) -> None:
        """Release what it holds, although the traceback of an error may still refer to it."""
        ...


class Engine(Protocol):
    """A program on the device, and what it says of itself."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Its inputs."""
        ...

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Its outputs."""
        ...

    @property
    def profiles(self) -> tuple[tuple[int, int], ...]:
        """Smallest and largest batch of each optimization profile."""
        ...

    @property
    def device_memory_bytes(self) -> int:
        """Scratch memory that a context needs while it runs, in any profile."""
        ...

    def create_context(self, profile: int, stream: int, memory: int) -> Context:
        """Make a context.

        Args:
            profile: The profile it starts in.
            stream: Where a switch to that profile is put.
            memory: Address of `device_memory_bytes` bytes of scratch memory, which contexts that
                never run at once may share.

        Raises:
            OutOfMemoryError: There is no memory for it.
        """
        ...

    def words(self) -> str:
        """What its library said of the last refusal, as sentences."""
        ...

    def close(self) -> None:
        """Release what it holds; all its contexts are gone by then."""
        ...


class OutOfMemoryError(Exception):
    """The device has no memory for another context. Never leaves a runner."""
