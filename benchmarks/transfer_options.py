"""What the options of the transfer set change: augmentation, mixup, ODS and held-out samples.

Usage: python benchmarks/transfer_options.py [-o results/transfer-options.json] [--seeds 4]

Five members are trained on one half of the digits' training set. A small student with five heads is
distilled for the same number of steps by each option, from the plain losses (one temperature, no
disagreement term), with several initial weights and orders of batches. Measured on the test set and
on shifted inputs, against the labels and against the ensemble. The members are the same for all, so
the spread is that of the students alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from hydra_edge.demo import digits
from hydra_edge.demo.digits import Images, Jitter, Painter
from hydra_edge.distillation import DistillationConfig, distill
from hydra_edge.ensembles import Ensemble, Hydra, mlp_heads
from hydra_edge.probe import describe_machine
from hydra_edge.tasks import find

MEMBERS = 5
PLAIN = DistillationConfig(
    epochs_mean=5,
    epochs_heads=25,
    batch_size=64,
    learning_rate=3e-3,
    learning_rate_heads=3e-3,
    teacher="online",
)
JITTER = Jitter(15, 0.15, 0.2, 0.15)


@dataclass(frozen=True)
class Option:
    """How one kind of student is distilled."""

    config: DistillationConfig = PLAIN
    augment: bool = False
    held_out: bool = False


OPTIONS = {
    "plain": Option(),
    "augment": Option(augment=True),
    "mixup 1": Option(dataclasses.replace(PLAIN, mixup=1.0)),
    "ods 0.5": Option(dataclasses.replace(PLAIN, ods=0.5)),
    "ods 1": Option(dataclasses.replace(PLAIN, ods=1.0)),
    "held out": Option(held_out=True),
    "held out, augment, mixup 1, ods 1": Option(
        dataclasses.replace(PLAIN, mixup=1.0, ods=1.0), augment=True, held_out=True
    ),
}


def jittered(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random rotation, scale, shift and shear."""
    painter = Painter(0)
    painter.generator = generator
    return painter.jitter(x, JITTER)


def network(channels: int) -> nn.Sequential:
    """Two convolutions and a dense layer: ``[B, 1, 8, 8]`` to ``[B, 64]``."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * channels, 64),
        nn.ReLU(),
    )


def student(seed: int) -> Hydra:
    """A body with a quarter of a member's multiplications, and heads of one hidden layer."""
    torch.manual_seed(seed)
    return Hydra(network(12), mlp_heads(MEMBERS, 64, 10, (32,)))


def train_member(images: Images, labels: npt.NDArray[np.int64], seed: int) -> nn.Module:
    """One member with its own initial weights, shuffling and augmentation."""
    torch.manual_seed(seed)
    model, painter = nn.Sequential(network(24), nn.Linear(64, 10)), Painter(seed)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    for _ in range(40):
        distorted = painter.jitter(x, digits.AUGMENTATION)
        for batch in torch.randperm(len(x), generator=painter.generator).split(64)[:-1]:
            optimizer.zero_grad()
            functional.cross_entropy(model(distorted[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def measure(
    trained: nn.Module, ensemble: nn.Module, sets: dict[str, Images], labels: npt.NDArray[np.int64]
) -> dict[str, float]:
    """Quality on the test set, and how near the uncertainty is to the ensemble's, by set."""
    task, found = find("classification"), {}
    for name, images in sets.items():
        x = torch.from_numpy(images)
        with torch.no_grad():
            ours, theirs = trained(x).numpy(), ensemble(x).numpy()
        drift = task.drift(ours, theirs)
        found[f"{name}: mi_ratio"] = drift["mi_ratio"]
        found[f"{name}: mi_rank_correlation"] = drift["mi_rank_correlation"]
        found[f"{name}: top1_agreement"] = drift["top1_agreement"]
        if name == "test":
            quality = task.metrics(ours, labels)
            found |= {key: quality[key] for key in ("accuracy", "nll", "ece")}
    return found


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds."""
    return {
        key: {
            "mean": float(np.mean([run[key] for run in runs])),
            "std": float(np.std([run[key] for run in runs], ddof=1)),
        }
        for key in runs[0]
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = digits.load()
    half = len(data.train) // 2
    members = [
        train_member(data.train[:half], data.train_labels[:half], seed) for seed in range(MEMBERS)
    ]
    ensemble = Ensemble(members).eval()
    sets = {"test": data.test, **digits.shifted(data.test)}
    with torch.no_grad():
        logits = ensemble(torch.from_numpy(data.test)).numpy()
    quality = find("classification").metrics(logits, data.test_labels)
    machine = describe_machine([])
    head = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(machine) | {"versions": {**machine.versions, "torch": torch.__version__}},
        "members": MEMBERS,
        "member_samples": half,
        "transfer_samples": half,
        "seeds": arguments.seeds,
        "distillation": asdict(PLAIN),
        "augmentation": asdict(JITTER),
        "ensemble": {key: quality[key] for key in ("accuracy", "nll", "ece")},
    }
    rows = []
    for name, option in OPTIONS.items():
        images = data.train[half : 2 * half] if option.held_out else data.train[:half]
        runs, start = [], time.perf_counter()
        for seed in range(arguments.seeds):
            trained = distill(
                ensemble,
                student(seed),
                images,
                dataclasses.replace(option.config, seed=seed),
                augment=jittered if option.augment else None,
                progress=False,
            )
            runs.append(measure(trained, ensemble, sets, data.test_labels))
        seconds = (time.perf_counter() - start) / arguments.seeds
        rows.append({"option": name, "seconds": seconds, **summary(runs)})
        shown = ("accuracy", "nll", "ece", "test: mi_ratio", "rotated: mi_ratio", "noise: mi_ratio")
        print(
            f"{name:<36}"
            + " ".join(f"{rows[-1][k]['mean']:.3f}±{rows[-1][k]['std']:.3f}" for k in shown)
            + f" {seconds:.0f} s",
            flush=True,
        )
        if arguments.output:
            text = json.dumps(head | {"rows": rows}, indent=1)
            arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
