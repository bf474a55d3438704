"""Visual question answering with sigmoid heads: every answer is right or wrong by itself.

The usual choice where several answers are right to some degree: Teney et al. 2017, arXiv
1708.02711, section 3.7. Entropies and mutual information are sums over the answers, in nats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import require
from hydra_edge.ops.ensemble_summary import reference_sigmoid
from hydra_edge.tasks import Float, Task
from hydra_edge.tasks.vqa import QuestionAnswering

if TYPE_CHECKING:
    import torch


class SigmoidQuestionAnswering(QuestionAnswering):
    """The task of judging C answers to a question; see `hydra_edge.tasks.Task`."""

    name = "vqa_sigmoid"
    summary_op = "SigmoidSummary"

    def summarize(self, logits: npt.ArrayLike) -> dict[str, Float]:
        """`SigmoidSummary` in numpy float64.

        Args:
            logits: ``[M, B, C]``.

        Returns:
            The op's five outputs by name; ``mean_prob`` is ``[B, C]``, the others are ``[B]``.
        """
        return reference_sigmoid(logits)

    def nll(self, prob: Float, scores: Float) -> float:
        """Cross entropy in nats of ``prob [B, C]`` with the scores, summed over C, mean over B."""
        tiny = np.finfo(np.float64).tiny
        terms = scores * np.log(np.maximum(prob, tiny))
        terms += (1 - scores) * np.log(np.maximum(1 - prob, tiny))
        return float(-terms.sum(-1).mean())

    def mean_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """``T² · Σ_c KL(mean_m sigmoid(teacher_m / T) ‖ sigmoid(student / T))`` of coins.

        Args:
            student: Logits of one head, ``[B, C]``.
            teacher: Logits of the members, ``[M, B, C]``.
            temperature: T.

        Returns:
            A scalar in nats, mean over the batch, in the student's dtype.
        """
        return _divergence(student, (teacher / temperature).sigmoid().mean(0), temperature)

    def head_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """``T² · Σ_c KL(sigmoid(teacher_m / T) ‖ sigmoid(student_m / T))`` of coins.

        Args:
            student: Logits of the heads, ``[H, B, C]``.
            teacher: Logits of the members they imitate, ``[H, B, C]``.
            temperature: T.

        Returns:
            A scalar in nats, mean over heads and batch, in the student's dtype.
        """
        return _divergence(student, (teacher / temperature).sigmoid(), temperature)

    def disagreement_loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """``(√MI_student - √MI_teacher)²``, mean over the batch; as for a classifier.

        Args:
            student: Logits of the heads, ``[H, B, C]``.
            teacher: Logits of the members, ``[M, B, C]``.

        Returns:
            A scalar in nats, in the student's dtype.
        """
        difference = _mutual_information(student).sqrt() - _mutual_information(teacher).sqrt()
        return difference.square().mean()


def _divergence(student: torch.Tensor, prob: torch.Tensor, temperature: float) -> torch.Tensor:
    functional = require("torch.nn.functional", "train")
    cross: torch.Tensor = functional.binary_cross_entropy_with_logits(
        student / temperature, prob, reduction="none"
    )
    return (cross - _coin_entropy(prob)).sum(-1).mean() * temperature**2


def _coin_entropy(prob: torch.Tensor) -> torch.Tensor:
    """Entropy of coins in nats, with finite gradients at 0 and 1."""
    rest = 1 - prob
    tiny = 1e-9
    return -(prob * prob.clamp_min(tiny).log() + rest * rest.clamp_min(tiny).log())


def _mutual_information(logits: torch.Tensor) -> torch.Tensor:
    """``[B]`` in nats, plus 1e-4: a root near 0 would have an unbounded gradient."""
    prob = logits.sigmoid()
    # Answer by answer: both entropies are sums of thousands of terms.
    terms = _coin_entropy(prob.mean(0)) - _coin_entropy(prob).mean(0)
    return terms.sum(-1).clamp_min(0) + 1e-4


TASK: Task = SigmoidQuestionAnswering()
