"""`distill`: train a `Hydra` student to imitate an `Ensemble`, head by head.

Two phases, after Tran et al. 2020, arXiv 2001.04694:

    mean    the body and head 0 imitate the mean of the members
    heads   that head is copied to all heads, then each imitates its members

What a run keeps in its work folder, so that a kill costs one epoch at most:

    teacher-<fingerprint>.npy    the members' outputs [M, N, C] in float32 (teacher="cached")
    checkpoint.safetensors       weights, optimizer state and position after the latest epoch
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader

from hydra_edge import tasks
from hydra_edge.artifacts.files import write_atomic
from hydra_edge.ensembles import Ensemble, Hydra, tensor_state
from hydra_edge.errors import ArtifactError, DistillationError, InputError, require
from hydra_edge.preflight import architecture, check_outputs, check_request
from hydra_edge.transfer import (
    Data,
    Inputs,
    Outputs,
    TransferSet,
    check_finite,
    chunks,
    hash_tensors,
    teacher_outputs,
)

Augment: TypeAlias = Callable[[torch.Tensor, torch.Generator], torch.Tensor]

_CHECKPOINT = "checkpoint.safetensors"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillationConfig:
    """How to distill. The defaults are a start for small image classifiers.

    Attributes:
        epochs_mean: Epochs in which head 0 imitates the mean of the members; 0 skips that phase.
        epochs_heads: Epochs in which every head imitates its members.
        batch_size: Samples per step. A single left-over sample joins the batch before it, because
            batch normalisation cannot train on one.
        learning_rate: AdamW's rate at the start of the first phase; a cosine takes it to 0.
        learning_rate_heads: The same for the second phase.
        temperature: Softens classification logits; published runs use 3 to 8. Regression needs 1.
            With several, the loss is their mean: a high one shows what members say about unlikely
            classes, 1 keeps the probabilities that uncertainty is computed from.
        disagreement_weight: Weight, in the second phase, of how far the size of the heads'
            disagreement is from the members'; see `Task.disagreement_loss`. 0 is the paper's loss.
        weight_decay: AdamW's decoupled weight decay.
        gradient_clip: Largest norm of the gradient; None for no limit.
        seed: Of shuffling, augmentation and dropout; the initial weights are the student's own.
        teacher: ``"cached"`` runs the members once and keeps their outputs on disk; ``"online"``
            runs them on every batch, which augmentation needs.
        warmstart_heads: Copy head 0 to all heads between the phases; otherwise the other heads keep
            their initial weights.
        mixed_precision: Of the student; the members always run in their own precision.
        workers: Processes that load data; 0 loads in this one.

    Raises:
        InputError: A value is out of range.
    """

    epochs_mean: int = 100
    epochs_heads: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    learning_rate_heads: float = 1e-3
    temperature: float | tuple[float, ...] = 1.0
    disagreement_weight: float = 0.0
    weight_decay: float = 1e-4
    gradient_clip: float | None = 5.0
    seed: int = 0
    teacher: Literal["cached", "online"] = "cached"
    warmstart_heads: bool = True
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    workers: int = 0

    @property
    def copies_head(self) -> bool:
        """Whether head 0 becomes all heads after the first phase."""
        return self.warmstart_heads and self.epochs_mean > 0

    def __post_init__(self) -> None:
        least = {"epochs_mean": 0, "epochs_heads": 1, "batch_size": 1, "seed": 0, "workers": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            self._require(name, value >= minimum, f"an integer of {minimum} or more")
        positive = bool(self.temperatures) and all(0 < v < math.inf for v in self.temperatures)
        self._require("temperature", positive, "one or more finite numbers above 0")
        for name in ("learning_rate", "learning_rate_heads", "gradient_clip"):
            value = getattr(self, name)
            unset = name == "gradient_clip" and value is None
            self._require(name, unset or 0 < value < math.inf, "a finite number above 0")
        for name in ("weight_decay", "disagreement_weight"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number of 0 or more")
        choices = {"teacher": ("cached", "online"), "mixed_precision": ("no", "fp16", "bf16")}
        for name, allowed in choices.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """`temperature` as a tuple."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise InputError(f"{name} is {value!r}.", f"It must be {allowed}.", "Change it.")


