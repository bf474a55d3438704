"""`compile`: a graph becomes an engine for one target."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt

import hydra_edge
from hydra_edge import backends, detection, equivalence, lowering
from hydra_edge.artifacts.arrays import check_arrays
from hydra_edge.artifacts.engine import BUILD_OPTIONS, MAIN, Engine, Golden, Program
from hydra_edge.artifacts.graph import Graph, Json, TensorSpec
from hydra_edge.artifacts.joining import join
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.errors import CompilationError, HydraError, InputError, MissingDependencyError
from hydra_edge.precision import Precision
from hydra_edge.programs import Backend, BuildOptions, BuildRequest, Built, check_batch
from hydra_edge.targets import Target

Array = npt.NDArray[np.generic]
_TIMING_SECONDS = 0.5  # per candidate lowering, in all rounds together
_TIMING_ROUNDS = 7
_GAIN = 0.96  # one program timed twice differs by a few percent: benchmarks/results/fused-cpu.json
_GOLDEN = 16  # samples, if the batch range allows
UNFUSED = "unfused"  # what a program's lowering is called when separate branches were faster


@dataclass(frozen=True)
class CompileOptions:
    """How an engine is built.

    Attributes:
        batch: Smallest, best and largest batch. Lowerings are timed at the best one.
        threads: CPU threads to time with; None means one per core.
        lowering: Keep this lowering instead of timing all of them.
        build: How TensorRT builds it.
    """

    batch: tuple[int, int, int] = (1, 8, 32)
    threads: int | None = None
    lowering: str | None = None
    build: BuildOptions = field(default_factory=BuildOptions)

    def __post_init__(self) -> None:
        check_batch(self.batch)
        if self.threads is not None and self.threads < 1:
            raise InputError(
                f"{self.threads} threads were asked for.",
                "A program runs on at least one.",
                "Leave it out for one per core.",
            )


@overload
def compile(
    graph: Graph,
    target: str = "cpu",
    *,
    batch: tuple[int, int, int] | None = None,
    golden: Mapping[str, Array] | None = None,
    unfused: Graph | None = None,
    options: CompileOptions | None = None,
) -> Engine: ...


@overload
def compile(
    graph: Mapping[str, Graph],
    target: str = "cpu",
    *,
    batch: Mapping[str, tuple[int, int, int]] | tuple[int, int, int] | None = None,
    golden: Mapping[str, Mapping[str, Array]] | None = None,
    unfused: Mapping[str, Graph] | None = None,
    options: Mapping[str, CompileOptions] | CompileOptions | None = None,
) -> Engine: ...


def compile(
    graph: Graph | Mapping[str, Graph],
    target: str = "cpu",
    *,
    batch: Any = None,
    golden: Mapping[str, Any] | None = None,
    unfused: Graph | Mapping[str, Graph] | None = None,
    options: CompileOptions | Mapping[str, CompileOptions] | None = None,
) -> Engine:
    """Lower a graph, build it for a target, prove it against the graph and pack it up.

    An engine of TensorRT is built on the device itself. Elsewhere the result is everything that
    the device needs to build it, see `Engine.is_built`; its notes say why.

    Args:
        graph: Any graph; fuse it first to gain from its heads. Several by name become one engine
            of several programs; then ``golden`` and ``unfused`` are by name too, as ``batch`` and
            ``options`` may be.
        target: A name from `hydra-edge targets`, or "local" for the device that is here. For
            TensorRT-RTX also several, with ",": one engine then serves them all.
        batch: Shorthand for ``options.batch``.
        golden: One batch of inputs to record with the graph's own outputs, so that
            `Session.self_test` can prove the engine later; random by default.
        unfused: The graph before fusion. It competes with the lowerings of ``graph``, so that
            fusing never costs time where the target runs separate branches faster.
        options: How it is built.

    Returns:
        The engine. Its program says which lowering was kept and how fast each one was.

    Raises:
        InputError: Unknown target or lowering, a bad batch range, an option that the target does
            not have, or golden inputs that do not fit.
        DeviceMismatchError: The target is too old.
        CompilationError: The target's backend refused the graph, or no lowering reproduced it.
        MissingDependencyError: What builds for the target is not installed.
    """
    if isinstance(graph, Graph):
        assert unfused is None or isinstance(unfused, Graph)
        assert options is None or isinstance(options, CompileOptions)
        return _compile(graph, target, batch, golden, unfused, options)
    return join(
        {
            name: _compile(
                one,
                target,
                _for(name, batch, graph, "batch"),
                _for(name, golden, graph, "golden"),
                _for(name, unfused, graph, "unfused"),
                _for(name, options, graph, "options"),
            )
            for name, one in graph.items()
        }
    )


def _for(name: str, given: object, graphs: Mapping[str, Graph], argument: str) -> Any:
    """What is meant for one of several programs: its entry of a mapping, or what all share."""
    if not isinstance(given, Mapping):
        return given
    if unknown := sorted(set(given) - set(graphs)):
        raise InputError(
            f"{argument} has an entry for '{unknown[0]}'.",
            f"The programs are {', '.join(graphs)}.",
            "Name one of those.",
        )
    return given.get(name)


def _compile(
    graph: Graph,
    target: str,
    batch: tuple[int, int, int] | None,
    golden: Mapping[str, Array] | None,
    unfused: Graph | None,
    options: CompileOptions | None,
) -> Engine:
    """`compile` for one program."""
    options = options or CompileOptions()
    options = options if batch is None else replace(options, batch=batch)
    rows = _rows(target)
    for row in rows:
        _check_precision(graph, row)
    backend = backends.find(rows[0].backend)
    options = replace(options, batch=_batch_range(graph, options))
    sources = _sources(graph, unfused, backend, options)
    feeds = (
        check_arrays(golden, graph.inputs)
        if golden is not None
        else equivalence.random_inputs(graph.inputs, batch=_GOLDEN)
    )
    feeds = {name: _fitted(array, options.batch) for name, array in feeds.items()}
    tolerance = equivalence.tolerance_of(graph.model)
    if options.build.tf32:
        tolerance = max(tolerance, equivalence.HALF_TOLERANCE)  # as many bits
    record = Golden(feeds, evaluate(graph.model, feeds), tolerance)
    request = BuildRequest(rows, graph.inputs, options.batch, options.build)
    program = Program(
        inputs=graph.inputs,
        outputs=graph.outputs,
        batch=options.batch,
        optional=(graph.metadata.logits,) if graph.metadata.logits else (),
        lowering=options.lowering or "",
        lowering_ms={},
        graph=graph if unfused is None else unfused,
        payload=b"",
        golden=record,
    )
    elsewhere = backend.builds_elsewhere(request)
    if elsewhere:
        program = replace(program, notes=(elsewhere,), facts=_asked(options))
    else:
        program = _Build(backend, request, options, record).program(program, sources)
    metadata = graph.metadata
    return Engine(
        target=request.name,
        backend=rows[0].backend,
        task=metadata.task,
        kind=metadata.kind,
        heads=metadata.heads,
        labels=metadata.labels,
        precision=metadata.precision,
        source_sha256=graph.sha256,
        calibration_sha256=metadata.calibration_sha256,
        metrics={},
        tools={
            "hydra-edge": hydra_edge.__version__,
            **({} if elsewhere else backend.versions()),
        },
        programs={MAIN: program},
    )


def _rows(target: str) -> tuple[Target, ...]:
    """The targets that one engine is for."""
    names = dict.fromkeys(name.strip() for name in target.split(","))
    rows = tuple(dict.fromkeys(map(detection.find, names)))
    shared = {row.backend for row in rows}
    if len(rows) > 1 and (len(shared) > 1 or not backends.find(rows[0].backend).SEVERAL_TARGETS):
        raise InputError(
            f"One engine was asked for {', '.join(row.name for row in rows)}.",
            "Only an engine of TensorRT-RTX serves several devices.",
            "Compile for each of them.",
        )
    return rows


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


def _fitted(array: Array, batch: tuple[int, int, int]) -> Array:
    """As many samples as the program takes at once: the first, or the last one repeated."""
    array = array[: batch[2]]
    missing = batch[0] - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, 0)]) if missing > 0 else array


def _batch_range(graph: Graph, options: CompileOptions) -> tuple[int, int, int]:
    """A graph with a fixed batch has a range of one."""
    wanted = options.batch
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
    found = (fixed.pop(),) * 3 if fixed else wanted
    for profile in options.build.profiles:
        if not found[0] <= profile[0] <= profile[2] <= found[2]:
            raise InputError(
                f"A profile is for batches {profile[0]} to {profile[2]}.",
                f"The engine takes {found[0]} to {found[2]} at once, and splits what is larger.",
                "Widen the batch range, or choose profiles inside it.",
            )
    return found


def _sources(
    graph: Graph, unfused: Graph | None, backend: Backend, options: CompileOptions
) -> list[tuple[str, Graph]]:
    """What is worth building, by lowering: of ``graph``, and last the unfused one."""
    names = backend.LOWERINGS if lowering.has_heads(graph) else (backend.PLAIN,)
    fused = any(group.fused for group in graph.fusion)
    if unfused is not None and fused and _same_interface(unfused, graph):
        names = (*names, UNFUSED)
    if options.lowering:
        names = (options.lowering,)
    if not set(names) <= {*backend.LOWERINGS, backend.PLAIN, UNFUSED}:
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


def _asked(options: CompileOptions) -> dict[str, Json]:
    """What a program's facts say of how it was, or is to be, built."""
    asked = options.build.to_json()
    return {BUILD_OPTIONS: asked} if asked else {}


