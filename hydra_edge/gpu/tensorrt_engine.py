"""TensorRT's engine and contexts as `hydra_edge.gpu.engines` wants them.

Only names that TensorRT 10.3 to 11 and TensorRT-RTX share are used; what is not in all of them is
asked for first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from hydra_edge.errors import CompilationError, DeviceMismatchError
from hydra_edge.gpu.engines import Context, OutOfMemoryError, Tensor
from hydra_edge.gpu.messages import Messages

if TYPE_CHECKING:
    import types

_DTYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP8": ml_dtypes.float8_e4m3fn,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


def deserialize(trt: types.ModuleType, payload: bytes, messages: Messages) -> TensorRTEngine:
    """Load what TensorRT has built; the device's context is current.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        payload: The serialized engine.
        messages: Where TensorRT says what is wrong.

    Raises:
        DeviceMismatchError: TensorRT refuses it; its own words are in the message.
        CompilationError: It has inputs or outputs of a kind that is not supported.
    """
    runtime = trt.Runtime(messages.logger)
    engine = runtime.deserialize_cuda_engine(payload)
    if engine is None:
        raise DeviceMismatchError(
            f"{trt.__name__} {trt.__version__} does not load the engine of {len(payload)} bytes.",
            f"It says: {messages.words()}",
            "Compile it again on this device: hydra-edge compile, or load(..., rebuild=True).",
        )
    return TensorRTEngine(trt, runtime, engine, messages)


class TensorRTEngine:
    """A deserialized engine; implements `hydra_edge.gpu.engines.Engine`.

    Raises:
        CompilationError: It has inputs or outputs of a kind that is not supported.
    """

    def __init__(
        self, trt: types.ModuleType, runtime: Any, engine: Any, messages: Messages
    ) -> None:
        self._trt, self._runtime, self._engine, self._messages = trt, runtime, engine, messages
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(self._tensor(name) for name in names if is_input[name])
        self.outputs = tuple(self._tensor(name) for name in names if not is_input[name])
        self.profiles = tuple(map(self._batches, range(engine.num_optimization_profiles)))
        self.device_memory_bytes = int(engine.device_memory_size_v2)

    def create_context(self, profile: int, stream: int, memory: int) -> Context:
        """A context with scratch memory that the caller owns; see `engines.Engine`."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise OutOfMemoryError(self._messages.words().rstrip("."))
        if self.device_memory_bytes:
            context.set_device_memory(memory, self.device_memory_bytes)
        is_there = context.active_optimization_profile == profile
        made = _TensorRTContext(context)
        del context  # the traceback of an error would keep it
        if not is_there and not made.set_profile(profile, stream):
            made.close()
            raise OutOfMemoryError(self._messages.words().rstrip("."))
        return made

    def words(self) -> str:
        """What TensorRT said."""
        return self._messages.words()

    def close(self) -> None:
        """Let go of TensorRT's objects, the runtime last."""
        self._engine = None
        self._runtime = None

    def _tensor(self, name: str) -> Tensor:
        engine = self._engine
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise _unsupported(name, f"its elements are {kind}")
        if engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
            raise _unsupported(name, "it lies on the CPU, as shapes do")
        return Tensor(name, tuple(engine.get_tensor_shape(name)), np.dtype(_DTYPES[kind]))

    def _batches(self, profile: int) -> tuple[int, int]:
        """Smallest and largest batch; of an engine without free axes, its only one."""
        ranges = []
        for tensor in self.inputs:
            if any(size < 0 for size in tensor.shape[1:]):
                raise _unsupported(tensor.name, "an axis behind the batch is open")
            if not tensor.shape:
                raise _unsupported(tensor.name, "it has no axis for the batch")
            if tensor.shape[0] >= 0:
                ranges.append((tensor.shape[0], tensor.shape[0]))
                continue
            low, _, high = self._engine.get_tensor_profile_shape(tensor.name, profile)
            ranges.append((int(low[0]), int(high[0])))
        return max(low for low, _ in ranges), min(high for _, high in ranges)


class _TensorRTContext:
    """An execution context; implements `hydra_edge.gpu.engines.Context`."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.set_input_shape = context.set_input_shape
        self.set_tensor_address = context.set_tensor_address
        self.execute_async = context.execute_async_v3
        self._set_profile = context.set_optimization_profile_async

    def set_profile(self, profile: int, stream: int) -> bool:
        try:
            return bool(self._set_profile(profile, stream))
        except RuntimeError:  # Python's binding raises where the C++ function returns false
            return False

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def is_capturable(self, stream: int) -> bool:
        """TensorRT-RTX compiles kernels while it runs, and until then says no."""
        context = self._context
        if hasattr(context, "is_stream_capturable"):
            return bool(context.is_stream_capturable(stream))
        return True

    def close(self) -> None:
        del self._context, self._set_profile
        del self.set_input_shape, self.set_tensor_address, self.execute_async


def _unsupported(name: str, why: str) -> CompilationError:
    return CompilationError(
        f"The tensor '{name}' of the engine cannot be fed or read: {why}.",
        "A session gives and takes whole batches of numbers, on the GPU.",
        "Compile the graph with hydra-edge, which makes no such tensors.",
    )
