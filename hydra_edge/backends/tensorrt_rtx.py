"""TensorRT-RTX: engines for GeForce RTX cards, built with a GPU or without.

It reads standard ONNX and knows no plugins: heads become the MatMuls of the lowering "qdq". One
engine serves several generations of cards; each card's own kernels are compiled when it is loaded.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from hydra_edge import detection
from hydra_edge.artifacts.graph import Json
from hydra_edge.errors import DeviceMismatchError, InputError, MissingDependencyError, require
from hydra_edge.gpu import building, opening
from hydra_edge.gpu.building import Product
from hydra_edge.gpu.building import build as build_engine
from hydra_edge.gpu.device import Device
from hydra_edge.gpu.fit import BuiltFor
from hydra_edge.programs import BuildRequest, Built, Runner

if TYPE_CHECKING:
    import types

Array = npt.NDArray[np.generic]
LOWERINGS = ("qdq",)
_NAME = "TensorRT-RTX"
_MISSING = {
    "timing_cache": "It times nothing when it builds: each card chooses when it loads the engine.",
    "optimization_level": "It chooses its kernels on the card, not in the build.",
    "hardware_compatible": "Its engines name the generations that they run on.",
    "dla_core": "GeForce cards have no such accelerator.",
    "refittable": "Without a GPU its builder gives no such engine.",
    "strip_weights": "Without a GPU its builder gives no such engine.",
}


PLAIN = "qdq"
SEVERAL_TARGETS = True


def builds_elsewhere(request: BuildRequest) -> str:
    """Never: it needs no GPU.

    Raises:
        CompilationError: An axis besides the batch is open.
        InputError: An option that TensorRT-RTX does not have.
        MissingDependencyError: It is not installed.
    """
    for name in request.options.asked_for(*_MISSING):
        fix = "Leave it out"
        if name == "hardware_compatible":
            fix += ", and name all targets: --target rtx-3090,rtx-4090,rtx-5090"
        raise InputError(f"{_NAME} was asked for {name}.", _MISSING[name], f"{fix}.")
    building.check(_NAME, request)
    _library()
    return ""


def runs_here(request: BuildRequest) -> bool:
    """Where the card of the target is here, with what runs its engines."""
    here = detection.detect().target.gpu
    if here is None or {gpu.compute_capability for gpu in request.gpus} != {
        here.compute_capability
    }:
        return False
    try:
        Device().close()
    except MissingDependencyError:
        return False
    return True


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a program does."""
    _library()
    return {
        "onnx": onnx.__version__,
        "tensorrt-rtx": importlib.metadata.version("tensorrt-rtx"),
    }


def build(model: onnx.ModelProto, request: BuildRequest) -> Built:
    """Build an engine for the generations of cards that the target belongs to.

    Raises:
        CompilationError: TensorRT-RTX refused the model; its own words are in the message.
        MissingDependencyError: It is not installed.
    """
    trt = _library()
    generations = sorted({gpu.compute_capability for gpu in request.gpus})

    def configure(builder: Any, network: Any, config: Any) -> None:
        config.num_compute_capabilities = len(generations)
        for index, generation in enumerate(generations):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{generation}"), index)

    plan = build_engine(Product(_NAME, trt, configure), model, request)
    built_for = BuiltFor("tensorrt_rtx", str(trt.__version__), tuple(generations))
    return Built(plan.data, plan.notes, {opening.BUILT_FOR: built_for.to_json()})


def refit(payload: bytes, weights: Mapping[str, Array], facts: Mapping[str, Json]) -> Built:
    """Refuse: there are no refittable engines of TensorRT-RTX.

    Raises:
        DeviceMismatchError: Always.
    """
    raise DeviceMismatchError(
        f"{len(weights)} weights of an engine of TensorRT-RTX were to be replaced.",
        _MISSING["refittable"],
        "Compile the new graph: that takes seconds.",
    )


def open(payload: bytes, threads: int | None, facts: Mapping[str, Json] | None = None) -> Runner:
    """Load an engine on the card that is here. This has never run on one.

    Raises:
        DeviceMismatchError: It was built for something else than is here.
        MissingDependencyError: TensorRT-RTX, PyCUDA or the driver is not installed.
    """
    return opening.open_engine(_library, "tensorrt_rtx", payload, facts or {})


def _library() -> types.ModuleType:
    return require("tensorrt_rtx", "rtx")
