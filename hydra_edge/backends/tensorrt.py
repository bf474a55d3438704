"""TensorRT: engines for Jetson and data-center GPUs, built on the device they are for.

Heads are computed by our plugin, where its library is installed, or by TensorRT's own kernels:
both are built and timed. Elsewhere than on the device a program is left to be built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from hydra_edge import detection
from hydra_edge.artifacts.engine import BUILD_OPTIONS
from hydra_edge.artifacts.graph import Json
from hydra_edge.errors import CompilationError, DeviceMismatchError, HydraError, InputError, require
from hydra_edge.gpu import building, fit, layers, opening, plugin, refitting
from hydra_edge.gpu.building import Product
from hydra_edge.gpu.device import Device
from hydra_edge.gpu.fit import BuiltFor
from hydra_edge.gpu.messages import Messages
from hydra_edge.ops import heads
from hydra_edge.programs import BuildRequest, Built, Runner

if TYPE_CHECKING:
    import types

Array = npt.NDArray[np.generic]
LOWERINGS = ("plugin", "qdq")
PLAIN = "qdq"
SEVERAL_TARGETS = False
_NAME, _PRODUCT = "TensorRT", "tensorrt"
_OLDEST = (10, 3)
_MEMORY = Path("/proc/meminfo")
_AMPERE = 80


def builds_elsewhere(request: BuildRequest) -> str:
    """Why this machine cannot build for the target; "" if it can.

    Raises:
        InputError: Options that exclude each other, or that the target does not have.
    """
    _check_options(request)
    building.check(_NAME, request)
    (target,) = request.targets
    found = detection.detect()
    here, wanted = found.target.gpu, target.gpu
    assert wanted is not None
    if here is None:
        return f"TensorRT builds on the GPU it builds for, and there is none here: {found.found}"
    on_card = not found.target.is_jetson and here.compute_capability >= _AMPERE
    compatible = request.options.hardware_compatible and on_card
    if here.compute_capability != wanted.compute_capability and not compatible:
        return (
            f"TensorRT builds on the GPU it builds for, sm_{wanted.compute_capability}; here is "
            f"{found.found}"
        )
    try:
        _library()
        Device().close()
    except HydraError as missing:
        return f"{missing.what} {missing.fix}"
    return ""


def runs_here(request: BuildRequest) -> bool:
    """Always: what is built here was built for this GPU."""
    return True


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a program does."""
    return {"onnx": onnx.__version__, "tensorrt": str(_library().__version__)}


def build(model: onnx.ModelProto, request: BuildRequest) -> Built:
    """Build an engine for this GPU, and look into it.

    Raises:
        CompilationError: TensorRT refused the model, or computes in other types than it asks for.
        DeviceMismatchError: TensorRT is too old.
        MissingDependencyError: TensorRT or our plugin's library is not installed.
    """
    trt = _library()
    if request.options.strip_weights:
        refitting.check_types(trt, model)
    ours = any(node.op_type == heads.OP for node in model.graph.node)
    if ours:
        plugin.load(trt)
    device = Device()
    try:
        with device.current():
            product = Product(_NAME, trt, _configure(trt, request), _free_bytes(device))
            plan = building.build(product, model, request)
            said, stripped = _inspected(trt, model, plan.data, request)
        machine = fit.find_machine(device, _PRODUCT, str(trt.__version__))
    finally:
        device.close()
    options = request.options
    built_for = BuiltFor(
        product=_PRODUCT,
        version=machine.version,
        compute_capabilities=(machine.compute_capability,),
        hardware="ampere_plus" if options.hardware_compatible else "none",
        jetpack=machine.jetpack,
        plugin=machine.plugin if ours else None,
    )
    facts: dict[str, Json] = {opening.BUILT_FOR: built_for.to_json()}
    return Built(plan.data, (*plan.notes, said), facts, stripped)


