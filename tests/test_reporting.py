"""A report reads well, says what is missing, and cannot be broken by the names users choose."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from reports import latency, sample, session
from rich.console import Console

from hydra_edge.artifacts.report import Report
from hydra_edge.errors import MissingDependencyError
from hydra_edge.reporting import to_html, to_markdown, to_table

HOSTILE = "<script>alert(1)</script>|$x_1$ [red]`&\"' 模型 \x00"
VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """Checks nesting on the way and remembers what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.text += data + " "


def minimal() -> Report:
    """One session, no reference, no quality."""
    return replace(
        sample(),
        reference=None,
        sessions=(session("only", quality={}, not_measured={"task metrics": "nobody knows"}),),
        latencies=(latency("only", 1, 0.5), latency("only", 32, 5.0)),
        reliabilities=(),
        histograms=(),
        commit=None,
        notes=(),
    )


def flat(text: str) -> str:
    return " ".join(text.replace("\xa0", " ").split())


def printed(report: Report, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_table(report))
    console.file.close()
    return console.export_text()


def test_the_page_answers_the_three_questions_first() -> None:
    text = flat(Page(to_html(sample())).text)
    order = [
        "student is about 10× as fast as ensemble",
        "How much faster? 10× 0.0800 ms instead of 0.800 ms at batch 1",
        "40×: 0.500 ms instead of 20.0 ms at batch 32",
        "Arithmetic: 6.0× less",
        "At what cost in quality? −0.1 points accuracy: 97.0 %, ensemble 97.1 %",
        "Is the uncertainty still right? 0.95 rank correlation with ensemble",
        "OOD AUROC: noise: 0.840, ensemble 0.841 (−0.001)",
        "Mean uncertainty: 0.70× that of ensemble",
        "Did not converge to a noise of 5 % in the time allowed. Batch 1: ensemble 31 %.",
        "other work seems to have used the machine. Batch 32: ensemble 20.0 against 5.00 ms.",
        "A note.",
        "At a glance",
        "0.500 ms (40×)",
    ]
    places = [text.index(each) for each in order]
    assert places == sorted(places)


@pytest.mark.parametrize("write", [to_html, to_markdown])
def test_what_is_missing_is_said_with_its_reason(write: Callable[[Report], str]) -> None:
    text = flat(re.sub(r"\\(.)", r"\1", write(sample())))
    assert "n/m: energy was not measured for student, ensemble: there is no sensor." in text
    assert "n/m: load was not measured for ensemble: the fresh process failed." in text
    assert "n/m: cold was not measured for ensemble at batch 32: no time." in text
    assert "Not measured because nobody asked. ensemble: Brier score." in text
    assert "† Did not converge to a noise of 5 % in the time allowed." in text.replace(
        "&nbsp;", " "
    )
    assert "* From fewer than 100 calls" in text


def test_a_report_with_little_in_it_reads_well() -> None:
    text = flat(Page(to_html(minimal())).text)
    assert "only answers in 0.500 ms" in text
    assert "no reference to compare with" in text
    assert "At what cost in quality? not measured nobody knows" in text
    assert "Is the uncertainty still right? not measured" in text
    assert "Not measured: it takes labels and a classifier." in text
    assert "Commit unknown" in text
    assert "Did not converge" not in text
    assert to_markdown(minimal()).startswith("# only answers in 0.500 ms\n")
    assert "0.500 ms" in printed(minimal())


def test_the_page_needs_nothing_else() -> None:
    page = Page(to_html(sample()))
    assert not page.tags & {"script", "link", "img", "iframe", "object", "base"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name != "src"
        if name.endswith("href"):
            assert value.startswith("#")
        else:
            assert "://" not in value or name.startswith("xmlns")
    assert "@import" not in to_html(sample())
    assert not re.search(r"url\((?!#)", to_html(sample()))


def test_equal_reports_give_equal_pages() -> None:
    again = Report.from_json(sample().to_json())
    assert to_html(again) == to_html(sample())
    assert to_markdown(again) == to_markdown(sample())


def test_plots_are_text_in_the_colours_of_the_page() -> None:
    html = to_html(sample())
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)  # noqa: S314 (our own output)
        assert "<text" in drawing
        assert "var(--" in drawing
        assert not re.search(r"#0a0[bcd]", drawing)
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', html)
    assert {a or b for a, b in targets} <= set(ids)


def test_names_that_users_choose_break_nothing() -> None:
    report = replace(
        sample(student=HOSTILE, shifted=HOSTILE),
        notes=(HOSTILE,),
        commit=HOSTILE,
        machine=replace(sample().machine, cpu=HOSTILE),
    )
    html = to_html(report)
    page = Page(html)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>|$x_1$" in page.text
    for drawing in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(drawing)  # noqa: S314 (our own output)
    markdown = to_markdown(report)
    assert "<script>" not in markdown.replace("\\<", "")
    assert "[red]" in printed(report, width=200)


def test_markdown_tables_have_equal_rows() -> None:
    for report in (sample(), minimal(), sample(student=HOSTILE)):
        for table in re.findall(r"(?:^\|.*\n)+", to_markdown(report), flags=re.MULTILINE):
            rows = table.splitlines()
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
            assert len(rows) >= 3


def test_a_slower_session_is_called_slower() -> None:
    report = sample()
    rows = (latency("student", 1, 1.6), latency("ensemble", 1, 0.8), *report.latencies[2:])
    text = flat(Page(to_html(replace(report, latencies=rows))).text)
    assert "student is 2.0× as slow as ensemble" in text
    assert "How much faster? 0.50×" in text


def test_a_regressor_is_compared_by_its_error() -> None:
    rows = (
        session("student", quality={"rmse": 0.5, "crps": 0.2}),
        session("ensemble", "ensemble", quality={"rmse": 0.4, "crps": 0.2}),
    )
    text = flat(Page(to_html(replace(sample(), sessions=rows, histograms=()))).text)
    assert "At what cost in quality? +0.100 rmse: 0.500, ensemble 0.400" in text
    assert "CRPS: 0.200, ensemble 0.200 (±0.000)" in text


def test_the_terminal_shows_one_row_per_session() -> None:
    text = printed(sample())
    assert "student is about 10× as fast as ensemble" in text
    assert "0.0800 ms" in text
    assert "(10×)" in text
    assert "Did not converge" in text


def test_without_matplotlib_the_page_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hydra-edge\[report\]'"):
        to_html(sample())
    assert to_markdown(sample())
