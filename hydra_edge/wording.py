"""What a `Report` says in words and rounded figures, before anybody decides how it looks."""

from __future__ import annotations

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
    "ece": Metric("Calibration error (ECE)", percent=True, higher_is_better=False),
    "coverage_90": Metric("Coverage of the 90 % interval", percent=True),
    "mutual_information": Metric("Mutual information (MI), nats"),
    "predictive_entropy": Metric("Predictive entropy, nats"),
    "disagreement": Metric("Disagreement of heads"),
    "mi_rank_correlation": Metric("Uncertainty, rank correlation", higher_is_better=True),
    "mi_ratio": Metric("Uncertainty, ratio"),
    "disagreement_ratio": Metric("Disagreement, ratio"),
    "top1_agreement": Metric("Equal top class", percent=True, higher_is_better=True),
    "max_abs_mean_prob": Metric("Largest change of a probability", higher_is_better=False),
    "max_abs_mean": Metric("Largest change of a mean", higher_is_better=False),
}
_FAMILIES = {"ood_auroc_": "OOD AUROC", "mi_ratio_": "Uncertainty, ratio"}


def metric(name: str) -> Metric:
    """How the figure called ``name`` is shown."""
    for prefix, title in _FAMILIES.items():
        if name.startswith(prefix):
            higher = True if prefix == "ood_auroc_" else None
            return Metric(f"{title}: {dataset(name[len(prefix) :])}", higher_is_better=higher)
    return METRICS.get(name, Metric(name.replace("_", " ")))


def dataset(name: str) -> str:
    """Name of a data set for people."""
    return "in distribution" if name == IN_DISTRIBUTION else name


def main_metric(report: Report) -> str | None:
    """The figure of quality to look at first, among those that were measured."""
    present = {name for row in report.sessions for name in row.quality}
    return next((name for name in METRICS if name in present), None)


def number(value: Figure) -> str:
    """Three significant digits, thousands separated; `MISSING` without a value."""
    if isinstance(value, NotMeasured):
        return MISSING
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def quality(name: str, value: float) -> str:
    """A figure of quality with its unit."""
    if metric(name).percent:
        return f"{100 * value:.1f} %"
    return number(value) if abs(value) >= 10 else f"{value:.3f}"


def milliseconds(value: Figure) -> str:
    """A time with its unit."""
    return MISSING if isinstance(value, NotMeasured) else f"{number(value)} ms"


def scaled(value: Figure, unit: str) -> str:
    """A large number with a decimal prefix, e.g. ``1.57 MFLOP``."""
    if isinstance(value, NotMeasured):
        return MISSING
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{number(value / factor)} {prefix}{unit}".rstrip()
    return f"{number(value)} {unit}".rstrip()


def times(ratio: float) -> str:
    """A factor, e.g. ``11×``."""
    return (
        f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×" if ratio >= 1.95 else f"{ratio:.2f}×"
    )


def title(report: Report) -> str:
    """The report in one sentence."""
    subject, reference = _subject(report), report.reference
    batch = report.protocol.batches[0]
    row = report.latency(subject.label, batch)
    if reference is None or reference == subject.label:
        return f"{subject.label} answers in {milliseconds(row.p50_ms)}"
    base = report.latency(reference, batch)
    ratio = base.p50_ms / row.p50_ms
    sure = all(found.converged and not found.disturbed for found in (row, base))
    about = "" if sure else "about "
    if ratio >= 1:
        return f"{subject.label} is {about}{times(ratio)} as fast as {reference}"
    return f"{subject.label} is {about}{times(1 / ratio)} as slow as {reference}"


def headlines(report: Report) -> tuple[Headline, Headline, Headline]:
    """How much faster, at what cost in quality, and is the uncertainty still right?"""
    return _speed(report), _cost_in_quality(report), _uncertainty(report)


def warnings(report: Report) -> tuple[str, ...]:
    """What weakens the figures, then the notes of the report."""
    loose = [row for row in report.latencies if not row.converged]
    disturbed = [row for row in report.latencies if row.disturbed]
    found = []
    if loose:
        limit = f"{100 * report.protocol.max_noise:g} %"
        rows = ", ".join(f"{row_name(row)} ({100 * row.noise:.0f} %)" for row in loose)
        found.append(f"Did not converge to a noise of {limit} in the time allowed: {rows}.")
    if disturbed:
        rows = ", ".join(
            f"{row_name(row)} (p50 {milliseconds(row.p50_ms)}, fastest {milliseconds(row.min_ms)})"
            for row in disturbed
        )
        found.append(
            "Other work seems to have used the machine: half of the calls took over twice the "
            f"fastest for {rows}."
        )
    return (*found, *report.notes)


