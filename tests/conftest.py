"""Profiles of hypothesis: `make nightly` runs the one of that name."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("nightly", max_examples=2500)
