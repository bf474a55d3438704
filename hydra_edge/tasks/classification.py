"""Classification: heads give logits ``[M, B, C]``, the prediction is the mean of their softmax.

Entropies and mutual information are in nats. The distillation losses are those of Hydra: Tran et
al. 2020, arXiv 2001.04694.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import InputError, require
from hydra_edge.ops.ensemble_summary import CLASSIFICATION_OUTPUTS, reference_classification
from hydra_edge.tasks import Float, Task, mean_ratio, rank_correlation

if TYPE_CHECKING:
    import torch

_ECE_BINS = 15


class Classification:
    """The task of naming one of C classes; see `hydra_edge.tasks.Task`."""

    name = "classification"
    summary_op = "EnsembleSummary"
    outputs: tuple[str, ...] = CLASSIFICATION_OUTPUTS
    epistemic = "mutual_information"
    vector_outputs: tuple[str, ...] = ("mean_prob",)

    def width(self, channels: int) -> int:
        """Size of the last axis of ``mean_prob``: one probability per logit."""
        return channels

    def summarize(self, logits: npt.ArrayLike) -> dict[str, Float]:
        """`EnsembleSummary` in numpy float64.

        Args:
            logits: ``[M, B, C]``.

        Returns:
            The op's five outputs by name; ``mean_prob`` is ``[B, C]``, the others are ``[B]``.
        """
        return reference_classification(logits)

    def metrics(self, logits: npt.ArrayLike, target: npt.ArrayLike) -> dict[str, float]:
        """Quality of the mean prediction and size of its uncertainty.

        Args:
            logits: ``[M, B, C]``.
            target: The true classes, integers ``[B]`` in ``[0, C)``.

        Returns:
            ``accuracy``; ``nll``, mean over samples, in nats; ``brier``, squared error summed over
            classes and averaged over samples, so it lies in [0, 2]; ``ece``, the l1 calibration
            error of the winning class over 15 bins of equal width; ``mutual_information`` and
            ``predictive_entropy``, means over samples, in nats; ``disagreement``, the share of head
            pairs whose argmax differs.

        Raises:
            InputError: The shapes do not fit, a class is out of range, or a logit is NaN.
            MissingDependencyError: scikit-learn or torchmetrics is not installed.

        Source of ``ece``: Guo et al. 2017, arXiv 1706.04599, eq. 3.
        """
        values = check_logits(logits)
        classes = values.shape[-1]
        truth = _check_target(target, values.shape[1], classes)
        sklearn = require("sklearn.metrics", "metrics")
        calibration = require("torchmetrics.functional.classification", "metrics")
        torch = require("torch", "metrics")
        summary = self.summarize(values)
        prob = summary["mean_prob"]
        every = np.arange(classes)
        return {
            "accuracy": float(sklearn.accuracy_score(truth, prob.argmax(-1))),
            "nll": float(sklearn.log_loss(truth, prob, labels=every)),
            "brier": float(
                sklearn.brier_score_loss(truth, prob, labels=every, scale_by_half=False)
            ),
            "ece": float(
                calibration.multiclass_calibration_error(
                    torch.from_numpy(prob),
                    torch.from_numpy(truth),
                    num_classes=classes,
                    n_bins=_ECE_BINS,
                    norm="l1",
                )
            ),
            "mutual_information": float(summary["mutual_information"].mean()),
            "predictive_entropy": float(summary["predictive_entropy"].mean()),
            "disagreement": disagreement(values),
        }

    def drift(self, logits: npt.ArrayLike, reference: npt.ArrayLike) -> dict[str, float]:
        """How far the prediction and its uncertainty are from those of a reference.

        Args:
            logits: ``[M, B, C]``.
            reference: ``[N, B, C]`` for the same inputs; N may differ from M.

        Returns:
            ``mi_rank_correlation``, Spearman's, of the mutual information; ``mi_ratio``, of its
            means; ``disagreement_ratio``; ``max_abs_mean_prob``, the largest absolute difference
            between the mean probabilities; ``top1_agreement``, the share of samples with equal
            argmax. A ratio to 0 and a correlation with a constant are NaN.

        Raises:
            InputError: The shapes do not fit, or a logit is NaN.
        """
        values, base = check_logits(logits), check_logits(reference)
        if values.shape[1:] != base.shape[1:]:
            raise InputError(
                f"The logits are {list(values.shape)} but the reference is {list(base.shape)}.",
                "Drift compares answers to the same inputs; only the number of heads may differ.",
                "Run both models on the same batch.",
            )
        summary, expected = self.summarize(values), self.summarize(base)
        name = self.epistemic
        prob, expected_prob = summary["mean_prob"], expected["mean_prob"]
        pairs = disagreement(base)
        return {
            "mi_rank_correlation": rank_correlation(summary[name], expected[name]),
            "mi_ratio": mean_ratio(summary, expected, name),
            "disagreement_ratio": disagreement(values) / pairs if pairs > 0 else float("nan"),
            "max_abs_mean_prob": float(np.abs(prob - expected_prob).max()),
            "top1_agreement": float((prob.argmax(-1) == expected_prob.argmax(-1)).mean()),
        }

    def mean_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """``T² · KL(mean_m softmax(teacher_m / T) ‖ softmax(student / T))``, mean over the batch.

        Args:
            student: Logits of one head, ``[B, C]``.
            teacher: Logits of the members, ``[M, B, C]``.
            temperature: T.

        Returns:
            A scalar in nats, in the student's dtype.
        """
        return _divergence(student, (teacher / temperature).softmax(-1).mean(0), temperature)

    def head_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """``T² · KL(softmax(teacher_m / T) ‖ softmax(student_m / T))``, mean over heads and batch.

        Args:
            student: Logits of the heads, ``[H, B, C]``.
            teacher: Logits of the members they imitate, ``[H, B, C]``.
            temperature: T.

        Returns:
            A scalar in nats, in the student's dtype.
        """
        return _divergence(student, (teacher / temperature).softmax(-1), temperature)

    def disagreement_loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """``(√MI_student - √MI_teacher)²``, mean over the batch.

        The root makes the difference relative for large values and still counts small ones, which
        most samples have.

        Args:
            student: Logits of the heads, ``[H, B, C]``.
            teacher: Logits of the members, ``[M, B, C]``.

        Returns:
            A scalar in nats, in the student's dtype.
        """
        difference = _mutual_information(student).sqrt() - _mutual_information(teacher).sqrt()
        return difference.square().mean()


def disagreement(logits: npt.ArrayLike) -> float:
    """Share of head pairs whose argmax differs, mean over the batch; 0 for one head.

    Pairs are counted from the votes ``n_c`` per class, ``Σ n_c(n_c - 1)`` of ``M(M - 1)`` ordered
    pairs agree, so the cost grows with M and not with its square.

    Args:
        logits: ``[M, B, C]``.
    """
    votes = np.asarray(logits).argmax(-1)
    heads, batch = votes.shape
    if heads == 1:
        return 0.0
    ballots = votes * batch + np.arange(batch)  # one number per pair of class and sample
    _, counts = np.unique(ballots, return_counts=True)
    agreeing = int(np.sum(counts * (counts - 1)))
    return 1.0 - float(agreeing / (batch * heads * (heads - 1)))


def ood_auroc(score_in: npt.ArrayLike, score_out: npt.ArrayLike) -> float:
    """Area under the ROC curve when an uncertainty score tells outliers from inliers.

    Args:
        score_in: Scores of in-distribution samples, ``[N]``.
        score_out: Scores of out-of-distribution samples, ``[K]``; higher means more uncertain.

    Returns:
        1 when every outlier scores above every inlier, 0.5 for chance.

    Raises:
        InputError: A side is empty, not one-dimensional or not finite.
        MissingDependencyError: scikit-learn is not installed.
    """
    inside, outside = np.asarray(score_in, np.float64), np.asarray(score_out, np.float64)
    for name, values in (("score_in", inside), ("score_out", outside)):
        if values.ndim != 1 or not values.size or not np.isfinite(values).all():
            raise InputError(
                f"{name} has shape {list(values.shape)} and {int((~np.isfinite(values)).sum())} "
                "values that are not finite.",
                "The ROC curve ranks one finite score per sample, from at least one sample a side.",
                "Pass an output of shape [B], such as mutual_information.",
            )
    truth = np.concatenate([np.zeros(inside.size), np.ones(outside.size)])
    sklearn = require("sklearn.metrics", "metrics")
    return float(sklearn.roc_auc_score(truth, np.concatenate([inside, outside])))


def _mutual_information(logits: torch.Tensor) -> torch.Tensor:
    """``[B]`` in nats, plus 1e-4: a root near 0 would have an unbounded gradient."""
    log_prob = logits.log_softmax(-1)
    prob = log_prob.exp()
    mean = prob.mean(0)
    entropy = -(mean * mean.clamp_min(1e-9).log()).sum(-1)
    expected = -(prob * log_prob).sum(-1).mean(0)
    return (entropy - expected).clamp_min(0) + 1e-4


def _divergence(student: torch.Tensor, prob: torch.Tensor, temperature: float) -> torch.Tensor:
    functional = require("torch.nn.functional", "train")
    log_prob = (student / temperature).log_softmax(-1)
    terms: torch.Tensor = functional.kl_div(log_prob, prob, reduction="none")
    return terms.sum(-1).mean() * temperature**2


def check_logits(logits: npt.ArrayLike) -> Float:
    """The logits ``[M, B, C]`` in float64; of -inf is made a probability of 0.

    Raises:
        InputError: They have another shape, or a NaN or +inf.
    """
    values = np.asarray(logits, np.float64)
    if values.ndim != 3 or 0 in values.shape or values.shape[-1] < 2:
        raise InputError(
            f"The logits have shape {list(values.shape)}.",
            "Classification needs [M, B, C]: at least 1 head, 1 sample and 2 classes.",
            "Pass every head's raw output; add a leading axis when there is one head.",
        )
    if np.isnan(values).any() or np.isposinf(values).any():
        raise InputError(
            "The logits contain NaN or +inf.",
            "Their softmax is not defined.",
            "Check the model's precision and its inputs.",
        )
    return values


def _check_target(target: npt.ArrayLike, batch: int, classes: int) -> npt.NDArray[np.int64]:
    values = np.asarray(target)
    if values.shape != (batch,) or values.dtype.kind not in "iu":
        raise InputError(
            f"The target is {values.dtype} of shape {list(values.shape)}.",
            f"The logits hold {batch} samples, and each has one true class.",
            f"Pass integers of shape [{batch}], not one-hot rows or probabilities.",
        )
    if values.min() < 0 or values.max() >= classes:
        raise InputError(
            f"The target holds classes {values.min()} to {values.max()}.",
            f"The logits have {classes} classes, numbered from 0 to {classes - 1}.",
            "Renumber the labels, or drop samples without a label.",
        )
    return values.astype(np.int64)


TASK: Task = Classification()
