"""`compile`: a graph becomes an engine for one target."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

import hydra_edge
from hydra_edge import backends, equivalence, lowering, targets
from hydra_edge.artifacts.arrays import check_arrays
from hydra_edge.artifacts.engine import MAIN, Engine, Golden, Program
from hydra_edge.artifacts.graph import Graph, TensorSpec
from hydra_edge.backends import Backend, BuildRequest
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.errors import CompilationError, InputError
from hydra_edge.precision import Precision
from hydra_edge.targets import Target

Array = npt.NDArray[np.generic]
_TIMING_SECONDS = 0.5  # per candidate lowering, in all rounds together
_TIMING_ROUNDS = 7
_GAIN = 0.96  # one program timed twice differs by a few percent: benchmarks/results/fused-cpu.json
UNFUSED = "unfused"  # what a program's lowering is called when separate branches were faster


@dataclass(frozen=True)
class CompileOptions:
    """How an engine is built.

    Attributes:
        batch: Smallest, best and largest batch. Lowerings are timed at the best one.
        threads: Threads to time with; None means one per core.
        lowering: Keep this lowering instead of timing all of them.
    """

    batch: tuple[int, int, int] = (1, 8, 32)
    threads: int | None = None
    lowering: str | None = None

    def __post_init__(self) -> None:
        if len(self.batch) != 3 or not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise InputError(
                f"The batch range is {self.batch}.",
                "It is (smallest, best, largest), each at least 1 and not decreasing.",
                "Write for example (1, 8, 32).",
            )
        if self.threads is not None and self.threads < 1:
            raise InputError(
                f"{self.threads} threads were asked for.",
                "A program runs on at least one.",
                "Leave it out for one per core.",
            )


def compile(
    graph: Graph,
    target: str = "cpu",
    *,
    batch: tuple[int, int, int] | None = None,
    golden: Mapping[str, Array] | None = None,
    unfused: Graph | None = None,
    options: CompileOptions | None = None,
) -> Engine:
    """Lower a graph, build it for a target, prove it against the graph and pack it up.

    Args:
        graph: Any graph; fuse it first to gain from its heads.
        target: A name from `hydra-edge targets`.
        batch: Shorthand for ``options.batch``.
        golden: One batch of inputs to record with the graph's own outputs, so that
            `Session.self_test` can prove the engine later; random by default.
        unfused: The graph before fusion. It competes with the lowerings of ``graph``, so that
            fusing never costs time where the target runs separate branches faster.
        options: How it is built.

    Returns:
        The engine. Its program says which lowering was kept and how fast each one was.

    Raises:
        InputError: Unknown target or lowering, a bad batch range, or golden inputs that do not fit.
        DeviceMismatchError: The target is too old.
        CompilationError: There is no backend for the target, it refused the graph, or no lowering
            reproduced it.
    """
    options = options or CompileOptions()
    options = options if batch is None else replace(options, batch=batch)
    row = targets.find(target)
    if not backends.build_for(row):
        built = [one.name for one in targets.TARGETS if backends.build_for(one)]
        raise CompilationError(
            f"This version of hydra-edge builds no engines for '{row.name}'.",
            f"That takes the backend '{row.backend}'; it builds for: {', '.join(built)}.",
            f"`hydra-edge plan FILE --target {row.name}` tells what the graph would be there.",
        )
    backend = backends.find(row.backend)
    _check_precision(graph, row)
    options = replace(options, batch=_batch_range(graph, options.batch))
    feeds = (
        check_arrays(golden, graph.inputs)
        if golden is not None
        else equivalence.random_inputs(graph.inputs, batch=min(16, options.batch[2]))
    )
    record = Golden(feeds, evaluate(graph.model, feeds), equivalence.tolerance_of(graph.model))
    request = BuildRequest(row, graph.inputs, options.batch)
    sources = _sources(graph, unfused, backend, options)
    build = _candidates if backend.RUNS_HERE else _build_unseen
    candidates = build(sources, backend, request, options, record)
    timings = _time(candidates, graph.inputs, backend, options) if backend.RUNS_HERE else {}
    best = _choose(timings) if timings else next(iter(candidates))
    program = Program(
        inputs=graph.inputs,
        outputs=graph.outputs,
        batch=options.batch,
        optional=(graph.metadata.logits,) if graph.metadata.logits else (),
        lowering=best,
        lowering_ms=timings,
        graph=graph,
        payload=candidates[best],
        golden=record,
    )
    metadata = graph.metadata
    return Engine(
        target=row.name,
        backend=row.backend,
        task=metadata.task,
        kind=metadata.kind,
        heads=metadata.heads,
        labels=metadata.labels,
        precision=metadata.precision,
        source_sha256=graph.sha256,
        calibration_sha256=metadata.calibration_sha256,
        metrics={},
        tools={"hydra-edge": hydra_edge.__version__, **backend.versions()},
        programs={MAIN: program},
    )


def _check_precision(graph: Graph, row: Target) -> None:
    """Refuse what the GPU cannot multiply, before a builder is asked."""
    try:
        asked = Precision.parse(graph.metadata.precision)
    except InputError:  # of another tool: the builder will say
        return
    parts = {asked.body, asked.heads, *asked.head_overrides.values(), *asked.layers.values()}
    missing = sorted(parts - set(row.precisions))
    if row.gpu is not None and missing:
        raise CompilationError(
            f"The graph is stored in {', '.join(missing)}, for {row.name}.",
            f"Its GPU, sm_{row.gpu.compute_capability}, has: {', '.join(row.precisions)}.",
            "Choose one of those, or another target: `hydra-edge targets` lists them.",
        )


def _batch_range(graph: Graph, wanted: tuple[int, int, int]) -> tuple[int, int, int]:
    """A graph with a fixed batch has a range of one."""
    for spec in (*graph.inputs, *graph.outputs):
        if spec.dtype in ("unknown", "object"):
            raise CompilationError(
                f"'{spec}' is not a tensor of numbers with a declared type.",
                "An engine checks its inputs, and records and compares its outputs.",
                "Export the model with typed, numeric inputs and outputs.",
            )
    batches = {spec.shape[0] if spec.shape else None for spec in graph.inputs}
    fixed = {size for size in batches if isinstance(size, int)}
    if not batches or None in batches or (fixed and len(batches) > 1):
        raise CompilationError(
            f"The inputs are {'; '.join(map(str, graph.inputs)) or 'none'}.",
            "Axis 0 of every input is the batch: all sizes are open, or all are the same.",
            "Export the model with a batch axis on every input.",
        )
    return (fixed.pop(),) * 3 if fixed else wanted


def _sources(
    graph: Graph, unfused: Graph | None, backend: Backend, options: CompileOptions
) -> list[tuple[str, Graph]]:
    """What is worth building, by lowering: of ``graph``, and last the unfused one."""
    names = backend.LOWERINGS if lowering.has_heads(graph) else backend.LOWERINGS[:1]
    fused = any(group.fused for group in graph.fusion)
    if unfused is not None and fused and _same_interface(unfused, graph):
        names = (*names, UNFUSED)
    if options.lowering:
        names = (options.lowering,)
    if not set(names) <= {*backend.LOWERINGS, UNFUSED}:
        raise InputError(
            f"Unknown lowering '{options.lowering}'.",
            f"For this target there are: {', '.join(backend.LOWERINGS)}.",
            "Pick one of those, or leave it out.",
        )
    if unfused is None and UNFUSED in names:
        raise InputError(
            f"The lowering '{UNFUSED}' was asked for.",
            "It needs the graph before fusion, which was not given.",
            "Pass unfused=…, or compile the unfused graph itself.",
        )
    return [(name, unfused if name == UNFUSED and unfused else graph) for name in names]


def _lowered(name: str, source: Graph, backend: Backend) -> Graph:
    return lowering.lower(source, backend.LOWERINGS[0] if name == UNFUSED else name)


def _error(payload: bytes, backend: Backend, options: CompileOptions, record: Golden) -> float:
    runner = backend.open(payload, options.threads)
    error = equivalence.replay(runner, record)
    runner.close()
    return error


def _candidates(
    sources: Sequence[tuple[str, Graph]],
    backend: Backend,
    request: BuildRequest,
    options: CompileOptions,
    record: Golden,
) -> dict[str, bytes]:
    """Built payloads by lowering; each reproduces the graph on the recorded batch."""
    payloads = {}
    errors = {}
    for name, source in sources:
        payload = backend.build(_lowered(name, source, backend).model, request)
        errors[name] = _error(payload, backend, options, record)
        if errors[name] <= record.tolerance:
            payloads[name] = payload
    if not payloads:
        raise _unlike(errors, record)
    return payloads


def _build_unseen(
    sources: Sequence[tuple[str, Graph]],
    backend: Backend,
    request: BuildRequest,
    options: CompileOptions,
    record: Golden,
) -> dict[str, bytes]:
    """The first lowering that the backend takes; what it computes is judged by ONNX Runtime.

    Nothing is timed: the program does not run here.
    """
    refusal = None
    for name, source in sources:
        try:
            lowered = _lowered(name, source, backend)
            payload = backend.build(lowered.model, request)
        except CompilationError as refused:
            refusal = refused
            continue
        # In ops that ONNX Runtime computes right: its DequantizeLinear of fp8 is not among them.
        judge = backends.find("onnxruntime")
        ours = lowering.lower(lowered, judge.LOWERINGS[0])
        error = _error(judge.build(ours.model, request), judge, options, record)
        if error <= record.tolerance:
            return {name: payload}
        refusal = _unlike({name: error}, record)
    assert refusal is not None, "there is a source at least"
    raise refusal


def _unlike(errors: Mapping[str, float], record: Golden) -> CompilationError:
    found = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
    return CompilationError(
        f"No lowering reproduces the graph: {found} (relative RMS).",
        f"Up to {record.tolerance:g} is rounding.",
        "Please report the graph; its unfused form compiles without grouped ops.",
    )


def _choose(timings: Mapping[str, float]) -> str:
    """The fastest; fused only where that is faster by more than the noise of the timing."""
    best = min(timings, key=timings.__getitem__)
    unfused = timings.get(UNFUSED)
    return UNFUSED if unfused is not None and timings[best] > _GAIN * unfused else best


def _same_interface(a: Graph, b: Graph) -> bool:
    return [s.name for s in a.inputs] == [s.name for s in b.inputs] and (
        {s.name for s in a.outputs} >= {s.name for s in b.outputs}
    )


def _time(
    candidates: Mapping[str, bytes],
    inputs: tuple[TensorSpec, ...],
    backend: Backend,
    options: CompileOptions,
) -> dict[str, float]:
    """p50 in ms per candidate at the best batch, in rounds so that all see the same noise."""
    feeds = equivalence.random_inputs(inputs, batch=options.batch[1])
    runners = {name: backend.open(data, options.threads) for name, data in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in runners}
    rounds = _TIMING_ROUNDS if len(runners) > 1 else 1
    for _ in range(rounds):
        for name, runner in runners.items():
            runner.run(feeds, [])
            end = time.perf_counter() + _TIMING_SECONDS / rounds
            while (start := time.perf_counter()) < end or not samples[name]:
                runner.run(feeds, [])
                samples[name].append(time.perf_counter() - start)
    for runner in runners.values():
        runner.close()
    return {name: round(statistics.median(times) * 1e3, 4) for name, times in samples.items()}
