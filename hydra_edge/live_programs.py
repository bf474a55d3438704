"""One program of a session and its runner: checks, splits, pads, runs, joins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from hydra_edge.artifacts.arrays import any_batch, check_shapes, in_c_order, to_numpy
from hydra_edge.artifacts.engine import Program
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.equivalence import replay
from hydra_edge.errors import InputError
from hydra_edge.gpu.arrays import DeviceArray, Foreign, is_on_gpu
from hydra_edge.programs import Runner

Array = npt.NDArray[np.generic]


@runtime_checkable
class _DeviceRunner(Protocol):
    """A runner on a GPU, which also takes and gives arrays that lie there."""

    def run_on_device(
        self, feeds: Mapping[str, Array | Foreign], outputs: Sequence[str]
    ) -> list[DeviceArray]:
        """Run once and leave the outputs where they are."""
        ...


class LiveProgram:
    """One program and its runner.

    Args:
        name: What the engine calls it.
        program: The program.
        runner: What runs it.
    """

    def __init__(self, name: str, program: Program, runner: Runner) -> None:
        self.name = name
        self.program = program
        self.runner = runner
        self._device_runner = runner if isinstance(runner, _DeviceRunner) else None
        self._specs = any_batch(program.inputs)
        self._single = program.inputs[0] if len(program.inputs) == 1 else None
        self._names = [spec.name for spec in program.outputs if spec.name not in program.optional]
        self._all_names = [spec.name for spec in program.outputs]
        self._axes = {spec.name: self._batch_axis(spec) for spec in program.outputs}

    @property
    def on_device(self) -> bool:
        """Whether outputs can stay where it runs, away from the CPU's memory."""
        return self._device_runner is not None

    def run(self, inputs: object, optional: bool) -> dict[str, Array]:
        """Outputs by name for any batch size."""
        feeds = self._feeds(inputs)
        names = self._wanted(optional)
        low, _, high = self.program.batch
        size = next(iter(feeds.values())).shape[0]
        if low <= size <= high:
            return dict(zip(names, self.runner.run(feeds, names), strict=True))
        if any(isinstance(value, Foreign) for value in feeds.values()):
            raise self._not_at_once(size)
        parts = [
            self._run_part({key: array[i : i + high] for key, array in feeds.items()}, names, low)
            for i in range(0, size, high)
        ]
        return {
            name: np.concatenate([part[name] for part in parts], axis=self._axes[name])
            for name in names
        }

    def run_on_device(self, inputs: object, optional: bool) -> dict[str, DeviceArray]:
        """Outputs by name, on the GPU, for a batch that the engine takes at once."""
        if self._device_runner is None:
            raise InputError(
                "The outputs were to stay on the GPU.",
                "This engine runs on the CPU.",
                "Use run(), or compile the model for a GPU.",
            )
        feeds = self._feeds(inputs)
        names = self._wanted(optional)
        low, _, high = self.program.batch
        size = next(iter(feeds.values())).shape[0]
        if not low <= size <= high:
            raise self._not_at_once(size)
        return dict(zip(names, self._device_runner.run_on_device(feeds, names), strict=True))

    def _wanted(self, optional: bool) -> list[str]:
        if optional and not self.program.optional and "head_logits" not in self._all_names:
            raise InputError(
                "The engine has no per-head output.",
                "It was exported without head_logits.",
                "Export the model with head_logits=True, or run without asking for it.",
            )
        return self._all_names if optional else self._names

    def _not_at_once(self, size: int) -> InputError:
        low, _, high = self.program.batch
        return InputError(
            f"A batch of {size} was given on the GPU, or was to stay there.",
            f"The engine takes {low} to {high} samples; arrays on a GPU are not split or padded.",
            "Run such batches, or pass arrays of the CPU to run().",
        )

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

    def _feeds(self, inputs: object) -> dict[str, Any]:
        """Arrays by name: of numpy and C-contiguous, or `Foreign` ones on the GPU."""
        if isinstance(inputs, Mapping):
            given = {str(name): self._read(value, str(name)) for name, value in inputs.items()}
        elif self._single is not None:
            given = {self._single.name: self._read(inputs, self._single.name)}
        else:
            raise InputError(
                f"The engine has {len(self._specs)} inputs and one array was given.",
                f"The inputs are {'; '.join(map(str, self.program.inputs))}.",
                "Pass a mapping of names to arrays.",
            )
        check_shapes(given, self._specs)
        ordered = {spec.name: given[spec.name] for spec in self._specs}
        return {
            name: value if isinstance(value, Foreign) else in_c_order(value)
            for name, value in ordered.items()
        }

    def _read(self, value: object, name: str) -> Array | Foreign:
        if not is_on_gpu(value):
            return to_numpy(value, name)
        if self._device_runner is None:
            raise InputError(
                f"The value for '{name}' lies on a GPU.",
                "This engine runs on the CPU.",
                "Copy it there first, e.g. tensor.cpu() or cupy.asnumpy(x).",
            )
        return Foreign(value, name)

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
