"""The plots of a `Report` as inline SVG whose colours and fonts the page around them decides.

Matplotlib lays out; colours it writes are placeholders that become CSS variables (``--ink``,
``--c0`` …), so a plot follows the page into the dark. Text stays text, and equal reports give equal
SVG.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydra_edge.artifacts.report import IN_DISTRIBUTION, LatencyRow, Report
from hydra_edge.errors import require
from hydra_edge.wording import choose_metric, describe_metric, format_ms, name_dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 6  # colours and markers before they start over: --c0 … per session, --d0 … per data set
MARKERS = "osD^vP"
GLYPHS = "●■◆▲▼✚"
_INK, _MUTED, _GRID, _PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _PAPER: "paper"} | {
    f"#0a0{row}0{index}": f"{row}{index}" for row in "cd" for index in range(SERIES)
}
_WIDTH = 5.2  # inches: 374 points, about the width of a phone
_LONGEST = 22  # characters of a name that fit beside an axis
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hydra-edge",
    "text.parse_math": False,  # a name may hold dollar signs
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        title: What it shows.
        caption: How to read it.
        svg: An ``<svg>`` element, or empty when there is nothing to show.
        legend: Names and the index of their colour; sessions where ``by_session``, else data sets.
        by_session: Whether the legend is that of the sessions.
    """

    title: str
    caption: str
    svg: str
    legend: tuple[tuple[str, int], ...]
    by_session: bool = True


def draw_plots(report: Report) -> tuple[Plot, ...]:
    """All plots of a report; one without data has a caption that says why.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    sessions = tuple((row.label, i % SERIES) for i, row in enumerate(report.sessions))
    shifted = [name for name in report.datasets if name != IN_DISTRIBUTION]
    sets = tuple((name_dataset(n), i % SERIES) for i, n in enumerate([IN_DISTRIBUTION, *shifted]))
    name = choose_metric(report)
    batch = report.protocol.batches[0]
    quantity = report.histograms[0].quantity.replace("_", " ") if report.histograms else "doubt"
    return (
        Plot(
            "Latency",
            "Dot: median. Thick line: to the 90th percentile; thin line: to the 99th. A hollow dot "
            "did not converge. Logarithmic axis.",
            _draw(report, "latency", _latency, _latency_height(report)),
            sessions,
        ),
        Plot(
            "Latency against quality",
            f"{describe_metric(name).title} over the median latency at batch {batch}, logarithmic."
            if name
            else "Not measured: no session has a figure of quality.",
            _draw(report, "tradeoff", _tradeoff, min(4.2, _latency_height(report))) if name else "",
            sessions if name else (),
        ),
        Plot(
            "Reliability",
            "Share of right answers over the confidence in them. On the diagonal, confidence can "
            "be taken at its word; the larger the mark, the more samples."
            if report.reliabilities
            else "Not measured: it takes labels and a classifier.",
            _draw(report, "reliability", _reliability, min(4.6, _histogram_height(report)))
            if report.reliabilities
            else "",
            sessions if report.reliabilities else (),
        ),
        Plot(
            "Uncertainty, in and out of distribution",
            f"Share of samples over {quantity}, logarithmic. Shifted data belongs to the right of "
            "the data in distribution, and every session's shapes should be those of the reference."
            if report.histograms
            else "Not measured: no session has heads that can disagree.",
            _draw(report, "doubt", _histograms, _histogram_height(report))
            if report.histograms
            else "",
            sets if report.histograms else (),
            by_session=False,
        ),
    )


def _draw(report: Report, name: str, draw: Callable[[Figure, Report], None], height: float) -> str:
    matplotlib = require("matplotlib", "report")
    figures = require("matplotlib.figure", "report")
    buffer = io.StringIO()
    # A name in a script that the layout font lacks is drawn by the reader's browser anyway.
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = figures.Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure, report)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """The bare element, with ids of its own and CSS variables for colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()


def _colour(index: int, row: str = "c") -> str:
    """Placeholder of a session's colour, or of a data set's in row ``"d"``."""
    return f"#0a0{row}0{index % SERIES}"


def _short(name: str) -> str:
    """A name without control characters, cut to what fits beside an axis."""
    printable = "".join(char if char.isprintable() else " " for char in name)
    return printable if len(printable) <= _LONGEST else printable[: _LONGEST - 1] + "…"


