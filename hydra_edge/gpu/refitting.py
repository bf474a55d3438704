"""New weights for a live engine, through TensorRT's refitter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from hydra_edge.errors import CompilationError, DeviceMismatchError, InputError
from hydra_edge.gpu.messages import Messages

if TYPE_CHECKING:
    import types

Array = npt.NDArray[np.generic]


def refit(
    trt: types.ModuleType, payload: bytes, weights: Mapping[str, Array]
) -> tuple[bytes, bytes]:
    """Replace weights by name, and serialize the engine again.

    Args:
        trt: The module ``tensorrt``.
        payload: An engine that was built refittable.
        weights: New values, in the types and sizes that the engine has. Of an engine without
            weights, at least those that it lacks; others are then left alone.

    Returns:
        The engine with its weights, and without.

    Raises:
        DeviceMismatchError: The engine does not load here, or was not built refittable.
        InputError: It has no weight of that name.
        CompilationError: TensorRT refused the values; its own words are in the message.
    """
    messages = Messages(trt)
    engine = trt.Runtime(messages.logger).deserialize_cuda_engine(payload)
    if engine is None:
        raise DeviceMismatchError(
            "TensorRT cannot load the engine.",
            f"It said: {messages.words()}",
            "Build it on this machine: hydra-edge compile FILE.hydra -o FILE.hydra",
        )
    if not engine.refittable:
        raise DeviceMismatchError(
            "The engine was not built refittable.",
            "TensorRT has merged its weights into its kernels.",
            "Build it once more with --refittable, or compile the new graph.",
        )
    refitter = trt.Refitter(engine, messages.logger)
    known = set(refitter.get_all_weights())
    lacking = set(refitter.get_missing_weights())
    if lacking:
        weights = {name: values for name, values in weights.items() if name in known}
    if missing := sorted(set(weights) - known):
        raise InputError(
            f"The engine has no weight '{missing[0]}' that could be replaced.",
            f"It has {len(known)}; {len(missing)} of {len(weights)} new ones are not among them.",
            "Compile the new graph.",
        )
    held = []  # TensorRT reads the arrays when it refits, not before
    for name, values in weights.items():
        array = np.ascontiguousarray(values)
        held.append(array)
        given = trt.Weights(_type_of(trt, array), array.ctypes.data, array.size)
        if not refitter.set_named_weights(name, given):
            raise _refused(f"'{name}', {array.dtype}{list(array.shape)}", messages)
    if left := list(refitter.get_missing_weights()):
        raise _refused(f"a part of what belongs together: '{left[0]}' is missing", messages)
    if not refitter.refit_cuda_engine():
        raise _refused("the new weights", messages)
    return bytes(_serialized(trt, engine, weights=True)), strip(trt, engine)


def strip(trt: types.ModuleType, engine: Any) -> bytes:
    """A refittable engine without the weights that `refit` can fill in."""
    return bytes(_serialized(trt, engine, weights=False))


def check_types(trt: types.ModuleType, model: onnx.ModelProto) -> None:
    """Refuse weights that an engine could be stripped of, but not be given again.

    Raises:
        InputError: TensorRT's refitter does not take their type.
    """
    for tensor in model.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        _type_of(trt, np.empty(0, dtype))


def _serialized(trt: types.ModuleType, engine: Any, *, weights: bool) -> Any:
    config = engine.create_serialization_config()
    flag = trt.SerializationFlag.EXCLUDE_WEIGHTS
    (config.clear_flag if weights else config.set_flag)(flag)
    remain = getattr(trt.SerializationFlag, "INCLUDE_REFIT", None)  # where that is a choice
    if remain is not None and weights:
        config.set_flag(remain)
    return engine.serialize_with_config(config)


def _refused(what: str, messages: Messages) -> CompilationError:
    return CompilationError(
        f"TensorRT did not take {what}.",
        f"It said: {messages.words()}",
        "Compile the new graph.",
    )


def _type_of(trt: types.ModuleType, array: Array) -> object:
    kinds = {
        np.dtype(np.float32): trt.DataType.FLOAT,
        np.dtype(np.float16): trt.DataType.HALF,
        np.dtype(ml_dtypes.bfloat16): trt.DataType.BF16,
        np.dtype(np.int8): trt.DataType.INT8,
        np.dtype(np.int32): trt.DataType.INT32,
        np.dtype(np.int64): trt.DataType.INT64,
    }
    kind = kinds.get(array.dtype)
    if kind is None:
        raise InputError(
            f"A weight of type {array.dtype} was to be replaced or left out.",
            f"TensorRT's refitter takes {', '.join(map(str, kinds))}.",
            "Compile the new graph; and build without --strip-weights.",
        )
    return kind
