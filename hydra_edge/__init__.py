"""hydra-edge: uncertainty-aware models on the edge.

Importing this package loads no library; each name below loads what it needs on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra_edge.artifacts.engine import Engine as Engine
    from hydra_edge.artifacts.graph import Graph as Graph
    from hydra_edge.artifacts.joining import join as join
    from hydra_edge.artifacts.joining import only as only
    from hydra_edge.artifacts.prediction import Prediction as Prediction
    from hydra_edge.artifacts.report import Report as Report
    from hydra_edge.compilation import CompileOptions as CompileOptions
    from hydra_edge.compilation import compile as compile
    from hydra_edge.distillation import DistillationConfig as DistillationConfig
    from hydra_edge.distillation import distill as distill
    from hydra_edge.ensembles import Ensemble as Ensemble
    from hydra_edge.ensembles import Hydra as Hydra
    from hydra_edge.ensembles import linear_heads as linear_heads
    from hydra_edge.ensembles import mlp_heads as mlp_heads
    from hydra_edge.ensembles import residual_heads as residual_heads
    from hydra_edge.errors import HydraError as HydraError
    from hydra_edge.exporting import export as export
    from hydra_edge.exporting import merge as merge
    from hydra_edge.exporting import summarize as summarize
    from hydra_edge.fusion import fuse as fuse
    from hydra_edge.lowering import lower as lower
    from hydra_edge.measurement import Protocol as Protocol
    from hydra_edge.measurement import benchmark as benchmark
    from hydra_edge.pipeline import build as build
    from hydra_edge.quantization import CalibrationOptions as CalibrationOptions
    from hydra_edge.quantization import Precision as Precision
    from hydra_edge.quantization import quantize as quantize
    from hydra_edge.runtime import EnsembleSession as EnsembleSession
    from hydra_edge.runtime import Session as Session
    from hydra_edge.runtime import load as load
    from hydra_edge.verification import Gates as Gates
    from hydra_edge.verification import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "CalibrationOptions": "quantization",
    "CompileOptions": "compilation",
    "DistillationConfig": "distillation",
    "Engine": "artifacts.engine",
    "Ensemble": "ensembles",
    "EnsembleSession": "runtime",
    "Gates": "verification",
    "Graph": "artifacts.graph",
    "Hydra": "ensembles",
    "HydraError": "errors",
    "Precision": "quantization",
    "Prediction": "artifacts.prediction",
    "Protocol": "measurement",
    "Report": "artifacts.report",
    "Session": "runtime",
    "benchmark": "measurement",
    "build": "pipeline",
    "compile": "compilation",
    "distill": "distillation",
    "export": "exporting",
    "fuse": "fusion",
    "join": "artifacts.joining",
    "linear_heads": "ensembles",
    "load": "runtime",
    "lower": "lowering",
    "merge": "exporting",
    "only": "artifacts.joining",
    "mlp_heads": "ensembles",
    "quantize": "quantization",
    "residual_heads": "ensembles",
    "summarize": "exporting",
    "verify": "verification",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hydra_edge' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"hydra_edge.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
