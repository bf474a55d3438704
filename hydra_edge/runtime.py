"""`load` and `Session`: a live engine that answers with its uncertainty. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from hydra_edge import backends, tasks
from hydra_edge.artifacts.arrays import any_batch, check_arrays, to_numpy
from hydra_edge.artifacts.engine import MAIN, Engine, Program
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.artifacts.prediction import Prediction
from hydra_edge.equivalence import replay
from hydra_edge.errors import GateError, InputError
from hydra_edge.programs import Runner

Array = npt.NDArray[np.generic]


def load(engine: str | Path | Engine, *, threads: int | None = None) -> Session:
    """Open an engine on this machine.

    Args:
        engine: A ``.hydra`` file or an `Engine`.
        threads: CPU threads for one run; None means one per core.

    Returns:
        A session; use it as a context manager or call ``close``.

    Raises:
        ArtifactError: The file is missing, damaged or too new.
        DeviceMismatchError: It was built for something that is not here.
        InputError: Fewer threads than one were asked for.

    Example:
        >>> with load("student.hydra") as session:  # doctest: +SKIP
        ...     prediction = session.run(images)
        ...     prediction.mean_prob, prediction.mutual_information
    """
    return Session(engine if isinstance(engine, Engine) else Engine.load(engine), threads)


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
        self._programs = {
            name: _LiveProgram(name, program, backend.open(program.payload, threads))
            for name, program in engine.programs.items()
        }
        self.threads = next(iter(self._programs.values())).runner.threads
        self._closed = False

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
            inputs: The input as an array (numpy, torch or any DLPack array on the CPU), or a
                mapping of input names to arrays. Axis 0 is the batch; a batch above the engine's
                maximum is split, one below its minimum is padded.
            head_logits: Return every head's raw output ``[M, B, C]`` too.
            program: Which program of the engine to run.

        Returns:
            The outputs by name.

        Raises:
            InputError: Names, shapes or dtypes do not fit, or the session is closed.
        """
        self._require_open()
        return Prediction(self._find(program).run(inputs, head_logits))

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
        """Release the programs. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            for live in self._programs.values():
                live.runner.close()

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

    def _find(self, name: str) -> _LiveProgram:
        try:
            return self._programs[name]
        except KeyError:
            raise InputError(
                f"The engine has no program '{name}'.",
                f"It has: {', '.join(self._programs)}.",
                "Name one of those.",
            ) from None


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


class _LiveProgram:
    """One program and its runner: checks, splits, pads, runs, joins."""

    def __init__(self, name: str, program: Program, runner: Runner) -> None:
        self.name = name
        self.program = program
        self.runner = runner
        self._single = program.inputs[0] if len(program.inputs) == 1 else None
        self._names = [spec.name for spec in program.outputs if spec.name not in program.optional]
        self._all_names = [spec.name for spec in program.outputs]
        self._axes = {spec.name: self._batch_axis(spec) for spec in program.outputs}

    def run(self, inputs: object, optional: bool) -> dict[str, Array]:
        """Outputs by name for any batch size."""
        feeds = self._feeds(inputs)
        names = self._all_names if optional else self._names
        if optional and not self.program.optional and "head_logits" not in self._all_names:
            raise InputError(
                "The engine has no per-head output.",
                "It was exported without head_logits.",
                "Export the model with head_logits=True, or run without asking for it.",
            )
        low, _, high = self.program.batch
        size = len(next(iter(feeds.values())))
        if low <= size <= high:
            return dict(zip(names, self.runner.run(feeds, names), strict=True))
        parts = [
            self._run_part({key: array[i : i + high] for key, array in feeds.items()}, names, low)
            for i in range(0, size, high)
        ]
        return {
            name: np.concatenate([part[name] for part in parts], axis=self._axes[name])
            for name in names
        }

    def _run_part(self, feeds: Mapping[str, Array], names: list[str], low: int) -> dict[str, Array]:
        """One part of a split batch; a short one is padded with its last sample."""
        size = len(next(iter(feeds.values())))
        if size < low:
            feeds = {
                key: np.concatenate([array, np.repeat(array[-1:], low - size, axis=0)])
                for key, array in feeds.items()
            }
        outputs = dict(zip(names, self.runner.run(feeds, names), strict=True))
        for name, array in outputs.items():
            if array.shape[self._axes[name] : self._axes[name] + 1] != (max(size, low),):
                raise InputError(
                    f"The output '{name}' is {list(array.shape)} for {max(size, low)} samples.",
                    "A batch outside the engine's range is run in parts, which must be joined.",
                    f"Run {low} to {self.program.batch[2]} samples at a time.",
                )
        if size < low:
            outputs = {
                name: array.take(range(size), axis=self._axes[name])
                for name, array in outputs.items()
            }
        return outputs

    def _feeds(self, inputs: object) -> dict[str, Array]:
        specs = self.program.inputs
        if isinstance(inputs, Mapping):
            given = {str(name): to_numpy(value, str(name)) for name, value in inputs.items()}
        elif self._single is not None:
            given = {self._single.name: to_numpy(inputs, self._single.name)}
        else:
            raise InputError(
                f"The engine has {len(specs)} inputs and one array was given.",
                f"The inputs are {'; '.join(map(str, specs))}.",
                "Pass a mapping of names to arrays.",
            )
        return check_arrays(given, any_batch(specs))

    def replay(self) -> float:
        """See `hydra_edge.equivalence.replay`."""
        return replay(self.runner, self.program.golden)

    def _batch_axis(self, output: TensorSpec) -> int:
        """The axis of an output that has the name, or the fixed size, of the inputs' batch axis.

        Exporters do not always name it alike: then it is the only named axis, or else axis 0.
        """
        if output.name in self.program.optional:
            return 1  # per-head outputs are [M, B, C]
        batch = self.program.inputs[0].shape[0]
        if batch in output.shape:
            return output.shape.index(batch)
        named = [axis for axis, size in enumerate(output.shape) if isinstance(size, str)]
        return named[0] if len(named) == 1 else 0


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
