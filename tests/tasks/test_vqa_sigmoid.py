"""Sigmoid heads against Bernoulli distributions of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from hydra_edge import tasks
from hydra_edge.distillation import DistillationConfig, distill
from hydra_edge.ensembles import Ensemble, Hydra, linear_heads
from hydra_edge.tasks.vqa_sigmoid import TASK
from hydra_edge.verification import verify

HEADS, BATCH, ANSWERS = 4, 30, 5


@pytest.fixture
def logits() -> np.ndarray:
    return 2 * np.random.default_rng(5).normal(size=(HEADS, BATCH, ANSWERS))


@pytest.fixture
def pair(logits: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    student = torch.from_numpy(logits).requires_grad_()
    return student, torch.from_numpy(logits[::-1].copy())


def test_entropies_are_sums_over_answers(logits: np.ndarray) -> None:
    assert tasks.find("vqa_sigmoid") is TASK
    heads = Bernoulli(logits=torch.from_numpy(logits))
    mean = Bernoulli(heads.probs.mean(0))
    summary = TASK.summarize(logits)
    assert tuple(summary) == TASK.outputs
    total, expected = mean.entropy().sum(-1), heads.entropy().mean(0).sum(-1)
    np.testing.assert_allclose(summary["predictive_entropy"], total)
    np.testing.assert_allclose(summary["expected_entropy"], expected)
    np.testing.assert_allclose(summary["mutual_information"], total - expected)
    votes = (logits > 0) != (heads.probs.mean(0).numpy() > 0.5)
    np.testing.assert_allclose(summary["variation_ratio"], votes.mean((0, 2)))


def test_nll_is_that_of_coins(logits: np.ndarray) -> None:
    scores = np.random.default_rng(0).choice([0, 0.3, 1], (BATCH, ANSWERS))
    prob = torch.sigmoid(torch.from_numpy(logits)).mean(0)
    cross = torch.nn.functional.binary_cross_entropy(
        prob, torch.from_numpy(scores), reduction="none"
    )
    metrics = TASK.metrics(logits, scores)
    assert metrics["nll"] == pytest.approx(float(cross.sum(-1).mean()))
    best = prob.numpy().argmax(-1)
    assert metrics["accuracy"] == pytest.approx(scores[np.arange(BATCH), best].mean())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_losses_are_divergences_of_coins(
    pair: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> None:
    student, teacher = pair
    soft = Bernoulli(logits=student / temperature)
    members = Bernoulli(logits=teacher / temperature)
    wanted = kl_divergence(members, soft).sum(-1).mean() * temperature**2
    found = TASK.head_loss(student, teacher, temperature)
    assert found.item() == pytest.approx(wanted.item())
    mean = Bernoulli(members.probs.mean(0))
    first = kl_divergence(mean, Bernoulli(logits=student[0] / temperature))
    found = TASK.mean_loss(student[0], teacher, temperature)
    assert found.item() == pytest.approx(first.sum(-1).mean().item() * temperature**2)


def test_the_loss_of_disagreement_is_that_of_mutual_information(
    pair: tuple[torch.Tensor, torch.Tensor], logits: np.ndarray
) -> None:
    student, teacher = pair
    roots = [
        np.sqrt(TASK.summarize(values)["mutual_information"] + 1e-4)
        for values in (logits, 3 * logits)
    ]
    found = TASK.disagreement_loss(student, 3 * torch.from_numpy(logits))
    assert found.item() == pytest.approx(np.square(roots[0] - roots[1]).mean(), rel=1e-4)
    assert TASK.disagreement_loss(student, teacher).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 200.0, -200.0])
def test_gradients_are_finite_where_heads_agree_or_are_certain(value: float) -> None:
    student = torch.full((3, 2, 4), value, requires_grad=True)
    teacher = torch.tensor([0.0, 200.0, -200.0])[:, None, None].expand(3, 2, 4)
    loss = TASK.head_loss(student, teacher, 1.0) + TASK.disagreement_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_two_inputs_are_distilled_exported_and_verified() -> None:
    """Sigmoid heads from members to a verified engine, on an image and a question."""
    from torch import nn

    import hydra_edge as he

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 4)
            self.pixels = nn.Linear(12, 8)
            self.text = nn.Linear(12, 8)

        def forward(self, image: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
            words = self.text(self.words(question).flatten(1))
            return torch.tanh(self.pixels(image.flatten(1)) * words)

    class Member(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Body(), nn.Linear(8, ANSWERS)
            nn.init.normal_(self.head.weight, 0, 1.5)

        def forward(self, image: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.body(image, question))
            return logits

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (96, 3, 2, 2)).astype(np.float32)
    questions = rng.integers(0, 7, (96, 3))
    labels = tuple("abcde")
    ensemble = Ensemble([Member() for _ in range(HEADS)], "vqa_sigmoid", labels)
    config = DistillationConfig(
        epochs_mean=1, epochs_heads=2, batch_size=32, disagreement_weight=1.0
    )
    student = Hydra(Body(), linear_heads(HEADS, 8, ANSWERS), "vqa_sigmoid", labels)
    before = TASK.head_loss(
        student(*map(torch.from_numpy, (images, questions))), _all(ensemble, images, questions), 1.0
    )
    student = distill(ensemble, student, (images, questions), config, progress=False)
    after = TASK.head_loss(
        student(*map(torch.from_numpy, (images, questions))), _all(ensemble, images, questions), 1.0
    )
    assert after < before
    data = {"image": images, "question": questions}
    graph = he.export(student, (images[:1], questions[:1]), input_names=tuple(data))
    assert graph.metadata.task == "vqa_sigmoid"
    scores = rng.choice([0, 0.3, 1], (96, ANSWERS))
    engine = he.build(
        graph,
        precision="int8",
        calibration=data,
        data=data,
        labels=scores,
        gates=he.Gates(mi_rank_correlation=0.5),
    )
    found = verify(engine, graph, data, labels=scores)
    assert not [text for text in found.failures if "does not follow" in text]
    assert found.metrics["accuracy"] == pytest.approx(found.reference_metrics["accuracy"], abs=0.05)


def _all(ensemble: Ensemble, images: np.ndarray, questions: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = ensemble(torch.from_numpy(images), torch.from_numpy(questions))
    return output