def _millisecond_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5 times powers of ten."""
    ticker = require("matplotlib.ticker", "report")
    low, high = min(values), max(values)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, high * 1.3)
    steps = (1, 2, 5) if high / low < 30 else (1,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=99))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("milliseconds")


def _latency_height(report: Report) -> float:
    return max(3.0, 0.8 + 0.26 * len(report.latencies) + 0.4 * len(report.protocol.batches))


def _latency(figure: Figure, report: Report) -> None:
    axes = figure.add_subplot()
    across = axes.get_yaxis_transform()
    ticks: dict[float, str] = {}
    y = 0.0
    for batch in report.protocol.batches:
        axes.text(0, y, f"batch {batch}", transform=across, weight="bold", va="center")
        axes.text(1.02, y, "median", transform=across, color=_MUTED, va="center")
        for index, session in enumerate(report.sessions):
            y += 1
            row = report.latency(session.label, batch)
            _latency_mark(axes, y, row, index)
            axes.text(1.02, y, format_ms(row.p50_ms), transform=across, va="center")
            ticks[y] = _short(session.label)
        y += 1.5
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_ylim(y - 0.8, -0.7)
    _millisecond_axis(axes, [v for row in report.latencies for v in (row.p50_ms, row.p99_ms)])


def _latency_mark(axes: Axes, y: float, row: LatencyRow, index: int) -> None:
    colour = _colour(index)
    axes.plot([row.p50_ms, row.p99_ms], [y, y], color=colour, lw=1.2, solid_capstyle="round")
    axes.plot([row.p50_ms, row.p90_ms], [y, y], color=colour, lw=4, solid_capstyle="round")
    _mark(axes, row.p50_ms, y, index, size=6.5, filled=row.converged)


def _mark(axes: Axes, x: float, y: float, index: int, *, size: float, filled: bool) -> None:
    """The sign of one session; hollow when its latency did not converge."""
    colour = _colour(index)
    axes.plot(
        x,
        y,
        MARKERS[index % SERIES],
        color=colour,
        markersize=size,
        markeredgewidth=1.5,
        markerfacecolor=colour if filled else _PAPER,
    )


def _tradeoff(figure: Figure, report: Report) -> None:
    axes = figure.add_subplot()
    name = choose_metric(report)
    batch = report.protocol.batches[0]
    assert name is not None
    found = describe_metric(name)
    latencies = []
    for index, session in enumerate(report.sessions):
        if name not in session.quality:
            continue
        row = report.latency(session.label, batch)
        latencies.append(row.p50_ms)
        value = session.quality[name] * (100 if found.percent else 1)
        _mark(axes, row.p50_ms, value, index, size=10, filled=row.converged)
    axes.margins(y=0.25)
    axes.ticklabel_format(axis="y", useOffset=False)
    better = {None: "", True: " (higher is better)", False: " (lower is better)"}
    axes.set_ylabel(
        f"{found.title}{', %' if found.percent else ''}{better[found.higher_is_better]}"
    )
    _millisecond_axis(axes, latencies)


def _reliability(figure: Figure, report: Report) -> None:
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=_MUTED, lw=1, ls=(0, (4, 3)))
    order = [row.label for row in report.sessions]
    for diagram in report.reliabilities:
        index = order.index(diagram.session)
        total = sum(each.count for each in diagram.bins)
        confidence = [each.confidence for each in diagram.bins]
        accuracy = [each.accuracy for each in diagram.bins]
        sizes = [20 + 240 * each.count / total for each in diagram.bins]
        axes.plot(confidence, accuracy, color=_colour(index), lw=1.3, alpha=0.8)
        axes.scatter(
            confidence,
            accuracy,
            s=sizes,
            color=_colour(index),
            marker=MARKERS[index % SERIES],
            alpha=0.75,
            linewidths=0,
        )
    lowest = min(each.confidence for diagram in report.reliabilities for each in diagram.bins)
    axes.set_xlim(min(lowest, 0.9) - 0.05, 1.03)
    axes.set_ylim(-0.05, 1.06)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share right")


def _histogram_height(report: Report) -> float:
    return 0.8 + 1.1 * max(2, len({each.session for each in report.histograms}))


def _histograms(figure: Figure, report: Report) -> None:
    sessions = list(dict.fromkeys(each.session for each in report.histograms))
    sets = list(report.datasets)
    panels = figure.subplots(len(sessions), 1, sharex=True, squeeze=False)[:, 0]
    top = 0.0
    for each in report.histograms:
        axes = panels[sessions.index(each.session)]
        index = sets.index(each.dataset)
        shares = [100 * count / max(1, sum(each.counts)) for count in each.counts]
        top = max(top, *shares)
        colour = _colour(index, "d")
        alpha = 0.35 if each.dataset == IN_DISTRIBUTION else 0.1
        axes.stairs(shares, each.edges, color=colour, fill=True, alpha=alpha, lw=0)
        axes.stairs(shares, each.edges, color=colour, lw=1.5)
    for session, axes in zip(sessions, panels, strict=True):
        axes.set_xscale("log")
        axes.set_ylim(0, top * 1.08)
        axes.text(0.01, 0.93, _short(session), transform=axes.transAxes, weight="bold", va="top")
        axes.yaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(3))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    last, first = panels[-1], report.histograms[0]
    decades = range(
        math.ceil(math.log10(first.edges[0])), math.floor(math.log10(first.edges[-1])) + 1
    )
    last.set_xlim(first.edges[0], first.edges[-1])
    last.set_xticks([10.0**power for power in decades], [f"{10.0**p:g}" for p in decades])
    last.xaxis.set_minor_locator(require("matplotlib.ticker", "report").NullLocator())
    unit = ", nats" if first.quantity == "mutual_information" else ""
    last.set_xlabel(first.quantity.replace("_", " ") + unit)
