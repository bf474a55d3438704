"""`Recipe`: a distillation written down in a TOML file, for the command line and for torchrun.

    workdir = "run"                       # the default; checkpoint, the same command resumes
    output = "student.safetensors"
    task = "classification"
    data = "my.data:transfer"             # a function that returns what `distill` takes

    [[members]]                           # may be repeated, for members of several kinds
    factory = "my.models:member"
    weights = ["members/*.safetensors"]   # one member per file, in order

    [student]                             # a Hydra of your own, or a body by name and heads
    factory = "my.models:student"

    [predictions]                         # optional: run the members once and keep what they say
    folder = "predictions"
    format = "fp16"

    [distillation]                        # fields of DistillationConfig
    epochs_heads = 20

Paths are relative to the file. See docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
import glob
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hydra_edge import bodies, factories
from hydra_edge.artifacts.files import read_bytes
from hydra_edge.distillation_config import DistillationConfig
from hydra_edge.ensembles import Hydra, linear_heads, load_factory, load_weights, mlp_heads
from hydra_edge.errors import InputError, require
from hydra_edge.perturbations import Augment
from hydra_edge.processes import Processes
from hydra_edge.teacher_formats import Format
from hydra_edge.teachers import EnsembleShare, share, taught
from hydra_edge.teaching import Storage
from hydra_edge.transfer import Data

_KNOWN: Mapping[str, set[str]] = {
    "": {
        *("workdir", "output", "task", "labels", "data", "augment"),
        *("members", "student", "predictions", "distillation"),
    },
    "members": {"factory", "weights"},
    "student": {
        *("factory", "weights", "body", "options", "features", "heads", "outputs", "hidden"),
        "count",
    },
    "predictions": {"folder", "format", "top_k", "block", "batch_size"},
    "distillation": {field.name for field in dataclasses.fields(DistillationConfig)},
}


@dataclass(frozen=True)
class Recipe:
    """What a TOML file asks for; nothing is loaded until it is needed.

    Attributes:
        folder: Where the file is; relative paths start there.
        table: The file's content.
        config: Its ``[distillation]``.
        members: Factory and weights of each of the M members.
    """

    folder: Path
    table: Mapping[str, Any]
    config: DistillationConfig
    members: tuple[tuple[str, Path | None], ...]

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a file.

        Raises:
            ArtifactError: It cannot be read.
            InputError: It is not TOML, or a name or value in it is not known.
        """
        path = Path(path)
        toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "train")
        try:
            table = toml.loads(read_bytes(path, "a recipe in TOML").decode())
        except ValueError as exc:
            raise InputError(
                f"'{path}' is not TOML: {exc}.", "A recipe is a TOML file.", "Correct that line."
            ) from exc
        _check_names(path, table)
        settings = dict(table.get("distillation", {}))
        if isinstance(settings.get("temperature"), list):
            settings["temperature"] = tuple(settings["temperature"])
        try:
            config = DistillationConfig(**settings)
        except TypeError as exc:
            raise InputError(
                f"'{path}' has a value of the wrong type in [distillation]: {exc}.",
                "The fields are those of DistillationConfig.",
                "Correct the value.",
            ) from exc
        return cls(path.parent, table, config, tuple(_members(path, table)))

    @property
    def task(self) -> str:
        """File name under ``hydra_edge/tasks``."""
        return str(self.table.get("task", "classification"))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the C outputs, or empty."""
        return tuple(self.table.get("labels", ()))

    @property
    def workdir(self) -> Path:
        """Where the run keeps its checkpoint."""
        return self.folder / str(self.table.get("workdir", "run"))

    @property
    def output(self) -> Path:
        """Where the student's weights go."""
        return self.folder / str(self.table.get("output", "student.safetensors"))

    @property
    def predictions(self) -> Path | None:
        """Where predictions are kept; None if the members run, or are cached in ``workdir``."""
        name = self.table.get("predictions", {}).get("folder")
        return None if name is None else self.folder / name

    @property
    def storage(self) -> Storage:
        """How predictions are kept; their error is measured at the loss's temperatures."""
        given = self.table.get("predictions", {})
        form = Format(given.get("format", "fp16"), given.get("top_k", 32))
        return Storage(form, given.get("block", 65536), self.config.temperatures)

    @property
    def teaching_batch(self) -> int:
        """Samples per run of a member."""
        return int(self.table.get("predictions", {}).get("batch_size", 256))

    def ensemble(self, processes: Processes, *, teaching: bool = False) -> EnsembleShare:
        """Load the members that this process runs, and no others.

        Args:
            processes: Who takes part.
            teaching: Whether predictions are to be kept, for which several processes may hold the
                same member.

        Raises:
            InputError: There are no members, or a factory cannot be used.
            ArtifactError: Weights are missing, damaged or do not fit.
        """
        count = len(self.members)
        if not count:
            raise InputError(
                "The recipe names no members.",
                "They are the teacher.",
                "Add [[members]] with factory and weights.",
            )
        held = (taught if teaching else share)(count, processes)
        return EnsembleShare({m: self._member(m) for m in held}, count, self.task, self.labels)

    def data(self) -> Data:
        """Call the function named ``data``.

        Raises:
            InputError: It is not named, or cannot be called.
        """
        if "data" not in self.table:
            raise InputError(
                "The recipe names no data.",
                "The student learns from samples; labels are not needed.",
                "Add data = 'pkg.module:function', which returns arrays or a Dataset.",
            )
        found: Data = factories.call(self.table["data"])  # type: ignore[assignment]
        return found

    def augment(self) -> Augment | None:
        """The function named ``augment``, which is called on every batch."""
        name = self.table.get("augment")
        return factories.find(name) if name else None

    def student(self) -> Hydra:
        """Build the student.

        Raises:
            InputError: It is not described, or its factory gives something else.
            MissingDependencyError: The library of its body is not installed.
        """
        given = self.table.get("student", {})
        if "factory" in given:
            made = load_factory(given["factory"])
            if not isinstance(made, Hydra):
                raise InputError(
                    f"'{given['factory']}' returned a {type(made).__name__}.",
                    "A student is a body and heads.",
                    "Return hydra_edge.Hydra(body, heads).",
                )
            student = made
        elif "body" in given:
            student = self._student_by_name(given)
        else:
            raise InputError(
                "The recipe describes no student.",
                "It is what is trained.",
                "Add [student] with factory = 'pkg.module:function', or body, outputs and heads.",
            )
        if "weights" in given:
            load_weights(student, self.folder / given["weights"])
        return student

    def _student_by_name(self, given: Mapping[str, Any]) -> Hydra:
        if "outputs" not in given:
            raise InputError(
                "[student] has a body and no outputs.",
                "The heads need to know how many classes there are.",
                "Add outputs = C.",
            )
        body = bodies.load(given["body"], given.get("options", {}), self.folder)
        features = int(given.get("features", body.features))
        count = int(given.get("count", len(self.members)))
        kind = given.get("heads", "mlp")
        if kind not in ("mlp", "linear"):
            raise InputError(
                f"heads is '{kind}'.", "By name there are mlp and linear.", "Use a factory."
            )
        if kind == "linear":
            heads = linear_heads(count, features, given["outputs"])
        else:
            heads = mlp_heads(count, features, given["outputs"], given.get("hidden", (64,)))
        return Hydra(body, heads, self.task, self.labels)

    def _member(self, index: int) -> nn.Module:
        factory, weights = self.members[index]
        member = load_factory(factory)
        return load_weights(member, weights) if weights is not None else member


