"""`DistillationConfig`: how a student is trained."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from hydra_edge.errors import InputError


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
        mixup: α of the Beta distribution that samples are mixed by, see `perturbations.mixed`;
            0 mixes none. Needs ``teacher="online"``.
        ods: Length of a step, in the inputs' units, towards where a member's outputs change most,
            see `perturbations.diversified`; 0 takes none. Needs ``teacher="online"``.
        accumulation: Steps that share one batch, at most: each holds the activations of
            batch_size / (accumulation · processes) samples. Batch statistics are those of a step.
        checkpoint_steps: Batches between checkpoints within an epoch; 0 writes one per epoch.
        timeout_s: Seconds that an exchange between processes may take until the run fails.

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
    mixup: float = 0.0
    ods: float = 0.0
    accumulation: int = 1
    checkpoint_steps: int = 0
    timeout_s: float = 300.0

    @property
    def copies_head(self) -> bool:
        """Whether head 0 becomes all heads after the first phase."""
        return self.warmstart_heads and self.epochs_mean > 0

    def __post_init__(self) -> None:
        least = {"epochs_mean": 0, "epochs_heads": 1, "batch_size": 1, "seed": 0, "workers": 0}
        least |= {"accumulation": 1, "checkpoint_steps": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            self._require(name, value >= minimum, f"an integer of {minimum} or more")
        positive = bool(self.temperatures) and all(0 < v < math.inf for v in self.temperatures)
        self._require("temperature", positive, "one or more finite numbers above 0")
        for name in ("learning_rate", "learning_rate_heads", "gradient_clip", "timeout_s"):
            value = getattr(self, name)
            unset = name == "gradient_clip" and value is None
            self._require(name, unset or 0 < value < math.inf, "a finite number above 0")
        for name in ("weight_decay", "disagreement_weight", "mixup", "ods"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number of 0 or more")
        choices = {"teacher": ("cached", "online"), "mixed_precision": ("no", "fp16", "bf16")}
        for name, allowed in choices.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")

    @property
    def identity(self) -> dict[str, object]:
        """The settings that a result depends on; the others may change when a run goes on."""
        execution = {"workers", "accumulation", "checkpoint_steps", "timeout_s"}
        return {n: v for n, v in dataclasses.asdict(self).items() if n not in execution}

    @property
    def temperatures(self) -> tuple[float, ...]:
        """`temperature` as a tuple."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise InputError(f"{name} is {value!r}.", f"It must be {allowed}.", "Change it.")
