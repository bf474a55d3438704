"""Distillation: what the student learns, and that runs can be stopped, resumed and refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from students import (
    CLASSES,
    FEATURES,
    ONLINE,
    SAMPLES,
    SHORT,
    Samples,
    assert_equal,
    make_ensemble,
    make_student,
    noisy,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hydra_edge import tasks
from hydra_edge.distillation import DistillationConfig, distill
from hydra_edge.ensembles import Ensemble, Hydra, linear_heads, mlp_heads
from hydra_edge.errors import ArtifactError, DistillationError


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost far more than they gain on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(3))


# What is learned


def test_the_student_matches_the_moments_of_a_heteroscedastic_ensemble() -> None:
    class Member(nn.Module):
        """Members part where |x| grows, and the noise grows with x."""

        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = torch.sin(2 * x) + self.shift * x**2
            return torch.cat([mean, -2 + 0.5 * x], -1)

    ensemble = Ensemble([Member(shift) for shift in np.linspace(-0.5, 0.5, 5)], "regression")
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    student = Hydra(body, mlp_heads(5, 32, 2, (16,), "tanh"), "regression")
    data = torch.linspace(-2, 2, 1024)[:, None]
    config = DistillationConfig(
        epochs_mean=6,
        epochs_heads=25,
        batch_size=32,
        learning_rate=1e-2,
        learning_rate_heads=1e-2,
        weight_decay=0,
    )
    trained = distill(ensemble, student, data, config, progress=False)
    task = tasks.find("regression")
    with torch.no_grad():
        ours, theirs = trained(data).numpy(), ensemble(data).numpy()
    drift = task.drift(ours, theirs)
    moments, expected = task.summarize(ours), task.summarize(theirs)
    # The means span about 4 and the members' log variances 2: errors of a few per cent.
    assert drift["max_abs_mean"] < 0.15
    assert drift["mi_ratio"] == pytest.approx(1, abs=0.1)
    assert drift["mi_rank_correlation"] > 0.95
    assert drift["disagreement_ratio"] == pytest.approx(1, abs=0.1)
    assert (
        np.abs(np.log(moments["aleatoric_variance"] / expected["aleatoric_variance"])).max() < 0.2
    )


def test_every_head_imitates_its_own_member(data: torch.Tensor) -> None:
    ensemble = Ensemble(linear_heads(3, FEATURES, CLASSES)).train()
    student = Hydra(nn.Identity(), linear_heads(3, FEATURES, CLASSES))
    config = dataclasses.replace(
        SHORT, epochs_heads=15, learning_rate_heads=5e-2, temperature=4.0, weight_decay=0
    )
    trained = distill(ensemble, student, data.repeat(10, 1), config, progress=False)
    ours, theirs = trained(data).softmax(-1), ensemble(data).softmax(-1)
    distances = (ours[:, None] - theirs[None]).abs().amax((-1, -2))
    assert distances.diagonal().max() < 0.02
    assert distances.argmin(0).tolist() == [0, 1, 2]


def test_fewer_heads_share_the_members_in_turn(data: torch.Tensor) -> None:
    def constant(*logits: float) -> nn.Module:
        layer = nn.Linear(FEATURES, 2)
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(logits)
        return layer

    # Head 0 imitates members 0, 2 and 4, head 1 imitates members 1 and 3.
    logits = [(0.0, 2.0), (0.0, -2.0), (0.0, 0.0), (0.0, -1.0), (0.0, 1.0)]
    ensemble = Ensemble([constant(*pair) for pair in logits])
    student = Hydra(nn.Identity(), linear_heads(2, FEATURES, 2))
    config = dataclasses.replace(SHORT, epochs_heads=15, learning_rate_heads=5e-2, weight_decay=0)
    trained = distill(ensemble, student, data.repeat(10, 1), config, progress=False)
    prob = ensemble(data).softmax(-1)
    groups = torch.stack([prob[0::2].mean(0), prob[1::2].mean(0)])
    torch.testing.assert_close(trained(data).softmax(-1), groups, atol=0.02, rtol=0)


def test_the_first_phase_trains_one_head_towards_the_mean(data: torch.Tensor) -> None:
    """With a vanishing rate in the second phase, all heads are still the one of the first."""
    config = dataclasses.replace(
        SHORT, epochs_mean=15, epochs_heads=1, learning_rate=5e-2, learning_rate_heads=1e-12
    )
    ensemble = make_ensemble().eval()
    student = Hydra(nn.Identity(), linear_heads(4, FEATURES, CLASSES))
    trained = distill(ensemble, student, data.repeat(10, 1), config, progress=False)
    prob = trained(data).softmax(-1)
    torch.testing.assert_close(prob[0], ensemble(data).softmax(-1).mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(prob[0].expand_as(prob), prob, atol=1e-6, rtol=0)
    config = dataclasses.replace(config, epochs_mean=1, warmstart_heads=False, weight_decay=0)
    trained = distill(ensemble, student, data, config, progress=False)
    torch.testing.assert_close(trained.heads[2].weight, student.heads[2].weight)


def test_schedule_clipping_and_shuffling(data: torch.Tensor) -> None:
    rates, norms = [], []

    def watch(optimizer: torch.optim.Optimizer, *_: object) -> None:
        (group,) = optimizer.param_groups
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        rates.append(group["lr"])
        norms.append(nn.utils.get_total_norm(gradients).item())

    config = dataclasses.replace(ONLINE, learning_rate_heads=3e-3, gradient_clip=0.01)
    samples = Samples(data)
    hook = register_optimizer_step_pre_hook(watch)
    try:
        distill(make_ensemble(), make_student(), samples, config, progress=False)
    finally:
        hook.remove()
    cosines = [
        rate * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))
        for rate, steps in ((1e-2, 2 * 3), (3e-3, 3 * 3))
    ]
    np.testing.assert_allclose(rates, np.concatenate(cosines))
    np.testing.assert_allclose(norms, 0.01, rtol=1e-3)
    epochs = np.reshape(samples.order[2:], (5, SAMPLES))
    assert (np.sort(epochs) == np.arange(SAMPLES)).all()
    assert len(np.unique(epochs, axis=0)) == 5


# What goes in, and what stays as it was


def test_arguments_and_random_state_stay_as_they_were(data: torch.Tensor) -> None:
    ensemble, student = make_ensemble(), make_student()
    ensemble.members[0].eval()
    ensemble_copy, student_copy = make_ensemble(), make_student()
    state = torch.get_rng_state()
    trained = distill(ensemble, student, data, SHORT, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(student, student_copy)
    assert_equal(ensemble, ensemble_copy)
    assert student.training
    assert not any(module.training for module in trained.modules())
    assert ensemble.members[1][2].training
    assert not ensemble.members[0][2].training
    with pytest.raises(AssertionError):
        assert_equal(trained, student)


# Python 3.12 and later warn whenever a process with threads forks, as the DataLoader's workers do.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_kinds_of_data_give_one_result(data: torch.Tensor) -> None:
    expected = distill(make_ensemble(), make_student(), data, SHORT, progress=False)
    same: list[object] = [data.numpy(), data.numpy().astype(np.float64), (data,), Samples(data)]
    for other in same:
        config = dataclasses.replace(SHORT, workers=int(isinstance(other, Samples)))
        trained = distill(make_ensemble(), make_student(), other, config, progress=False)  # type: ignore[arg-type]
        assert_equal(trained, expected)


def test_cached_and_online_teachers_agree(data: torch.Tensor) -> None:
    cached = distill(make_ensemble(), make_student(), data, SHORT, progress=False)
    online = distill(make_ensemble(), make_student(), data, ONLINE, progress=False)
    # Matmuls round differently for other batch sizes, and AdamW amplifies that.
    torch.testing.assert_close(cached(data), online(data), atol=1e-3, rtol=0)


def test_models_with_several_inputs(data: torch.Tensor) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.word = nn.Linear(FEATURES, CLASSES), nn.Embedding(5, CLASSES)

        def forward(self, image: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
            return self.image(image) + self.word(word)

    class Pairs(Samples):
        def __getitem__(self, index: int) -> tuple[object, int]:
            return (self.data[index], np.int64(index % 5)), 0

    class Named(Samples):
        def __getitem__(self, index: int) -> dict[str, object]:  # type: ignore[override]
            return {"image": self.data[index], "word": np.int64(index % 5)}

    ensemble = Ensemble([Both(), Both()])
    student = Hydra(Both(), linear_heads(2, CLASSES, CLASSES))
    words = np.arange(SAMPLES) % 5
    trained = distill(ensemble, student, (data, words), SHORT, progress=False)
    kinds = (Pairs(data), [data, words], {"image": data, "word": words}, Named(data))
    for same in kinds:
        assert_equal(distill(ensemble, student, same, SHORT, progress=False), trained)
    assert trained(data, torch.from_numpy(words)).shape == (2, SAMPLES, CLASSES)
    distill(ensemble, student, (data, words), ONLINE, augment=noisy, progress=False)


def test_augmentation_is_repeatable_and_seen_by_the_teacher(data: torch.Tensor) -> None:
    ensemble, seen = make_ensemble(), []
    ensemble.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    first = distill(ensemble, make_student(), data, ONLINE, augment=noisy, progress=False)
    assert not torch.isin(seen[-1], data).any()
    again = distill(ensemble, make_student(), data, ONLINE, augment=noisy, progress=False)
    assert_equal(first, again)
    other = dataclasses.replace(ONLINE, seed=1)
    third = distill(ensemble, make_student(), data, other, augment=noisy, progress=False)
    assert not torch.equal(first.body[0].weight, third.body[0].weight)


def test_frozen_parameters_stay(data: torch.Tensor) -> None:
    student = make_student()
    student.body[0].requires_grad_(False)
    config = dataclasses.replace(SHORT, gradient_clip=None)
    trained = distill(make_ensemble(), student, data, config, progress=False)
    assert torch.equal(trained.body[0].weight, student.body[0].weight)
    assert not torch.equal(trained.heads[3][0].weight, student.heads[3][0].weight)


def test_progress_is_shown_on_stderr_or_not_at_all(
    data: torch.Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    distill(make_ensemble(), make_student(), data, SHORT, progress=False)
    assert capfd.readouterr() == ("", "")
    distill(make_ensemble(), make_student(), data, SHORT)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(word in err for word in ("teacher", "phase 1: mean", "phase 2: heads", "loss"))


def test_mixed_precision_trains(tmp_path: Path) -> None:
    """In its own process: accelerate keeps one precision per process."""
    code = (
        "import torch; from torch import nn; from hydra_edge.ensembles import *; "
        "from hydra_edge.distillation import *; heads = linear_heads(2, 4, 3); "
        "config = DistillationConfig(epochs_mean=1, epochs_heads=1, mixed_precision='bf16'); "
        "student = Hydra(nn.Linear(4, 4), linear_heads(2, 4, 3)); "
        "trained = distill(Ensemble(heads), student, torch.randn(9, 4), config, progress=False); "
        "y = trained(torch.randn(2, 4)); print(y.dtype, y.isfinite().all().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "torch.float32 True\n"


# Stop and resume


@pytest.mark.parametrize("reads", [1, 30, 50, 85, 110])
def test_a_killed_run_resumes_to_the_same_weights(
    data: torch.Tensor, tmp_path: Path, reads: int
) -> None:
    """Killed after so many reads of 125: in the first phase, between the phases, in the second."""
    whole = distill(make_ensemble(), make_student(), data, ONLINE, progress=False)
    setup = 2  # samples that the check before training reads
    samples = Samples(data, interrupt=setup + reads)
    with pytest.raises(KeyboardInterrupt):
        distill(make_ensemble(), make_student(), samples, ONLINE, workdir=tmp_path, progress=False)
    samples = Samples(data)
    resumed = distill(
        make_ensemble(), make_student(), samples, ONLINE, workdir=tmp_path, progress=False
    )
    assert_equal(resumed, whole)
    assert samples.reads == setup + (2 + 3 - reads // SAMPLES) * SAMPLES


def test_a_run_killed_in_an_augmentation_resumes_to_the_same_weights(
    data: torch.Tensor, tmp_path: Path
) -> None:
    calls = 0

    def killed(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 * 3 + 2:  # the second batch of the fourth epoch
            raise KeyboardInterrupt
        return noisy(x, generator)

    run: Callable[..., Hydra] = distill
    whole = run(make_ensemble(), make_student(), data, ONLINE, augment=noisy, progress=False)
    for attempt in (killed, noisy):
        arguments = (make_ensemble(), make_student(), data, ONLINE)
        if attempt is killed:
            with pytest.raises(KeyboardInterrupt):
                run(*arguments, augment=attempt, workdir=tmp_path, progress=False)
        else:
            resumed = run(*arguments, augment=attempt, workdir=tmp_path, progress=False)
    assert_equal(resumed, whole)


def test_partly_written_teacher_outputs_are_continued(data: torch.Tensor, tmp_path: Path) -> None:
    setup = 2 * SAMPLES + 2 + SAMPLES  # two reads for repeatability, the check, the fingerprint
    samples = Samples(data, interrupt=setup + 12)  # in the second batch of eight
    with pytest.raises(KeyboardInterrupt):
        distill(make_ensemble(), make_student(), samples, SHORT, workdir=tmp_path, progress=False)
    assert {path.suffixes[0] for path in tmp_path.iterdir()} == {".part"}
    samples = Samples(data)
    resumed = distill(
        make_ensemble(), make_student(), samples, SHORT, workdir=tmp_path, progress=False
    )
    assert samples.reads == setup + (SAMPLES - 8) + (2 + 3) * SAMPLES
    assert_equal(resumed, distill(make_ensemble(), make_student(), data, SHORT, progress=False))
    (outputs,) = tmp_path.glob("teacher-*")
    with torch.no_grad():
        expected = make_ensemble().eval()(data).numpy()
    np.testing.assert_allclose(np.load(outputs), expected, rtol=1e-5, atol=1e-6)


def test_a_note_without_its_partial_outputs_is_ignored(data: torch.Tensor, tmp_path: Path) -> None:
    arguments = (make_ensemble(), make_student(), data, SHORT)
    distill(*arguments, workdir=tmp_path, progress=False)
    (outputs,) = tmp_path.glob("teacher-*.npy")
    expected = np.load(outputs)
    outputs.unlink()
    outputs.with_suffix(".part.json").write_text("24")
    (tmp_path / "checkpoint.safetensors").unlink()
    distill(*arguments, workdir=tmp_path, progress=False)
    np.testing.assert_array_equal(np.load(outputs), expected)


def test_memory_addresses_do_not_make_another_run(data: torch.Tensor, tmp_path: Path) -> None:
    class Addressed(nn.Identity):
        def __init__(self) -> None:
            super().__init__()
            self.kept = object()

        def extra_repr(self) -> str:
            return repr(self.kept)

    for _ in range(2):
        student = Hydra(Addressed(), linear_heads(4, FEATURES, CLASSES))
        distill(make_ensemble(), student, data, SHORT, workdir=tmp_path, progress=False)


def test_a_finished_run_returns_at_once(data: torch.Tensor, tmp_path: Path) -> None:
    ensemble, student = make_ensemble(), make_student()
    first = distill(ensemble, student, data, SHORT, workdir=tmp_path / "run", progress=False)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    calls: list[int] = []
    ensemble.register_forward_hook(lambda *_: calls.append(1))
    again = distill(ensemble, student, data, SHORT, workdir=tmp_path / "run", progress=False)
    assert len(calls) == 1  # the check of the first samples
    assert_equal(first, again)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert {path.suffix for path in files} == {".npy", ".safetensors"}


def test_the_checkpoint_of_another_run_is_refused(data: torch.Tensor, tmp_path: Path) -> None:
    def run(
        ensemble: Ensemble | None = None,
        student: Hydra | None = None,
        x: torch.Tensor = data,
        config: DistillationConfig = SHORT,
    ) -> Hydra:
        ensemble, student = ensemble or make_ensemble(), student or make_student()
        return distill(ensemble, student, x, config, workdir=tmp_path, progress=False)

    run()
    message = "belongs to a run with another {}.*Choose another workdir"
    with pytest.raises(DistillationError, match=message.format("config")):
        run(config=dataclasses.replace(SHORT, seed=5))
    with pytest.raises(DistillationError, match=message.format("data")):
        run(x=data + 1)
    other = make_ensemble()
    other.members[2][0].bias.data += 1
    with pytest.raises(DistillationError, match=message.format("ensemble")):
        run(other)
    with pytest.raises(DistillationError, match=message.format("student")):
        run(student=make_student(heads=3))
    with pytest.raises(DistillationError, match="another ensemble, another student"):
        run(other, make_student(heads=3))
    run(config=dataclasses.replace(SHORT, workers=1))


def test_damaged_files_are_named(data: torch.Tensor, tmp_path: Path) -> None:
    arguments = (make_ensemble(), make_student(), data, SHORT)
    distill(*arguments, workdir=tmp_path, progress=False)
    checkpoint = tmp_path / "checkpoint.safetensors"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:100])
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors' cannot be read.*Delete it"):
        distill(*arguments, workdir=tmp_path, progress=False)
    checkpoint.unlink()
    (outputs,) = tmp_path.glob("teacher-*.npy")
    np.save(outputs, np.zeros((4, 3), np.float32))
    with pytest.raises(ArtifactError, match=r"cannot be used: its shape.*float32 \[4, 25, 3\]"):
        distill(*arguments, workdir=tmp_path, progress=False)
    outputs.write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match=r"teacher-.*cannot be used.*Delete the file"):
        distill(*arguments, workdir=tmp_path, progress=False)
