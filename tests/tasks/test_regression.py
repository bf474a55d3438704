"""The regression task against formulas written out in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    kl_divergence,
)

from hydra_edge import tasks
from hydra_edge.errors import InputError
from hydra_edge.tasks.regression import TASK, disagreement

HEADS, BATCH, DIM = 4, 30, 2


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def params(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(HEADS, BATCH, 2 * DIM))


@pytest.fixture
def target(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(BATCH, DIM))


def normal(params: torch.Tensor) -> Normal:
    mean, log_variance = params.chunk(2, -1)
    return Normal(mean, (0.5 * log_variance).exp())


def test_summary_and_names_agree(params: np.ndarray) -> None:
    assert tasks.find("regression") is TASK
    summary = TASK.summarize(params)
    assert tuple(summary) == TASK.outputs == TASK.vector_outputs
    assert TASK.epistemic in summary
    assert all(value.shape == (BATCH, TASK.width(2 * DIM)) for value in summary.values())


def test_metrics_match_their_formulas(params: np.ndarray, target: np.ndarray) -> None:
    components = Independent(normal(torch.from_numpy(params.swapaxes(0, 1).copy())), 1)
    mixture = MixtureSameFamily(Categorical(torch.ones(BATCH, HEADS)), components)
    means, variances = params[..., :DIM], np.exp(params[..., DIM:])
    total = variances.mean(0) + means.var(0)
    inside = np.abs(target - means.mean(0)) <= 1.6448536269514722 * np.sqrt(total)
    metrics = TASK.metrics(params, target)
    assert metrics["rmse"] == pytest.approx(np.sqrt(((target - means.mean(0)) ** 2).mean(0)).mean())
    assert metrics["nll"] == pytest.approx(
        -mixture.log_prob(torch.from_numpy(target)).mean().item(),
        rel=1e-6,  # Categorical normalises its float32 weights
    )
    assert metrics["coverage_90"] == inside.mean()
    assert metrics["epistemic_variance"] == pytest.approx(means.var(0).mean())
    assert metrics["aleatoric_variance"] == pytest.approx(variances.mean())
    assert metrics["disagreement"] == disagreement(params)


def test_crps_matches_sampling(rng: np.random.Generator) -> None:
    params = np.array([[[-1.0, 0.3]], [[0.5, -1.0]], [[2.0, 0.0]]])
    truth = 0.7
    heads = rng.integers(0, 3, 400_000)
    draws = rng.normal(params[heads, 0, 0], np.exp(0.5 * params[heads, 0, 1]))
    sampled = np.abs(draws - truth).mean() - 0.5 * np.abs(draws[::2] - draws[1::2]).mean()
    # Three standard errors of the two means.
    assert TASK.metrics(params, [truth])["crps"] == pytest.approx(sampled, abs=0.01)


def test_crps_of_one_gaussian_has_a_known_value() -> None:
    # Gneiting and Raftery 2007, eq. 21, at the mean: sigma (sqrt(2) - 1) / sqrt(pi).
    crps = TASK.metrics(np.array([[[3.0, np.log(4.0)]]]), [3.0])["crps"]
    assert crps == pytest.approx(2 * (np.sqrt(2) - 1) / np.sqrt(np.pi))


def test_a_calibrated_gaussian_is_covered_nine_times_of_ten(rng: np.random.Generator) -> None:
    metrics = TASK.metrics(np.zeros((1, 20_000, 2)), rng.normal(size=20_000))
    assert metrics["coverage_90"] == pytest.approx(0.9, abs=0.007)  # three standard errors


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_disagreement_is_the_mean_distance_of_head_pairs(
    rng: np.random.Generator, heads: int
) -> None:
    params = rng.normal(size=(heads, BATCH, 2 * DIM))
    pairs = [np.abs(a - b).mean() for a, b in itertools.combinations(params[..., :DIM], 2)]
    assert disagreement(params) == pytest.approx(np.mean(pairs) if pairs else 0.0)


def test_drift(params: np.ndarray) -> None:
    assert TASK.drift(params, params) == pytest.approx(
        {
            "mi_rank_correlation": 1.0,
            "mi_ratio": 1.0,
            "disagreement_ratio": 1.0,
            "max_abs_mean": 0.0,
        }
    )
    halved = params.copy()
    halved[..., :DIM] /= 2
    drift = TASK.drift(halved, params)
    assert drift["mi_ratio"] == pytest.approx(0.25)
    assert drift["disagreement_ratio"] == pytest.approx(0.5)
    assert drift["max_abs_mean"] == pytest.approx(np.abs(params[..., :DIM].mean(0)).max() / 2)
    alone = TASK.drift(params, params[:1])
    assert np.isnan([alone["mi_ratio"], alone["disagreement_ratio"]]).all()
    assert np.isnan(alone["mi_rank_correlation"])


def test_rank_correlation_ignores_the_units_of_an_output(params: np.ndarray) -> None:
    other = params[::-1] + np.random.default_rng(0).normal(size=params.shape)
    scale = np.array([1.0, 1000.0, 1.0, 1.0])
    plain, scaled = TASK.drift(other, params), TASK.drift(other * scale, params * scale)
    assert scaled["mi_rank_correlation"] == pytest.approx(plain["mi_rank_correlation"])


def test_inputs_that_do_not_fit(params: np.ndarray, target: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"outputs have shape \[4, 30, 3\].*needs \[M, B, 2D\]"):
        TASK.metrics(params[..., :3], target)
    with pytest.raises(InputError, match=r"outputs have shape \[30, 4\]"):
        TASK.metrics(params[0], target)
    with pytest.raises(InputError, match="outputs contain NaN or inf"):
        TASK.metrics(np.full_like(params, np.inf), target)
    with pytest.raises(InputError, match=r"target has shape \[30\].*30 samples of 2 values"):
        TASK.metrics(params, target[:, 0])
    with pytest.raises(InputError, match="target contains NaN or inf"):
        TASK.metrics(params, np.full_like(target, np.nan))
    with pytest.raises(InputError, match=r"\[4, 30, 4\] but the reference is \[4, 29, 4\]"):
        TASK.drift(params, params[:, :-1])


def test_losses_and_gradients_match_torch_distributions() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(3, 6, 4, dtype=torch.float64)
    student = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    means, log_variances = teacher.chunk(2, -1)
    variance = log_variances.exp().mean(0) + ((means - means.mean(0)) ** 2).mean(0)
    mixture = Normal(means.mean(0), variance.sqrt())
    for loss, divergence in (
        (TASK.head_loss(student, teacher, 1.0), kl_divergence(normal(teacher), normal(student))),
        (TASK.mean_loss(student[0], teacher, 1.0), kl_divergence(mixture, normal(student[0]))),
    ):
        expected = divergence.sum(-1).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        gradients = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert TASK.head_loss(teacher, teacher, 1.0) == 0


def test_losses_refuse_what_has_no_meaning() -> None:
    params = torch.zeros(2, 3, 4)
    for loss in (
        lambda p, t: TASK.head_loss(p, p, t),
        lambda p, t: TASK.mean_loss(p[0], p, t),
    ):
        with pytest.raises(InputError, match=r"temperature is 2\.0.*Set temperature=1"):
            loss(params, 2.0)
        with pytest.raises(InputError, match=r"outputs have shape \[2, 3, 3\].*log variance"):
            loss(params[..., :3], 1.0)


def test_an_odd_number_of_outputs_is_refused() -> None:
    assert TASK.width(6) == 3
    with pytest.raises(InputError, match="The heads have 5 outputs"):
        TASK.width(5)
