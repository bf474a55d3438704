"""Heteroscedastic regression: heads give ``[M, B, 2D]``, D means and then D log variances.

The prediction is the uniform mixture of the heads' diagonal Gaussians. Losses after Hydra: Tran et
al. 2020, arXiv 2001.04694.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import InputError, require
from hydra_edge.ops.ensemble_summary import GAUSSIAN_OUTPUTS, reference_gaussian
from hydra_edge.tasks import Float, Task, mean_ratio, rank_correlation

if TYPE_CHECKING:
    import torch

_COVERAGE = 0.9


class Regression:
    """The task of predicting D numbers with their variances; see `hydra_edge.tasks.Task`."""

    name = "regression"
    summary_op = "GaussianSummary"
    outputs: tuple[str, ...] = GAUSSIAN_OUTPUTS
    epistemic = "epistemic_variance"
    vector_outputs: tuple[str, ...] = GAUSSIAN_OUTPUTS

    def width(self, channels: int) -> int:
        """D, the size of the last axis of every output: half of the heads' channels.

        Raises:
            InputError: The number of channels is odd.
        """
        if channels % 2:
            raise InputError(
                f"The heads have {channels} outputs.",
                "A regression head gives a mean and a log variance for each quantity.",
                "Give heads 2 · D outputs: first the means, then the log variances.",
            )
        return channels // 2

    def summarize(self, logits: npt.ArrayLike) -> dict[str, Float]:
        """`GaussianSummary` in numpy float64.

        Args:
            logits: ``[M, B, 2D]``, means first, then log variances.

        Returns:
            ``mean``, ``aleatoric_variance`` and ``epistemic_variance``, each ``[B, D]``.
        """
        return reference_gaussian(logits)

    def metrics(self, logits: npt.ArrayLike, target: npt.ArrayLike) -> dict[str, float]:
        """Quality of the mixture and size of its uncertainty, in the target's units.

        Args:
            logits: ``[M, B, 2D]``, means first, then log variances.
            target: The true values, ``[B, D]``, or ``[B]`` when D is 1.

        Returns:
            ``rmse`` of the mixture's mean, per output and then averaged over D; ``nll`` of the
            mixture in nats, of all D values together, mean over samples; ``crps``, mean over
            samples and D; ``coverage_90``, the share of values inside the central 90 % interval of
            the Gaussian with the mixture's mean and variance; ``epistemic_variance`` and
            ``aleatoric_variance``, means over samples and D; ``disagreement``.

        Raises:
            InputError: The shapes do not fit, or a value is not finite.
            MissingDependencyError: scikit-learn or scipy is not installed.

        Source of ``crps``: Grimit et al. 2006, doi 10.1256/qj.05.235.
        """
        params = _check_params(logits)
        truth = _check_target(target, params.shape[1], params.shape[2] // 2)
        sklearn, special = (
            require("sklearn.metrics", "metrics"),
            require("scipy.special", "metrics"),
        )
        summary = self.summarize(params)
        aleatoric, epistemic = summary["aleatoric_variance"], summary["epistemic_variance"]
        half_width = special.ndtri((1 + _COVERAGE) / 2) * np.sqrt(aleatoric + epistemic)
        return {
            "rmse": float(sklearn.root_mean_squared_error(truth, summary["mean"])),
            "nll": _mixture_nll(params, truth),
            "crps": _mixture_crps(params, truth),
            "coverage_90": float((np.abs(truth - summary["mean"]) <= half_width).mean()),
            "epistemic_variance": float(epistemic.mean()),
            "aleatoric_variance": float(aleatoric.mean()),
            "disagreement": disagreement(params),
        }

    def drift(self, logits: npt.ArrayLike, reference: npt.ArrayLike) -> dict[str, float]:
        """How far the prediction and its uncertainty are from those of a reference.

        Args:
            logits: ``[M, B, 2D]``.
            reference: ``[N, B, 2D]`` for the same inputs; N may differ from M.

        Returns:
            ``mi_rank_correlation``, Spearman's, of the epistemic variance, per output and averaged
            over D, whose units may differ; ``mi_ratio``, of its means; ``disagreement_ratio``;
            ``max_abs_mean``, the largest absolute difference between the means. A ratio to 0 and a
            correlation with a constant are NaN.

        Raises:
            InputError: The shapes do not fit, or a value is not finite.
        """
        params, base = _check_params(logits), _check_params(reference)
        if params.shape[1:] != base.shape[1:]:
            raise InputError(
                f"The outputs are {list(params.shape)} but the reference is {list(base.shape)}.",
                "Drift compares answers to the same inputs; only the number of heads may differ.",
                "Run both models on the same batch.",
            )
        summary, expected = self.summarize(params), self.summarize(base)
        name = self.epistemic
        correlations = map(rank_correlation, summary[name].T, expected[name].T)
        pairs = disagreement(base)
        return {
            "mi_rank_correlation": float(np.mean(list(correlations))),
            "mi_ratio": mean_ratio(summary, expected, name),
            "disagreement_ratio": disagreement(params) / pairs if pairs > 0 else float("nan"),
            "max_abs_mean": float(np.abs(summary["mean"] - expected["mean"]).max()),
        }

    def mean_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """``KL(N_mix ‖ N_student)``, N_mix the Gaussian with the mean and variance of the mixture.

        Args:
            student: One head's output, ``[B, 2D]``.
            teacher: The members' outputs, ``[M, B, 2D]``.
            temperature: Must be 1.

        Returns:
            A scalar in nats, summed over D and averaged over the batch, in the student's dtype.

        Raises:
            InputError: The temperature is not 1, or the last axis is odd.
        """
        _check_temperature(temperature)
        means, log_variances = _halves(teacher)
        variance = log_variances.exp().mean(0) + means.var(0, correction=0)
        return _divergence(student, means.mean(0), variance.log())

    def head_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """``KL(N_member ‖ N_head)``, mean over heads and batch.

        Args:
            student: The heads' outputs, ``[H, B, 2D]``.
            teacher: The outputs of the members they imitate, ``[H, B, 2D]``.
            temperature: Must be 1.

        Returns:
            A scalar in nats, summed over D, in the student's dtype.

        Raises:
            InputError: The temperature is not 1, or the last axis is odd.
        """
        _check_temperature(temperature)
        mean, log_variance = _halves(teacher)
        return _divergence(student, mean, log_variance)

    def disagreement_loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Squared difference of the standard deviations of the means, mean over batch and outputs.

        Args:
            student: Outputs of the heads, ``[H, B, 2D]``.
            teacher: Outputs of the members, ``[M, B, 2D]``.

        Returns:
            A scalar in squared units of the target, in the student's dtype.
        """
        # 1e-8 under the root: its gradient at 0, where the phases begin, would be infinite.
        spread, wanted = (
            (_halves(params)[0].var(0, correction=0) + 1e-8).sqrt() for params in (student, teacher)
        )
        return (spread - wanted).square().mean()


