"""The training loop of a distillation: two phases of epochs of batches, on one process or several.

Everything random is drawn anew for each piece of each batch, from the seed and the position. So a
run that was killed, or goes on with another number of processes, draws what the whole run drew, as
long as processes × accumulation stays the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from hydra_edge import checkpoints, perturbations, sampling, tasks
from hydra_edge.batch_norm import synchronized
from hydra_edge.checkpoints import Checkpoint
from hydra_edge.distillation_config import DistillationConfig
from hydra_edge.ensembles import Hydra
from hydra_edge.errors import DistillationError
from hydra_edge.perturbations import Augment
from hydra_edge.processes import Processes
from hydra_edge.sampling import Piece
from hydra_edge.teachers import LiveTeacher, Teacher
from hydra_edge.transfer import Inputs, TransferSet

_PHASES = ("mean", "heads")
_log = logging.getLogger(__name__)


@dataclass
class Training:
    """One run: what it trains, on what, and with whom.

    Attributes:
        config: How to train.
        student: On the accelerator's device; trained in place.
        inputs: The N samples.
        make_teacher: Gives the teacher; called once, and only if something is left to train.
        augment: Changes the first input of a piece, or None.
        folder: Where the checkpoint lies; that of process 0 counts.
        identity: What must be equal for a checkpoint to be of this run.
        processes: Who takes part.
        accelerator: Of the library accelerate; its precision and its device.
        bar: Gets a row for each phase.
    """

    config: DistillationConfig
    student: Hydra
    inputs: TransferSet
    make_teacher: Callable[[], Teacher]
    augment: Augment | None
    folder: Path
    identity: Mapping[str, str]
    processes: Processes
    accelerator: Any
    bar: Progress

    def run(self) -> None:
        """Run what is left of both phases.

        Raises:
            ArtifactError: The checkpoint is damaged or cannot be written.
            DistillationError: It belongs to another run, the loss is not finite, or another process
                is gone.
        """
        config, trained = self.config, self._prepared_student()
        start = self.processes.on_main(lambda: checkpoints.read(self.folder, self.identity))
        self._losses = start.losses
        if start.started:
            place = f"{start.epoch} epochs and {start.step} steps of phase {start.phase + 1}"
            _log.info("Going on after %s.", place)
            trained.load_state_dict(dict(start.student))
        for phase, epochs in enumerate((config.epochs_mean, config.epochs_heads)):
            begin = start if phase == start.phase else Checkpoint(phase)
            if phase < start.phase or begin.epoch == epochs:
                continue
            if phase == 1 and not begin.epoch and not begin.step and config.copies_head:
                for head in trained.heads[1:]:
                    head.load_state_dict(trained.heads[0].state_dict())
            parameters = [p for p in trained.parameters() if p.requires_grad]
            optimizer = self.accelerator.prepare(
                torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
            )
            if begin.optimizer:
                state = {"state": begin.optimizer, "param_groups": begin.param_groups}
                optimizer.load_state_dict(state)
                if begin.scaler:
                    self.accelerator.scaler.load_state_dict(begin.scaler)
            where = f"in phase {phase + 1}"
            with self.processes.guarded(where):
                self._phase(begin, epochs, optimizer, trained)
        if trained is not self.student:
            self.student.load_state_dict(trained.state_dict())

    @functools.cached_property
    def _teacher(self) -> Teacher:
        return self.make_teacher()

    def _prepared_student(self) -> Hydra:
        if self.processes.size == 1:
            return self.student
        trained = synchronized(copy.deepcopy(self.student), self.accelerator.device)
        assert isinstance(trained, Hydra)
        return trained

    def _phase(self, begin: Checkpoint, epochs: int, optimizer: Any, trained: Hydra) -> None:
        phase, size = begin.phase, self.config.batch_size
        _ = self._teacher  # its row of the progress bar comes first
        model = self._parallel(trained if phase else _FirstHead(trained))
        steps = len(sampling.batches(len(self.inputs), size, torch.Generator()))
        row = self.bar.add_task(
            f"phase {phase + 1}: {_PHASES[phase]}",
            total=epochs * steps,
            completed=begin.epoch * steps + begin.step,
            loss="",
        )
        every = self.config.checkpoint_steps

        def save(epoch: int, step: int) -> None:
            if self.processes.is_main:
                position = (phase, epoch, step)
                scaler = self.accelerator.scaler
                checkpoints.write(
                    self.folder, self.identity, position, self._losses, trained, optimizer, scaler
                )

        for epoch in range(begin.epoch, epochs):
            done = begin.step if epoch == begin.epoch else 0
            for step in self._steps(phase, epoch, epochs, done, optimizer, model):
                self.bar.update(row, advance=1, loss=f"loss {self._losses[phase][-1]:.4g}")
                if every and (step + 1) % every == 0 and step + 1 < steps:
                    save(epoch, step + 1)
            save(epoch + 1, 0)

    def _steps(
        self, phase: int, epoch: int, epochs: int, done: int, optimizer: Any, model: nn.Module
    ) -> Iterator[int]:
        """Train on what is left of one epoch; yields the number of each batch done."""
        config, processes = self.config, self.processes
        words = np.random.SeedSequence([config.seed, phase, epoch]).generate_state(3)
        shuffling = torch.Generator().manual_seed(int(words[0]))
        batches = sampling.batches(len(self.inputs), config.batch_size, shuffling)
        plans = [sampling.pieces(b, processes.size, config.accumulation) for b in batches]
        loader = iter(
            DataLoader(
                self.inputs,
                batch_sampler=[
                    part[processes.rank].indices for plan in plans[done:] for part in plan
                ],
                collate_fn=_unchanged,
                num_workers=config.workers,
                generator=shuffling,
            )
        )
        model.train()
        rate = (config.learning_rate, config.learning_rate_heads)[phase]
        for step, plan in enumerate(plans[done:], done):
            position = (epoch + step / len(plans)) / epochs
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * position))
            optimizer.zero_grad()
            total = torch.zeros((), device=self.accelerator.device)
            for part in plan:
                with self._exchanging(model, last=part is plan[-1]):
                    own = part[processes.rank]
                    loss = self._loss(phase, (epoch, step), part, next(loader), model)
                    loss = loss if own.weight == 1 else loss * own.weight
                    total = total + loss.detach()
                    # The gradients are averaged over the processes, and the weights sum to 1.
                    self.accelerator.backward(
                        loss if processes.size == 1 else loss * processes.size
                    )
            value = processes.total(total).item()
            if not math.isfinite(value):
                raise DistillationError(
                    f"The loss is {value} in phase {phase + 1}, epoch {epoch + 1}, "
                    f"step {step + 1}.",
                    "Training cannot go on from there; the checkpoint holds an earlier state.",
                    "Lower the learning rate or gradient_clip, or set mixed_precision='no'.",
                )
            self._update(optimizer)
            self._losses[phase].append(value)
            yield step

    def _loss(
        self, phase: int, at: tuple[int, int], part: Sequence[Piece], x: Inputs, model: nn.Module
    ) -> torch.Tensor:
        """The loss of the piece that this process does of one part of a batch."""
        config, own = self.config, part[self.processes.rank]
        words = np.random.SeedSequence([config.seed, phase, *at, own.number]).generate_state(2)
        torch.manual_seed(int(words[0]))
        generator = torch.Generator().manual_seed(int(words[1]))
        if self.augment is not None:
            x = perturbations.augmented(self.augment, x, generator)
        x = tuple(value.to(self.accelerator.device) for value in x)
        if config.mixup:
            x = perturbations.mixed(x, config.mixup, generator)
        if config.ods:
            assert isinstance(self._teacher, LiveTeacher)
            x = perturbations.diversified(x, config.ods, self._teacher.direction, generator)
        target = self._teacher.targets(x, [piece.indices for piece in part], self.processes)
        with self.accelerator.autocast():
            return step_loss(self.student.task, phase, model(*x), target, config)

    def _update(self, optimizer: Any) -> None:
        if self.config.gradient_clip is not None:
            self.accelerator.unscale_gradients(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
        optimizer.step()

    def _parallel(self, module: nn.Module) -> nn.Module:
        if self.processes.size == 1:
            return module
        device = self.accelerator.device
        return DistributedDataParallel(
            module,
            device_ids=None if device.type == "cpu" else [device],
            find_unused_parameters=self._leaves_some_unused(module),
        )

    def _leaves_some_unused(self, module: nn.Module) -> bool:
        """Whether a parameter gets no gradient, for which the others must not wait."""
        module.eval()
        x = self.inputs.__getitems__(range(1))
        output = module(*(part.to(self.accelerator.device) for part in x))
        parameters = [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(output.float().sum(), parameters, allow_unused=True)
        return any(gradient is None for gradient in gradients)

    def _exchanging(
        self, model: nn.Module, *, last: bool
    ) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged once per batch, with its last piece."""
        if isinstance(model, DistributedDataParallel) and not last:
            waiting: contextlib.AbstractContextManager[None] = model.no_sync()
            return waiting
        return contextlib.nullcontext()


