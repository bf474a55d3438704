"""`Engine`: compiled programs, their graphs, and proof that they still work, in one file.

A ``.hydra`` file is a zip whose members are all stored uncompressed, so its size on disk bounds
what reading it can cost. Nothing is ever extracted to disk or unpickled.

    manifest.json                            everything but bytes, and the sha256 of the others
    programs/<name>.bin                      what the backend loads
    graphs/<name>.onnx                       the canonical fused graph the program was lowered from
    golden/<name>/inputs/<tensor index>.npy  one recorded batch …
    golden/<name>/outputs/<tensor index>.npy … and what the canonical graph answered
    assets/<name>                            files that whoever asks it needs, e.g. a tokenizer
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from hydra_edge.artifacts.files import NPY_HEADER_ERRORS, read_bytes, sha256, write_atomic
from hydra_edge.artifacts.graph import Graph, Json, TensorSpec
from hydra_edge.errors import ArtifactError, HydraError, InputError

Array = npt.NDArray[np.generic]
_T = TypeVar("_T")
SCHEMA_VERSION = 1
FORMAT = "hydra-edge engine"
MANIFEST = "manifest.json"
BUILD_OPTIONS = "build_options"  # among a program's facts
MAIN = "main"  # the program a plain `run` means
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_ASSET = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*")
_ASSETS = "assets/"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's oldest date: equal engines give equal bytes


@dataclass(frozen=True)
class Golden:
    """One recorded batch and the outputs of the canonical graph for it.

    Attributes:
        inputs: Arrays by input name.
        outputs: Arrays by output name.
        tolerance: Relative RMS difference that a faithful program may show.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    tolerance: float