@dataclass(frozen=True)
class _Build:
    """One call of `compile`, from lowerings to a program."""

    backend: Backend
    request: BuildRequest
    options: CompileOptions
    record: Golden

    def program(self, unbuilt: Program, sources: Sequence[tuple[str, Graph]]) -> Program:
        """The fastest lowering, or the first that is built where none can be timed here."""
        runs = self.backend.runs_here(self.request)
        prove = self.run if runs else self.judge
        candidates: dict[str, _Candidate] = {}
        refusals: dict[str, HydraError] = {}
        for name, source in sources:
            try:
                lowered = lowering.lower(source, self.backend.PLAIN if name == UNFUSED else name)
                candidates[name] = _Candidate(source, *prove(name, lowered))
            except (CompilationError, MissingDependencyError) as refusal:
                refusals[name] = refusal
            if candidates and not runs:
                break
        if not candidates:
            raise _all_refused(refusals)
        timings = _time(candidates, unbuilt.inputs, self.backend, self.options) if runs else {}
        best = _choose(timings) if timings else next(iter(candidates))
        kept = candidates[best]
        others = (f"not as '{name}': {error.what} {error.why}" for name, error in refusals.items())
        return replace(
            unbuilt,
            lowering=best,
            lowering_ms=timings,
            graph=kept.source,
            payload=kept.built.stripped or kept.built.payload,
            golden=kept.record,
            notes=(*kept.built.notes, *others),
            facts={**kept.built.facts, **_asked(self.options)},
        )

    def run(self, name: str, lowered: Graph) -> tuple[Built, Golden]:
        """Build it, and prove what was built on the recorded batch.

        Raises:
            CompilationError: It was refused, or computes something else.
            MissingDependencyError: Something is missing that this lowering needs.
        """
        record = self.recorded(lowered)
        built = self.built(lowered)
        runner = self.backend.open(built.payload, self.options.threads, built.facts)
        error = equivalence.replay(runner, record)
        runner.close()
        _require_same(name, error, record)
        return built, record

    def judge(self, name: str, lowered: Graph) -> tuple[Built, Golden]:
        """The same where it does not run: what it is built from is proved, by ONNX Runtime."""
        record = self.recorded(lowered)
        # In ops that ONNX Runtime computes right: its DequantizeLinear of fp8 is not among them.
        ours = lowering.lower(lowered, backends.find("onnxruntime").PLAIN)
        _require_same(name, equivalence.distance(ours.model, record), record)
        return self.built(lowered), record

    def recorded(self, lowered: Graph) -> Golden:
        """The recorded batch, with what this lowering may round."""
        allowed = equivalence.tolerance_of(lowered.model)
        return replace(self.record, tolerance=max(self.record.tolerance, allowed))

    def built(self, lowered: Graph) -> Built:
        """What the backend makes of it, with what `lower` had to say."""
        built = self.backend.build(lowered.model, self.request)
        note = lowering.note_of(lowered)
        return replace(built, notes=(*built.notes, note)) if note else built


