"""Dense captioning: at every word of a caption M heads give logits over the V words.

A row is one word of one caption: per-head tensors are ``[M, B, V]`` for the B words of all captions
together, and the prediction is the mean of the heads' softmax, word by word; captions are searched
in its logarithm. Summary, losses and drift are those of classification. The quality of whole
captions, with their boxes, is `hydra_edge.captioning.evaluation`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import InputError
from hydra_edge.tasks import Task
from hydra_edge.tasks.classification import Classification

if TYPE_CHECKING:
    import torch

PADDING = -1  # behind the end of a caption


class DenseCaptioning(Classification):
    """The task of saying the next of V words; see `hydra_edge.tasks.Task`."""

    name = "dense_captioning"

    def metrics(self, logits: npt.ArrayLike, target: npt.ArrayLike) -> dict[str, float]:
        """Quality of the mean prediction of words, given the words before.

        Args:
            logits: ``[M, B, V]``.
            target: The true words ``[B]``; rows with -1 are padding and do not count.

        Returns:
            What `Classification.metrics` gives for words, and ``perplexity``, the exponential of
            ``nll``.

        Raises:
            InputError: The shapes do not fit, or all is padding.
            MissingDependencyError: scikit-learn or torchmetrics is not installed.
        """
        values, truth = np.asarray(logits), np.asarray(target)
        if truth.ndim == 1 and values.ndim == 3 and len(truth) == values.shape[1]:
            spoken = truth != PADDING
            if not spoken.any():
                raise InputError(
                    "All target words are padding.",
                    "There is nothing to judge.",
                    "Pass captions with at least one word.",
                )
            values, truth = values[:, spoken], truth[spoken]
        found = super().metrics(values, truth)
        return {**found, "perplexity": math.exp(min(found["nll"], 700.0))}  # e^709 is fp64's last


def rows_of(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The rows that losses are taken over: those of words, without padding.

    Args:
        logits: ``[M, R, T, V]`` for R captions of up to T words.
        words: ``[R, T]``; -1 behind a caption's end.

    Returns:
        ``[M, B, V]`` for the B words, ends included.
    """
    return logits[:, words != PADDING]


TASK: Task = DenseCaptioning()
