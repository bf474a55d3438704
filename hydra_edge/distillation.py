"""`distill`: train a `Hydra` student to imitate an `Ensemble`, head by head.

Two phases, after Tran et al. 2020, arXiv 2001.04694:

    mean    the body and head 0 imitate the mean of the members
    heads   that head is copied to all heads, then each imitates its members

What a run keeps in its work folder, so that a kill costs ``checkpoint_steps`` or an epoch:

    teacher-<fingerprint>.npy    the members' outputs [M, N, C] in float32 (teacher="cached")
    teacher-<fingerprint>/       the same on several processes, as files of `teaching`
    checkpoint.safetensors       weights, optimizer state, losses and position

The same call in every process of ``torchrun`` trains on all of them: see docs/scaling.md.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from hydra_edge import teachers
from hydra_edge.artifacts.files import make_folder
from hydra_edge.distillation_config import DistillationConfig as DistillationConfig
from hydra_edge.ensembles import Ensemble, Hydra
from hydra_edge.errors import DistillationError, InputError, require
from hydra_edge.perturbations import Augment as Augment
from hydra_edge.preflight import check_outputs, check_request
from hydra_edge.processes import Processes, joined
from hydra_edge.progress import progress_bar
from hydra_edge.teacher_formats import Format
from hydra_edge.teachers import EnsembleShare, KeptTeacher, LiveTeacher, Teacher
from hydra_edge.teaching import Predictions, Storage, store
from hydra_edge.training import Training
from hydra_edge.transfer import Data, TransferSet, architecture, teacher_outputs

_DEFAULT = DistillationConfig()


def distill(
    ensemble: Ensemble | EnsembleShare | Predictions,
    student: Hydra,
    data: Data,
    config: DistillationConfig = _DEFAULT,
    *,
    augment: Augment | None = None,
    workdir: Path | str | None = None,
    progress: bool = True,
) -> Hydra:
    """Train a copy of ``student`` to imitate ``ensemble``; no labels are used.

    With H heads and M members, head h imitates members h, h + H, h + 2H, … and its loss is the mean
    over them. Rotating through them would have the same optimum, their mean, and only add noise to
    the gradient. That mean hides what those members disagree on: H below M costs uncertainty.

    Args:
        ensemble: The M members, run in eval mode; left in the mode and on the device they were. On
            several processes an `Ensemble` is split between them; a process that holds only its
            members passes its `EnsembleShare`. `Predictions` of `teach` need no members at all.
        student: The untrained student, with at most M heads. It is not changed.
        data: What to imitate on: an array or tensor ``[N, …]``; a tuple, list or mapping of them
            for a model with several inputs, which go in by position; or a map-style dataset that
            yields x or ``(x, …)``, where x may be a tuple or mapping of inputs. numpy's float64
            becomes torch's default dtype.
        config: How to train.
        augment: Called as ``augment(x, generator)`` on every batch (on several processes, or with
            accumulation: every piece of one) of the first input, on the CPU; draw from the
            generator to keep runs repeatable. Needs ``teacher="online"``.
        workdir: Where the run keeps the teacher's outputs and its checkpoint; the same call resumes
            from there, also with another number of processes, and returns at once when the run was
            finished. All processes must see it. None for a temporary folder.
        progress: Show progress on stderr.

    Returns:
        The trained student in eval mode, on the device of ``student``.

    Raises:
        InputError: Ensemble, student, data and config do not fit each other.
        DistillationError: The folder belongs to another run, the disk is too small, an output or
            the loss is not finite, another process is gone, or the environment cannot train so.
        ArtifactError: A file of the work folder is damaged or cannot be written.
        MissingDependencyError: accelerate is not installed.

    Source: Tran et al. 2020, arXiv 2001.04694.
    """
    inputs = TransferSet(data)
    changes = {"augment": augment is not None, "mixup": config.mixup > 0, "ods": config.ods > 0}
    check_request(
        ensemble,
        student,
        inputs,
        cached=config.teacher == "cached",
        changed=[name for name, given in changes.items() if given],
        copies_head=config.copies_head,
    )
    with joined(config.timeout_s) as processes, processes.guarded("before training"):
        accelerator = _accelerator(config, processes)
        device: torch.device = accelerator.device
        if isinstance(ensemble, Ensemble) and processes.size > 1:
            held = teachers.share(ensemble.heads, processes)
            ensemble = EnsembleShare.of(ensemble, held)
        home = teachers.device_of(student)
        student = copy.deepcopy(student).to(device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_callers_random_state(device))
            if not isinstance(ensemble, Predictions):
                stack.enter_context(teachers.evaluating(ensemble, device))
            folder = stack.enter_context(_folder(workdir, processes))
            bar = stack.enter_context(progress_bar(progress and processes.is_main))
            source = _Source(ensemble, inputs, config, folder, processes, device, bar)
            student.eval()
            shape = check_outputs(source.first, student, inputs, config.temperatures, device)
            data_hash, teacher_hash = source.identity()
            settings = config.identity | {"augment": augment is not None}
            outputs = (shape[0], len(inputs), *shape[2:])
            Training(
                config,
                student,
                inputs,
                lambda: source.teacher(data_hash, teacher_hash, outputs),
                augment,
                folder,
                {
                    "config": json.dumps(settings, sort_keys=True),
                    "data": data_hash,
                    "ensemble": teacher_hash,
                    "student": hashlib.sha256(architecture(student).encode()).hexdigest(),
                },
                processes,
                accelerator,
                bar,
            ).run()
    return student.to(home).eval()


@dataclass
class _Source:
    """Where the targets come from."""

    given: Ensemble | EnsembleShare | Predictions
    inputs: TransferSet
    config: DistillationConfig
    folder: Path
    processes: Processes
    device: torch.device
    bar: Progress

    def __post_init__(self) -> None:
        given, config = self.given, self.config
        if isinstance(given, Predictions):
            _check_predictions(given, self.inputs, config, self.processes)
        elif config.ods and not given.members:
            raise InputError(
                f"Process {self.processes.rank} holds no member, but ods is {config.ods:g}.",
                "Every process moves its samples along the gradient of a member.",
                f"Start at most {given.heads} processes, or set ods=0.",
            )

    def first(self, *x: torch.Tensor) -> torch.Tensor:
        """What the members say about the first samples, ``[M, B, C]``."""
        first = list(range(len(x[0])))
        if isinstance(self.given, Predictions):
            return torch.from_numpy(self.given[:, first]).to(self.device)
        if isinstance(self.given, Ensemble):
            answer: torch.Tensor = self.given(*x)
            return answer
        live = LiveTeacher(self.given, self.processes)
        return live.targets(x, [first] * self.processes.size, self.processes)

    def identity(self) -> tuple[str, str]:
        """Hashes of the data and of the teacher, as they decide the targets."""
        if isinstance(self.given, Predictions):
            return self.given.data_digest, self.given.identity
        # With an online teacher a dataset may give new values on every visit.
        content = bool(self.inputs.arrays) or self.config.teacher == "cached"
        data = self.processes.on_main(lambda: self.inputs.digest(content))
        return data, teachers.identity(self.given, self.processes)

    def teacher(self, data: str, name: str, shape: tuple[int, ...]) -> Teacher:
        """The teacher; computes what is not on disk yet."""
        if isinstance(self.given, Predictions):
            return KeptTeacher(self.given, self.device)
        if self.config.teacher == "online":
            return LiveTeacher(self.given, self.processes)
        path = self.folder / f"teacher-{hashlib.sha256((data + name).encode()).hexdigest()[:16]}"
        size = self.config.batch_size
        if isinstance(self.given, Ensemble):
            file = path.with_suffix(".npy")
            outputs = teacher_outputs(
                self.given, self.inputs, file, shape, size, self.device, self.bar
            )
            return KeptTeacher(outputs, self.device)
        exact = Storage(Format("fp32"))
        kept = store(
            self.given, self.inputs, path, exact, size, self.device, self.processes, self.bar
        )
        return KeptTeacher(kept, self.device)


def _check_predictions(
    given: Predictions, inputs: TransferSet, config: DistillationConfig, processes: Processes
) -> None:
    if config.teacher != "cached":
        raise InputError(
            f"Predictions are given, but teacher is '{config.teacher}'.",
            "Predictions are a teacher that has answered already.",
            "Set teacher='cached', or give the ensemble.",
        )
    digest = processes.on_main(lambda: inputs.digest(True))
    if len(given) != len(inputs) or digest != given.data_digest:
        raise InputError(
            f"The predictions in '{given.folder}' are of {len(given)} other samples; "
            f"the data holds {len(inputs)}.",
            "Sample n must be the one that prediction n was made for.",
            "Give the data that teach was given, in the same order.",
        )


def _accelerator(config: DistillationConfig, processes: Processes) -> Any:
    accelerate = require("accelerate", "train")
    on_cpu = processes.size > 1 and not torch.cuda.is_available()
    try:
        accelerator = accelerate.Accelerator(mixed_precision=config.mixed_precision, cpu=on_cpu)
    except ValueError as exc:
        raise DistillationError(
            f"accelerate refuses mixed_precision='{config.mixed_precision}': {exc}",
            "The device lacks it, or this process has used another precision before.",
            "Set mixed_precision='no', or start a new process.",
        ) from exc
    if accelerator.num_processes != processes.size:
        raise DistillationError(
            f"accelerate runs {accelerator.num_processes} processes, torch.distributed "
            f"{processes.size}.",
            "Batches would be split in two ways.",
            "Start with torchrun, or with hydra-edge distill --processes.",
        )
    return accelerator


@contextlib.contextmanager
def _folder(workdir: Path | str | None, processes: Processes) -> Iterator[Path]:
    if workdir is None:
        with contextlib.ExitStack() as stack:
            name = ""
            if processes.is_main:
                temporary = tempfile.TemporaryDirectory(prefix="hydra-edge-")
                name = stack.enter_context(temporary)
            yield Path(processes.from_main(name))
            processes.wait()
        return
    yield make_folder(workdir)


def _callers_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Gives torch's global random state back to the caller as it was."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    count = torch.get_device_module(device).device_count()
    return torch.random.fork_rng(devices=range(count), device_type=device.type)
