"""`Prediction`: named arrays, with the uncertainty beside the answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]


class Prediction(Mapping[str, Array]):
    """What `Session.run` returns: the engine's outputs by name, as a mapping and as attributes.

    A classifier gives (B batch, C classes, entropies in nats):

    ========================  ==========  ==============================================
    ``mean_prob``             ``[B, C]``  mean over heads of the softmax
    ``predictive_entropy``    ``[B]``     entropy of ``mean_prob``: total uncertainty
    ``expected_entropy``      ``[B]``     mean entropy of the heads: aleatoric
    ``mutual_information``    ``[B]``     the difference of the two: epistemic
    ``variation_ratio``       ``[B]``     share of heads that vote against ``mean_prob``
    ========================  ==========  ==============================================

    A regressor gives ``mean``, ``aleatoric_variance`` and ``epistemic_variance``, each ``[B, D]``.
    With ``head_logits=True`` every head's raw output ``[M, B, C]`` comes too.
    """

    __slots__ = ("_arrays",)

    mean_prob: Array
    predictive_entropy: Array
    expected_entropy: Array
    mutual_information: Array
    variation_ratio: Array
    mean: Array
    aleatoric_variance: Array
    epistemic_variance: Array
    head_logits: Array

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = dict(arrays)

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._arrays[name]
        except KeyError:
            hint = " Ask for it: run(x, head_logits=True)." if name == "head_logits" else ""
            raise AttributeError(
                f"This prediction has no '{name}'; it has {', '.join(self._arrays)}.{hint}"
            ) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._arrays]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}{list(a.shape)}" for name, a in self._arrays.items())
        return f"Prediction({shapes})"
