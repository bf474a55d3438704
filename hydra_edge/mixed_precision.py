"""`fit`: the smallest mix of two precisions that stays inside a budget on the ensemble's figures.

Most heads and layers do not mind few bits, and some do. Which ones is measured, see `sensitivity`;
every candidate is then measured as a whole, because losses do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hydra_edge.artifacts.graph import Graph
from hydra_edge.errors import InputError, QuantizationError
from hydra_edge.precision import Precision
from hydra_edge.sensitivity import HEAD, LAYER, Part, Sensitivity, Study


@dataclass(frozen=True)
class Budget:
    """How much worse each figure may become; the names are those of `losses`.

    Attributes:
        limits: Largest loss by figure, e.g. ``{"accuracy": 0.005, "mi": 0.1}``.
    """

    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        bad = next((n for n, limit in self.limits.items() if not 0 <= limit < math.inf), None)
        if not self.limits or bad is not None:
            raise InputError(
                "The budget is empty."
                if bad is None
                else f"The budget allows {bad} {self.limits[bad]}.",
                "It says by how much figures may become worse, each a number from 0 up.",
                "Write for example 'accuracy=0.005,nll=0.01,mi=0.1'.",
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"accuracy=0.005,nll=0.01,ece=0.01,mi=0.1"``.

        Raises:
            InputError: It says something else.
        """
        limits: dict[str, float] = {}
        for item in text.split(","):
            name, _, value = item.partition("=")
            try:
                limits[name.strip()] = float(value)
            except ValueError as exc:
                raise InputError(
                    f"'{item.strip()}' in the budget '{text}' is not NAME=NUMBER.",
                    "A budget says by how much figures may become worse.",
                    "Write for example 'accuracy=0.005,nll=0.01,mi=0.1'.",
                ) from exc
        return cls(limits)

    def excess(self, found: Mapping[str, float]) -> dict[str, float]:
        """The losses that are too large, by figure. NaN is too large."""
        unknown = sorted(set(self.limits) - set(found))
        if unknown:
            raise InputError(
                f"There is no figure '{unknown[0]}' to keep inside a budget.",
                f"There are: {', '.join(sorted(found))}.",
                "Those of a task need labels; mi and mi_rank do not.",
            )
        return {n: found[n] for n, limit in self.limits.items() if not found[n] <= limit}


@dataclass(frozen=True)
class Mix:
    """A mix of two precisions.

    Attributes:
        graph: The quantized graph.
        precision: Which part is stored and multiplied in what.
        sensitivity: What each part costs alone.
        kept: Names of the parts that stay in the fallback precision.
        losses: Measured on the whole mix.
        saved_bytes: By how much smaller it is than the graph in full precision.
        tried: Number of mixes that were measured.
    """

    graph: Graph
    precision: Precision
    sensitivity: Sensitivity
    kept: tuple[str, ...]
    losses: Mapping[str, float]
    saved_bytes: int
    tried: int = field(compare=False, default=0)


def fit(study: Study, precision: str, budget: Budget, fallback: str = "fp16") -> Mix:
    """Find the smallest mix of two precisions that stays inside a budget.

    Starts with everything in ``precision`` and gives parts to ``fallback``, those first whose loss
    takes the largest share of the budget for the bytes they save, until what is measured on the
    whole mix fits; then takes back every part that turns out not to be needed, the largest first.

    Args:
        study: A graph and the data to measure on. Report the result on other samples: the mix is
            fitted to these.
        precision: The low precision.
        budget: How much worse each figure may become.
        fallback: The precision of parts that are too sensitive; ``"fp16"`` or ``"fp32"``.

    Raises:
        InputError: A precision is unknown, or the budget names a figure that is not measured.
        QuantizationError: Not even the fallback precision for everything is inside the budget.
    """
    # What is unknown is named before the work.
    Precision(precision, fallback)
    budget.excess(study.losses(study.reference))
    return _Search(study, study.analyze(precision), budget, fallback).run()


class _Search:
    """Looks for the cheapest mix; every candidate is measured as a whole."""

    def __init__(self, study: Study, found: Sensitivity, budget: Budget, fallback: str) -> None:
        self.study = study
        self.found = found
        self.low = found.precision
        self.fallback = fallback
        self.budget = budget
        self.parts = sorted(found.parts, key=self._harm_per_byte, reverse=True)
        self.measured: dict[frozenset[str], Mapping[str, float]] = {frozenset(): found.whole.losses}

    def _harm_per_byte(self, part: Part) -> float:
        """How much of the budget a part takes for each byte that it saves."""
        shares = [
            max(part.losses[name], 0.0) / limit if limit else math.inf * (part.losses[name] > 0)
            for name, limit in self.budget.limits.items()
        ]
        worst = max((0.0 if math.isnan(share) else share for share in shares), default=0.0)
        return worst / max(part.saved_bytes, 1)

    def run(self) -> Mix:
        """Give parts to the fallback until the mix fits, then take back what need not be there."""
        names = [part.name for part in self.parts]
        count = self._first_that_fits(names)
        kept = list(names[:count])
        sizes = {part.name: part.saved_bytes for part in self.parts}
        for name in sorted(kept[:-1], key=lambda n: -sizes[n]):
            fewer = [other for other in kept if other != name]
            if self.fits(fewer):
                kept = fewer
        chosen = tuple(name for name in names if name in kept)
        precision = self.mix(chosen)
        graph = self.study.prepared.apply(precision)
        return Mix(
            graph=graph,
            precision=precision,
            sensitivity=self.found,
            kept=chosen,
            losses=self.measured[frozenset(chosen)],
            saved_bytes=self.study.saved(precision),
            tried=len(self.measured),
        )

    def _first_that_fits(self, names: Sequence[str]) -> int:
        """How many of ``names``, from the first on, the fallback needs: doubled, then bisected."""
        if self.fits([]):
            return 0
        low, high = 0, 1
        while high < len(names) and not self.fits(names[:high]):
            low, high = high, 2 * high
        high = min(high, len(names))
        if not self.fits(names[:high]):
            excess = self.budget.excess(self.measured[frozenset(names[:high])])
            raise QuantizationError(
                f"Even with every layer in {self.fallback} the losses are too large: "
                + ", ".join(f"{name} {value:.3g}" for name, value in excess.items())
                + ".",
                f"The budget allows {_text(self.budget.limits)}.",
                "Loosen the budget, or choose fp32 as the fallback.",
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(names[:middle]) else (middle, high)
        return high

    def fits(self, kept: Sequence[str]) -> bool:
        """Whether the mix with ``kept`` in the fallback precision is inside the budget."""
        key = frozenset(kept)
        if key not in self.measured:
            self.study.on_step(f"{len(kept)} of {len(self.parts)} parts in {self.fallback}")
            self.measured[key] = self.study.losses(self.study.logits(self.mix(kept)))
        return not self.budget.excess(self.measured[key])

    def mix(self, kept: Sequence[str]) -> Precision:
        """Everything low but ``kept``."""
        if len(kept) == len(self.parts):
            return Precision(self.fallback, self.fallback)
        everything = Precision(self.low, self.low)
        heads = {
            int(name.removeprefix(HEAD)): self.fallback for name in kept if name.startswith(HEAD)
        }
        layers = {
            name.removeprefix(LAYER): self.fallback for name in kept if name.startswith(LAYER)
        }
        if len(heads) == self.found.heads:  # said shorter
            return replace(everything, heads=self.fallback, layers=layers)
        return replace(everything, head_overrides=heads, layers=layers)


def _text(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
