"""TensorRT-RTX: engines for GeForce RTX cards, built with a GPU or without.

It reads standard ONNX and knows no plugins: heads become the MatMuls of the lowering "qdq". An
engine is built for one generation of cards; the card's own kernels are compiled at load.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import onnx

from hydra_edge import ops
from hydra_edge.backends import BuildRequest, Runner
from hydra_edge.errors import CompilationError, DeviceMismatchError, require

if TYPE_CHECKING:
    import types

LOWERINGS = ("qdq",)
RUNS_HERE = False


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a program does."""
    _library()
    return {
        "onnx": onnx.__version__,
        "tensorrt-rtx": importlib.metadata.version("tensorrt-rtx"),
    }


def build(model: onnx.ModelProto, request: BuildRequest) -> bytes:
    """Build an engine for the generation of cards that the target belongs to.

    Raises:
        CompilationError: TensorRT-RTX refused the model; its own words are in the message.
        MissingDependencyError: It is not installed.
    """
    trt = _library()
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log.logger)
    inlined = ops.inline(model)
    if not parser.parse(inlined.SerializeToString(deterministic=True)):
        said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise _refused(request, said or log.errors)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, request))
    config.num_compute_capabilities = 1
    gpu = request.target.gpu
    assert gpu is not None
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{gpu.compute_capability}"), 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused(request, log.errors)
    return bytes(engine)


def open(payload: bytes, threads: int | None) -> Runner:
    """Refuse: nothing here runs on a GPU yet.

    Raises:
        DeviceMismatchError: Always.
    """
    raise DeviceMismatchError(
        f"An engine of TensorRT-RTX, {len(payload)} bytes, was to be opened.",
        "This version of hydra-edge builds such engines, and runs none.",
        "Compile the graph for 'cpu' to run it with hydra-edge.",
    )


class _Log:
    """What TensorRT-RTX says, kept for our exceptions."""

    def __init__(self, trt: types.ModuleType) -> None:
        errors: list[str] = []
        severe = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in severe:
                    errors.append(message.strip())

        self.errors, self.logger = errors, Logger()


def _profile(builder: Any, network: Any, request: BuildRequest) -> Any:
    """Every input from the smallest to the largest batch."""
    profile = builder.create_optimization_profile()
    fixed = {spec.name: spec.shape[1:] for spec in request.inputs}
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        open_axes = [size for size in fixed[name] if not isinstance(size, int)]
        if open_axes:
            raise CompilationError(
                f"The input '{name}' has the open axes {', '.join(map(str, open_axes))}.",
                "An engine needs a range for each; only that of the batch is known.",
                "Export the model with fixed sizes for all axes but the batch.",
            )
        profile.set_shape(name, *((size, *fixed[name]) for size in request.batch))
    return profile


def _refused(request: BuildRequest, said: list[str]) -> CompilationError:
    words = " ".join(said)[:2000] or "It gave no reason."
    return CompilationError(
        f"TensorRT-RTX built no engine for {request.target.name}.",
        f"It said: {words}",
        "Try --precision fp16, or see what TensorRT-RTX says about the operator it names.",
    )


def _library() -> types.ModuleType:
    return require("tensorrt_rtx", "rtx")
