"""`teach`: run the members once over a transfer set and keep what they say; `Predictions` reads it.

    FOLDER/manifest.json                     shape, format, errors, sha256 and size of every file
    FOLDER/member-003/block-000012.npy       outputs of one member for one block of samples
    FOLDER/member-003/block-000012.json      sha256, size and errors of that file

A block that is there and whose checksum holds is not computed again. On several processes each runs
its own members, or, where there are more processes than members, its own blocks; nothing is sent.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress

from hydra_edge.artifacts.files import read_bytes, sha256, write_atomic
from hydra_edge.ensembles import Ensemble
from hydra_edge.errors import ArtifactError, InputError
from hydra_edge.processes import Processes, joined
from hydra_edge.progress import progress_bar
from hydra_edge.teacher_formats import Errors, Format, is_softmax, merged
from hydra_edge.teachers import EnsembleShare, evaluating, identity, taught
from hydra_edge.transfer import Data, TransferSet, check_finite, chunks

_MANIFEST = "manifest.json"
_VERSION = 1


@dataclass(frozen=True)
class Storage:
    """How predictions are kept.

    Attributes:
        format: Of one sample's outputs.
        block: Samples per file.
        temperatures: Softmax temperatures at which the format's error is measured.

    Raises:
        InputError: A value is out of range.
    """

    format: Format = field(default_factory=Format)
    block: int = 65536
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise InputError(
                f"block is {self.block}.", "A file holds at least one sample.", "Give 1 or more."
            )
        if not all(value > 0 for value in self.temperatures):
            raise InputError(
                f"temperatures are {self.temperatures}.",
                "Logits are divided by them.",
                "Give numbers above 0.",
            )


def teach(
    ensemble: Ensemble | EnsembleShare,
    data: Data,
    folder: str | Path,
    storage: Storage = Storage(),
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Predictions:
    """Keep what the members say about every sample; goes on where an earlier call stopped.

    Every process of a run calls this with the same arguments and a folder that all can see.

    Args:
        ensemble: The M members, or this process's share of them; run in eval mode.
        data: The N samples, as for `distill`.
        folder: Where the files go.
        storage: How they are kept.
        batch_size: Samples per run of a member.
        device: Where to run them; a GPU if there is one.
        progress: Show progress on stderr.

    Returns:
        The predictions, whole and opened.

    Raises:
        InputError: Members, data and format do not fit each other.
        DistillationError: An output is not finite, or another process is gone.
        ArtifactError: The folder holds other predictions or cannot be written.
    """
    inputs = TransferSet(data)
    with (
        joined(timeout_s=300) as processes,
        processes.guarded("while the members ran"),
        progress_bar(progress and processes.is_main) as bar,
    ):
        if device is None:
            device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        return store(ensemble, inputs, Path(folder), storage, batch_size, device, processes, bar)


def store(
    ensemble: Ensemble | EnsembleShare,
    inputs: TransferSet,
    folder: Path,
    storage: Storage,
    batch_size: int,
    device: torch.device | str,
    processes: Processes,
    bar: Progress,
) -> Predictions:
    """`teach` for processes that have been joined and a bar that is shown."""
    own = ensemble
    if isinstance(own, Ensemble):
        own = EnsembleShare.of(own, taught(own.heads, processes))
    work = _Work(own, inputs, folder, storage, batch_size, torch.device(device), processes, bar)
    work.identity = {
        "ensemble": identity(ensemble, processes),
        "data": processes.on_main(lambda: inputs.digest(True)),
    }
    with evaluating(own, work.device):
        work.compute()
    processes.wait()
    processes.on_main(work.finish)
    return Predictions.open(folder)


@dataclass
class _Work:
    share: EnsembleShare
    inputs: TransferSet
    folder: Path
    storage: Storage
    batch_size: int
    device: torch.device
    processes: Processes
    bar: Progress

    def __post_init__(self) -> None:
        self.identity: dict[str, str] = {}
        self.shape: tuple[int, ...] = ()

    def compute(self) -> None:
        """Write every block of our members that is not there yet."""
        count, size = len(self.inputs), self.storage.block
        total = (count + size - 1) // size
        # Processes that hold the same members take turns in the blocks.
        peers = self.processes.gather(self.share.indices)
        same = [rank for rank, held in enumerate(peers) if held == self.share.indices]
        blocks = range(same.index(self.processes.rank), total, len(same))
        row = self.bar.add_task("teacher", total=count, completed=0, loss="")
        for block in blocks if self.share.indices else ():
            rows = range(block * size, min((block + 1) * size, count))
            missing = [m for m in self.share.indices if not self._is_done(m, block)]
            if missing:
                self._block(block, rows, missing)
            self.bar.update(row, completed=rows[-1] + 1)

    def _block(self, block: int, rows: range, missing: Sequence[int]) -> None:
        form = self.storage.format
        kept: dict[int, list[npt.NDArray[Any]]] = {m: [] for m in missing}
        softmax = is_softmax(self.share.task)
        errors = {m: Errors(softmax, self.storage.temperatures) for m in missing}
        for indices in chunks(rows, self.batch_size):
            x = tuple(part.to(self.device) for part in self.inputs.__getitems__(indices))
            for m in missing:
                with torch.no_grad():
                    outputs = self.share.members[self.share.indices.index(m)](*x).float()
                check_finite(outputs[None], indices, m)
                if not self.shape:
                    form.check(self.share.task, outputs.shape[1:])
                self.shape = tuple(outputs.shape[1:])
                encoded = form.encode(outputs)
                kept[m].append(encoded)
                if form.name != "fp32":
                    restored = torch.from_numpy(form.decode(encoded, self.shape[-1]))
                    errors[m].add(outputs, restored.to(self.device))
        for m in missing:
            self._write(m, block, np.concatenate(kept[m]), errors[m].summary())

    def _write(
        self, m: int, block: int, outputs: npt.NDArray[Any], errors: dict[str, dict[str, float]]
    ) -> None:
        path = self.folder / _name(m, block)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ArtifactError(
                f"The folder '{path.parent}' cannot be made: {exc.strerror}.",
                "Predictions are kept there.",
                "Choose another folder.",
            ) from exc
        stream = io.BytesIO()
        np.lib.format.write_array(stream, outputs, allow_pickle=False)
        data = stream.getvalue()
        write_atomic(path, data)
        note = {
            "made": self._made(),
            "sha256": sha256(data),
            "bytes": len(data),
            "samples": len(outputs),
            "shape": self.shape,
            "errors": errors,
        }
        write_atomic(path.with_suffix(".json"), json.dumps(note).encode())

    def _made(self) -> dict[str, Any]:
        """What a block must have been made of to be one of ours."""
        return {**self.identity, **asdict(self.storage.format), "block": self.storage.block}

    def _is_done(self, m: int, block: int) -> bool:
        path = self.folder / _name(m, block)
        note = _note(path)
        if note is None or not path.exists():
            return False
        if note["made"] != self._made():
            raise ArtifactError(
                f"'{path}' was made of other members or data, or in another format.",
                "One folder holds one set of predictions.",
                "Choose another folder, or delete this one.",
            )
        if path.stat().st_size != note["bytes"] or _digest(path) != note["sha256"]:
            return False  # computed again
        self.shape = tuple(note["shape"])
        return True

    def finish(self) -> None:
        """Write the manifest of all blocks of all members."""
        count = len(self.inputs)
        total = (count + self.storage.block - 1) // self.storage.block
        names = [_name(m, b) for m in range(self.share.heads) for b in range(total)]
        notes = {name: _note(self.folder / name) for name in names}
        absent = [name for name, note in notes.items() if note is None]
        if absent:
            raise ArtifactError(
                f"'{self.folder}' lacks {absent[0]} and {len(absent) - 1} more.",
                "Every process writes its members' files into one folder.",
                "Use a folder that all processes can see, and shares that hold all members.",
            )
        found = {name: note for name, note in notes.items() if note is not None}
        errors = merged([(note["samples"], note["errors"]) for note in found.values()])
        first = next(iter(found.values()))
        manifest = {
            "version": _VERSION,
            "task": self.share.task,
            "labels": self.share.labels,
            "shape": [self.share.heads, count, *first["shape"]],
            **self._made(),
            "errors": errors,
            "files": {n: {k: note[k] for k in ("sha256", "bytes")} for n, note in found.items()},
        }
        write_atomic(self.folder / _MANIFEST, json.dumps(manifest, indent=1).encode())


class Predictions:
    """What M members said about N samples, memory-mapped.

    ``predictions[:, indices]`` reads ``[M, B, C]`` in float32.

    Attributes:
        folder: Where the files are.
        heads: M.
        task: File name under ``hydra_edge/tasks``.
        labels: Names of the C outputs, or empty.
        shape: ``(M, N, C)``.
        format: How outputs are kept.
        errors: Mean and maximum of what the format changes, by name.
        data_digest: Hash of the samples.
        identity: Hash of members, data and format.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.task: str = manifest["task"]
        self.labels: tuple[str, ...] = tuple(manifest["labels"])
        self.shape: tuple[int, ...] = tuple(manifest["shape"])
        self.heads = self.shape[0]
        self.format = Format(manifest["name"], manifest["top_k"])
        self.errors: dict[str, dict[str, float]] = manifest["errors"]
        self.data_digest: str = manifest["data"]
        made = {name: manifest[name] for name in ("ensemble", "data", "name", "top_k")}
        self.identity = sha256(json.dumps(made, sort_keys=True).encode())
        self._block: int = manifest["block"]
        self._files: dict[str, dict[str, Any]] = manifest["files"]
        self._open: dict[str, npt.NDArray[Any]] = {}

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Predictions:
        """Open what `teach` wrote.

        Args:
            folder: The folder.
            verify: Read every file and compare its sha256; otherwise only sizes are compared.

        Raises:
            ArtifactError: The manifest is missing, damaged or newer, or a file is not what it says.
        """
        folder = Path(folder)
        text = read_bytes(folder / _MANIFEST, "the manifest of a teacher's predictions")
        try:
            manifest = json.loads(text)
            version = manifest["version"]
            found = cls(folder, manifest) if version == _VERSION else None
        except (ValueError, KeyError, TypeError) as exc:
            raise ArtifactError(
                f"'{folder / _MANIFEST}' cannot be read: {exc!r}.",
                "It is damaged, or was not written by teach.",
                "Run teach again; it keeps the files that are whole.",
            ) from exc
        if found is None:
            raise ArtifactError(
                f"'{folder / _MANIFEST}' is of version {version}.",
                f"This is hydra-edge for version {_VERSION}.",
                "Update hydra-edge, or run teach again into another folder.",
            )
        found._check(verify)
        return found

    def _check(self, verify: bool) -> None:
        for name, entry in self._files.items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else -1
            wrong = size != entry["bytes"] or (verify and _digest(path) != entry["sha256"])
            if wrong:
                raise ArtifactError(
                    f"'{path}' is missing, cut off or changed.",
                    "Its size or sha256 is not that of the manifest.",
                    "Run teach again: it computes this file anew and keeps the others.",
                )

    def __len__(self) -> int:
        """N."""
        return self.shape[1]

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(entry["bytes"] for entry in self._files.values())

    def __getitem__(self, key: tuple[slice, Sequence[int]]) -> npt.NDArray[np.float32]:
        """``predictions[:, indices]``: all members' outputs ``[M, B, C]`` in float32.

        Raises:
            InputError: The members were to be sliced.
        """
        members, indices = key
        if members != slice(None):
            raise InputError(
                f"Members {members} were asked for.",
                "All members' outputs are read together.",
                "Write predictions[:, indices].",
            )
        rows = np.asarray(indices, np.int64)
        outputs = np.empty((self.heads, len(rows), *self.shape[2:]), np.float32)
        for block, places in _by_block(rows // self._block):
            inside = rows[places] - block * self._block
            for m in range(self.heads):
                kept = self._array(_name(m, block))[inside]
                outputs[m, places] = self.format.decode(kept, self.shape[-1])
        return outputs

    def _array(self, name: str) -> npt.NDArray[Any]:
        if name not in self._open:
            mapped = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
            self._open[name] = np.asarray(mapped)  # a plain view: memmap's own indexing is slow
        return self._open[name]


def _by_block(blocks: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    order = np.argsort(blocks, kind="stable")
    starts = np.flatnonzero(np.diff(blocks[order], prepend=-1))
    for places in np.split(order, starts[1:]):
        if len(places):
            yield int(blocks[places[0]]), places


def _name(m: int, block: int) -> str:
    return f"member-{m:03d}/block-{block:06d}.npy"


def _note(path: Path) -> dict[str, Any] | None:
    """What is written beside a block; None when it is not there or was cut off."""
    try:
        note: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    return note if {"made", "sha256", "bytes", "samples", "shape", "errors"} <= set(note) else None


def _digest(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            hasher.update(piece)
    return hasher.hexdigest()
