"""`benchmark`: latency, memory and quality of sessions, side by side, under one protocol.

`timing` takes the latencies, `probe` asks a fresh process for load time and memory, `quality`
judges the answers, and `costs` counts the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from hydra_edge import probe, quality, timing
from hydra_edge.artifacts.arrays import check_arrays, to_numpy
from hydra_edge.artifacts.engine import MAIN, Engine
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.artifacts.report import (
    IN_DISTRIBUTION,
    LatencyRow,
    NotMeasured,
    Report,
    SessionRow,
)
from hydra_edge.artifacts.report import Protocol as Protocol
from hydra_edge.costs import Cost, cost
from hydra_edge.errors import GraphError, InputError
from hydra_edge.quality import Answers, Quality
from hydra_edge.runtime import EnsembleSession, Session, require_same_inputs

Array = npt.NDArray[np.generic]
AnySession = Session | EnsembleSession
_MAX_SLICES = 8  # parts of the inputs that a session is timed on in turn
_NO_SENSOR = NotMeasured("hydra-edge reads no power sensor on this target")


def benchmark(
    sessions: Mapping[str, Session | EnsembleSession],
    inputs: object,
    *,
    labels: object = None,
    shifted: Mapping[str, object] | None = None,
    reference: str | None = None,
    protocol: Protocol | None = None,
    progress: bool = False,
) -> Report:
    """Measure sessions side by side.

    Args:
        sessions: Open sessions by the name they have in the report; all take the same inputs.
        inputs: Samples in distribution: an array, or a mapping of input names to arrays. Quality
            uses all of them, latency slices of them, repeated if a batch needs more.
        labels: Their truth ``[B]``; without it accuracy and the like are not measured.
        shifted: Samples out of distribution by name, in the format of ``inputs``.
        reference: The session whose uncertainty the others should have, usually the ensemble.
        protocol: How latency is measured.
        progress: Show a progress bar on stderr.

    Returns:
        The report. Use ``dataclasses.replace`` to add the commit and notes of your own. Latency is
        that of ``session.run``, which is what an application calls; load time and memory come from
        a fresh process per session.

    Raises:
        InputError: There is no session, the reference is none of them, or the data does not fit.

    Example:
        >>> report = benchmark(  # doctest: +SKIP
        ...     {"student": student, "ensemble": ensemble}, images, labels=classes,
        ...     shifted={"noise": noise}, reference="ensemble",
        ... )
        >>> speedup(report, "student", "ensemble", batch=1)  # doctest: +SKIP
    """
    protocol = protocol or Protocol()
    specs = _check_sessions(sessions, reference)
    datasets = _datasets(specs, inputs, shifted or {})
    truth = None if labels is None else to_numpy(labels, "labels")
    _check_labels(truth, datasets[IN_DISTRIBUTION])
    engines = {label: _engines(session) for label, session in sessions.items()}
    machine = probe.describe_machine([e.backend for group in engines.values() for e in group])
    # Quality first: it is what refuses wrong data, and that should not take minutes.
    answers = quality.ask_all(sessions, datasets)
    judged = {
        label: quality.judge(
            found, truth, answers[reference] if reference and label != reference else None
        )
        for label, found in answers.items()
    }
    diagrams = [quality.bin_reliability(label, found, truth) for label, found in answers.items()]
    rows = []
    latencies: list[LatencyRow] = []
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("benchmark", total=len(sessions) + len(protocol.batches))
        for label, session in sessions.items():
            bar.update(task, description=f"load {label}")
            startup = probe.measure_startup(engines[label], max(protocol.batches), session.threads)
            found = answers[label]
            rows.append(_row(label, session, engines[label], found, startup, judged[label]))
            bar.advance(task)
        for batch in protocol.batches:
            bar.update(task, description=f"time batch {batch}")
            feeds = _slices(datasets[IN_DISTRIBUTION], batch)
            calls = {label: _calls(session, feeds) for label, session in sessions.items()}
            latencies += timing.measure(calls, batch, protocol, machine.cache_bytes)
            bar.advance(task)
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine,
        protocol=protocol,
        datasets={name: _size(arrays) for name, arrays in datasets.items()},
        reference=reference,
        sessions=tuple(rows),
        latencies=tuple(latencies),
        reliabilities=tuple(diagram for diagram in diagrams if diagram is not None),
        histograms=quality.bin_doubts(answers),
        notes=_notes(sessions, engines, protocol, machine.cache_bytes),
    )


def speedup(report: Report, session: str, baseline: str, batch: int) -> float:
    """How many times faster ``session`` answers than ``baseline``: the ratio of their p50.

    Args:
        report: A report of both.
        session: Label of a session.
        baseline: Label of the session it is compared with.
        batch: One of the protocol's batch sizes.

    Raises:
        InputError: The report has no such measurement.
    """
    return report.latency(baseline, batch).p50_ms / report.latency(session, batch).p50_ms


def _check_sessions(
    sessions: Mapping[str, AnySession], reference: str | None
) -> tuple[TensorSpec, ...]:
    if not sessions:
        raise InputError("There is no session.", "Nothing can be measured.", "Pass at least one.")
    if reference is not None and reference not in sessions:
        raise InputError(
            f"The reference '{reference}' is not among the sessions.",
            f"They are {', '.join(sessions)}.",
            "Name one of those, or leave the reference out.",
        )
    return require_same_inputs(sessions)


def _datasets(
    specs: tuple[TensorSpec, ...], inputs: object, shifted: Mapping[str, object]
) -> dict[str, dict[str, Array]]:
    if IN_DISTRIBUTION in shifted:
        raise InputError(
            f"A shifted set is called '{IN_DISTRIBUTION}'.",
            "That is the name of the inputs themselves.",
            "Give it another name.",
        )
    found = {}
    for name, value in {IN_DISTRIBUTION: inputs, **shifted}.items():
        if isinstance(value, Mapping):
            arrays = {str(key): to_numpy(part, str(key)) for key, part in value.items()}
        elif len(specs) == 1:
            arrays = {specs[0].name: to_numpy(value, specs[0].name)}
        else:
            raise InputError(
                f"The data set '{name}' is one array.",
                f"The engines take {'; '.join(map(str, specs))}.",
                "Pass a mapping of input names to arrays.",
            )
        found[name] = check_arrays(arrays, _any_batch(specs))
    return found


def _any_batch(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Data sets hold any number of samples, even for an engine with a fixed batch."""
    return tuple(TensorSpec(s.name, s.dtype, ("batch", *s.shape[1:])) for s in specs)