@dataclass(frozen=True)
class Program:
    """One compiled program of an engine.

    Attributes:
        inputs: Declared inputs; axis 0 of each is the batch.
        outputs: Declared outputs.
        batch: Smallest, best and largest batch; larger inputs are split by the session.
        optional: Outputs that are returned only on request.
        lowering: Name of the lowering that was kept.
        lowering_ms: Measured p50 per candidate lowering at the best batch, in milliseconds.
        graph: The canonical fused graph.
        payload: What the backend loads.
        golden: The recorded batch.
        notes: What the builder has to say about it, a sentence each.
        facts: What has to be so where it is loaded; of a program that is not built, how to build.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: tuple[int, int, int]
    optional: tuple[str, ...]
    lowering: str
    lowering_ms: Mapping[str, float]
    graph: Graph = field(repr=False)
    payload: bytes = field(repr=False)
    golden: Golden = field(repr=False)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Json] = field(default_factory=dict)

    @property
    def build_options(self) -> Mapping[str, Json]:
        """How the program was, or is to be, built: `hydra_edge.programs.BuildOptions`."""
        found = self.facts.get(BUILD_OPTIONS, {})
        return found if isinstance(found, dict) else {}

    @property
    def is_stripped(self) -> bool:
        """Whether the payload lacks the weights, which the graph has."""
        return bool(self.build_options.get("strip_weights"))


@dataclass(frozen=True)
class Engine:
    """One or more compiled programs for one target.

    Attributes:
        target: Target name, e.g. ``"cpu"``.
        backend: Backend that opens it.
        task: Task name or None.
        kind: ``"student"``, ``"ensemble"``, ``"member"`` or ``"model"``.
        heads: M or None.
        labels: Names of the C outputs, or empty.
        precision: Precision asked for.
        source_sha256: Digest of the graph that was given to ``compile``.
        calibration_sha256: Digest of the calibration data, or None.
        metrics: Figures measured at compile time, by name.
        tools: Versions of the libraries that built it.
        programs: Programs by name. A classifier has one, called ``main``.
        assets: Files by name that whoever asks the engine needs, such as ``tokenizer.json``.

    Raises:
        InputError: An asset has a name that is none of a file.
    """

    target: str
    backend: str
    task: str | None
    kind: str
    heads: int | None
    labels: tuple[str, ...]
    precision: str
    source_sha256: str
    calibration_sha256: str | None
    metrics: Mapping[str, float]
    tools: Mapping[str, str]
    programs: Mapping[str, Program]
    assets: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in self.assets:
            if not _ASSET.fullmatch(name):
                raise InputError(
                    f"An asset is called '{name}'.",
                    "It becomes a member of the engine file.",
                    "Use lower-case letters, digits and underscores, e.g. 'tokenizer.json'.",
                )

    @property
    def is_built(self) -> bool:
        """Whether it can be loaded; else it holds what its target needs to build it."""
        return all(program.payload for program in self.programs.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of the compiled programs alone."""
        return sum(len(program.payload) for program in self.programs.values())

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the main program, or of the first one."""
        return (self.programs.get(MAIN) or next(iter(self.programs.values()))).inputs

    def to_bytes(self) -> bytes:
        """The ``.hydra`` file: the same engine always gives the same bytes."""
        members = {f"{_ASSETS}{name}": data for name, data in self.assets.items()}
        for name, program in self.programs.items():
            members[f"programs/{name}.bin"] = program.payload
            members[f"graphs/{name}.onnx"] = program.graph.data
            for side, arrays in (
                ("inputs", program.golden.inputs),
                ("outputs", program.golden.outputs),
            ):
                for index, tensor in enumerate(arrays):
                    members[f"golden/{name}/{side}/{index}.npy"] = _to_npy(arrays[tensor])
        manifest = json.dumps(self._manifest(members), indent=1, sort_keys=True).encode()
        return _to_zip({MANIFEST: manifest, **dict(sorted(members.items()))})

    def save(self, path: str | Path) -> Path:
        """Write the ``.hydra`` file, atomically."""
        return write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Engine:
        """Read and check a ``.hydra`` file: every byte is covered by a digest.

        Raises:
            ArtifactError: Missing, truncated, tampered with, unsafe, or of a newer schema.
        """
        return _Reader(read_bytes(path, "a .hydra engine"), str(path)).engine()

    def _manifest(self, members: Mapping[str, bytes]) -> Mapping[str, Json]:
        return {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "target": self.target,
            "backend": self.backend,
            "task": self.task,
            "kind": self.kind,
            "heads": self.heads,
            "labels": list(self.labels),
            "precision": self.precision,
            "source_sha256": self.source_sha256,
            "calibration_sha256": self.calibration_sha256,
            "metrics": dict(self.metrics),
            "tools": dict(self.tools),
            "members": {name: sha256(data) for name, data in members.items()},
            "programs": {
                name: {
                    "inputs": [_spec_to_json(spec) for spec in program.inputs],
                    "outputs": [_spec_to_json(spec) for spec in program.outputs],
                    "batch": list(program.batch),
                    "optional": list(program.optional),
                    "lowering": program.lowering,
                    "lowering_ms": dict(program.lowering_ms),
                    "golden_inputs": list(program.golden.inputs),
                    "golden_outputs": list(program.golden.outputs),
                    "tolerance": program.golden.tolerance,
                    "notes": list(program.notes),
                    "facts": dict(program.facts),
                }
                for name, program in self.programs.items()
            },
        }


class _Reader:
    """Reads one untrusted file; every refusal names the file and the reason."""

    def __init__(self, data: bytes, origin: str) -> None:
        self.origin = origin
        self.members = self._unzip(data)

    def refuse(self, reason: str, fix: str = "Compile or copy the engine again.") -> NoReturn:
        raise ArtifactError(f"'{self.origin}' is not a usable .hydra engine.", reason, fix)

    def _unzip(self, data: bytes) -> dict[str, bytes]:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                infos = archive.infolist()
                names = [info.filename for info in infos]
                if MANIFEST not in names:
                    self.refuse(f"It holds no {MANIFEST}.")
                for info in infos:
                    if info.filename.startswith(("/", "\\")) or ".." in info.filename:
                        self.refuse(f"Its member '{info.filename}' points outside the file.")
                    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
                        self.refuse(f"Its member '{info.filename}' is compressed or encrypted.")
                if len(set(names)) != len(names):
                    self.refuse("Two of its members have the same name.")
                total = sum(info.file_size for info in infos)
                if total > len(data):
                    self.refuse(f"It claims {total} bytes of content in {len(data)} bytes.")
                members = {info.filename: archive.read(info) for info in infos}
                if archive.comment != sha256(members[MANIFEST]).encode():
                    self.refuse("Its manifest was changed after it was written.")
                # A zip may begin and end with anything; ours is exactly its members.
                if _to_zip(members) != data:
                    self.refuse("It holds more than its members, or was not written by hydra-edge.")
                return members
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, OSError) as exc:
            self.refuse(f"It is no zip file, or a part of it is missing or damaged: {exc}.")

    def engine(self) -> Engine:
        try:
            manifest = json.loads(self.members[MANIFEST])
            if manifest["format"] != FORMAT:
                self.refuse("Its manifest is of another format.")
            if manifest["schema"] > SCHEMA_VERSION:
                self.refuse(
                    f"It has schema {manifest['schema']}; this version reads up to "
                    f"{SCHEMA_VERSION}.",
                    "Upgrade hydra-edge.",
                )
            self._check_digests(manifest["members"])
            programs = {
                name: self._program(name, entry) for name, entry in manifest["programs"].items()
            }
            if not programs:
                self.refuse("It holds no program.")
            return Engine(
                target=str(manifest["target"]),
                backend=str(manifest["backend"]),
                task=_optional(manifest["task"], str),
                kind=str(manifest["kind"]),
                heads=_optional(manifest["heads"], int),
                labels=tuple(_list(manifest["labels"])),
                precision=str(manifest["precision"]),
                source_sha256=str(manifest["source_sha256"]),
                calibration_sha256=_optional(manifest["calibration_sha256"], str),
                metrics={str(k): float(v) for k, v in manifest["metrics"].items()},
                tools={str(k): str(v) for k, v in manifest["tools"].items()},
                programs=programs,
                assets=self._assets(),
            )
        except HydraError:
            raise
        except (
            *(ValueError, KeyError, AttributeError, RecursionError),
            *NPY_HEADER_ERRORS,
        ) as exc:
            self.refuse(f"Its manifest is not complete: {exc!r}.")

    def _assets(self) -> dict[str, bytes]:
        found = {
            name.removeprefix(_ASSETS): data
            for name, data in self.members.items()
            if name.startswith(_ASSETS)
        }
        for name in found:
            if not _ASSET.fullmatch(name):
                self.refuse(f"'{name}' is not the name of an asset.")
        return found

    def _check_digests(self, digests: Mapping[str, str]) -> None:
        present = set(self.members) - {MANIFEST}
        if present != set(digests):
            odd = sorted(present ^ set(digests))
            self.refuse(f"Manifest and content disagree about the member '{odd[0]}'.")
        for name, digest in digests.items():
            if sha256(self.members[name]) != digest:
                self.refuse(f"Its member '{name}' does not have the recorded sha256.")

    def _program(self, name: str, entry: Mapping[str, Any]) -> Program:
        if not NAME.fullmatch(name):
            self.refuse(f"'{name}' is not a program name.")
        low, best, high = (int(value) for value in entry["batch"])
        if not 1 <= low <= best <= high:
            self.refuse(f"Program '{name}' has the batch range {entry['batch']}.")
        inputs = tuple(map(_spec_from_json, entry["inputs"]))
        if not inputs or not all(spec.shape for spec in inputs):
            self.refuse(f"Program '{name}' declares an input without a batch axis, or none at all.")
        tolerance = float(entry["tolerance"])
        if not (math.isfinite(tolerance) and tolerance >= 0):  # NaN would pass every self-test
            self.refuse(f"Program '{name}' has the tolerance {tolerance}.")
        golden = {
            side: {
                tensor: self._npy(f"golden/{name}/{side}/{index}.npy")
                for index, tensor in enumerate(_list(entry[f"golden_{side}"]))
            }
            for side in ("inputs", "outputs")
        }
        return Program(
            inputs=inputs,
            outputs=tuple(map(_spec_from_json, entry["outputs"])),
            batch=(low, best, high),
            optional=tuple(_list(entry["optional"])),
            lowering=str(entry["lowering"]),
            lowering_ms={str(k): float(v) for k, v in entry["lowering_ms"].items()},
            graph=Graph.parse(self.members[f"graphs/{name}.onnx"], f"{self.origin}:graphs/{name}"),
            payload=self.members[f"programs/{name}.bin"],
            golden=Golden(golden["inputs"], golden["outputs"], tolerance),
            notes=tuple(_list(entry.get("notes", []))),
            facts={str(key): value for key, value in entry.get("facts", {}).items()},
        )

    def _npy(self, member: str) -> Array:
        """Read one array, after checking that its header does not claim more than is there."""
        stream = io.BytesIO(self.members[member])
        if np.lib.format.read_magic(stream) != (1, 0):
            self.refuse(f"Its member '{member}' is not a version 1.0 .npy array.")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        raw = stream.read()
        if dtype.hasobject or fortran or int(np.prod(shape)) * dtype.itemsize != len(raw):
            self.refuse(f"Its member '{member}' does not hold the array its header declares.")
        return np.frombuffer(raw, dtype).reshape(shape)


def _optional(value: object, kind: type[_T]) -> _T | None:
    if value is None or isinstance(value, kind):
        return value
    raise TypeError(f"{value!r} is no {kind.__name__}")


def _list(value: object) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return [str(item) for item in value]


def _to_zip(members: Mapping[str, bytes]) -> bytes:
    """The members uncompressed and in order, the manifest's digest as the comment."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member, _EPOCH), data)
        archive.comment = sha256(members[MANIFEST]).encode()
    return buffer.getvalue()


def _to_npy(array: Array) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array, order="C"), (1, 0), allow_pickle=False)
    return stream.getvalue()


def _spec_to_json(spec: TensorSpec) -> Mapping[str, Json]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _spec_from_json(entry: object) -> TensorSpec:
    if not isinstance(entry, dict):
        raise TypeError(f"tensor entry {entry!r}")
    shape = tuple(size if isinstance(size, int) else str(size) for size in entry["shape"])
    return TensorSpec(str(entry["name"]), str(np.dtype(entry["dtype"])), shape)
