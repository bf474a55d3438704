"""Creates the plugin through TensorRT's Python bindings: a program, which needs no GPU.

python create_plugin.py LIBRARY, with the fields as JSON on stdin; answers in JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import tensorrt as trt


class Logger(trt.ILogger):  # type: ignore[misc]
    """Keeps errors."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: int, text: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(text)


def field(name: str, value: object) -> object:
    """As TensorRT's parser makes it of an attribute."""
    if isinstance(value, str):
        text = np.frombuffer(value.encode(), np.int8)
        return trt.PluginField(name, text, trt.PluginFieldType.CHAR)
    values = np.atleast_1d(np.asarray(value))
    if values.dtype.kind == "f":
        return trt.PluginField(name, values.astype(np.float32), trt.PluginFieldType.FLOAT32)
    return trt.PluginField(name, values.astype(np.int32), trt.PluginFieldType.INT32)


def main() -> None:
    """Create it, and say what happened."""
    logger = Logger()
    builder = trt.Builder(logger)
    registry = builder.get_plugin_registry()
    registry.load_library(sys.argv[1])
    creator = registry.get_creator("HydraHeads", "1", "hydra")
    fields = [field(name, value) for name, value in json.load(sys.stdin).items()]
    collection = trt.PluginFieldCollection(fields)
    plugin = creator.create_plugin("heads", collection, trt.TensorRTPhase.BUILD)
    answer = {
        "fields": [known.name for known in creator.field_names],
        "created": plugin is not None,
        "errors": logger.errors,
    }
    del plugin, creator  # before the builder, which unloads their library
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
