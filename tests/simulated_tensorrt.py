"""TensorRT's place in the chain, with ONNX Runtime inside: for what `compile` does on a device.

Like TensorRT it takes the lowerings "plugin" and "qdq", runs what it builds, and refuses batches
outside of the range. What it computes is what ONNX Runtime computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx

from hydra_edge import lowering
from hydra_edge.artifacts.graph import Graph, Json
from hydra_edge.backends import onnxruntime
from hydra_edge.errors import InputError, MissingDependencyError
from hydra_edge.ops import heads
from hydra_edge.programs import BuildRequest, Built

Array = npt.NDArray[np.generic]


class Simulated:
    """A backend; ``requests`` are those it was asked to build, in order."""

    LOWERINGS = ("plugin", "qdq")
    PLAIN = "qdq"
    SEVERAL_TARGETS = False

    def __init__(self, *, has_plugin: bool = True) -> None:
        self.has_plugin = has_plugin
        self.requests: list[BuildRequest] = []

    def builds_elsewhere(self, request: BuildRequest) -> str:
        return ""

    def runs_here(self, request: BuildRequest) -> bool:
        return True

    def versions(self) -> dict[str, str]:
        return {"tensorrt": "simulated"}

    def build(self, model: onnx.ModelProto, request: BuildRequest) -> Built:
        self.requests.append(request)
        ours = any(node.op_type == heads.OP for node in model.graph.node)
        if ours and not self.has_plugin:
            raise MissingDependencyError("No plugin.", "It was not built.", "Build it.")
        plain = lowering.lower(Graph(model), onnxruntime.PLAIN)
        low, _, high = request.batch
        facts: dict[str, Json] = {"range": [low, high]}
        payload = onnxruntime.build(plain.model).payload
        stripped = b"stripped" if request.options.strip_weights else b""
        return Built(payload, ("simulated",), facts, stripped)

    def refit(
        self, payload: bytes, weights: Mapping[str, Array], facts: Mapping[str, Json]
    ) -> Built:
        raise NotImplementedError

    def open(
        self, payload: bytes, threads: int | None, facts: Mapping[str, Json] | None = None
    ) -> _Runner:
        low, high = (facts or {})["range"]  # type: ignore[misc]
        return _Runner(onnxruntime.open(payload, threads), int(low), int(high))  # type: ignore[call-overload]


class _Runner:
    def __init__(self, inner: onnxruntime._Runner, low: int, high: int) -> None:
        self._inner, self._low, self._high = inner, low, high
        self.threads = inner.threads

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        batch = len(next(iter(feeds.values())))
        if not self._low <= batch <= self._high:
            raise InputError(f"Batch {batch}.", f"{self._low} to {self._high}.", "Split it.")
        return self._inner.run(feeds, outputs)

    def close(self) -> None:
        self._inner.close()
