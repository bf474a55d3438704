"""ONNX Runtime on the CPU: the target that is everywhere, and the judge of graph rewrites.

A program is a lowered ``.onnx`` model without local functions. It is optimized at load, because
ONNX Runtime's optimized form depends on the CPU it was made on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from hydra_edge import ops, weightless
from hydra_edge.artifacts.graph import Json
from hydra_edge.errors import CompilationError, InputError
from hydra_edge.programs import BuildRequest, Built

Array = npt.NDArray[np.generic]

# What is worth timing here: see hydra_edge/lowering.py. Which one wins depends on the shapes,
# because ONNX Runtime prepacks the weights of Gemm but not those of a batched MatMul.
LOWERINGS: tuple[str, ...] = ("grouped", "wide", "separate")


PLAIN = "grouped"
SEVERAL_TARGETS = False


def builds_elsewhere(request: BuildRequest) -> str:
    """Never.

    Raises:
        InputError: An option of a builder that ONNX Runtime is not.
    """
    if asked := request.options.asked_for():
        raise InputError(
            f"The target '{request.name}' was asked for {', '.join(asked)}.",
            "That is for TensorRT; ONNX Runtime optimizes a graph when it loads it.",
            "Leave it out, or compile for a GPU.",
        )
    return ""


def runs_here(request: BuildRequest) -> bool:
    """Always: it is part of the base install."""
    return True


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a program does."""
    return {"onnx": onnx.__version__, "onnxruntime": ort.__version__}


def build(model: onnx.ModelProto, request: BuildRequest | None = None) -> Built:
    """Inline the local functions and let ONNX Runtime prove that it takes the result.

    Raises:
        CompilationError: It does not.
    """
    payload: bytes = ops.inline(model).SerializeToString(deterministic=True)
    open(payload, threads=1)
    return Built(payload)


def refit(payload: bytes, weights: Mapping[str, Array], facts: Mapping[str, Json]) -> Built:
    """The program with other values for some initializers.

    Raises:
        InputError: It has none of that name.
    """
    model = onnx.ModelProto.FromString(payload)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    if missing := sorted(set(weights) - set(tensors)):
        raise InputError(
            f"The program has no weight '{missing[0]}'.",
            f"It has {len(tensors)} weights of other names.",
            "Compile the graph instead.",
        )
    for name, values in weights.items():
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
    return Built(model.SerializeToString(deterministic=True))


def open(payload: bytes, threads: int | None, facts: Mapping[str, Json] | None = None) -> _Runner:
    """Load a program with ``threads`` intra-op threads; None means one per physical core."""
    return _Runner(payload, threads)


def evaluate(
    model: onnx.ModelProto, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> dict[str, Array]:
    """Run any model once, e.g. to compare two graphs.

    Returns:
        Arrays by output name, for all graph outputs or those in ``outputs``.

    Raises:
        CompilationError: ONNX Runtime refused the model.
        InputError: It refused the inputs.
    """
    names = list(outputs or [value.name for value in model.graph.output])
    return dict(zip(names, _Judge(model).run(feeds, names), strict=True))


class Observer:
    """Reads tensors inside a model, batch after batch."""

    def __init__(self, model: onnx.ModelProto, tensors: Sequence[str]) -> None:
        self._tensors = list(tensors)
        seen = weightless.without_data(model, lambda _: None)
        known = {value.name for value in (*seen.graph.output, *seen.graph.input)}
        for name in self._tensors:
            if name not in known:  # ONNX Runtime infers type and shape itself
                seen.graph.output.append(onnx.ValueInfoProto(name=name))
        self._inputs = {value.name for value in seen.graph.input}
        self._judge = _Judge(seen)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors' values by name; inputs are passed through."""
        names = [name for name in self._tensors if name not in self._inputs]
        found = dict(zip(names, self._judge.run(feeds, names), strict=True)) if names else {}
        return {name: found[name] if name in found else feeds[name] for name in self._tensors}


class _Judge:
    """Runs a model as it is written: not optimized, and with one copy of its weights at most.

    ONNX Runtime copies initializers, also those in memory it is shown, but not what it is fed.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # it grows in powers of two
        self._weights: dict[str, Array] = {}
        if weightless.total_bytes(model) > _WHOLE_BYTES:
            model, weights = weightless.split(model, _FEEDABLE)
            self._weights = _arrays(weights)
        self._runner = _Runner(model.SerializeToString(), None, options)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        return self._runner.run({**feeds, **self._weights}, outputs)


# Below this a model is handed over whole.
_WHOLE_BYTES = 1 << 20
_ALIGNMENT = 64  # bytes of a cache line
_OWN_PIECE_BYTES = 1 << 25  # from here on glibc gives every array pages of its own
_FEEDABLE = frozenset(
    onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name))
    for name in ("float16", "float32", "float64", "int8", "uint8", "int32", "int64")
)


def _arrays(weights: Mapping[str, onnx.TensorProto]) -> dict[str, Array]:
    """The small ones in one piece of memory: unlike many pieces it goes back to the system."""
    arrays: dict[str, Array] = {}
    small: dict[str, int] = {}
    for name, tensor in weights.items():
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        size = math.prod(tensor.dims) * dtype.itemsize
        if size < _OWN_PIECE_BYTES:
            small[name] = -(-size // _ALIGNMENT) * _ALIGNMENT
        else:
            arrays[name] = onnx.numpy_helper.to_array(tensor)
    block = np.empty(sum(small.values()), np.uint8)
    start = 0
    for name, size in small.items():
        values = onnx.numpy_helper.to_array(weights[name])
        arrays[name] = block[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        arrays[name][...] = values
        start += size
    return arrays


class _Runner:
    def __init__(
        self,
        payload: bytes,
        threads: int | None,
        options: ort.SessionOptions | None = None,
    ) -> None:
        options = options or ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # A finished run lets go of its cores: what runs next, be it the next member of an ensemble
        # or the user's own code, does not compete with spinning workers.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.threads = threads or _default_threads()
        try:
            self._session = ort.InferenceSession(
                payload, options, providers=["CPUExecutionProvider"]
            )
        except Exception as exc:  # its exceptions share no public base class
            raise CompilationError(
                "ONNX Runtime cannot load the model.",
                f"It says: {_first_line(exc)}.",
                "If an operator is missing, upgrade onnxruntime or export with a lower opset.",
            ) from exc

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once."""
        try:
            return self._session.run(outputs, feeds)  # type: ignore[no-any-return]
        except Exception as exc:  # its exceptions share no public base class
            raise InputError(
                "ONNX Runtime failed on these inputs.",
                f"It says: {_first_line(exc)}.",
                "Check shapes and value ranges, e.g. that token ids lie inside the vocabulary.",
            ) from exc

    def close(self) -> None:
        """Drop the session; ONNX Runtime frees it with the last reference."""
        del self._session


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".")


def _default_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
