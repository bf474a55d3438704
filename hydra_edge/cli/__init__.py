"""The command line: one verb per stage. Parses, calls, prints; every verb has its library call.

Exit codes: 0 ok, 1 error, 2 usage, 3 accuracy or uncertainty gate failed, 4 engine does not fit
this device, 5 performance gate failed, 6 something missing from the environment, 130 interrupted.
"""

from __future__ import annotations

from hydra_edge.cli import building, programs, stages, training, views
from hydra_edge.cli.app import app

__all__ = ["app", "building", "main", "programs", "stages", "training", "views"]


def main() -> None:
    """Entry point."""
    app()
