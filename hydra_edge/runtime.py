"""`load` and `Session`: a live engine that answers with its uncertainty. Needs no torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from hydra_edge import backends, tasks
from hydra_edge.artifacts.engine import MAIN, Engine
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.artifacts.prediction import Prediction
from hydra_edge.errors import DeviceMismatchError, GateError, InputError
from hydra_edge.gpu.arrays import DeviceArray, is_on_gpu
from hydra_edge.live_programs import LiveProgram
from hydra_edge.programs import Runner

Array = npt.NDArray[np.generic]
_SUBMITTED_AT_ONCE = 4
_log = logging.getLogger(__name__)


def load(
    engine: str | Path | Engine, *, threads: int | None = None, rebuild: bool = False
) -> Session:
    """Open an engine on this machine.

    Args:
        engine: A ``.hydra`` file or an `Engine`.
        threads: CPU threads for one run; None means one per core.
        rebuild: Build it again for this machine, from the graph in it, where it is for another one
            or not built yet. That takes a builder, and minutes with TensorRT; the file stays.

    Returns:
        A session; use it as a context manager or call ``close``.

    Raises:
        ArtifactError: The file is missing, damaged or too new.
        DeviceMismatchError: It was built for something that is not here, or is not built yet.
        InputError: Fewer threads than one were asked for.

    Example:
        >>> with load("student.hydra") as session:  # doctest: +SKIP
        ...     prediction = session.run(images)
        ...     prediction.mean_prob, prediction.mutual_information
    """
    found = engine if isinstance(engine, Engine) else Engine.load(engine)
    if not found.is_built:
        if not rebuild:
            raise DeviceMismatchError(
                "The engine is not built yet.",
                f"It is for {found.target}, and holds what that needs to build it.",
                "On the device: hydra-edge compile FILE.hydra -o FILE.hydra, or "
                "load(..., rebuild=True).",
            )
        return Session(_rebuilt(found, "it is not built yet"), threads)
    try:
        return Session(_filled(found), threads)
    except DeviceMismatchError as mismatch:
        if not rebuild:
            raise
        return Session(_rebuilt(found, mismatch.why), threads)


def _rebuilt(engine: Engine, why: str) -> Engine:
    # Running calls building here and below: what that loads, a device may lack.
    from hydra_edge import pipeline

    _log.warning("building the engine again for this machine: %s", why)
    return _filled(pipeline.rebuild(engine, "local"))


def _filled(engine: Engine) -> Engine:
    """The engine with the weights that it was stored without."""
    if not any(program.is_stripped for program in engine.programs.values()):
        return engine
    from hydra_edge import refitting

    return refitting.fill(engine)


class Session:
    """A live engine. ``run`` is safe to call from several threads at once.

    Attributes:
        engine: The engine it runs.
        threads: CPU threads one run may use.
    """

    def __init__(self, engine: Engine, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise InputError(
                f"{threads} threads were asked for.",
                "A program runs on at least one.",
                "Leave it out for one per core.",
            )
        backend = backends.find(engine.backend)
        self.engine = engine
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._programs: dict[str, LiveProgram] = {}
        self._derived: dict[str, Runner] = {}
        self._asked_threads = threads
        try:
            for name, program in engine.programs.items():
                runner = backend.open(program.payload, threads, program.facts)
                self._programs[name] = LiveProgram(name, program, runner)
        except BaseException:
            self.close()
            raise
        self.threads = next(iter(self._programs.values())).runner.threads

    @property
    def programs(self) -> Mapping[str, SessionProgram]:
        """Its programs by name, each of which runs by itself."""
        return {name: SessionProgram(self, name) for name in self._programs}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the main program."""
        return self._find(MAIN).program.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs of the main program."""
        return self._find(MAIN).program.outputs

    def run(self, inputs: object, *, head_logits: bool = False, program: str = MAIN) -> Prediction:
        """Predict.

        Args:
            inputs: The input as an array (numpy, torch or any DLPack array), or a mapping of input
                names to arrays. Axis 0 is the batch; a batch above the engine's maximum is split,
                one below its minimum is padded. An engine on a GPU reads arrays on that GPU (of
                torch, CuPy, PyCUDA) where they are, and takes no other batches of them.
            head_logits: Return every head's raw output ``[M, B, C]`` too.
            program: Which program of the engine to run.

        Returns:
            The outputs by name.

        Raises:
            InputError: Names, shapes or dtypes do not fit, or the session is closed.
        """
        self._require_open()
        return Prediction(self._find(program).run(inputs, head_logits))

    def run_on_device(
        self, inputs: object, *, head_logits: bool = False, program: str = MAIN
    ) -> dict[str, DeviceArray]:
        """Predict, and leave the outputs on the GPU.

        Args:
            inputs: As for `run`, but of a batch that the engine takes at once.
            head_logits: Return every head's raw output ``[M, B, C]`` too.
            program: Which program of the engine to run.

        Returns:
            The outputs by name. They are complete; ``torch.from_dlpack`` takes them as they are.

        Raises:
            InputError: The engine does not run on a GPU, or as for `run`.
        """
        self._require_open()
        return self._find(program).run_on_device(inputs, head_logits)

    def submit(
        self, inputs: object, *, head_logits: bool = False, program: str = MAIN
    ) -> Future[Prediction]:
        """Start `run` in another thread.

        Args:
            inputs: As for `run`, but on the CPU; they must stay as they are until the result is
                there.
            head_logits: Return every head's raw output ``[M, B, C]`` too.
            program: Which program of the engine to run.

        Returns:
            What `run` will return or raise. Closing the session cancels what has not begun.

        Raises:
            InputError: The session is closed, or an array lies on a GPU.
        """
        values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
        if any(map(is_on_gpu, values)):
            raise InputError(
                "An array on a GPU was submitted.",
                "It is complete on the current stream of the thread that made it; another would "
                "run it.",
                "Call run or run_on_device in that thread, or copy the array to the CPU first.",
            )
        with self._lock:
            self._require_open()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_SUBMITTED_AT_ONCE, "hydra-edge")
            return self._pool.submit(self.run, inputs, head_logits=head_logits, program=program)

    def derived(self, name: str, make: Callable[[], bytes]) -> Runner:
        """A runner of something made of the engine's programs, which closes with the session.

        Args:
            name: What it is called here.
            make: Gives a program of the engine's backend; called the first time.

        Raises:
            InputError: The session is closed.
            CompilationError: The backend refuses it.
        """
        with self._lock:
            self._require_open()
            if name not in self._derived:
                backend = backends.find(self.engine.backend)
                self._derived[name] = backend.open(make(), self._asked_threads, {})
            return self._derived[name]

    def self_test(self) -> dict[str, float]:
        """Replay the recorded batch of every program.

        Returns:
            The relative RMS difference found, by program.

        Raises:
            GateError: A program answers differently than its graph did when it was compiled.
            InputError: The session is closed.
        """
        self._require_open()
        errors = {name: live.replay() for name, live in self._programs.items()}
        for name, error in errors.items():
            limit = self.engine.programs[name].golden.tolerance
            if error > limit:
                raise GateError(
                    f"Program '{name}' differs by {error:.2g} (relative RMS) from its recording.",
                    f"Up to {limit:g} is rounding on another CPU; more is a wrong result.",
                    "Compile the engine on this machine, and please report both machines.",
                )
        return errors

    def close(self) -> None:
        """Wait for what was submitted and has begun, and release the programs. Twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for live in self._programs.values():
            live.runner.close()
        for runner in self._derived.values():
            runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        engine = self.engine
        return f"Session({engine.kind}, {engine.target}, {engine.precision}, heads={engine.heads})"

    def _require_open(self) -> None:
        if self._closed:
            raise InputError(
                "The session is closed.", "Its program was released.", "Load the engine again."
            )

    def _find(self, name: str) -> LiveProgram:
        try:
            return self._programs[name]
        except KeyError:
            raise InputError(
                f"The engine has no program '{name}'.",
                f"It has: {', '.join(self._programs)}.",
                "Name one of those.",
            ) from None


