"""Loads an engine on this machine: checked before TensorRT sees it, then live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hydra_edge import detection
from hydra_edge.artifacts.graph import Json
from hydra_edge.errors import DeviceMismatchError
from hydra_edge.gpu import fit, plugin, tensorrt_engine
from hydra_edge.gpu.device import Device
from hydra_edge.gpu.fit import BuiltFor
from hydra_edge.gpu.messages import Messages
from hydra_edge.gpu.running import EngineRunner

if TYPE_CHECKING:
    import types

BUILT_FOR = "built_for"  # among a program's facts


def on_device(
    library: Callable[[], types.ModuleType], product: str, facts: Mapping[str, Json]
) -> tuple[types.ModuleType, Device]:
    """The module and the GPU that an engine is for, if both are here.

    Args:
        library: Imports ``tensorrt`` or ``tensorrt_rtx``.
        product: That name.
        facts: What was recorded when the engine was built.

    Returns:
        The module, which knows our plugin if the engine needs it, and the GPU, to be closed.

    Raises:
        ArtifactError: The facts are not those of such an engine.
        DeviceMismatchError: It was built for something else than is here.
        MissingDependencyError: The module, PyCUDA, the driver or our plugin is not there.
    """
    built = BuiltFor.from_json(facts.get(BUILT_FOR, {}))  # type: ignore[arg-type]
    _require_gpu(built)
    trt = library()
    device = Device()
    try:
        fit.check(built, fit.find_machine(device, product, str(trt.__version__)))
        if built.plugin is not None:
            plugin.load(trt)
    except BaseException:
        device.close()
        raise
    return trt, device


def open_engine(
    library: Callable[[], types.ModuleType],
    product: str,
    payload: bytes,
    facts: Mapping[str, Json],
) -> EngineRunner:
    """Load an engine.

    Args:
        library: See `on_device`.
        product: See `on_device`.
        payload: The serialized engine.
        facts: See `on_device`.

    Raises:
        ArtifactError: See `on_device`.
        DeviceMismatchError: See `on_device`; or TensorRT refused it.
        MissingDependencyError: See `on_device`.
    """
    trt, device = on_device(library, product, facts)
    try:
        with device.current():
            engine = tensorrt_engine.deserialize(trt, payload, Messages(trt))
    except BaseException:
        device.close()
        raise
    return EngineRunner(engine, device)  # which owns both, also when it fails


def _require_gpu(built: BuiltFor) -> None:
    """Refuse before anything is asked for that only a machine with a GPU needs."""
    here = detection.detect()
    if here.target.gpu is None:
        generations = ", ".join(f"sm_{one}" for one in built.compute_capabilities)
        raise DeviceMismatchError(
            f"The engine is for a GPU, {generations}.",
            f"Here is none that could run it: {here.found}",
            "Copy it to its device, or compile its graph for this machine: "
            "hydra-edge compile FILE.hydra --target cpu",
        )
