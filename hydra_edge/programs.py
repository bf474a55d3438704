"""What is asked of a backend and what it gives: a request to build, a built program, a runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx

from hydra_edge.artifacts.graph import Json, TensorSpec
from hydra_edge.errors import ArtifactError, InputError
from hydra_edge.targets import Gpu, Target

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class BuildOptions:
    """How TensorRT or TensorRT-RTX builds an engine; each refuses what it does not have.

    Attributes:
        profiles: Further batch ranges (smallest, best, largest), each optimized for by itself.
        workspace_mb: Scratch memory a layer may use; at most half of what is free on the device.
        timing_cache: File that remembers how fast each way to compute a layer was.
        optimization_level: 0 to 5: how long to look for faster ways; 3 is TensorRT's own.
        tf32: Let fp32 layers multiply with 10 bits of mantissa.
        hardware_compatible: One engine for every GPU from Ampere on, somewhat slower.
        refittable: Weights can be changed without a build, see `hydra_edge.refit`.
        strip_weights: Leave out weights that the graph beside the engine has, too; they are filled
            in when it is loaded. Implies refittable.
        dla_core: The deep-learning accelerator to use, where the GPU is not needed.
        progress: Show a progress bar.
    """

    profiles: tuple[tuple[int, int, int], ...] = ()
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    optimization_level: int | None = None
    tf32: bool = False
    hardware_compatible: bool = False
    refittable: bool = False
    strip_weights: bool = False
    dla_core: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for batch in self.profiles:
            check_batch(batch)
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise InputError(
                f"The optimization level is {self.optimization_level}.",
                "TensorRT has the levels 0 (fast build) to 5 (fast engine).",
                "Leave it out for TensorRT's own, 3.",
            )
        path = self.timing_cache
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InputError(
                f"The timing cache cannot be written to '{path}'.",
                "It is a folder." if path.is_dir() else "Its folder does not exist.",
                "Name a file in a folder that exists.",
            )
        if self.dla_core is not None and self.dla_core < 0:
            raise InputError(
                f"The DLA core {self.dla_core} was asked for.",
                "They are counted from 0.",
                "Leave it out: the GPU computes everything.",
            )
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise InputError(
                f"The workspace is {self.workspace_mb} MB.",
                "A build needs some scratch memory.",
                "Leave it out: then it is half of the memory that is free.",
            )

    def to_json(self) -> dict[str, Json]:
        """What another machine has to know: all but the file and what is shown."""
        return {name: getattr(self, name) for name in self.asked_for() if name != "timing_cache"}

    @classmethod
    def from_json(cls, known: Mapping[str, Json]) -> BuildOptions:
        """The inverse of `to_json`.

        Raises:
            ArtifactError: They are not the options of this version.
        """
        values = dict(known)
        try:
            if "profiles" in values:
                values["profiles"] = tuple(map(tuple, values["profiles"]))  # type: ignore[arg-type]
            return cls(**values)  # type: ignore[arg-type]
        except (TypeError, ValueError) as exc:
            raise ArtifactError(
                f"The engine says that it is built with {dict(known)}.",
                f"This version of hydra-edge does not understand that: {exc}.",
                "Upgrade hydra-edge, or compile the graph anew.",
            ) from exc

    def over(self, others: BuildOptions) -> BuildOptions:
        """These options, and where they are the defaults, the others."""
        return replace(others, **{name: getattr(self, name) for name in self.asked_for()})

    def asked_for(self, *names: str) -> tuple[str, ...]:
        """Those of ``names``, or of all options but progress, that differ from the defaults."""
        every = {option.name: option.default for option in fields(self)}
        return tuple(
            name
            for name in names or every
            if name != "progress" and getattr(self, name) != every[name]
        )


def check_batch(batch: tuple[int, ...]) -> None:
    """Check a batch range.

    Raises:
        InputError: It is not (smallest, best, largest).
    """
    if len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise InputError(
            f"The batch range is {batch}.",
            "It is (smallest, best, largest), each at least 1 and not decreasing.",
            "Write for example (1, 8, 32).",
        )


@dataclass(frozen=True)
class BuildRequest:
    """What a program is built for.

    Attributes:
        targets: The devices.
        inputs: Declared inputs; axis 0 of each is the batch.
        batch: Smallest, best and largest batch.
        options: How it is built.
    """

    targets: tuple[Target, ...]
    inputs: tuple[TensorSpec, ...]
    batch: tuple[int, int, int]
    options: BuildOptions = BuildOptions()

    @property
    def name(self) -> str:
        """The targets' names, as the user gives them."""
        return ",".join(target.name for target in self.targets)

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs of the targets that have one."""
        return tuple(target.gpu for target in self.targets if target.gpu is not None)


@dataclass(frozen=True)
class Built:
    """What a backend made.

    Attributes:
        payload: What `Backend.open` loads.
        notes: What the user should know about it, a sentence each.
        facts: What has to be so where it is loaded; `Backend.open` checks it before it loads.
        stripped: The payload without its weights, where that was asked for.
    """

    payload: bytes
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Json] = field(default_factory=dict)
    stripped: bytes = b""


class Runner(Protocol):
    """A loaded program. ``run`` may be called from several threads."""

    threads: int

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once on inputs of the declared names, shapes and dtypes."""
        ...

    def close(self) -> None:
        """Release what the program holds; ``run`` is not called again."""
        ...


class Backend(Protocol):
    """What every module in `hydra_edge.backends` offers."""

    LOWERINGS: tuple[str, ...]  # of graphs with fused heads, the one to try first in front
    PLAIN: str  # of graphs without
    SEVERAL_TARGETS: bool  # whether one program can serve them

    def builds_elsewhere(self, request: BuildRequest) -> str:
        """Why `build` has to be called on another machine, and how; "" where it works here.

        Raises:
            InputError: It does not have one of the options.
            MissingDependencyError: Its library is not installed, and would work here.
        """
        ...

    def runs_here(self, request: BuildRequest) -> bool:
        """Whether `open` runs on this machine what is built here; else it stays unseen."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that decide what a program does."""
        ...

    def build(self, model: onnx.ModelProto, request: BuildRequest) -> Built:
        """Compile one lowered model.

        Raises:
            CompilationError: The backend refused it; its own words are in the message.
            InputError: It does not have one of the options.
        """
        ...

    def refit(
        self, payload: bytes, weights: Mapping[str, Array], facts: Mapping[str, Json]
    ) -> Built:
        """What `build` made, with other values for some weights of its model, by name.

        Raises:
            DeviceMismatchError: It cannot change weights, or not here.
            InputError: It has no weight of that name.
        """
        ...

    def open(
        self, payload: bytes, threads: int | None, facts: Mapping[str, Json] | None = None
    ) -> Runner:
        """Load what `build` made.

        Raises:
            CompilationError: The payload does not load here.
            DeviceMismatchError: By its facts it was built for something else than is here.
        """
        ...
