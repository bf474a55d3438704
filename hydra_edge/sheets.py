"""The tables of a `Report` as text, for whoever draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hydra_edge.artifacts.report import Figure, NotMeasured, Report, SessionRow
from hydra_edge.wording import (
    METRICS,
    MISSING,
    choose_metric,
    describe_metric,
    find_rival,
    format_ms,
    format_number,
    format_quality,
    format_ratio,
    format_scaled,
    name_dataset,
    name_row,
)

_MANY = 100  # calls from which a 99th percentile is more than the maximum


@dataclass(frozen=True)
class Sheet:
    """A table of text; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def fill_sheets(report: Report) -> tuple[Sheet, ...]:
    """All tables, most important first."""
    return (_glance(report), _latency(report), _quality(report), _sessions(report), _setup(report))


def _glance(report: Report) -> Sheet:
    batches = report.protocol.batches
    names = [name for name in (choose_metric(report), "ece", "mi_rank_correlation") if name]
    names += [name for name in _names(report) if name.startswith("ood_auroc_")]
    names = [name for name in names if any(name in row.quality for row in report.sessions)]
    rows = []
    for row in report.sessions:
        cells = [row.label, row.precision]
        for batch in batches:
            found = report.latency(row.label, batch)
            cell = format_ms(found.p50_ms)
            rival = find_rival(report, batch)
            if rival is not None and rival.session != row.label:
                cell += f" ({format_ratio(rival.p50_ms / found.p50_ms)})"
            cells.append(cell)
        rows.append((*cells, *(_cell(row, name) for name in names)))
    columns = ("Session", "Precision", *(f"p50, batch {batch}" for batch in batches))
    notes = ["p50 is the median time of one call."]
    if report.reference:
        kind = report.session(report.reference).kind
        notes = [f"{notes[0]} In brackets: how many times as fast as the fastest {kind}."]
    return Sheet(
        "At a glance",
        (*columns, *(describe_metric(name).title for name in names)),
        tuple(rows),
        tuple(notes),
    )


def _latency(report: Report) -> Sheet:
    rows = []
    for row in sorted(
        report.latencies, key=lambda found: report.protocol.batches.index(found.batch)
    ):
        noise = f"{100 * row.noise:.1f} %{'' if row.converged else '†'}"
        times_ms = (row.min_ms, row.p50_ms, row.p90_ms, row.p99_ms, row.mean_ms, row.cold_p50_ms)
        cells = [f"{format_number(value)}" for value in times_ms]
        if row.n < _MANY:
            cells[3] += "*"
        rows.append(
            (
                row.session,
                str(row.batch),
                *cells,
                format_number(row.throughput_per_s),
                noise,
                f"{row.n:,}",
            )
        )
    notes = [
        "Times in milliseconds of one call of session.run. Throughput is batch / p50 in samples "
        "per second of one caller. Noise is the interquartile range of the windows' medians, "
        "relative to their median. Cold is the median with emptied caches.",
    ]
    if any(row.n < _MANY for row in report.latencies):
        notes.append(f"* From fewer than {_MANY} calls: near the slowest of them.")
    if not all(row.converged for row in report.latencies):
        limit = f"{100 * report.protocol.max_noise:g} %"
        notes.append(f"† Did not converge to a noise of {limit} in the time allowed.")
    notes += _reasons(("cold", row.cold_p50_ms, name_row(row)) for row in report.latencies)
    columns = "Session,Batch,Fastest,p50,p90,p99,Mean,Cold p50,Throughput,Noise,Calls"
    return Sheet("Latency", tuple(columns.split(",")), tuple(rows), tuple(notes))


def _quality(report: Report) -> Sheet:
    labels = [row.label for row in report.sessions]
    rows = []
    for name in _names(report):
        found = describe_metric(name)
        better = {None: "", True: " ↑", False: " ↓"}[found.higher_is_better]
        rows.append((found.title + better, *(_cell(row, name) for row in report.sessions)))
    notes = ["↑ higher is better, ↓ lower is better."] if rows else []
    if report.reference:
        notes.append(
            f"Rank correlation, ratios and changes compare with {report.reference} over all data "
            "sets together, or over the one named; 1 is no difference."
        )
    missing: dict[str, dict[str, list[str]]] = {}
    for row in report.sessions:
        for name, reason in row.not_measured.items():
            missing.setdefault(reason.rstrip("."), {}).setdefault(row.label, []).append(
                describe_metric(name).title
            )
    for reason, concerned in missing.items():
        who = "; ".join(f"{label}: {', '.join(names)}" for label, names in concerned.items())
        notes.append(f"Not measured because {reason}. {who}.")
    return Sheet("Quality and uncertainty", ("Figure", *labels), tuple(rows), tuple(notes))


