"""``python -m hydra_edge.cli``."""

from hydra_edge.cli import main

main()