def _check_labels(labels: Array | None, inputs: Mapping[str, Array]) -> None:
    if labels is not None and (labels.ndim == 0 or len(labels) != _size(inputs)):
        raise InputError(
            f"The labels have shape {list(labels.shape)}.",
            f"The inputs hold {_size(inputs)} samples, and each has one label.",
            "Pass the labels of exactly these inputs.",
        )


def _size(arrays: Mapping[str, Array]) -> int:
    return len(next(iter(arrays.values())))


def _engines(session: AnySession) -> list[Engine]:
    members = session.members if isinstance(session, EnsembleSession) else (session,)
    return [member.engine for member in members]


def _row(
    label: str,
    session: AnySession,
    engines: Sequence[Engine],
    answers: Answers,
    startup: probe.Startup,
    judged: Quality,
) -> SessionRow:
    first = engines[0]
    total = _total_cost(engines)
    precisions = sorted({engine.precision for engine in engines})
    return SessionRow(
        label=label,
        kind="ensemble" if isinstance(session, EnsembleSession) else first.kind,
        task=answers.task.name if answers.task else None,
        precision=", ".join(precisions),
        backend=first.backend,
        target=first.target,
        threads=session.threads,
        heads=answers.heads or first.heads,
        engines=len(engines),
        size_bytes=sum(engine.size_bytes for engine in engines),
        weight_bytes=total if isinstance(total, NotMeasured) else total.weight_bytes,
        parameters=total if isinstance(total, NotMeasured) else total.parameters,
        flops_per_sample=total if isinstance(total, NotMeasured) else total.flops_per_sample,
        load_ms=startup.load_ms,
        first_run_ms=startup.first_run_ms,
        base_memory_mb=startup.base_memory_mb,
        peak_memory_mb=startup.peak_memory_mb,
        energy_mj=_NO_SENSOR,
        quality=judged.figures,
        not_measured=judged.not_measured,
    )


def _total_cost(engines: Sequence[Engine]) -> Cost | NotMeasured:
    try:
        parts = [cost(program.graph) for e in engines for program in e.programs.values()]
    except GraphError as exc:
        return NotMeasured(f"{exc.what} {exc.why}")
    return Cost(
        sum(part.flops_per_sample for part in parts),
        sum(part.weight_bytes for part in parts),
        sum(part.parameters for part in parts),
    )


def _slices(inputs: Mapping[str, Array], batch: int) -> list[dict[str, Array]]:
    """Batches cut from the inputs, which start over where they end."""
    size = _size(inputs)
    count = max(1, min(_MAX_SLICES, size // batch))
    indices = [np.arange(i * batch, (i + 1) * batch) % size for i in range(count)]
    return [
        {name: np.ascontiguousarray(array[index]) for name, array in inputs.items()}
        for index in indices
    ]


def _calls(session: AnySession, feeds: Sequence[Mapping[str, Array]]) -> list[timing.Call]:
    return [partial(session.run, feed) for feed in feeds]


def _notes(
    sessions: Mapping[str, AnySession],
    engines: Mapping[str, Sequence[Engine]],
    protocol: Protocol,
    cache_bytes: int | None,
) -> tuple[str, ...]:
    """What a reader must know before comparing the rows."""
    notes = []
    threads = {label: session.threads for label, session in sessions.items()}
    if len(set(threads.values())) > 1:
        found = ", ".join(f"'{label}' {count}" for label, count in threads.items())
        notes.append(f"The sessions use different numbers of threads: {found}.")
    backends = {engine.backend for group in engines.values() for engine in group}
    if len(backends) > 1:
        notes.append(f"The sessions run on different backends: {', '.join(sorted(backends))}.")
    for label, group in engines.items():
        low, _, high = group[0].programs[MAIN].batch
        split = [batch for batch in protocol.batches if batch > high]
        padded = [batch for batch in protocol.batches if batch < low]
        if split:
            sizes = " and ".join(map(str, split))
            notes.append(f"'{label}' takes up to {high} samples at once; it split batch {sizes}.")
        if padded:
            sizes = " and ".join(map(str, padded))
            notes.append(f"'{label}' takes at least {low} samples; it padded batch {sizes}.")
    if protocol.cold_samples and cache_bytes is None:
        notes.append(
            "The size of the last-level cache is unknown; cold samples assume "
            f"{timing.UNKNOWN_CACHE_BYTES >> 20} MiB."
        )
    return tuple(notes)
