"""`Report`: what a benchmark measured, on which machine and under which protocol, in one JSON file.

A figure that could not be measured is a `NotMeasured` with its reason, never 0. The record names no
host, no user and no path, so it can be published as it is.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from hydra_edge.artifacts.files import read_bytes, write_atomic
from hydra_edge.errors import ArtifactError, InputError

SCHEMA_VERSION = 1
FORMAT = "hydra-edge report"
IN_DISTRIBUTION = "in_distribution"  # the data set that a benchmark is given as `inputs`


@dataclass(frozen=True)
class NotMeasured:
    """Stands where a number could not be had, and says why."""

    reason: str

    def __str__(self) -> str:
        return f"not measured: {self.reason}"


Figure = float | NotMeasured


@dataclass(frozen=True)
class Protocol:
    """How latency is measured; see `hydra_edge.measurement.benchmark`.

    Attributes:
        batches: Batch sizes, each measured on its own.
        warmup_s: Seconds every session runs untimed before the windows of a batch size.
        window_s: Seconds of one window; a window holds at least one call.
        min_windows: Windows per session before the noise is judged.
        max_windows: Windows per session at which measuring stops in any case.
        max_seconds: Seconds per batch size, over all sessions, after which it stops in any case.
        max_noise: Largest noise that counts as converged: the interquartile range of the windows'
            medians, relative to their median.
        cold_samples: Calls timed with emptied caches; 0 measures none.
        seed: Decides the order of the sessions inside a round.
    """

    batches: tuple[int, ...] = (1, 32)
    warmup_s: float = 0.3
    window_s: float = 0.1
    min_windows: int = 8
    max_windows: int = 60
    max_seconds: float = 30.0
    max_noise: float = 0.05
    cold_samples: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches or len(set(self.batches)) < len(self.batches) or min(self.batches) < 1:
            raise InputError(
                f"The batch sizes are {self.batches}.",
                "Each is measured once and holds at least one sample.",
                "Write for example batches=(1, 32).",
            )
        if not 2 <= self.min_windows <= self.max_windows:
            raise InputError(
                f"Between {self.min_windows} and {self.max_windows} windows were asked for.",
                "Noise is the spread between windows, so it takes at least two.",
                "Write for example min_windows=8, max_windows=60.",
            )
        for name in ("warmup_s", "window_s", "max_seconds", "max_noise", "cold_samples", "seed"):
            value = getattr(self, name)
            positive = name in ("window_s", "max_seconds", "max_noise")
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise InputError(
                    f"The protocol has {name}={value}.",
                    f"It must be a finite number {'above' if positive else 'of at least'} 0.",
                    "Leave it out for a sound default.",
                )


@dataclass(frozen=True)
class Machine:
    """Where the sessions ran.

    Attributes:
        platform: Operating system, its release and the architecture.
        cpu: Model name of the processor or the board.
        cores: Cores this process may use.
        cache_bytes: Size of the last-level cache, or None when the system does not tell.
        python: Version of Python.
        versions: Versions of the libraries that decide what is measured.
    """

    platform: str
    cpu: str
    cores: int
    cache_bytes: int | None
    python: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class SessionRow:
    """One session: what it is, what it costs at rest, and how good its answers are.

    Attributes:
        label: The name the caller gave it.
        kind: ``"student"``, ``"ensemble"``, ``"member"`` or ``"model"``.
        task: Task name or None.
        precision: Precision asked for.
        backend: Backend it runs on.
        target: Target name.
        threads: CPU threads one run may use.
        heads: M, or None when unknown.
        engines: Engines that one answer takes: 1, or M for an ensemble of engines.
        size_bytes: Bytes of the compiled programs.
        weight_bytes: Bytes of the weights as stored.
        parameters: Number of weights.
        flops_per_sample: Two per multiply-add, at batch 1; see `hydra_edge.costs.cost`.
        load_ms: From file to live session in a fresh process, libraries already imported.
        first_run_ms: The first run after that.
        base_memory_mb: Peak resident memory of that process before it loaded anything.
        peak_memory_mb: Peak resident memory of that process in the end, Python included.
        energy_mj: Energy per sample in millijoules.
        quality: Figures by name, e.g. ``accuracy``, ``nll``, ``ood_auroc_<set>``,
            ``mi_rank_correlation``.
        not_measured: What is missing in ``quality``, and why.
    """

    label: str
    kind: str
    task: str | None
    precision: str
    backend: str
    target: str
    threads: int
    heads: int | None
    engines: int
    size_bytes: int
    weight_bytes: Figure
    parameters: Figure
    flops_per_sample: Figure
    load_ms: Figure
    first_run_ms: Figure
    base_memory_mb: Figure
    peak_memory_mb: Figure
    energy_mj: Figure
    quality: Mapping[str, float] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LatencyRow:
    """Latency of one session at one batch size.

    Attributes:
        session: Label of the session.
        batch: Batch size B.
        min_ms: Fastest call.
        p50_ms: Median latency of one call.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile.
        mean_ms: Mean.
        n: Timed calls.
        windows: Windows they were taken in.
        noise: Interquartile range of the windows' medians, relative to their median.
        converged: Whether the noise came below the protocol's limit before time was up.
        throughput_per_s: Samples per second of one caller: batch / p50.
        cold_p50_ms: Median latency with emptied caches.
    """

    session: str
    batch: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    n: int
    windows: int
    noise: float
    converged: bool
    throughput_per_s: float
    cold_p50_ms: Figure

    @property
    def disturbed(self) -> bool:
        """Whether half of the calls took over twice the fastest: other work used the machine."""
        return self.p50_ms > 2 * self.min_ms


@dataclass(frozen=True)
class ReliabilityBin:
    """Samples whose winning class has a probability inside one interval.

    Attributes:
        confidence: Mean probability of the winning class.
        accuracy: Share of right answers.
        count: Number of samples, at least 1.
    """

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """The reliability diagram of one session: its bins that are not empty, by confidence."""

    session: str
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class Histogram:
    """How one session's epistemic uncertainty is distributed over one data set.

    Attributes:
        session: Label of the session.
        dataset: `IN_DISTRIBUTION` or the name of a shifted set.
        quantity: Name of the output, e.g. ``mutual_information``.
        edges: Rising bin edges, one more than counts; equal for all histograms of a report.
        counts: Samples per bin; values outside the edges count in the outermost bins.
    """

    session: str
    dataset: str
    quantity: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """Measurements of sessions under one protocol.

    Attributes:
        created: UTC time, ISO 8601.
        machine: Where it was measured.
        protocol: How latency was measured.
        datasets: Number of samples by data set.
        reference: Label of the session that ``quality`` compares the others with, or None.
        sessions: One row per session.
        latencies: One row per session and batch size.
        reliabilities: Reliability diagrams.
        histograms: Distributions of the epistemic uncertainty.
        commit: The source's git commit, when the caller knows it.
        notes: Remarks of the benchmark and of the caller.
    """

    created: str
    machine: Machine
    protocol: Protocol
    datasets: Mapping[str, int]
    reference: str | None
    sessions: tuple[SessionRow, ...]
    latencies: tuple[LatencyRow, ...]
    reliabilities: tuple[Reliability, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    commit: str | None = None
    notes: tuple[str, ...] = ()

    def session(self, label: str) -> SessionRow:
        """The row of one session.

        Raises:
            InputError: The report has no such session.
        """
        for row in self.sessions:
            if row.label == label:
                return row
        raise InputError(
            f"The report has no session '{label}'.",
            f"It has: {', '.join(row.label for row in self.sessions)}.",
            "Name one of those.",
        )

    def latency(self, label: str, batch: int) -> LatencyRow:
        """The latency of one session at one batch size.

        Raises:
            InputError: It was not measured.
        """
        self.session(label)
        for row in self.latencies:
            if (row.session, row.batch) == (label, batch):
                return row
        raise InputError(
            f"'{label}' was not measured at batch {batch}.",
            f"The protocol's batches are {', '.join(map(str, self.protocol.batches))}.",
            "Name one of those, or benchmark again with another protocol.",
        )

    def to_json(self) -> str:
        """Readable JSON in the order of the fields.

        Raises:
            InputError: A figure is NaN or infinite.
        """
        content = {"format": FORMAT, "schema": SCHEMA_VERSION, **asdict(self)}
        try:
            return json.dumps(content, indent=1, allow_nan=False) + "\n"
        except ValueError as exc:
            raise InputError(
                "The report holds a figure that is NaN or infinite.",
                "JSON has no such numbers.",
                "Put NotMeasured with a reason in its place.",
            ) from exc

    @classmethod
    def from_json(cls, text: str, origin: str = "the given text") -> Report:
        """Read what `to_json` wrote.

        Args:
            text: The JSON.
            origin: Where it comes from, for error messages.

        Raises:
            ArtifactError: It is no report, is not complete, or was written by a newer version.
        """
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
            if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
                raise TypeError(f"the entry 'format' is not '{FORMAT}'")
            schema = content.pop("schema")
            if schema > SCHEMA_VERSION:
                raise ArtifactError(
                    f"The report '{origin}' has schema {schema}.",
                    f"This version reads up to schema {SCHEMA_VERSION}.",
                    "Upgrade hydra-edge.",
                )
            report = _decode(cls, content, "report")
            assert isinstance(report, cls)
            return report
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise ArtifactError(
                f"'{origin}' is not a usable report.",
                f"Reading it failed: {str(exc).rstrip('.')}.",
                "Check that it is a complete .json file written by `hydra-edge bench`.",
            ) from exc

    def save(self, path: str | Path) -> Path:
        """Write a ``.json`` file, atomically."""
        return write_atomic(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a ``.json`` file.

        Raises:
            ArtifactError: It is missing, no report, or written by a newer version.
        """
        data = read_bytes(path, "a report (.json)")
        return cls.from_json(data.decode("utf-8", "replace"), str(path))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _decode(kind: object, value: object, where: str) -> object:
    """Build a ``kind`` from plain JSON, checking every type on the way."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode(_choose(arguments, value), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {str(k): _decode(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(kind, type):
        if is_dataclass(kind) and isinstance(value, dict):
            return _decode_fields(kind, value, where)
        if kind is float and type(value) in (int, float):
            return value
        if type(value) is kind:
            return value
    raise TypeError(f"{where} is {json.dumps(value)[:40]}, not {getattr(kind, '__name__', kind)}")


def _decode_fields(kind: type, value: dict[str, object], where: str) -> object:
    hints = typing.get_type_hints(kind)
    names = [entry.name for entry in fields(kind)]
    if odd := sorted(set(names) ^ set(value)):
        raise KeyError(f"{where} {'lacks' if odd[0] in names else 'has the unknown'} '{odd[0]}'")
    return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in names})


def _choose(kinds: tuple[object, ...], value: object) -> object:
    """The member of a union that JSON's type tells: null, an object, or the plain one."""
    if value is None and type(None) in kinds:
        return type(None)
    wanted = [kind for kind in kinds if is_dataclass(kind) == isinstance(value, dict)]
    wanted = [kind for kind in wanted if kind is not type(None)]
    return wanted[0] if wanted else kinds[0]
