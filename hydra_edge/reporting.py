"""A `Report` for people: markdown, one self-contained HTML page, or a table in the terminal.

What is said comes from `wording` and `sheets`, what is drawn from `plotting`; here it gets its
form. The first screen answers how much faster, at what cost in quality, and whether the uncertainty
still holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from importlib import resources

from rich import box
from rich.table import Table
from rich.text import Text

from hydra_edge import plotting, sheets, wording
from hydra_edge.artifacts.report import Report
from hydra_edge.plotting import GLYPHS, SERIES, Plot
from hydra_edge.sheets import Sheet
from hydra_edge.wording import Headline

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~#&])")

_WIDE = 32  # characters from which a column's title would wrap into a tower
_PRECISION = 1  # its column in the first sheet
_SHORT = {"Calibration error": "ECE", "Rank correlation of uncertainty": "MI rank corr."}
_UNIT = re.compile(r"(?<=\d) (?=ms\b|%|points\b)")


def to_markdown(report: Report) -> str:
    """The report as GitHub-flavoured markdown, without plots.

    Args:
        report: Any report; equal reports give equal text.
    """
    lines = [f"# {_md(wording.write_title(report))}", "", _md(_where(report)), ""]
    for headline in wording.write_headlines(report):
        lines.append(
            f"- **{_md(headline.question)}** {_md(headline.answer)} ({_md(headline.caption)})"
        )
        lines += [f"  - {_md(detail)}" for detail in headline.details]
    lines.append("")
    for warning in wording.write_warnings(report):
        lines += [f"> {_md(warning)}", ""]
    lines += [f"{_md(note)}\n" for note in report.notes]
    for sheet in sheets.fill_sheets(report):
        lines += [f"## {_md(sheet.title)}", "", *_md_table(sheet)]
        lines += [f"{_md(note)}\n" for note in sheet.notes]
    return "\n".join(lines).rstrip() + "\n"


def to_html(report: Report) -> str:
    """The report as one HTML page that needs nothing else: no network, no script.

    Args:
        report: Any report; equal reports give equal text.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    marks = {row.label: _mark(index) for index, row in enumerate(report.sessions)}
    title = _html(wording.write_title(report))
    cards = "".join(map(_card, wording.write_headlines(report)))
    warnings = "".join(f"<p>{_html(each)}</p>" for each in wording.write_warnings(report))
    notes = "".join(f"<p>{_html(each)}</p>" for each in report.notes)
    glance, *others = (_sheet(sheet, marks) for sheet in sheets.fill_sheets(report))
    figures = "".join(map(_figure, plotting.draw_plots(report)))
    style = resources.files("hydra_edge").joinpath("report.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><p>hydra-edge benchmark</p><h1>{title}</h1><p>{_html(_where(report))}</p>"
        f'</header>\n<section class="cards">{cards}</section>\n'
        + (f'<div class="warnings">{warnings}</div>\n' if warnings else "")
        + (f'<div class="notes">{notes}</div>\n' if notes else "")
        + f'{glance}<h2>Plots</h2>\n<section class="plots">{figures}</section>\n'
        + "".join(others)
        + "</main>\n</body>\n</html>\n"
    )


def to_table(report: Report) -> Table:
    """The report at a glance for the terminal: one row per session.

    Args:
        report: Any report.
    """
    sheet = sheets.fill_sheets(report)[0]
    remarks = [*sheet.notes, *wording.write_warnings(report), *report.notes]
    table = Table(
        title=Text(wording.write_title(report)),
        caption=Text("\n".join(remarks)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    # Precision is left to the other forms: a terminal has 80 columns, and times must not wrap.
    shown = [index for index in range(len(sheet.columns)) if index != _PRECISION]
    times = len(report.protocol.batches)
    table.add_column("Session", min_width=12)
    for position, index in enumerate(shown[1:]):
        column = sheet.columns[index].replace(", ", "\n")
        column = _SHORT.get(column, column).replace("OOD AUROC: ", "AUROC ")
        table.add_column(Text(column), justify="right", no_wrap=position < times)
    for row in sheet.rows:
        table.add_row(*(Text(row[index].replace(" (", "\n(")) for index in shown))
    return table


def _where(report: Report) -> str:
    """When, where and on what, in one line."""
    machine = report.machine
    commit = f", commit {report.commit[:12]}" if report.commit else ""
    return f"{machine.cpu}, {machine.cores} cores, {machine.platform}, {report.created}{commit}"


def _md(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _md_table(sheet: Sheet) -> list[str]:
    if not sheet.rows:
        return []
    rule = _md_row(("---", *["---:"] * (len(sheet.columns) - 1)), raw=True)
    return [_md_row(sheet.columns), rule, *map(_md_row, sheet.rows), ""]


def _md_row(cells: tuple[str, ...], *, raw: bool = False) -> str:
    return f"| {' | '.join(cells if raw else map(_md, cells))} |"


def _html(text: str) -> str:
    """Escaped, and with numbers that stay beside their unit."""
    return _UNIT.sub("&nbsp;", escape(text))


def _mark(index: int) -> str:
    index %= SERIES
    return f'<span class="k{index}" aria-hidden="true">{GLYPHS[index]}</span>&nbsp;'


def _card(headline: Headline) -> str:
    details = "".join(f"<li>{_html(each)}</li>" for each in headline.details)
    return (
        f'<article class="card{"" if headline.measured else " missing"}">'
        f"<h2>{_html(headline.question)}</h2><strong>{_html(headline.answer)}</strong>"
        f"<p>{_html(headline.caption)}</p>{f'<ul>{details}</ul>' if details else ''}</article>\n"
    )


def _figure(plot: Plot) -> str:
    legend = "".join(
        f"<li>{_mark(index) if plot.by_session else _swatch(index)}{_html(name)}</li>"
        for name, index in plot.legend
    )
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    drawing = (
        f'<div role="img" aria-label="{_html(plot.title)}">{plot.svg}</div>' if plot.svg else ""
    )
    return (
        f"<figure><h3>{_html(plot.title)}</h3>"
        f"{legend}{drawing}"
        f"<figcaption>{_html(plot.caption)}</figcaption></figure>\n"
    )


def _swatch(index: int) -> str:
    return f'<span class="d{index}" aria-hidden="true">■</span>&nbsp;'


def _sheet(sheet: Sheet, marks: Mapping[str, str]) -> str:
    notes = "".join(f"<p>{_html(note)}</p>" for note in sheet.notes)
    notes = f'<div class="notes">{notes}</div>\n' if notes else ""
    if not sheet.rows:
        return f"<h2>{_html(sheet.title)}</h2>\n{notes}"
    if not any(sheet.columns):
        items = "".join(f"<dt>{_html(k)}</dt><dd>{_html(v)}</dd>" for k, v in sheet.rows)
        body = f"<dl>{items}</dl>"
    else:
        head = "".join(
            f"<th{' class=wide' if len(c) > _WIDE else ''}>{marks.get(c, '')}{_html(c)}</th>"
            for c in sheet.columns
        )
        rows = "".join(
            "<tr>"
            + "".join(
                f"<td>{marks.get(cell, '') if index == 0 else ''}{_html(cell)}</td>"
                for index, cell in enumerate(row)
            )
            + "</tr>\n"
            for row in sheet.rows
        )
        body = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return (
        f"<h2>{_html(sheet.title)}</h2>\n"
        f'<div class="sheet"><div class="scroll">{body}</div></div>\n{notes}'
    )
