"""The library with our TensorRT plugin: where it is, and how TensorRT learns of it.

It is only ever loaded from the installed package, never from a path that an engine's file names.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import TYPE_CHECKING

from hydra_edge.errors import DeviceMismatchError, MissingDependencyError
from hydra_edge.ops import packing

if TYPE_CHECKING:
    import types

NAMESPACE, NAME, VERSION = "hydra", "HydraHeads", "1"


def path_for(version: str, folder: Path | None = None) -> Path:
    """Where the plugin for a version of TensorRT is installed, such as ``"10.3.0"``."""
    major = re.match(r"\d+", version)
    assert major is not None, version
    return (folder or Path(__file__).parents[1]) / f"libhydra_plugin{major[0]}.so"


def layout_of(path: Path) -> str:
    """How a plugin's library wants weights to be packed.

    Raises:
        OSError: It is not there, or does not load.
        AttributeError: It is no library of ours.
    """
    function = ctypes.CDLL(str(path)).hydra_plugin_layout
    function.restype = ctypes.c_char_p
    return str(function().decode())


def load(trt: types.ModuleType, folder: Path | None = None) -> None:
    """Register the plugin with TensorRT; doing so twice is fine.

    Args:
        trt: The module ``tensorrt``.
        folder: Where the library is; by default the installed package.

    Raises:
        MissingDependencyError: It is not installed, or does not load.
        DeviceMismatchError: It reads weights in another layout than this version packs.
    """
    registry = trt.get_plugin_registry()
    if registry.get_creator(NAME, VERSION, NAMESPACE) is not None:
        return
    path = path_for(str(trt.__version__), folder)
    build = (
        "Install hydra-edge where nvcc and TensorRT's headers are: see kernels/README.md; or take "
        "--lowering qdq, which needs no plugin."
    )
    if not path.exists():
        raise MissingDependencyError(
            f"{path.name} is not there.",
            f"It holds our kernels for TensorRT {trt.__version__}, and was not built here.",
            build,
        )
    try:
        layout = layout_of(path)
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"{path.name} cannot be loaded: {error}.",
            "It needs libhydra_kernels.so beside it, and the CUDA driver.",
            build,
        ) from error
    if layout != packing.LAYOUT:
        raise DeviceMismatchError(
            f"{path.name} reads weights in the layout {layout}.",
            f"This version of hydra-edge packs them as {packing.LAYOUT}.",
            "Install hydra-edge again on this machine, so that both are of one version.",
        )
    registry.load_library(str(path))
    if registry.get_creator(NAME, VERSION, NAMESPACE) is None:
        raise MissingDependencyError(
            f"TensorRT {trt.__version__} found no plugin in {path.name}.",
            "It may have been built against another version of TensorRT's headers.",
            build,
        )
