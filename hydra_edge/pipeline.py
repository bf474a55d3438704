"""`build`: the whole chain on one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hydra_edge import detection, twins
from hydra_edge.artifacts.arrays import check_arrays, to_numpy
from hydra_edge.artifacts.engine import MAIN, Engine, Program
from hydra_edge.artifacts.graph import Graph
from hydra_edge.artifacts.joining import join, only
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.errors import DeviceMismatchError, GateError, GraphError, InputError
from hydra_edge.fusion import fuse
from hydra_edge.lowering import has_heads
from hydra_edge.programs import BuildOptions
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
        p50 latency in milliseconds of its twin: the same graph in fp16, on a CPU in fp32.

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
    plain = _PLAIN[engine.backend]
    if wanted not in (Precision(), plain) and runs:
        on_step(f"time the {plain} twin")
        metrics[f"p50_ms_{plain}_twin"] = _p50(_twin(graph, plain, target, options))
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


def rebuild(
    engine: Engine,
    target: str | None = None,
    *,
    options: CompileOptions | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Engine:
    """Build an engine again from the graphs in it, on this machine.

    What was packed up elsewhere becomes an engine here, and an engine of another device one of
    this. Precision and the recorded batch stay.

    Args:
        engine: Any engine, built or not.
        target: A name from `hydra-edge targets`; by default what it was packed up for.
        options: See `compile`; by default its batch range and, for targets of the same backend, how
            it was, or was to be, built.
        on_step: Called with a line about each step as it begins.

    Returns:
        The engine, with the figures measured here in place of those measured elsewhere. Only what
        was packed up and not built yet has a twin to be timed against: the fused graph of a built
        engine has none.

    Raises:
        DeviceMismatchError: This machine cannot build for the target.
        HydraError: See `compile`.
    """
    target = target or engine.target
    return join(
        {
            name: _rebuilt(only(engine, name), name, target, options, on_step)
            for name in engine.programs
        }
    )


def _rebuilt(
    engine: Engine,
    name: str,
    target: str,
    options: CompileOptions | None,
    on_step: Callable[[str], None],
) -> Engine:
    """`rebuild` for one program, the only one of its engine; ``name`` is what others call it."""
    (program,) = engine.programs.values()
    graph = program.graph
    fused, unfused = (graph, None) if has_heads(graph) else (fuse(graph), graph)
    how = options or kept_options(engine, program, target)
    on_step(f"compile {name} for {target}")
    built = compile(fused, target, options=how, golden=program.golden.inputs, unfused=unfused)
    if not built.is_built:
        raise DeviceMismatchError(
            f"An engine for {built.target} cannot be built on this machine.",
            built.programs[MAIN].notes[0],
            "Copy the file to the device, and call `hydra-edge compile FILE.hydra` there.",
        )
    measured = {key: v for key, v in engine.metrics.items() if not key.startswith("p50_ms")}
    if built.programs[MAIN].lowering_ms:
        measured["p50_ms"] = _p50(built)
        plain = _PLAIN[built.backend]
        if engine.precision not in ("fp32", str(plain)) and unfused is not None:
            on_step(f"time the {plain} twin")
            try:
                twin = _twin(twins.in_floats(unfused), plain, target, how)
                measured[f"p50_ms_{plain}_twin"] = _p50(twin)
            except GraphError as none:  # another tool quantized it
                on_step(f"not timed: {none.what}")
    return replace(
        built,
        metrics=measured,
        calibration_sha256=engine.calibration_sha256,
        assets=engine.assets,
    )


def kept_options(engine: Engine, program: Program, target: str) -> CompileOptions:
    """How a program was, or is to be, built; a target of another backend takes its batch alone."""
    rows = (detection.find(name.strip()) for name in target.split(","))
    if any(row.backend != engine.backend for row in rows):
        return CompileOptions(program.batch)
    asked = program.lowering if not program.payload and program.lowering else None
    return CompileOptions(
        program.batch, lowering=asked, build=BuildOptions.from_json(program.build_options)
    )


def pays(engine: Engine) -> bool | None:
    """Whether lower precision made the engine faster than its twin; None if not measured."""
    twin = twin_of(engine)
    return None if twin is None else engine.metrics["p50_ms"] < twin[1]


def twin_of(engine: Engine) -> tuple[str, float] | None:
    """Precision and p50 latency in milliseconds of the twin, if one was timed."""
    for precision in ("fp16", "fp32"):
        if f"p50_ms_{precision}_twin" in engine.metrics:
            return precision, engine.metrics[f"p50_ms_{precision}_twin"]
    return None


# What an engine in few bits has to beat: the plain choice of its users.
_PLAIN = {
    "onnxruntime": Precision(),
    "tensorrt": Precision("fp16", "fp16"),
    "tensorrt_rtx": Precision("fp16", "fp16"),
}


def _twin(
    graph: Graph, precision: Precision, target: str, options: CompileOptions | None
) -> Engine:
    plain = quantize(graph, precision) if precision != Precision() else graph
    return compile(fuse(plain), target, options=options, unfused=plain)


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