def _sessions(report: Report) -> Sheet:
    shown: tuple[tuple[str, Callable[[SessionRow], str]], ...] = (
        ("Kind", lambda row: row.kind),
        ("Precision", lambda row: row.precision),
        ("Heads", lambda row: MISSING if row.heads is None else str(row.heads)),
        ("Engines", lambda row: str(row.engines)),
        ("Target", lambda row: f"{row.target} ({row.backend})"),
        ("Threads", lambda row: str(row.threads)),
        ("Arithmetic per sample", lambda row: format_scaled(row.flops_per_sample, "FLOP")),
        ("Parameters", lambda row: format_scaled(row.parameters, "")),
        ("Weights", lambda row: format_scaled(row.weight_bytes, "B")),
        ("Programs", lambda row: format_scaled(row.size_bytes, "B")),
        ("Load", lambda row: format_ms(row.load_ms)),
        ("First run", lambda row: format_ms(row.first_run_ms)),
        ("Memory before", lambda row: format_scaled(_million(row.base_memory_mb), "B")),
        ("Peak memory", lambda row: format_scaled(_million(row.peak_memory_mb), "B")),
        ("Energy per sample", lambda row: _energy(row.energy_mj)),
    )
    names = ("flops_per_sample", "load_ms", "peak_memory_mb", "energy_mj")
    notes = [
        "Load time, first run and memory come from a fresh process per session; memory is that of "
        "the whole process, before loading and at its peak.",
        *_reasons(
            (name.rsplit("_", 1)[0].replace("_", " "), getattr(row, name), row.label)
            for name in names
            for row in report.sessions
        ),
    ]
    rows = tuple((name, *map(show, report.sessions)) for name, show in shown)
    return Sheet("Sessions", ("", *(row.label for row in report.sessions)), rows, tuple(notes))


def _setup(report: Report) -> Sheet:
    machine, protocol = report.machine, report.protocol
    cache = MISSING if machine.cache_bytes is None else f"{machine.cache_bytes / 2**20:.0f} MiB"
    rows = [
        ("Measured", report.created),
        ("Commit", report.commit or "unknown"),
        ("Processor", f"{machine.cpu}, {machine.cores} cores, last-level cache {cache}"),
        ("System", machine.platform),
        ("Versions", ", ".join([f"Python {machine.python}", *_pairs(machine.versions)])),
        ("Data", ", ".join(f"{name_dataset(name)} {n:,}" for name, n in report.datasets.items())),
        ("Batches", ", ".join(map(str, protocol.batches))),
        (
            "Protocol",
            f"{protocol.warmup_s:g} s of warm-up; {protocol.min_windows} to "
            f"{protocol.max_windows} windows of {protocol.window_s:g} s, sessions in turn; until "
            f"the noise is at most {100 * protocol.max_noise:g} % or {protocol.max_seconds:g} s "
            f"have passed; {protocol.cold_samples} cold samples; seed {protocol.seed}",
        ),
    ]
    return Sheet("Machine and protocol", ("", ""), tuple(rows))


def _names(report: Report) -> list[str]:
    """Names of all figures of quality: those we know in our order, then the others in theirs."""
    present = list(dict.fromkeys(name for row in report.sessions for name in row.quality))
    known = [name for name in METRICS if name in present]
    return known + [name for name in present if name not in known]


def _cell(row: SessionRow, name: str) -> str:
    return format_quality(name, row.quality[name]) if name in row.quality else "–"


def _pairs(values: Mapping[str, str]) -> list[str]:
    return [f"{name} {value}" for name, value in sorted(values.items())]


def _million(value: Figure) -> Figure:
    return value if isinstance(value, NotMeasured) else value * 1e6


def _energy(value: Figure) -> str:
    return MISSING if isinstance(value, NotMeasured) else f"{format_number(value)} mJ"


def _reasons(found: Iterable[tuple[str, Figure, str]]) -> list[str]:
    """One sentence per reason, naming what and whom it concerns."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for what, value, who in found:
        if isinstance(value, NotMeasured):
            grouped.setdefault((what, value.reason), []).append(who)
    return [
        f"{MISSING}: {what} was not measured for {', '.join(who)}: {reason}."
        for (what, reason), who in grouped.items()
    ]
