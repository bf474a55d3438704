"""`build`: the whole chain on one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hydra_edge.artifacts.arrays import check_arrays, to_numpy
from hydra_edge.artifacts.engine import MAIN, Engine
from hydra_edge.artifacts.graph import Graph
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.errors import GateError, InputError
from hydra_edge.fusion import fuse
from hydra_edge.quantization import Calibration, CalibrationOptions, Precision, quantize
from hydra_edge.verification import Gates, verify

Array = npt.NDArray[np.generic]
_GOLDEN = 16  # samples
# Against the graph it was made from, an engine must keep nearly all of its uncertainty.
ENGINE_GATES = Gates(
    accuracy_drop=0.005,
    mi_rank_correlation=0.95,
    mi_ratio=(0.67, 1.5),
    prediction_error=0.1,
    top1_agreement=0.97,
)


def build(
    graph: Graph,
    target: str = "cpu",
    *,
    precision: str | Precision = "fp32",
    calibration: Calibration | None = None,
    calibration_options: CalibrationOptions | None = None,
    options: CompileOptions | None = None,
    data: object | None = None,
    labels: object | None = None,
    gates: Gates | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Engine:
    """Quantize, fuse, compile and verify a graph.

    Args:
        graph: An fp32 graph, or one that another tool quantized (then leave ``precision`` alone).
        target: A name from `hydra-edge targets`.
        precision: See `quantize`.
        calibration: See `quantize`.
        calibration_options: See `quantize`.
        options: See `compile`.
        data: Inputs to verify the engine on, against ``graph``, and whose first samples the engine
            records; without it the engine is only compared with its own graph on random inputs.
        labels: Ground truth for ``data``.
        gates: Limits for the verification; strict ones by default.
        on_step: Called with a line about each step as it begins.

    Returns:
        The engine. Its ``metrics`` hold the verification's figures and, for lower precisions, the
        p50 latency of its fp32 twin in milliseconds.

    Raises:
        GateError: The engine drifted too far from ``graph``.
        HydraError: A step failed; see `quantize`, `fuse` and `compile`.
    """
    wanted = Precision.parse(precision) if isinstance(precision, str) else precision
    if data is not None:
        _check_data(graph, data)  # before the slow steps, not after them
    lowered = graph
    if wanted != Precision():
        on_step(f"quantize to {wanted}")
        lowered = quantize(graph, wanted, calibration=calibration, options=calibration_options)
    on_step("fuse heads")
    fused = fuse(lowered)
    on_step(f"compile for {target}")
    golden = None if data is None else _first(data, graph)
    engine = compile(fused, target, options=options, golden=golden, unfused=lowered)
    runs = bool(engine.programs[MAIN].lowering_ms)
    metrics = {"p50_ms": _p50(engine)} if runs else {}
    if wanted != Precision() and runs:
        on_step("time the fp32 twin")
        metrics["p50_ms_fp32_twin"] = _p50(
            compile(fuse(graph), target, options=options, unfused=graph)
        )
    if data is not None:
        judged = engine if runs else fused
        on_step(
            "verify against the source graph"
            + ("" if runs else ": the fused graph, for the engine does not run here")
        )
        result = verify(judged, graph, data, labels=labels, gates=gates or ENGINE_GATES)
        if not result.passed:
            raise GateError(*_explained(result.failures, wanted))
        metrics |= {**result.metrics, **result.drift}
    return replace(engine, metrics={name: float(value) for name, value in metrics.items()})


def pays(engine: Engine) -> bool | None:
    """Whether lower precision made the engine faster than its fp32 twin; None if not measured."""
    twin = engine.metrics.get("p50_ms_fp32_twin")
    return None if twin is None else engine.metrics["p50_ms"] < twin


def _check_data(graph: Graph, data: object) -> None:
    if graph.metadata.logits is None or graph.metadata.task is None:
        raise InputError(
            "There is data to verify the engine on, but the graph has no task or per-head output.",
            "Without them it is not known what its outputs mean.",
            "Give it a task first, with `summarize` or --task, or leave the data out.",
        )
    check_arrays(_first(data, graph), graph.inputs)


def _first(data: object, graph: Graph) -> dict[str, Array]:
    """The first samples of the data, as the batch that the engine records."""
    given = data if isinstance(data, Mapping) else {graph.inputs[0].name: data}
    return {str(name): to_numpy(value, str(name))[:_GOLDEN] for name, value in given.items()}


def _p50(engine: Engine) -> float:
    program = engine.programs[MAIN]
    return program.lowering_ms[program.lowering]


def _explained(failures: tuple[str, ...], precision: Precision) -> tuple[str, str, str]:
    return (
        f"The {precision} engine drifted from its source: {'; '.join(failures)}.",
        "No engine was returned.",
        "See with `hydra-edge quantize --report` which heads and layers mind, keep those in fp16 "
        "(int8,head.3=fp16), calibrate with more or better data, or pass looser gates on purpose.",
    )