def step_loss(
    task_name: str,
    phase: int,
    output: torch.Tensor,
    target: torch.Tensor,
    config: DistillationConfig,
) -> torch.Tensor:
    """The loss of one piece, a mean over its samples; every further term belongs here.

    Args:
        task_name: The task.
        phase: 0: ``output`` is one head's, ``[B, C]``; 1: all heads', ``[H, B, C]``.
        output: What the student says.
        target: What the members say, ``[M, B, C]``.
        config: Temperatures and weights.
    """
    task, output = tasks.find(task_name), output.to(target.dtype)
    if phase == 0:
        terms = [task.mean_loss(output, target, value) for value in config.temperatures]
        return torch.stack(terms).mean()
    imitating = torch.arange(len(target), device=output.device) % len(output)
    terms = [task.head_loss(output[imitating], target, value) for value in config.temperatures]
    loss = torch.stack(terms).mean()
    if config.disagreement_weight:
        loss = loss + config.disagreement_weight * task.disagreement_loss(output, target)
    return loss


class _FirstHead(nn.Module):
    """What the first phase trains: the body and head 0."""

    def __init__(self, student: Hydra) -> None:
        super().__init__()
        self.student_body, self.student_head = student.body, student.heads[0]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.student_head(self.student_body(*inputs))
        return output


def _unchanged(batch: Any) -> Any:
    return batch
