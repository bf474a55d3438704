"""The processes that one distillation runs in: who they are, and what they tell each other.

One process needs nothing of this: every exchange then gives back what went in. Several are started
by torchrun, by `launch`, or by a caller that has set up `torch.distributed` itself. Gradients and
predictions go through the default group (NCCL on GPUs, gloo on CPUs), small Python objects through
a second group of gloo, which is patient: one process may wait while another computes.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from hydra_edge.errors import DistillationError, HydraError

T = TypeVar("T")

# One process may compute the teacher's outputs for hours while others have finished theirs.
_PATIENCE = datetime.timedelta(days=7)
# What gloo, NCCL and torch's own layer say when a peer is gone or silent; plain RuntimeErrors.
_PLACE = re.compile(r"^\[[^\]]*\] *")  # the line of C++ that they begin with
_LOST = ("connection", "gloo", "nccl", "timed out", "timeout", "processgroup", "socket", "peer")


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
        control: Group for Python objects and waiting; None when there is one process.
    """

    rank: int = 0
    size: int = 1
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints and shows progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            distributed.barrier(group=self.control)

    def from_main(self, value: T) -> T:
        """What process 0 gives here."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def on_main(self, compute: Callable[[], T]) -> T:
        """What process 0 computes, or the error it raises, in every process."""
        if self.size == 1:
            return compute()
        outcome: tuple[Any, HydraError | None] = (None, None)
        if self.is_main:
            try:
                outcome = (compute(), None)
            except HydraError as exc:
                outcome = (None, exc)
        value, error = self.from_main(outcome)
        if error is not None:
            raise error
        found: T = value
        return found

    def gather(self, value: T) -> list[T]:
        """What every process gives here, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.control)
        return values

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def concatenate(self, value: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The tensors of all processes, one after the other along the first axis.

        Args:
            value: ``[counts[rank], …]``.
            counts: Length of the first axis in each process.

        Returns:
            ``[sum(counts), …]``.
        """
        if self.size == 1:
            return value
        longest = max(counts)
        padded = value.new_zeros((longest, *value.shape[1:]))
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @contextlib.contextmanager
    def guarded(self, where: str) -> Iterator[None]:
        """Turn the loss of another process into an error that says what to do.

        Raises:
            DistillationError: Another process is gone, or does not answer in time.
        """
        try:
            yield
        except RuntimeError as exc:
            text = _PLACE.sub("", str(exc).strip()).split(". ")[0].splitlines()
            lost = self.size > 1 and any(word in str(exc).lower() for word in _LOST)
            if not lost or isinstance(exc, torch.OutOfMemoryError):
                raise
            raise DistillationError(
                f"Process {self.rank} of {self.size} lost another one {where}: "
                f"{text[0] if text else type(exc).__name__}.",
                "That one was killed, failed or does not answer; the launcher and its own output "
                "say which it was and why.",
                "Start the same command again, with any number of processes: it goes on from the "
                "latest checkpoint in the work folder.",
            ) from exc


@contextlib.contextmanager
def joined(timeout_s: float) -> Iterator[Processes]:
    """This process among those that torchrun or the caller has started.

    Args:
        timeout_s: How long an exchange of tensors may take before the others count as lost; it
            counts only where this call sets up `torch.distributed`.

    Raises:
        DistillationError: The other processes cannot be reached.
    """
    if not distributed.is_available():
        yield Processes()
        return
    if not distributed.is_initialized() and distributed.is_torchelastic_launched():
        _set_up(timeout_s)
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield Processes()
        return
    control = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    yield Processes(distributed.get_rank(), distributed.get_world_size(), control)
    # Not after an error: the others may be gone, and closing would wait for them.
    distributed.destroy_process_group(control)


def leave() -> None:
    """Close what `joined` has set up; a process that ends without it warns."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def stop_when_told() -> None:
    """Let SIGTERM, which a launcher sends when another process failed, raise an error.

    Raises:
        DistillationError: Later, in the main thread, when the signal comes.
    """

    def stop(number: int, frame: object) -> None:
        raise DistillationError(
            "This process was told to stop.",
            "Another process of the run failed, or somebody stopped the launcher, which says why.",
            "Start the same command again: it goes on from the latest checkpoint.",
        )

    signal.signal(signal.SIGTERM, stop)


def launch(arguments: Sequence[str], count: int) -> None:
    """Run ``python -m hydra_edge.cli`` in ``count`` processes of this machine, as torchrun does.

    Args:
        arguments: What follows on the command line.
        count: How many processes.

    Raises:
        DistillationError: One of them failed; the others were stopped.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        run_id="hydra-edge",
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "hydra_edge.cli", *arguments)
    except ChildFailedError as exc:
        rank, failure = exc.get_first_failure()
        how = (
            f"was killed by {failure.signal_name()}"
            if failure.exitcode < 0
            else f"ended with exit code {failure.exitcode}"
        )
        raise DistillationError(
            f"Process {rank} of {count} {how} (process id {failure.pid}).",
            "The others wait for it in every step, so they were stopped, too.",
            "See its output above; a kill without output is often a lack of memory. Then run the "
            "same command again, with any number of processes: it goes on from the latest "
            "checkpoint.",
        ) from exc


def _set_up(timeout_s: float) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.get_node_local_rank())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as exc:
        raise DistillationError(
            f"The processes cannot reach each other: {exc}.",
            f"They are joined by torch.distributed with {backend}.",
            "Check the address and port given to torchrun, and that every node was started.",
        ) from exc