def distill(
    ensemble: Ensemble,
    student: Hydra,
    data: Data,
    config: DistillationConfig = DistillationConfig(),
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
        ensemble: The M members, run in eval mode; left in the mode and on the device it was.
        student: The untrained student, with at most M heads. It is not changed.
        data: What to imitate on: an array or tensor ``[N, …]``; a tuple, list or mapping of them
            for a model with several inputs, which go in by position; or a map-style dataset that
            yields x or ``(x, …)``, where x may be a tuple or mapping of inputs. numpy's float64
            becomes torch's default dtype.
        config: How to train.
        augment: Called as ``augment(x, generator)`` on every batch of the first input, on the CPU;
            draw from the generator to keep runs repeatable. Needs ``teacher="online"``.
        workdir: Where the run keeps the teacher's outputs and its checkpoint; the same call resumes
            from there, and returns at once when the run was finished. None for a temporary folder.
        progress: Show progress on stderr.

    Returns:
        The trained student in eval mode, on the device of ``student``.

    Raises:
        InputError: Ensemble, student, data and config do not fit each other.
        DistillationError: The folder belongs to another run, the disk is too small, an output or
            the loss is not finite, or the environment cannot train this way.
        ArtifactError: A file of the work folder is damaged or cannot be written.
        MissingDependencyError: accelerate is not installed.

    Source: Tran et al. 2020, arXiv 2001.04694.
    """
    inputs = TransferSet(data)
    check_request(
        ensemble,
        student,
        inputs,
        cached=config.teacher == "cached",
        augmented=augment is not None,
        copies_head=config.copies_head,
    )
    accelerator = _accelerator(config)
    device: torch.device = accelerator.device
    home = _device_of(student)
    student = copy.deepcopy(student).to(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_callers_random_state(device))
        stack.enter_context(_evaluating(ensemble, device))
        shape = check_outputs(ensemble, student, inputs, config.temperatures, device)
        folder = stack.enter_context(_folder(workdir))
        bar = stack.enter_context(_progress_bar(progress))
        run = _Run(config, ensemble, student, inputs, augment, folder, accelerator, bar)
        run.train((shape[0], len(inputs), *shape[2:]))
    return student.to(home).eval()


@dataclass
class _Run:
    config: DistillationConfig
    ensemble: Ensemble
    student: Hydra
    inputs: TransferSet
    augment: Augment | None
    folder: Path
    accelerator: Any
    bar: Progress
    identity: Mapping[str, str] = field(default_factory=dict)
    cached: Outputs | None = None

    def train(self, teacher_shape: tuple[int, ...]) -> None:
        """Run what is left of both phases; the members' outputs have shape ``[M, N, C]``."""
        config, student = self.config, self.student
        self.identity = self._identity()
        header, tensors = self._read_checkpoint()
        if header:
            _log.info("Resuming after epoch %d of phase %d.", header["epoch"], header["phase"] + 1)
            student.load_state_dict(_under("student.", tensors))
        reached = header.get("phase", 0)
        for phase, epochs in enumerate((config.epochs_mean, config.epochs_heads)):
            done = header.get("epoch", 0) if phase == reached else 0
            if phase < reached or done == epochs:
                continue
            if config.teacher == "cached" and self.cached is None:
                name = hashlib.sha256((self.identity["data"] + self.identity["ensemble"]).encode())
                self.cached = teacher_outputs(
                    self.ensemble,
                    self.inputs,
                    self.folder / f"teacher-{name.hexdigest()[:16]}.npy",
                    teacher_shape,
                    config.batch_size,
                    self.accelerator.device,
                    self.bar,
                )
            if phase == 1 and done == 0 and config.copies_head:
                for head in student.heads[1:]:
                    head.load_state_dict(student.heads[0].state_dict())
            parameters = [p for p in student.parameters() if p.requires_grad]
            optimizer = self.accelerator.prepare(
                torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
            )
            if done:
                self._restore(optimizer, header, _under("optimizer.", tensors))
            self._phase(phase, done, epochs, optimizer)

    def _phase(self, phase: int, done: int, epochs: int, optimizer: Any) -> None:
        steps = len(_batches(len(self.inputs), self.config.batch_size, torch.Generator()))
        row = self.bar.add_task(
            f"phase {phase + 1}: {('mean', 'heads')[phase]}",
            total=epochs * steps,
            completed=done * steps,
            loss="",
        )
        for epoch in range(done, epochs):
            self._epoch(phase, epoch, epochs, optimizer, row)
            self._write_checkpoint(phase, epoch + 1, optimizer)

    def _epoch(self, phase: int, epoch: int, epochs: int, optimizer: Any, row: Any) -> None:
        config, device = self.config, self.accelerator.device
        # Every epoch has its own random streams, so a resumed run draws what the whole run drew.
        words = np.random.SeedSequence([config.seed, phase, epoch]).generate_state(3)
        shuffling, augmenting = (torch.Generator().manual_seed(int(word)) for word in words[:2])
        torch.manual_seed(int(words[2]))
        batches = _batches(len(self.inputs), config.batch_size, shuffling)
        loader = DataLoader(
            self.inputs,
            batch_sampler=batches,
            collate_fn=_unchanged,
            num_workers=config.workers,
            generator=shuffling,
        )
        self.student.train()
        rate = (config.learning_rate, config.learning_rate_heads)[phase]
        for step, (indices, x) in enumerate(zip(batches, loader, strict=True)):
            position = (epoch + step / len(batches)) / epochs
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * position))
            if self.augment is not None:
                x = (_augmented(self.augment, x[0], augmenting), *x[1:])
            x = tuple(part.to(device) for part in x)
            target = self._target(indices, x)
            with self.accelerator.autocast():
                loss = _step_loss(self.student, phase, x, target, config)
            if not torch.isfinite(loss):
                raise DistillationError(
                    f"The loss is {loss.item()} in phase {phase + 1}, epoch {epoch + 1}, "
                    f"step {step + 1}.",
                    "Training cannot go on from there; the checkpoint holds the epoch before.",
                    "Lower the learning rate or gradient_clip, or set mixed_precision='no'.",
                )
            self._update(loss, optimizer)
            self.bar.update(row, advance=1, loss=f"loss {loss.item():.4g}")

    def _update(self, loss: torch.Tensor, optimizer: Any) -> None:
        optimizer.zero_grad()
        self.accelerator.backward(loss)
        if self.config.gradient_clip is not None:
            self.accelerator.unscale_gradients(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
        optimizer.step()

    def _target(self, indices: Sequence[int], x: Inputs) -> torch.Tensor:
        if self.cached is not None:
            return torch.from_numpy(self.cached[:, indices]).to(self.accelerator.device)
        with torch.no_grad():
            return check_finite(self.ensemble(*x).float(), indices)

    def _identity(self) -> dict[str, str]:
        """What must be equal for a checkpoint to be of this run, by the name the user knows."""
        settings = dataclasses.asdict(self.config) | {"augment": self.augment is not None}
        del settings["workers"]
        teacher = hashlib.sha256(architecture(self.ensemble).encode())
        hash_tensors(teacher, tensor_state(self.ensemble).values())
        # With an online teacher a dataset may give new values on every visit.
        content = bool(self.inputs.arrays) or self.config.teacher == "cached"
        return {
            "config": json.dumps(settings, sort_keys=True),
            "data": self.inputs.digest(content),
            "ensemble": teacher.hexdigest(),
            "student": hashlib.sha256(architecture(self.student).encode()).hexdigest(),
        }

    def _read_checkpoint(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        path = self.folder / _CHECKPOINT
        if not path.exists():
            return {}, {}
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header: dict[str, Any] = json.loads(file.metadata()["hydra_edge"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError) as exc:
            raise ArtifactError(
                f"'{path}' cannot be read: {exc}.",
                "It is damaged or was not written by distill.",
                "Delete it to start over, or choose another workdir.",
            ) from exc
        saved: dict[str, str] = header["identity"]
        changed = [name for name, value in self.identity.items() if saved.get(name) != value]
        if changed:
            raise DistillationError(
                f"'{path}' belongs to a run with another {', another '.join(changed)}.",
                "Going on from it would mix two runs.",
                "Choose another workdir, or delete the file to start over.",
            )
        return header, tensors

    def _write_checkpoint(self, phase: int, epoch: int, optimizer: Any) -> None:
        saved, scaler = optimizer.state_dict(), self.accelerator.scaler
        tensors = {f"student.{name}": value for name, value in tensor_state(self.student).items()}
        for index, state in saved["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        # Clones, because safetensors refuses tensors that share memory.
        tensors = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        header = {
            "identity": self.identity,
            "phase": phase,
            "epoch": epoch,
            "param_groups": saved["param_groups"],
            "scaler": scaler.state_dict() if scaler else None,
        }
        data: bytes = safetensors.torch.save(tensors, {"hydra_edge": json.dumps(header)})
        write_atomic(self.folder / _CHECKPOINT, data)

    def _restore(
        self, optimizer: Any, header: dict[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": header["param_groups"]})
        if header["scaler"]:
            self.accelerator.scaler.load_state_dict(header["scaler"])


def _step_loss(
    student: Hydra, phase: int, x: Inputs, target: torch.Tensor, config: DistillationConfig
) -> torch.Tensor:
    """The loss of one step; every further term belongs here."""
    task = tasks.find(student.task)
    if phase == 0:
        output = student.heads[0](student.body(*x)).to(target.dtype)
        terms = [task.mean_loss(output, target, value) for value in config.temperatures]
        return torch.stack(terms).mean()
    outputs = student(*x).to(target.dtype)
    imitating = torch.arange(len(target), device=outputs.device) % len(outputs)
    terms = [task.head_loss(outputs[imitating], target, value) for value in config.temperatures]
    loss = torch.stack(terms).mean()
    if config.disagreement_weight:
        loss = loss + config.disagreement_weight * task.disagreement_loss(outputs, target)
    return loss


def _accelerator(config: DistillationConfig) -> Any:
    accelerate = require("accelerate", "train")
    try:
        accelerator = accelerate.Accelerator(mixed_precision=config.mixed_precision)
    except ValueError as exc:
        raise DistillationError(
            f"accelerate refuses mixed_precision='{config.mixed_precision}': {exc}",
            "The device lacks it, or this process has used another precision before.",
            "Set mixed_precision='no', or start a new process.",
        ) from exc
    if accelerator.num_processes > 1:
        raise DistillationError(
            f"accelerate runs {accelerator.num_processes} processes.",
            "One process writes the teacher's outputs and the checkpoint.",
            "Start with python instead of accelerate launch or torchrun.",
        )
    return accelerator


@contextlib.contextmanager
def _folder(workdir: Path | str | None) -> Iterator[Path]:
    if workdir is None:
        with tempfile.TemporaryDirectory(prefix="hydra-edge-") as name:
            yield Path(name)
        return
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ArtifactError(
            f"The folder '{workdir}' cannot be made: {exc.strerror}.",
            "The run keeps its checkpoint there.",
            "Choose another workdir.",
        ) from exc
    yield Path(workdir)


def _progress_bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
        disable=not shown,
    )


def _callers_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Gives torch's global random state back to the caller as it was."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    count = torch.get_device_module(device).device_count()
    return torch.random.fork_rng(devices=range(count), device_type=device.type)


@contextlib.contextmanager
def _evaluating(ensemble: Ensemble, device: torch.device) -> Iterator[None]:
    modes, home = {module: module.training for module in ensemble.modules()}, _device_of(ensemble)
    ensemble.to(device).eval()
    try:
        yield
    finally:
        ensemble.to(home)
        for module, mode in modes.items():
            module.training = mode


def _device_of(module: nn.Module) -> torch.device:
    tensor = next(iter(tensor_state(module).values()), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def _augmented(augment: Augment, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    result = augment(x, generator)
    if not isinstance(result, torch.Tensor) or result.shape[:1] != x.shape[:1]:
        got = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise InputError(
            f"augment returned {got} for a batch {list(x.shape)}.",
            "It must keep the batch axis.",
            "Return one augmented sample per sample.",
        )
    return result


def _batches(count: int, size: int, generator: torch.Generator) -> list[list[int]]:
    batches = list(chunks(torch.randperm(count, generator=generator).tolist(), size))
    if len(batches) > 1 and len(batches[-1]) == 1 < size:
        batches[-2:] = [batches[-2] + batches[-1]]  # batch normalisation cannot train on one sample
    return batches


def _unchanged(batch: Any) -> Any:
    return batch


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
