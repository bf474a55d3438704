"""ONNX Runtime on the CPU: the target that is everywhere, and the judge of graph rewrites.

A program is a lowered ``.onnx`` model without local functions. It is optimized at load, because
ONNX Runtime's optimized form depends on the CPU it was made on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from hydra_edge import ops
from hydra_edge.errors import CompilationError, InputError

Array = npt.NDArray[np.generic]

# What is worth timing here: see hydra_edge/lowering.py. Which one wins depends on the shapes,
# because ONNX Runtime prepacks the weights of Gemm but not those of a batched MatMul.
LOWERINGS = ("grouped", "wide", "separate")


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a program does."""
    return {"onnx": onnx.__version__, "onnxruntime": ort.__version__}


def build(model: onnx.ModelProto) -> bytes:
    """Inline the local functions and let ONNX Runtime prove that it takes the result."""
    payload: bytes = ops.inline(model).SerializeToString(deterministic=True)
    open(payload, threads=1)
    return payload


def open(payload: bytes, threads: int | None) -> _Runner:
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
    runner = _Runner(model.SerializeToString(), None)
    return dict(zip(names, runner.run(feeds, names), strict=True))


class _Runner:
    def __init__(self, payload: bytes, threads: int | None) -> None:
        options = ort.SessionOptions()
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