def disagreement(params: npt.ArrayLike) -> float:
    """Mean over head pairs, samples and D of ``|mean_i - mean_j|``; 0 for one head.

    For sorted means ``x_0 ≤ … ≤ x_{M-1}`` the sum over pairs is ``Σ_k (2k - M + 1) x_k`` (Gini's
    mean difference), so the cost grows with M log M and not with its square.

    Args:
        params: ``[M, B, 2D]``, means first, then log variances.
    """
    means = np.sort(np.split(np.asarray(params, np.float64), 2, axis=-1)[0], axis=0)
    heads = means.shape[0]
    if heads == 1:
        return 0.0
    weights = 2.0 * np.arange(heads) - heads + 1
    total = np.tensordot(weights, means, axes=1)
    return float(np.mean(total) / (heads * (heads - 1) / 2))


def _divergence(
    student: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    # ½ (log s₂²/s₁² + (s₁² + (m₁ - m₂)²) / s₂² - 1), the first Gaussian being the teacher's.
    student_mean, student_log_variance = _halves(student)
    log_ratio = log_variance - student_log_variance
    distance = (mean - student_mean) ** 2 * (-student_log_variance).exp()
    return 0.5 * (log_ratio.exp() - log_ratio - 1 + distance).sum(-1).mean()


def _halves(params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if params.shape[-1] % 2:
        raise InputError(
            f"The outputs have shape {list(params.shape)}.",
            "Regression needs 2D outputs: D means, then D log variances.",
            "Give every mean its log variance.",
        )
    mean, log_variance = params.chunk(2, -1)
    return mean, log_variance


def _mixture_nll(params: Float, truth: Float) -> float:
    means, log_variances = np.split(params, 2, axis=-1)
    squares = (truth - means) ** 2 * np.exp(-log_variances)
    log_density = -0.5 * (np.log(2 * np.pi) + log_variances + squares).sum(-1)
    return float(np.mean(np.log(len(params)) - np.logaddexp.reduce(log_density, axis=0)))


def _mixture_crps(params: Float, truth: Float) -> float:
    means, log_variances = np.split(params, 2, axis=-1)
    variances = np.exp(log_variances)
    to_truth = _expected_distance(truth - means, variances).mean()
    # One head against all at a time: M² pairs at once would not fit in memory.
    between = [
        _expected_distance(mean - means, variance + variances).mean()
        for mean, variance in zip(means, variances, strict=True)
    ]
    return float(to_truth - 0.5 * np.mean(between))


def _expected_distance(mean: Float, variance: Float) -> Float:
    """E|X| of a Gaussian X: ``A(mean, variance)`` of Grimit et al. 2006."""
    special = require("scipy.special", "metrics")
    deviation = np.sqrt(variance)
    z = mean / deviation
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return np.asarray(2 * deviation * density + mean * (2 * special.ndtr(z) - 1))


def _check_temperature(temperature: float) -> None:
    if temperature != 1:
        raise InputError(
            f"The temperature is {temperature}.",
            "Regression imitates the members' Gaussians, and there are no logits to soften.",
            "Set temperature=1.",
        )


def _check_params(params: npt.ArrayLike) -> Float:
    values = np.asarray(params, np.float64)
    if values.ndim != 3 or 0 in values.shape or values.shape[-1] % 2:
        raise InputError(
            f"The outputs have shape {list(values.shape)}.",
            "Regression needs [M, B, 2D]: D means, then D log variances.",
            "Pass every head's raw output; add a leading axis when there is one head.",
        )
    if not np.isfinite(values).all():
        raise InputError(
            "The outputs contain NaN or inf.",
            "They are no means and log variances.",
            "Check the model's precision and its inputs.",
        )
    return values


def _check_target(target: npt.ArrayLike, batch: int, outputs: int) -> Float:
    values = np.asarray(target, np.float64)
    if values.shape == (batch,) and outputs == 1:
        values = values[:, None]
    if values.shape != (batch, outputs):
        raise InputError(
            f"The target has shape {list(values.shape)}.",
            f"The outputs hold {batch} samples of {outputs} values.",
            f"Pass numbers of shape [{batch}, {outputs}].",
        )
    if not np.isfinite(values).all():
        raise InputError(
            "The target contains NaN or inf.",
            "Errors to it are not defined.",
            "Drop samples without a value.",
        )
    return values


TASK: Task = Regression()
