"""What a `Report` says in words and rounded figures, before anybody decides how it looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hydra_edge.artifacts.report import (
    IN_DISTRIBUTION,
    Figure,
    LatencyRow,
    NotMeasured,
    Report,
    SessionRow,
)

MISSING = "n/m"


@dataclass(frozen=True)
class Metric:
    """How one figure of quality is shown.

    Attributes:
        title: Its name for people.
        percent: Whether it is a share, shown in percent and compared in points.
        higher_is_better: None when neither is.
    """

    title: str
    percent: bool = False
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class Headline:
    """One of the questions a report must answer first.

    Attributes:
        question: The question.
        answer: The answer in a few characters.
        caption: What the answer is, in a few words.
        details: Short sentences that qualify it.
        measured: Whether there is an answer.
    """

    question: str
    answer: str
    caption: str
    details: tuple[str, ...]
    measured: bool = True


METRICS = {
    "accuracy": Metric("Accuracy", percent=True, higher_is_better=True),
    "rmse": Metric("RMSE", higher_is_better=False),
    "nll": Metric("NLL, nats", higher_is_better=False),
    "brier": Metric("Brier score", higher_is_better=False),
    "crps": Metric("CRPS", higher_is_better=False),
    "ece": Metric("Calibration error", percent=True, higher_is_better=False),
    "coverage_90": Metric("Coverage of the 90 % interval", percent=True),
    "mutual_information": Metric("Mutual information (MI), nats"),
    "predictive_entropy": Metric("Predictive entropy, nats"),
    "disagreement": Metric("Disagreement of heads"),
    "mi_rank_correlation": Metric("Rank correlation of uncertainty", higher_is_better=True),
    "mi_ratio": Metric("Ratio of uncertainty"),
    "disagreement_ratio": Metric("Ratio of disagreement"),
    "top1_agreement": Metric("Equal top class", percent=True, higher_is_better=True),
    "max_abs_mean_prob": Metric("Largest change of a probability", higher_is_better=False),
    "drift": Metric("change against the reference"),
    "max_abs_mean": Metric("Largest change of a mean", higher_is_better=False),
}
_FAMILIES = {"ood_auroc_": "OOD AUROC", "mi_ratio_": "Ratio of uncertainty"}


def describe_metric(name: str) -> Metric:
    """How the figure called ``name`` is shown."""
    for prefix, title in _FAMILIES.items():
        if name.startswith(prefix):
            higher = True if prefix == "ood_auroc_" else None
            return Metric(f"{title}: {name_dataset(name[len(prefix) :])}", higher_is_better=higher)
    return METRICS.get(name, Metric(name.replace("_", " ")))


def name_dataset(name: str) -> str:
    """Name of a data set for people."""
    return "in distribution" if name == IN_DISTRIBUTION else name


def choose_metric(report: Report) -> str | None:
    """The figure of quality to look at first, among those that were measured."""
    present = {name for row in report.sessions for name in row.quality}
    return next((name for name in METRICS if name in present), None)


def format_number(value: Figure) -> str:
    """Three significant digits, thousands separated; `MISSING` without a value."""
    if isinstance(value, NotMeasured):
        return MISSING
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:#.3g}" if value else "0"


def format_quality(name: str, value: float) -> str:
    """A figure of quality with its unit."""
    if describe_metric(name).percent:
        return f"{100 * value:.1f} %"
    return format_number(value) if abs(value) >= 10 else f"{value:.3f}"


def format_ms(value: Figure) -> str:
    """A time with its unit."""
    return MISSING if isinstance(value, NotMeasured) else f"{format_number(value)} ms"


def format_scaled(value: Figure, unit: str) -> str:
    """A large number with a decimal prefix, e.g. ``1.57 MFLOP``."""
    if isinstance(value, NotMeasured):
        return MISSING
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{format_number(value / factor)} {prefix}{unit}".rstrip()
    return f"{format_number(value)} {unit}".rstrip()


def format_ratio(ratio: float) -> str:
    """A factor, e.g. ``11×``."""
    return (
        f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×" if ratio >= 1.95 else f"{ratio:.2f}×"
    )


def write_title(report: Report) -> str:
    """The report in one sentence."""
    subject, reference = _subject(report), report.reference
    batch = report.protocol.batches[0]
    row = report.latency(subject.label, batch)
    base = find_rival(report, batch)
    if reference is None or base is None:
        return f"{subject.label} answers in {format_ms(row.p50_ms)}"
    ratio = base.p50_ms / row.p50_ms
    sure = all(found.converged and not found.disturbed for found in (row, base))
    about = "" if sure else "about "
    if ratio >= 1:
        return f"{subject.label} is {about}{format_ratio(ratio)} as fast as {base.session}"
    return f"{subject.label} is {about}{format_ratio(1 / ratio)} as slow as {base.session}"


def write_headlines(report: Report) -> tuple[Headline, Headline, Headline]:
    """How much faster, at what cost in quality, and is the uncertainty still right?"""
    return _speed(report), _cost_in_quality(report), _uncertainty(report)


def write_warnings(report: Report) -> tuple[str, ...]:
    """What weakens the figures of latency."""
    loose = [row for row in report.latencies if not row.converged]
    disturbed = [row for row in report.latencies if row.disturbed]
    found = []
    if loose:
        rows = _by_batch(loose, lambda row: f"{row.session} {100 * row.noise:.0f} %")
        limit = f"{100 * report.protocol.max_noise:g} %"
        found.append(f"Did not converge to a noise of {limit} in the time allowed. {rows}.")
    if disturbed:
        rows = _by_batch(
            disturbed,
            lambda row: (
                f"{row.session} {format_number(row.p50_ms)} against {format_ms(row.min_ms)}"
            ),
        )
        found.append(
            "Half of the calls took over twice the fastest, so other work seems to have used the "
            f"machine. {rows}."
        )
    return tuple(found)


def _by_batch(rows: Sequence[LatencyRow], show: Callable[[LatencyRow], str]) -> str:
    batches = dict.fromkeys(row.batch for row in rows)
    return "; ".join(
        f"Batch {batch}: {', '.join(show(row) for row in rows if row.batch == batch)}"
        for batch in batches
    )


def _subject(report: Report) -> SessionRow:
    """The session the headlines are about: the first that is not the reference."""
    others = [row for row in report.sessions if row.label != report.reference]
    return (others or list(report.sessions))[0]


def find_rival(report: Report, batch: int) -> LatencyRow | None:
    """What the headlines compare with: the fastest of the reference's kind at that batch.

    A reference in fp32 says what the answers should be; a quantized ensemble beside it is the one
    to beat. None when there is nothing but the session the headlines are about.
    """
    if report.reference is None:
        return None
    kind, subject = report.session(report.reference).kind, _subject(report).label
    rivals = [row for row in report.sessions if row.kind == kind and row.label != subject]
    rows = [report.latency(row.label, batch) for row in rivals]
    return min(rows, key=lambda row: row.p50_ms, default=None)


def name_row(row: LatencyRow) -> str:
    """A measurement in running text."""
    return f"{row.session} at batch {row.batch}"


def _speed(report: Report) -> Headline:
    question = "How much faster?"
    subject, reference = _subject(report), report.reference
    rows = [report.latency(subject.label, batch) for batch in report.protocol.batches]
    bases = [base for row in rows if (base := find_rival(report, row.batch)) is not None]
    if reference is None or not bases:
        return Headline(
            question,
            format_ms(rows[0].p50_ms),
            f"p50 at batch {rows[0].batch}; no reference to compare with",
            tuple(f"Batch {row.batch}: {format_ms(row.p50_ms)}" for row in rows[1:]),
        )
    ratios = [format_ratio(base.p50_ms / row.p50_ms) for row, base in zip(rows, bases, strict=True)]
    first, *details = [
        f"{format_ms(row.p50_ms)} instead of {format_ms(base.p50_ms)} at batch {row.batch} "
        f"({base.session})"
        for row, base in zip(rows, bases, strict=True)
    ]
    details = [f"{ratio}: {text}" for ratio, text in zip(ratios[1:], details, strict=True)]
    ours, theirs = subject.flops_per_sample, report.session(reference).flops_per_sample
    if not isinstance(ours, NotMeasured) and not isinstance(theirs, NotMeasured) and ours:
        details.append(f"Arithmetic: {format_ratio(theirs / ours)} less, at any batch")
    return Headline(question, ratios[0], first, tuple(details))


def _cost_in_quality(report: Report) -> Headline:
    question = "At what cost in quality?"
    subject = _subject(report)
    name = choose_metric(report)
    if name is None or name not in subject.quality:
        return Headline(
            question, "not measured", _reason(subject, "task metrics"), (), measured=False
        )
    details = tuple(
        f"{describe_metric(other).title}: {_against(report, subject, other)}"
        for other in ("nll", "ece", "crps")
        if other in subject.quality and other != name
    )
    title = describe_metric(name).title.lower()
    change = _change(report, subject, name)
    if change is None:
        return Headline(question, format_quality(name, subject.quality[name]), title, details)
    assert report.reference is not None
    base = format_quality(name, report.session(report.reference).quality[name])
    caption = f"{title}: {format_quality(name, subject.quality[name])}, {report.reference} {base}"
    return Headline(question, change, caption, details)


def _uncertainty(report: Report) -> Headline:
    question = "Is the uncertainty still right?"
    subject = _subject(report)
    aurocs = [name for name in subject.quality if name.startswith("ood_auroc_")]
    details = [
        f"{describe_metric(name).title}: {_against(report, subject, name)}" for name in aurocs
    ]
    if "mi_ratio" in subject.quality:
        ratio = format_ratio(subject.quality["mi_ratio"])
        details.append(f"Mean uncertainty: {ratio} that of {report.reference}")
    if "mi_rank_correlation" in subject.quality:
        answer = f"{subject.quality['mi_rank_correlation']:.2f}"
        caption = f"rank correlation with {report.reference}; 1 is the same order of doubt"
        return Headline(question, answer, caption, tuple(details))
    if aurocs:
        answer = format_quality(aurocs[0], subject.quality[aurocs[0]])
        caption = f"{describe_metric(aurocs[0]).title}; 0.5 is chance, 1 is perfect"
        return Headline(question, answer, caption, tuple(details))
    reason = "no reference and no shifted data were given"
    if subject.not_measured and (report.reference or len(report.datasets) > 1):
        reason = _reason(subject, "drift")
    return Headline(question, "not measured", reason, (), measured=False)


def _reason(row: SessionRow, name: str) -> str:
    return row.not_measured.get(name) or next(iter(row.not_measured.values()), "no figure is known")


def _against(report: Report, row: SessionRow, name: str) -> str:
    """A figure beside that of the reference."""
    change = _change(report, row, name)
    if change is None:
        return format_quality(name, row.quality[name])
    assert report.reference is not None
    base = format_quality(name, report.session(report.reference).quality[name])
    return f"{format_quality(name, row.quality[name])}, {report.reference} {base} ({change})"


def _change(report: Report, row: SessionRow, name: str) -> str | None:
    """How far a figure is from that of the reference; None when there is nothing to compare."""
    if report.reference in (None, row.label):
        return None
    base = report.session(str(report.reference)).quality
    if name not in base:
        return None
    difference = row.quality[name] - base[name]
    change = f"{100 * difference:+.1f}" if describe_metric(name).percent else f"{difference:+.3f}"
    change = "±" + change[1:] if not change.strip("+-0.") else change.replace("-", "−")
    return f"{change} points" if describe_metric(name).percent else change
