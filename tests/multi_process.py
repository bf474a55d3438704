"""What tests/test_training.py runs in several processes, and in its own.

    python -m torch.distributed.run --nproc-per-node N tests/multi_process.py FOLDER CASE…

Writes what process 0 found to FOLDER/N.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from students import SHORT, make_ensemble
from torch import distributed, nn

from hydra_edge import checkpoints, processes
from hydra_edge.batch_norm import synchronized
from hydra_edge.distillation import distill
from hydra_edge.ensembles import Ensemble, Hydra, mlp_heads
from hydra_edge.errors import HydraError
from hydra_edge.processes import Processes
from hydra_edge.teacher_formats import Format
from hydra_edge.teachers import EnsembleShare, share
from hydra_edge.teaching import Predictions, Storage, teach

# 26 samples in batches of 8: the last batch has 2, fewer than 4 processes.
SAMPLES, FEATURES, CLASSES, MEMBERS = 26, 4, 3, 3


class Body(nn.Module):
    """Two inputs, batch statistics, and a layer that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.words, self.unused = nn.Embedding(5, 8), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + self.words(word)


class Member(nn.Module):
    def __init__(self, member: nn.Module) -> None:
        super().__init__()
        self.member, self.word = member, nn.Embedding(5, CLASSES)

    def forward(self, x: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
        return self.member(x) + self.word(word)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return x, torch.arange(SAMPLES) % 5


def ensemble() -> Ensemble:
    members = make_ensemble(MEMBERS).members
    torch.manual_seed(4)
    return Ensemble([Member(member) for member in members])


def student() -> Hydra:
    torch.manual_seed(2)
    return Hydra(Body(), mlp_heads(MEMBERS, 8, CLASSES, (6,), norm="batch"))


def training(folder: Path, group: Processes, **changes: object) -> object:
    """The loss curve of a run, and what its student says."""
    config = dataclasses.replace(SHORT, disagreement_weight=1.0, **changes)  # type: ignore[arg-type]
    trained = distill(ensemble(), student(), data(), config, workdir=folder, progress=False)
    curve = np.concatenate(checkpoints.loss_curve(folder)).tolist()
    with torch.no_grad():
        prob = trained(*data()).softmax(-1)
    return {"curve": curve, "prob": prob.tolist()}


def cached(folder: Path, group: Processes) -> object:
    return training(folder, group)


def online(folder: Path, group: Processes) -> object:
    return training(folder, group, teacher="online")


def accumulated(folder: Path, group: Processes) -> object:
    """Without batch statistics, which are those of a step."""
    config = dataclasses.replace(SHORT, accumulation=3, teacher="online")
    torch.manual_seed(2)
    plain = Hydra(nn.Linear(FEATURES, 8), mlp_heads(MEMBERS, 8, CLASSES, (6,)))
    members = make_ensemble(MEMBERS)
    distill(members, plain, data()[0], config, workdir=folder, progress=False)
    return np.concatenate(checkpoints.loss_curve(folder)).tolist()


def half(folder: Path, group: Processes) -> object:
    """Stops in the first phase, by an error on every process."""
    seen = 0

    def failing(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen > 6:
            raise ZeroDivisionError
        return x

    config = dataclasses.replace(SHORT, checkpoint_steps=1, teacher="online")
    shared, plan = folder.parent / "half", (ensemble(), student(), data())
    try:
        distill(*plan, config, augment=failing, workdir=shared, progress=False)
    except ZeroDivisionError:
        return checkpoints.loss_curve(shared)[0].tolist()
    raise AssertionError


def finished(folder: Path, group: Processes) -> object:
    """Goes on with what `half` has left; or does all of it, where there is nothing."""

    def same(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return x

    config = dataclasses.replace(SHORT, checkpoint_steps=1, teacher="online")
    shared, plan = folder.parent / "half", (ensemble(), student(), data())
    distill(*plan, config, augment=same, workdir=shared, progress=False)
    return np.concatenate(checkpoints.loss_curve(shared)).tolist()


def perturbed(folder: Path, group: Processes) -> object:
    return training(folder, group, teacher="online", mixup=1.0, ods=0.1)


def predictions(folder: Path, group: Processes) -> object:
    """Kept by as many processes as there are, then imitated."""
    storage = Storage(Format("fp32"), block=7)
    kept = teach(ensemble(), data(), folder / "kept", storage, batch_size=4, progress=False)
    trained = distill(kept, student(), data(), SHORT, workdir=folder, progress=False)
    assert isinstance(kept, Predictions)
    files = sorted(path.name for path in (folder / "kept").rglob("*.npy"))
    outputs = kept[:, list(range(SAMPLES))]
    assert trained.heads
    curve = np.concatenate(checkpoints.loss_curve(folder)).tolist()
    return {"files": files, "outputs": outputs.tolist(), "curve": curve}


def normalized(folder: Path, group: Processes) -> object:
    """Batch normalisation of uneven parts of a batch: output, gradients, running statistics."""
    x = torch.randn(9, 3, 2, generator=torch.Generator().manual_seed(0))
    ends = {1: [0, 9], 2: [0, 2, 9], 4: [0, 2, 2, 5, 9]}[group.size]
    part = x[ends[group.rank] : ends[group.rank + 1]].clone().requires_grad_()
    layer: nn.Module = nn.BatchNorm1d(3, momentum=None)
    if group.size > 1:
        layer = synchronized(nn.Sequential(layer), part.device)[0]
    for _ in range(2):
        y = layer(part)
    (y * y.sigmoid()).sum().backward()
    counts = [b - a for a, b in itertools.pairwise(ends)]
    assert part.grad is not None
    found = [group.concatenate(y.detach(), counts), group.concatenate(part.grad, counts)]
    gradients = [group.total(p.grad) for p in layer.parameters() if p.grad is not None]
    buffers = [b.float() for b in layer.buffers()]
    with torch.no_grad():
        inference = group.concatenate(layer.eval()(part), counts)
    return [value.tolist() for value in (*found, *gradients, *buffers, inference)]


def exchanges(folder: Path, group: Processes) -> object:
    def fail() -> int:
        raise HydraError("What.", "Why.", "Fix.")

    group.wait()
    failed = ""
    try:
        group.on_main(fail)
    except HydraError as exc:
        failed = str(exc)
    share_of_one = EnsembleShare.of(ensemble(), share(MEMBERS, group))
    rows = torch.full((group.rank + 1, 2), float(group.rank))
    return {
        "gathered": group.gather(group.rank),
        "main": group.on_main(lambda: group.rank),
        "total": group.total(torch.ones(2)).tolist(),
        "rows": group.concatenate(rows, range(1, group.size + 1)).tolist(),
        "failed": group.gather(failed),
        "members": group.gather(share_of_one.indices),
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, *cases = sys.argv[1:]
    found = {}
    with processes.joined(30) as group:
        for case in cases:
            found[case] = globals()[case](Path(folder) / f"{case}-{group.size}", group)
    if group.is_main:
        (Path(folder) / f"{group.size}.json").write_text(json.dumps(found))
    if distributed.is_initialized():
        processes.leave()


if __name__ == "__main__":
    main()
