"""The whole story on data that is at hand: networks become one engine that knows when it does not.

Everything is kept in one folder; what is there already is not trained again. One module per task;
what they share stands in `story`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from rich.console import Console

from hydra_edge.artifacts.report import Report
from hydra_edge.errors import InputError

TASKS = ("classification", "vqa", "dense-captioning")


def run_demo(folder: Path, console: Console, task: str = "classification") -> Report:
    """Run or resume a demo in ``folder``.

    Args:
        folder: Where networks, graphs, engines and reports are kept.
        console: Where progress goes.
        task: One of `TASKS`.

    Returns:
        The report, also written as ``report.json``, ``report.md`` and ``report.html``.

    Raises:
        InputError: There is no demo of that task.
    """
    if task not in TASKS:
        raise InputError(
            f"There is no demo of the task '{task}'.",
            f"There are: {', '.join(TASKS)}.",
            "Pick one of those.",
        )
    module = importlib.import_module(f"{__name__}.{task.replace('-', '_')}")
    report: Report = module.run(folder, console)
    return report
