"""Distillation: what is refused, and in which words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
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
    make_ensemble,
    make_student,
    noisy,
)
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from hydra_edge.distillation import DistillationConfig, distill
from hydra_edge.ensembles import Ensemble, Hydra, linear_heads, mlp_heads
from hydra_edge.errors import ArtifactError, DistillationError, InputError


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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs_mean", -1, r"epochs_mean is -1\. It must be an integer of 0 or more"),
        ("epochs_heads", 0, "epochs_heads is 0"),
        ("batch_size", 0, "batch_size is 0"),
        ("seed", -1, "seed is -1"),
        ("workers", -1, "workers is -1"),
        ("learning_rate", 0.0, r"learning_rate is 0\.0\. It must be a finite number above 0"),
        ("learning_rate_heads", float("inf"), "learning_rate_heads is inf"),
        ("temperature", float("nan"), "temperature is nan"),
        ("gradient_clip", -1.0, r"gradient_clip is -1\.0"),
        ("weight_decay", -0.1, r"weight_decay is -0\.1\. It must be a number of 0 or more"),
        ("teacher", "offline", "teacher is 'offline'. It must be one of cached, online"),
        ("mixed_precision", "fp8", "mixed_precision is 'fp8'"),
    ],
)
def test_config_values_are_checked(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillationConfig(**{name: value})  # type: ignore[arg-type]


def refused(message: str, *arguments: object, **options: object) -> None:
    run: Callable[..., Hydra] = distill
    with pytest.raises(InputError, match=message):
        run(*arguments, progress=False, **options)


def test_models_that_do_not_fit_each_other(data: torch.Tensor) -> None:
    ensemble = make_ensemble()
    regressor = Hydra(nn.Identity(), linear_heads(2, FEATURES, 2), "regression")
    refused(
        r"task is classification \(\), the student's regression \(\)", ensemble, regressor, data
    )
    labelled = (
        Ensemble(linear_heads(2, FEATURES, 2), labels=["cat", "dog"]),
        Hydra(nn.Identity(), linear_heads(2, FEATURES, 2), labels=["dog", "cat"]),
    )
    refused(r"\('cat', 'dog'\).*same labels in the same order", *labelled, data)
    refused("student has 5 heads, the ensemble 4 members", ensemble, make_student(5), data, SHORT)
    wide = make_student(classes=5)
    refused(r"Members give \[2, 3\] but heads give \[2, 5\]", ensemble, wide, data, SHORT)
    uneven = Hydra(nn.Identity(), [*linear_heads(1, 4, 3), *mlp_heads(1, 4, 3)])
    refused("Head 1 is not built like head 0.*epochs_mean=0", ensemble, uneven, data, SHORT)
    for change in ({"epochs_mean": 0}, {"warmstart_heads": False}):
        config = dataclasses.replace(SHORT, epochs_heads=1, **change)  # type: ignore[arg-type]
        distill(ensemble, uneven, data, config, progress=False)
    gaussians = Ensemble(linear_heads(2, FEATURES, 2), "regression")
    warm = dataclasses.replace(SHORT, temperature=2.0)
    refused(r"temperature is 2\.0", gaussians, regressor, data, warm)
    frozen = Hydra(nn.Identity(), linear_heads(4, FEATURES, CLASSES)).requires_grad_(False)
    refused("student has no trainable parameters", ensemble, frozen, data, SHORT)
    flat = Ensemble([nn.Flatten(0)])
    refused(r"Members give \[8\] for 2 samples.*\[M, B, C\]", flat, make_student(1), data, SHORT)


def test_data_that_cannot_be_used(data: torch.Tensor) -> None:
    models = (make_ensemble(), make_student())
    refused("data is a list", *models, [])
    refused("data is a tuple", *models, ())
    refused("data is a tuple", *models, (data, "text"))
    refused("inputs hold 0 samples", *models, data[:0])
    refused("inputs hold 0 samples", *models, torch.tensor(1.0))
    refused("inputs hold 24 and 25 samples", *models, (data, data[1:]))

    class Unsized(Dataset[object]):
        pass

    class Text(Samples):
        def __getitem__(self, index: int) -> tuple[object, int]:
            return "text", 0

    class Random(Samples):
        def __getitem__(self, index: int) -> tuple[object, int]:
            return torch.randn(FEATURES), 0

    class Stream(IterableDataset[object]):
        def __iter__(self) -> Iterator[object]:
            return iter(data)

        def __len__(self) -> int:
            return SAMPLES

    refused("data is a Unsized", *models, Unsized())
    refused("data is a Stream", *models, Stream())
    refused("sample's input is a ndarray", *models, np.array(["a", "b"]))
    refused("sample's input is a str", *models, Text(data))
    refused("Reading the dataset twice.*Set teacher='online'", *models, Random(data))
    distill(*models, Random(data), dataclasses.replace(ONLINE, epochs_heads=1), progress=False)
    refused(r"ensemble cannot run on the data: .*float32 \[2, 3\]", *models, data[:, 1:])
    odd = Hydra(nn.Linear(5, 3), linear_heads(2, 3, 3))
    refused("student cannot run on the data", models[0], odd, data)


def test_augmentation_that_cannot_be_used(data: torch.Tensor) -> None:
    models = (make_ensemble(), make_student())
    refused("teacher is 'cached'.*Set teacher='online'", *models, data, SHORT, augment=noisy)
    refused(
        r"augment returned \[7, 4\] for a batch \[8, 4\]",
        *models,
        data,
        ONLINE,
        augment=lambda x, generator: x[1:],
    )
    refused("augment returned NoneType", *models, data, ONLINE, augment=lambda x, generator: None)


@pytest.mark.parametrize("config", [SHORT, ONLINE])
def test_a_member_that_gives_nan_is_named(data: torch.Tensor, config: DistillationConfig) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x[:, :1] == data[17, 0], torch.nan, x[:, :3])

    ensemble = Ensemble([nn.Linear(FEATURES, CLASSES), Fails()])
    with pytest.raises(DistillationError, match="Member 1 gives NaN or inf for sample 17"):
        distill(ensemble, make_student(2), data, config, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(data: torch.Tensor) -> None:
    class Overflows(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (torch.inf if self.training else 1)

    student = Hydra(Overflows(FEATURES, 6), linear_heads(2, 6, CLASSES))
    with pytest.raises(
        DistillationError, match=r"loss is nan in phase 1, epoch 1, step 1\..*Lower the learning"
    ):
        distill(make_ensemble(), student, data, SHORT, progress=False)


def test_environments_that_cannot_train(
    data: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (make_ensemble(), make_student(), data)
    distill(*arguments, dataclasses.replace(SHORT, epochs_heads=1), progress=False)
    with pytest.raises(DistillationError, match=r"refuses mixed_precision='bf16'.*a new process"):
        distill(*arguments, dataclasses.replace(SHORT, mixed_precision="bf16"), progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"file' cannot be made.*Choose another workdir"):
        distill(*arguments, SHORT, workdir=tmp_path / "file", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(DistillationError, match=r"need 0\.0 MiB more.*set teacher='online'"):
            distill(*arguments, SHORT, workdir=tmp_path / "full", progress=False)
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(DistillationError, match="accelerate runs 2 processes"):
        distill(*arguments, SHORT, progress=False)