class SessionProgram:
    """One program of a session, e.g. ``session.programs["step"]``; it lives as long as that.

    Attributes:
        session: The session it belongs to.
        name: What the engine calls it.
        program: What the engine keeps of it.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.session = session
        self.name = name
        self.program = session.engine.programs[name]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Its inputs."""
        return self.program.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Its outputs."""
        return self.program.outputs

    @property
    def on_device(self) -> bool:
        """Whether its outputs can stay on the device it runs on: `run_on_device`."""
        return self.session._find(self.name).on_device

    def run(self, inputs: object, *, head_logits: bool = False) -> Prediction:
        """See `Session.run`."""
        return self.session.run(inputs, head_logits=head_logits, program=self.name)

    def run_on_device(self, inputs: object, *, head_logits: bool = False) -> dict[str, DeviceArray]:
        """See `Session.run_on_device`."""
        return self.session.run_on_device(inputs, head_logits=head_logits, program=self.name)

    def __repr__(self) -> str:
        return f"SessionProgram({self.name} of {self.session!r})"


class EnsembleSession:
    """M member engines run one after another: what an ensemble costs without any of our work.

    Args:
        members: Open sessions; each returns one array of logits ``[B, C]``.
        task: How their outputs become one prediction.

    Raises:
        InputError: There is no member, one returns more than its logits, or their sizes differ.
    """

    def __init__(self, members: Sequence[Session], task: str = "classification") -> None:
        if not members or any(len(member.outputs) != 1 for member in members):
            raise InputError(
                f"An ensemble of {len(members)} sessions cannot be formed.",
                "Each member returns exactly one array, its logits.",
                "Compile the members' own ONNX files, without a summary.",
            )
        if len({member.outputs[0].shape[1:] for member in members}) > 1:
            raise InputError(
                f"The members give {'; '.join(str(member.outputs[0]) for member in members)}.",
                "Their outputs are stacked, so they must have the same size.",
                "Load members trained for the same outputs.",
            )
        self.members = tuple(members)
        self.threads = members[0].threads
        self.task = task
        self._task = tasks.find(task)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of every member."""
        return self.members[0].inputs

    def run(self, inputs: object, *, head_logits: bool = False) -> Prediction:
        """Run all members and summarize them in numpy; see `Session.run`."""
        logits = np.stack([next(iter(member.run(inputs).values())) for member in self.members])
        arrays: dict[str, Array] = {
            name: value.astype(np.float32) for name, value in self._task.summarize(logits).items()
        }
        if head_logits:
            arrays["head_logits"] = logits
        return Prediction(arrays)

    def close(self) -> None:
        """Close all members."""
        for member in self.members:
            member.close()


def require_same_inputs(
    sessions: Mapping[str, Session | EnsembleSession],
) -> tuple[TensorSpec, ...]:
    """The inputs all sessions share.

    Raises:
        InputError: Two sessions take different inputs, or there is no session.
    """
    known: tuple[TensorSpec, ...] | None = None
    for name, session in sessions.items():
        if known is not None and session.inputs != known:
            raise InputError(
                f"'{name}' takes {'; '.join(map(str, session.inputs))}.",
                f"The others take {'; '.join(map(str, known))}.",
                "Compare engines of models with the same inputs.",
            )
        known = session.inputs
    if known is None:
        raise InputError("There is no session.", "Nothing can be compared.", "Pass at least one.")
    return known