def _members(path: Path, table: Mapping[str, Any]) -> list[tuple[str, Path | None]]:
    found: list[tuple[str, Path | None]] = []
    for entry in table.get("members", []):
        if "factory" not in entry:
            raise InputError(
                f"'{path}' has [[members]] without a factory.",
                "It builds the network that the weights are for.",
                "Add factory = 'pkg.module:function'.",
            )
        patterns = entry.get("weights", [])
        if isinstance(patterns, str):
            patterns = [patterns]
        if not patterns:
            found.append((entry["factory"], None))
        for pattern in patterns:
            files = sorted(glob.glob(str(path.parent / pattern)))
            if not files:
                raise InputError(
                    f"'{pattern}' matches no file in '{path.parent}'.",
                    "Each member has its weights in a safetensors file.",
                    "Correct the pattern, or save them with hydra_edge.ensembles.save_weights.",
                )
            found += [(entry["factory"], Path(file)) for file in files]
    return found


def _check_names(path: Path, table: Mapping[str, Any]) -> None:
    for section, known in _KNOWN.items():
        given = table if not section else table.get(section, {})
        tables: Sequence[Any] = given if isinstance(given, list) else [given]
        for entry in tables:
            if not isinstance(entry, dict):
                raise InputError(
                    f"'{path}' gives {section} = {entry!r}.",
                    f"{section} is a table.",
                    f"Write [{section}], or [[{section}]] for members.",
                )
            unknown = sorted(set(entry) - known)
            if unknown:
                raise InputError(
                    f"'{path}' has '{unknown[0]}'{f' in [{section}]' if section else ''}.",
                    f"Known are {', '.join(sorted(known))}.",
                    "Correct the spelling, or leave it out.",
                )