def refit(payload: bytes, weights: Mapping[str, Array], facts: Mapping[str, Json]) -> Built:
    """The engine with other weights, on this GPU. Never run on a device yet.

    Raises:
        DeviceMismatchError: The engine was not built refittable, or is not for this machine.
        InputError: It has no weight of that name.
        MissingDependencyError: TensorRT, PyCUDA or our plugin's library is not installed.
    """
    trt, device = opening.on_device(_library, _PRODUCT, facts)
    try:
        with device.current():
            full, stripped = refitting.refit(trt, payload, weights)
            wanted = facts.get(BUILD_OPTIONS, {})
            keep = isinstance(wanted, dict) and wanted.get("strip_weights")
            return Built(full, facts=facts, stripped=stripped if keep else b"")
    finally:
        device.close()


def open(payload: bytes, threads: int | None, facts: Mapping[str, Json] | None = None) -> Runner:
    """Load an engine on this GPU. Never run on a device yet.

    Raises:
        DeviceMismatchError: It was built for something else than is here.
        MissingDependencyError: TensorRT, PyCUDA or our plugin's library is not installed.
    """
    return opening.open_engine(_library, _PRODUCT, payload, facts or {})


def _free_bytes(device: Device) -> int:
    """Memory for the build. Where CPU and GPU share it, the system gives back what it caches."""
    free = device.free_bytes()
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(_MEMORY)) if device.integrated else None
    return free if found is None else max(free, int(found[1]) * 1024)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _configure(trt: types.ModuleType, request: BuildRequest) -> Any:
    """What only TensorRT has: the accelerators beside the GPU."""
    core = request.options.dla_core

    def configure(builder: Any, network: Any, config: Any) -> None:
        if core is None:
            return
        if core >= builder.num_DLA_cores:
            raise CompilationError(
                f"The DLA core {core} was asked for.",
                f"TensorRT {trt.__version__} finds {builder.num_DLA_cores} of them here.",
                "Leave it out: the GPU computes everything.",
            )
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = core
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)

    return configure


def _inspected(
    trt: types.ModuleType, model: onnx.ModelProto, plan: bytes, request: BuildRequest
) -> tuple[str, bytes]:
    """What the engine computes in, and the engine without weights where that was asked for."""
    messages = Messages(trt)
    runtime = trt.Runtime(messages.logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise CompilationError(
            f"{_NAME} cannot load the engine that it built.",
            f"It said: {messages.words()}",
            "Free some memory on the device, and build again.",
        )
    said = layers.check(model, layers.inspect(trt, engine), _NAME)
    return said, refitting.strip(trt, engine) if request.options.strip_weights else b""


def _check_options(request: BuildRequest) -> None:
    options, (target,) = request.options, request.targets
    if options.dla_core is not None:
        gpu = target.gpu
        if gpu is None or options.dla_core >= gpu.dla:
            raise InputError(
                f"The DLA core {options.dla_core} was asked for, on {target.name}.",
                f"It has {gpu.dla if gpu else 0} of them.",
                "Leave it out: the GPU computes everything.",
            )
        if len(set(request.batch)) > 1 or options.profiles:
            raise InputError(
                f"A DLA was asked for, with batches from {request.batch[0]} to {request.batch[2]}.",
                "A DLA runs one size.",
                f"Choose one, such as --batch {','.join([str(request.batch[1])] * 3)}.",
            )
    if options.hardware_compatible and target.is_jetson:
        raise InputError(
            f"A hardware-compatible engine was asked for, on {target.name}.",
            "TensorRT has them for cards alone, not for a Jetson.",
            "Leave it out, and build on each device.",
        )


def _library() -> types.ModuleType:
    trt = require("tensorrt", "tensorrt")
    numbers = re.findall(r"\d+", str(trt.__version__))
    if tuple(map(int, numbers[:2])) < _OLDEST:
        raise DeviceMismatchError(
            f"TensorRT {trt.__version__} is installed.",
            "Engines need 10.3 or newer, which has the plugins that our kernels are.",
            "On a Jetson install JetPack 6.2 or newer; elsewhere: pip install 'tensorrt>=10.3'.",
        )
    return trt