def _subject(report: Report) -> SessionRow:
    """The session the headlines are about: the first that is not the reference."""
    others = [row for row in report.sessions if row.label != report.reference]
    return (others or list(report.sessions))[0]


def row_name(row: LatencyRow) -> str:
    """A measurement in running text."""
    return f"{row.session} at batch {row.batch}"


def _speed(report: Report) -> Headline:
    question = "How much faster?"
    subject, reference = _subject(report), report.reference
    rows = [report.latency(subject.label, batch) for batch in report.protocol.batches]
    if reference is None or reference == subject.label:
        return Headline(
            question,
            milliseconds(rows[0].p50_ms),
            f"p50 at batch {rows[0].batch}; no reference to compare with",
            tuple(f"Batch {row.batch}: {milliseconds(row.p50_ms)}" for row in rows[1:]),
        )
    bases = [report.latency(reference, row.batch) for row in rows]
    ratios = [times(base.p50_ms / row.p50_ms) for row, base in zip(rows, bases, strict=True)]
    details = [
        f"Batch {row.batch}: {ratio}, {milliseconds(row.p50_ms)} instead of "
        f"{milliseconds(base.p50_ms)}"
        for row, base, ratio in zip(rows, bases, ratios, strict=True)
    ]
    ours, theirs = subject.flops_per_sample, report.session(reference).flops_per_sample
    if not isinstance(ours, NotMeasured) and not isinstance(theirs, NotMeasured) and ours:
        details.append(f"Arithmetic: {times(theirs / ours)} less")
    return Headline(question, ratios[0], f"p50 at batch {rows[0].batch}", tuple(details))


def _cost_in_quality(report: Report) -> Headline:
    question = "At what cost in quality?"
    subject = _subject(report)
    name = main_metric(report)
    if name is None or name not in subject.quality:
        return Headline(
            question, "not measured", _reason(subject, "task metrics"), (), measured=False
        )
    details = [
        f"{metric(other).title}: {_against(report, subject, other)}"
        for other in ("accuracy", "rmse", "nll", "ece", "crps")
        if other in subject.quality
    ]
    return Headline(
        question, quality(name, subject.quality[name]), metric(name).title.lower(), tuple(details)
    )


def _uncertainty(report: Report) -> Headline:
    question = "Is the uncertainty still right?"
    subject = _subject(report)
    aurocs = [name for name in subject.quality if name.startswith("ood_auroc_")]
    details = [f"{metric(name).title}: {_against(report, subject, name)}" for name in aurocs]
    if "mi_ratio" in subject.quality:
        details.append(f"Its mean over the reference's: {subject.quality['mi_ratio']:.2f}")
    if "mi_rank_correlation" in subject.quality:
        answer = f"{subject.quality['mi_rank_correlation']:.2f}"
        caption = f"rank correlation with {report.reference}; 1 is the same order of doubt"
        return Headline(question, answer, caption, tuple(details))
    if aurocs:
        answer = quality(aurocs[0], subject.quality[aurocs[0]])
        caption = f"{metric(aurocs[0]).title}; 0.5 is chance, 1 is perfect"
        return Headline(question, answer, caption, tuple(details))
    reason = "no reference and no shifted data were given"
    if subject.not_measured and (report.reference or len(report.datasets) > 1):
        reason = _reason(subject, "drift")
    return Headline(question, "not measured", reason, (), measured=False)


def _reason(row: SessionRow, name: str) -> str:
    return row.not_measured.get(name) or next(iter(row.not_measured.values()), "no figure is known")


def _against(report: Report, row: SessionRow, name: str) -> str:
    """A figure beside that of the reference."""
    value = row.quality[name]
    if report.reference is None or name not in (base := report.session(report.reference).quality):
        return quality(name, value)
    difference = value - base[name]
    change = f"{100 * difference:+.1f} points" if metric(name).percent else f"{difference:+.3f}"
    return f"{quality(name, value)}, {report.reference} {quality(name, base[name])} ({change})"
