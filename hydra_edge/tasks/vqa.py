"""Visual question answering: heads give logits ``[M, B, C]`` over C answers; softmax heads.

People disagree about answers, so the truth is a score in [0, 1] for each of them: 1 when at least
four of ten people gave it. `hydra_edge.tasks.vqa_sigmoid` is the same for heads that judge every
answer by itself. Reliability after Whitehead et al. 2022, arXiv 2204.13631.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import InputError
from hydra_edge.tasks import Float, Task
from hydra_edge.tasks.classification import Classification, check_logits, disagreement

RISKS = (0.01, 0.05, 0.1, 0.2)
COST = 1.0  # of a wrong answer, against a right one
_ECE_BINS = 15


class QuestionAnswering(Classification):
    """The task of answering a question about an image; see `hydra_edge.tasks.Task`.

    A prediction, drift and the distillation losses are those of a classifier of answers.
    """

    name = "vqa"

    def metrics(self, logits: npt.ArrayLike, target: npt.ArrayLike) -> dict[str, float]:
        """Quality of the mean prediction and size of its uncertainty.

        Args:
            logits: ``[M, B, C]``.
            target: How right each answer is, ``[B, C]`` in [0, 1]: see
                `hydra_edge.vqa.answers.consensus`; or one right answer each, integers ``[B]``.

        Returns:
            ``accuracy``, the mean score of the answers given: the official VQA accuracy where the
            targets are consensus scores; ``nll``, see `nll`; ``ece``, the l1 calibration error of
            the winning answer against its score, over 15 bins of equal width;
            ``coverage_at_risk_<r>``, the largest share of questions that can be answered, surest
            first, with at most r of their score lost, for r of 1, 5, 10 and 20 %;
            ``effective_reliability``, see `effective_reliability`; ``mutual_information`` and
            ``predictive_entropy``, means over samples, in nats; ``disagreement``, the share of head
            pairs whose argmax differs.

        Raises:
            InputError: The shapes do not fit, a score is outside [0, 1], or a logit is NaN.
        """
        values = check_logits(logits)
        scores = check_scores(target, values.shape[1], values.shape[2])
        summary = self.summarize(values)
        prob = summary["mean_prob"]
        confidence, right = prob.max(-1), np.take_along_axis(scores, _best(prob), 1)[:, 0]
        return {
            "accuracy": float(right.mean()),
            "nll": self.nll(prob, scores),
            "ece": _calibration_error(confidence, right),
            **{
                f"coverage_at_risk_{risk:g}": coverage_at_risk(confidence, right, risk)
                for risk in RISKS
            },
            "effective_reliability": effective_reliability(confidence, right),
            "mutual_information": float(summary["mutual_information"].mean()),
            "predictive_entropy": float(summary["predictive_entropy"].mean()),
            "disagreement": disagreement(values),
        }

    def nll(self, prob: Float, scores: Float) -> float:
        """Cross entropy in nats of ``prob [B, C]`` with the scores, scaled to sum to 1.

        The mean over questions of which any answer has a score; NaN when there is none.
        """
        total = scores.sum(-1)
        known = total > 0
        terms = -(scores * np.log(np.maximum(prob, np.finfo(np.float64).tiny))).sum(-1)
        return float(np.mean(terms[known] / total[known])) if known.any() else float("nan")


def coverage_at_risk(confidence: npt.ArrayLike, score: npt.ArrayLike, risk: float) -> float:
    """Largest share of questions that can be answered with at most ``risk``.

    Questions are answered surest first, equally sure ones together, because no threshold tells them
    apart. The risk is 1 minus the mean score of those answered.

    Args:
        confidence: ``[N]``; higher is surer.
        score: How right each answer is, ``[N]`` in [0, 1].
        risk: In [0, 1].

    Returns:
        A share in [0, 1].

    Raises:
        InputError: The arrays do not fit.

    Source: Whitehead et al. 2022, arXiv 2204.13631, section 4.2.
    """
    _, counts, scores = _surest_first(confidence, score)
    fits = 1 - scores / counts <= risk + 1e-12  # sums of scores are rounded
    return float(counts[fits].max() / counts[-1]) if fits.any() else 0.0


def reliability(answered: npt.ArrayLike, score: npt.ArrayLike, cost: float = COST) -> float:
    """Effective reliability: mean of the score if answered and not wrong, -cost if wrong, else 0.

    Args:
        answered: Which questions were answered, ``[N]``.
        score: How right each answer is, or would be, ``[N]``.
        cost: Of an answer with the score 0.

    Source: Whitehead et al. 2022, arXiv 2204.13631, eq. 4.
    """
    value = np.asarray(score, np.float64)
    return float(np.mean(np.where(np.asarray(answered, bool), _worth(value, cost), 0.0)))


def best_threshold(confidence: npt.ArrayLike, score: npt.ArrayLike, cost: float = COST) -> float:
    """The smallest confidence to answer at that gives the largest `reliability` on these questions.

    Args:
        confidence: ``[N]``; higher is surer.
        score: How right each answer is, ``[N]``.
        cost: Of a wrong answer.

    Returns:
        A threshold; infinity when it is best to answer nothing.

    Raises:
        InputError: The arrays do not fit.
    """
    thresholds, _, worths = _surest_first(confidence, score, lambda value: _worth(value, cost))
    best = len(worths) - 1 - int(np.argmax(worths[::-1]))
    return float(thresholds[best]) if worths[best] > 0 else float("inf")


def effective_reliability(
    confidence: npt.ArrayLike, score: npt.ArrayLike, cost: float = COST
) -> float:
    """`reliability` at the threshold that was best on other questions.

    Every other question chooses the threshold for the rest, and the other way round, so that no
    question is judged at a threshold it had a part in.

    Args:
        confidence: ``[N]``; higher is surer.
        score: How right each answer is, ``[N]``.
        cost: Of a wrong answer.

    Returns:
        The mean over both halves; NaN for a single question.

    Raises:
        InputError: The arrays do not fit.
    """
    sure, right = _check_pairs(confidence, score)
    if len(sure) < 2:
        return float("nan")
    answered = np.empty(len(sure), bool)
    for start in (0, 1):
        answered[start::2] = sure[start::2] >= best_threshold(
            sure[1 - start :: 2], right[1 - start :: 2], cost
        )
    return reliability(answered, right, cost)


def check_scores(target: npt.ArrayLike, batch: int, answers: int) -> Float:
    """The scores ``[B, C]`` of a target; see `QuestionAnswering.metrics`.

    Raises:
        InputError: The target has another shape, or values that are no scores.
    """
    values = np.asarray(target)
    if values.shape == (batch,) and values.dtype.kind in "iu":
        if values.min() < 0 or values.max() >= answers:
            raise InputError(
                f"The target holds answers {values.min()} to {values.max()}.",
                f"The logits have {answers} answers, numbered from 0 to {answers - 1}.",
                "Renumber them, or pass scores, all 0 where the right answer is not among them.",
            )
        return np.asarray(np.eye(answers)[values])
    if values.shape != (batch, answers) or values.dtype.kind not in "fiub":
        raise InputError(
            f"The target is {values.dtype} of shape {list(values.shape)}.",
            f"The logits hold {batch} questions and {answers} answers.",
            f"Pass scores of shape [{batch}, {answers}], or integers of shape [{batch}].",
        )
    scores = np.asarray(values, np.float64)
    if not ((scores >= 0) & (scores <= 1)).all():  # so that NaN fails
        raise InputError(
            "The target holds scores outside 0 to 1, or NaN.",
            "A score is the share of agreement with people.",
            "Use hydra_edge.vqa.answers.consensus to make scores.",
        )
    return scores


def _best(prob: Float) -> npt.NDArray[np.int64]:
    return np.asarray(prob.argmax(-1)[:, None])


def _worth(score: Float, cost: float) -> Float:
    return np.where(score > 0, score, -cost)


def _calibration_error(confidence: Float, score: Float) -> float:
    """Guo et al. 2017, arXiv 1706.04599, eq. 3, with scores in place of hits."""
    index = np.minimum((confidence * _ECE_BINS).astype(int), _ECE_BINS - 1)
    gaps = np.bincount(index, confidence - score, _ECE_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _surest_first(
    confidence: npt.ArrayLike,
    score: npt.ArrayLike,
    worth: Callable[[Float], Float] = lambda value: value,
) -> tuple[Float, Float, Float]:
    """Distinct confidences, falling, with the count and summed worth of questions at or above."""
    sure, right = _check_pairs(confidence, score)
    thresholds, inverse = np.unique(-sure, return_inverse=True)
    counts = np.cumsum(np.bincount(inverse)).astype(np.float64)
    return -thresholds, counts, np.cumsum(np.bincount(inverse, worth(right)))


def _check_pairs(confidence: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Float, Float]:
    sure, right = np.asarray(confidence, np.float64), np.asarray(score, np.float64)
    if sure.ndim != 1 or not sure.size or sure.shape != right.shape or np.isnan(sure).any():
        raise InputError(
            f"The confidence has shape {list(sure.shape)}, the score {list(right.shape)}, and "
            f"{int(np.isnan(sure).sum())} confidences are NaN.",
            "Each question has one confidence and one score.",
            "Pass two arrays [N] with at least one question.",
        )
    return sure, right


TASK: Task = QuestionAnswering()
