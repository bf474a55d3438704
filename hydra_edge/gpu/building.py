"""From a lowered model to an engine: what TensorRT and TensorRT-RTX have in common.

Networks are strongly typed: the precision of each layer is that of the graph, and Q and DQ say what
is multiplied in integers. Nothing here reads the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from hydra_edge import ops
from hydra_edge.artifacts.files import write_atomic
from hydra_edge.errors import CompilationError
from hydra_edge.gpu.messages import Messages
from hydra_edge.gpu.progress import Watch
from hydra_edge.programs import BuildRequest

if TYPE_CHECKING:
    import types

_MB = 1 << 20
_SHARE_OF_FREE_MEMORY = 0.5  # the engine, its activations and other programs need some, too


@dataclass(frozen=True)
class Product:
    """TensorRT, or TensorRT-RTX.

    Attributes:
        name: As its users know it.
        trt: The module.
        configure: Sets what only one of them has, on the configuration of a build.
        free_bytes: Device memory that is free, or None where no device is here.
    """

    name: str
    trt: types.ModuleType
    configure: Callable[[Any, Any, Any], None]
    free_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """A serialized engine, and what there is to say about it."""

    data: bytes
    notes: tuple[str, ...]


def build(product: Product, model: onnx.ModelProto, request: BuildRequest) -> Plan:
    """Build one engine.

    Args:
        product: What builds it.
        model: A lowered model; its local functions are inlined.
        request: What it is built for.

    Raises:
        CompilationError: The builder refused the model; its own words are in the message.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    check(product.name, request)
    trt = product.trt
    options = request.options
    messages = Messages(trt)
    builder = trt.Builder(messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(product, network, model, messages, request)
    config = builder.create_builder_config()
    for batch in (request.batch, *options.profiles):
        config.add_optimization_profile(_profile(builder, network, request, batch))
    _set_flags(trt, config, request)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    limit = _workspace(options.workspace_mb, product.free_bytes)
    if limit is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what the inspector reads
    notes = _load_timings(config, options.timing_cache)
    watch = Watch(trt, shown=options.progress)
    config.progress_monitor = watch.monitor
    product.configure(builder, network, config)
    engine = watch.run(lambda: builder.build_serialized_network(network, config))
    if engine is None:
        raise refused(product.name, request, messages.words())
    if options.timing_cache is not None:
        _save_timings(config, options.timing_cache)
    if skipped := messages.skipped_tactics():
        notes.append(
            f"{skipped} ways to compute layers were skipped for want of memory"
            + (f" (workspace {limit // _MB} MB)" if limit else "")
            + ": a larger workspace_mb may give a faster engine"
        )
    if on_gpu := messages.left_to_the_gpu():
        notes.append(f"on the GPU, not on the DLA: {', '.join(on_gpu)}")
    return Plan(bytes(engine), tuple(notes))


def check(name: str, request: BuildRequest) -> None:
    """Refuse what no build of such a request can give, before it is packed up or begun.

    Raises:
        CompilationError: An axis besides the batch is open.
    """
    for spec in request.inputs:
        open_axes = [size for size in spec.shape[1:] if not isinstance(size, int)]
        if open_axes:
            raise CompilationError(
                f"The input '{spec.name}' has the open axes {', '.join(map(str, open_axes))}.",
                f"An engine of {name} needs a range for each; only that of the batch is known.",
                "Export the model with fixed sizes for all axes but the batch.",
            )


def refused(name: str, request: BuildRequest, said: str) -> CompilationError:
    """The exception for a builder that gave no engine, with its own words."""
    return CompilationError(
        f"{name} built no engine for {request.name}.",
        f"It said: {said}",
        f"Try --precision fp16, or see what {name} says about the operator it names.",
    )


def _parse(
    product: Product,
    network: Any,
    model: onnx.ModelProto,
    messages: Messages,
    request: BuildRequest,
) -> None:
    parser = product.trt.OnnxParser(network, messages.logger)
    inlined = ops.inline(model)
    _require_plain(product, inlined)
    if parser.parse(inlined.SerializeToString(deterministic=True)):
        return
    said = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"{error.node_operator()} '{error.node_name()}': " if error.node_name() else ""
        said.append(where + error.desc())
    raise refused(product.name, request, " ".join(said) or messages.words())


def _require_plain(product: Product, model: onnx.ModelProto) -> None:
    """No plugin's node may reach a parser without plugins: TensorRT-RTX would end the process."""
    registry = product.trt.get_plugin_registry()
    creators = {creator.name for creator in registry.all_creators}
    ours = {node.op_type for node in model.graph.node} & creators
    if ours and not hasattr(product.trt.INetworkDefinition, "add_plugin_v3"):
        raise CompilationError(
            f"The graph holds the plugin node '{min(ours)}', for {product.name}.",
            f"{product.name} has no plugins, and its parser ends the process at such a node.",
            "Take the lowering 'qdq', whose heads are standard operators.",
        )


def _profile(builder: Any, network: Any, request: BuildRequest, batch: tuple[int, int, int]) -> Any:
    """Every input from the smallest to the largest batch."""
    profile = builder.create_optimization_profile()
    fixed = {spec.name: spec.shape[1:] for spec in request.inputs}
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        profile.set_shape(name, *((size, *fixed[name]) for size in batch))
    return profile


def _set_flags(trt: types.ModuleType, config: Any, request: BuildRequest) -> None:
    options = request.options
    flags = {
        trt.BuilderFlag.TF32: options.tf32,
        trt.BuilderFlag.REFIT: options.refittable or options.strip_weights,
    }
    for flag, wanted in flags.items():
        (config.set_flag if wanted else config.clear_flag)(flag)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _workspace(asked_mb: int | None, free_bytes: int | None) -> int | None:
    """Bytes of scratch memory a build may use: never more than the device can give."""
    limits = [] if asked_mb is None else [asked_mb * _MB]
    if free_bytes is not None:
        limits.append(int(free_bytes * _SHARE_OF_FREE_MEMORY))
    return min(limits, default=None)


def _load_timings(config: Any, path: Path | None) -> list[str]:
    """Use what earlier builds measured. A cache of another device or version starts afresh."""
    if path is None:
        return []
    known = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(known)
    if cache is not None and config.set_timing_cache(cache, False):
        return []
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return [f"the timing cache '{path.name}' is of another device or version, and was not used"]


def _save_timings(config: Any, path: Path) -> None:
    """Write what was measured, together with what another build wrote meanwhile."""
    measured = config.get_timing_cache()
    written = config.create_timing_cache(path.read_bytes()) if path.exists() else None
    if written is not None:
        measured.combine(written, False)  # of another device nothing is taken
    write_atomic(path, bytes(measured.serialize()))
