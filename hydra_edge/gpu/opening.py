"""Loads an engine on this machine: checked before TensorRT sees it, then live."""

from __future__ import annotations

from collections.abc import Mapping
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


def require_gpu(facts: Mapping[str, Json]) -> BuiltFor:
    """What an engine was built for, if there is a GPU at all.

    Raises:
        ArtifactError: The facts are not those of such an engine.
        DeviceMismatchError: There is none.
    """
    built = BuiltFor.from_json(facts.get(BUILT_FOR, {}))  # type: ignore[arg-type]
    here = detection.detect()
    if here.target.gpu is None:
        generations = ", ".join(f"sm_{one}" for one in built.compute_capabilities)
        raise DeviceMismatchError(
            f"The engine is for a GPU, {generations}.",
            f"Here is none that could run it: {here.found}",
            "Copy it to its device, or compile its graph for this machine: "
            "hydra-edge compile FILE.hydra --target cpu",
        )
    return built


def open_engine(
    trt: types.ModuleType, product: str, payload: bytes, facts: Mapping[str, Json]
) -> EngineRunner:
    """Load an engine.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        product: That name.
        payload: The serialized engine.
        facts: What was recorded when it was built.

    Raises:
        ArtifactError: The facts are not those of such an engine.
        DeviceMismatchError: It was built for something else than is here.
        MissingDependencyError: PyCUDA, the driver or our plugin's library is not there.
    """
    built = require_gpu(facts)
    device = Device()
    try:
        fit.check(built, fit.find_machine(device, product, str(trt.__version__)))
        if built.plugin is not None:
            plugin.load(trt)
        with device.current():
            engine = tensorrt_engine.deserialize(trt, payload, Messages(trt))
    except BaseException:
        device.close()
        raise
    return EngineRunner(engine, device)  # which owns both, also when it fails
