"""A `Report` for people: markdown, one self-contained HTML page, or a table in the terminal."""

from __future__ import annotations

from rich.table import Table

from hydra_edge.artifacts.report import Report


def to_markdown(report: Report) -> str:
    """The report as GitHub-flavoured markdown."""
    raise NotImplementedError


def to_html(report: Report) -> str:
    """The report as one self-contained HTML page with plots."""
    raise NotImplementedError


def to_table(report: Report) -> Table:
    """The report as a table for the terminal."""
    raise NotImplementedError
