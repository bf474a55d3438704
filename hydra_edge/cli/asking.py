"""What `run --question` does: an image and a question in, answers and their doubt out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hydra_edge import terminal

if TYPE_CHECKING:
    from hydra_edge.vqa import Reply


def ask(
    engine: Path, picture: Path, question: str, rule: str | None, threads: int | None, as_json: bool
) -> None:
    """Ask an engine about a picture, and print what it says."""
    from hydra_edge import runtime
    from hydra_edge.vqa import Answerer, DeferRule

    defer = None if rule is None else DeferRule.parse(rule)
    with runtime.load(engine, threads=threads) as session:
        reply = Answerer(session, defer).ask(picture, question)
    if as_json:
        terminal.echo_json(asdict(reply))
        return
    _show(reply)


def _show(reply: Reply) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = terminal.console_on(stderr=False)
    answers = Table(box=None, padding=(0, 2, 0, 0))
    answers.add_column("answer")
    answers.add_column("probability", justify="right")
    for answer in reply.answers:
        answers.add_row(escape(answer.text), f"{answer.probability:.4f}")
    console.print(answers)
    doubts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in ("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio"):
        doubts.add_row(f"[dim]{name}[/]", f"{getattr(reply, name):.4f}")
    decision = {None: "no rule was given", True: "[yellow]yes: ask somebody else[/]", False: "no"}
    doubts.add_row("[dim]defer[/]", decision[reply.defer])
    if reply.unknown_words:
        doubts.add_row("[dim]unknown words[/]", escape(", ".join(reply.unknown_words)))
    console.print(doubts)