@dataclass(frozen=True)
class _Candidate:
    """One lowering, built."""

    source: Graph
    built: Built
    record: Golden


def _require_same(name: str, error: float, record: Golden) -> None:
    if error > record.tolerance:
        raise _DriftError({name: error}, record.tolerance)


class _DriftError(CompilationError):
    """A lowering that computes something else than its graph."""

    def __init__(self, errors: Mapping[str, float], tolerance: float) -> None:
        found = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
        super().__init__(
            f"No lowering reproduces the graph: {found} (relative RMS).",
            f"Up to {tolerance:g} is rounding.",
            "Please report the graph; its unfused form compiles without grouped ops.",
        )
        self.errors, self.tolerance = errors, tolerance


def _all_refused(refusals: Mapping[str, HydraError]) -> HydraError:
    """Why nothing could be built: the first thing that was missing, or what all drifted by."""
    drifted = [error for error in refusals.values() if isinstance(error, _DriftError)]
    if len(drifted) < len(refusals):
        return next(error for error in refusals.values() if not isinstance(error, _DriftError))
    every = {name: value for error in drifted for name, value in error.errors.items()}
    return _DriftError(every, drifted[0].tolerance)


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
    candidates: Mapping[str, _Candidate],
    inputs: tuple[TensorSpec, ...],
    backend: Backend,
    options: CompileOptions,
) -> dict[str, float]:
    """p50 in ms per candidate at the best batch, in rounds so that all see the same noise."""
    feeds = equivalence.random_inputs(inputs, batch=options.batch[1])
    runners = {
        name: backend.open(one.built.payload, options.threads, one.built.facts)
        for name, one in candidates.items()
    }
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
