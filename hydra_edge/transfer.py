"""What a student is distilled on: the transfer set, and the members' outputs for it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from hydra_edge.artifacts.files import write_atomic
from hydra_edge.ensembles import Ensemble, tensor_state
from hydra_edge.errors import ArtifactError, DistillationError, InputError

Array: TypeAlias = npt.NDArray[np.generic] | torch.Tensor
Data: TypeAlias = Array | Sequence[Array] | Mapping[str, Array] | Dataset[object]
Inputs: TypeAlias = tuple[torch.Tensor, ...]
Outputs: TypeAlias = np.memmap[Any, np.dtype[np.float32]]

_HASHED_SAMPLES = 64


class TransferSet(Dataset[Inputs]):
    """Any accepted data as a map-style dataset of tuples, one tensor per input of the model.

    The inputs of a mapping go into the model by position, in the mapping's order.
    """

    def __init__(self, data: Data) -> None:
        parts: tuple[object, ...] = (data,)
        if isinstance(data, Mapping):
            parts = tuple(data.values())
        elif isinstance(data, (tuple, list)):
            parts = tuple(data)
        self.arrays = tuple(part for part in parts if isinstance(part, (np.ndarray, torch.Tensor)))
        self.dataset: Any = data
        if parts and len(self.arrays) == len(parts):
            lengths = {len(array) if array.ndim else 0 for array in self.arrays}
        elif (
            isinstance(data, Dataset)
            and hasattr(data, "__len__")
            and not isinstance(data, IterableDataset)
        ):
            self.arrays, lengths = (), {len(data)}
        else:
            raise InputError(
                f"The data is a {type(data).__name__}.",
                "Samples are visited by number, in a new order every epoch.",
                "Give an array, a tuple, list or mapping of arrays, or a map-style torch Dataset.",
            )
        if len(lengths) > 1 or 0 in lengths:
            raise InputError(
                f"The inputs hold {' and '.join(map(str, sorted(lengths)))} samples.",
                "Sample n of every input goes into the model together, and there is at least one.",
                "Give all inputs the same first axis.",
            )
        (self.length,) = lengths

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Inputs:
        if self.arrays:
            return tuple(_tensor(array[index]) for array in self.arrays)
        sample = self.dataset[index]
        first = sample[0] if isinstance(sample, (tuple, list)) else sample
        if isinstance(first, Mapping):
            first = tuple(first.values())
        return tuple(map(_tensor, first if isinstance(first, (tuple, list)) else (first,)))

    def __getitems__(self, indices: Sequence[int]) -> Inputs:
        """One batch, each input ``[B, …]``; the hook through which `DataLoader` fetches batches."""
        if self.arrays:
            return tuple(_tensor(array[list(indices)]) for array in self.arrays)
        return tuple(default_collate([self[index] for index in indices]))

    def digest(self, content: bool) -> str:
        """Hash of the length and, on request, of all arrays or of some samples of a dataset."""
        hasher = hashlib.sha256(str(len(self)).encode())
        spread = np.linspace(0, len(self) - 1, min(_HASHED_SAMPLES, len(self))).astype(int)
        indices = range(len(self)) if self.arrays else spread.tolist()
        for chunk in chunks(indices, 1024) if content else ():
            hash_tensors(hasher, self.__getitems__(chunk))
        return hasher.hexdigest()


def teacher_outputs(
    ensemble: Ensemble,
    inputs: TransferSet,
    path: Path,
    shape: tuple[int, ...],
    batch_size: int,
    device: torch.device,
    bar: Progress,
) -> Outputs:
    """The members' outputs ``[M, N, C]``, memory-mapped; computes what is not on disk yet.

    Args:
        ensemble: The members, in eval mode and on ``device``.
        inputs: The N samples.
        path: Where the outputs belong. An unfinished part lies beside it and is continued.
        shape: ``(M, N, C)``.
        batch_size: Samples per run of the members.
        device: Where to run them.
        bar: Gets a row of its own.

    Returns:
        ``[M, N, C]``, float32, read-only.

    Raises:
        ArtifactError: A file in the way is damaged.
        DistillationError: The disk is too small, or an output is not finite.
    """
    if not path.exists():
        _write_outputs(ensemble, inputs, path, shape, batch_size, device, bar)
    return _open_array(path, shape, "r")


def _write_outputs(
    ensemble: Ensemble,
    inputs: TransferSet,
    path: Path,
    shape: tuple[int, ...],
    batch_size: int,
    device: torch.device,
    bar: Progress,
) -> None:
    partial, progress = path.with_suffix(".part.npy"), path.with_suffix(".part.json")
    if not partial.exists():
        progress.unlink(missing_ok=True)
    done: int = json.loads(progress.read_text()) if progress.exists() else 0
    size = 4 * math.prod(shape) * (shape[1] - done) // shape[1]
    if shutil.disk_usage(path.parent).free < size:
        raise DistillationError(
            f"The teacher's outputs need {size / 2**20:.1f} MiB more in '{path.parent}'.",
            "The disk has less free space than that.",
            "Choose another workdir, or set teacher='online'.",
        )
    outputs = _open_array(partial, shape, "r+" if done else "w+")
    row = bar.add_task("teacher", total=shape[1], completed=done, loss="")
    for indices in chunks(range(done, shape[1]), batch_size):
        x = tuple(part.to(device) for part in inputs.__getitems__(indices))
        with torch.no_grad():
            batch = check_finite(ensemble(*x).float(), indices)
        outputs[:, indices[0] : indices[-1] + 1] = batch.cpu().numpy()
        outputs.flush()
        write_atomic(progress, json.dumps(indices[-1] + 1).encode())
        bar.update(row, completed=indices[-1] + 1)
    del outputs  # Windows cannot rename a mapped file
    os.replace(partial, path)
    progress.unlink()


def architecture(module: nn.Module) -> str:
    """What a module is built of, without its weights and memory addresses."""
    shapes = [(name, value.shape, value.dtype) for name, value in tensor_state(module).items()]
    trained = [name for name, value in module.named_parameters() if value.requires_grad]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", f"{module} {shapes} {trained}")


def hash_tensors(hasher: Any, tensors: Iterable[torch.Tensor]) -> None:
    """Feed dtype, shape and content of tensors to a hash."""
    for tensor in tensors:
        hasher.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def check_finite(outputs: torch.Tensor, indices: Sequence[int], first: int = 0) -> torch.Tensor:
    """The members' outputs ``[M, B, C]`` as they are.

    Args:
        outputs: Of members ``first``, ``first`` + 1, ….
        indices: Numbers of the B samples, for the message.
        first: Number of the first member, for the message.

    Raises:
        DistillationError: One is not finite.
    """
    bad = (~torch.isfinite(outputs)).flatten(2).any(-1).nonzero()
    if len(bad):
        member, row = bad[0].tolist()
        raise DistillationError(
            f"Member {first + member} gives NaN or inf for sample {indices[row]}.",
            "A head cannot imitate that.",
            "Check that member and that sample.",
        )
    return outputs


def chunks(values: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut a sequence into lists of ``size``, the last of them possibly shorter."""
    return (list(values[start : start + size]) for start in range(0, len(values), size))


def _tensor(value: object) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    array = np.require(value, requirements=["C", "W"])
    if array.dtype.kind in "biuf":
        tensor = torch.from_numpy(array)
        return tensor.to(torch.get_default_dtype()) if array.dtype == np.float64 else tensor
    raise InputError(
        f"A sample's input is a {type(value).__name__}.",
        "The models take tensors.",
        "Let the dataset yield tensors or arrays: x, (x, …) or ((x1, x2), …).",
    )


def _open_array(path: Path, shape: tuple[int, ...], mode: Literal["r", "r+", "w+"]) -> Outputs:
    reason = "its shape or dtype is another"
    try:
        array: Outputs = np.lib.format.open_memmap(
            path, mode, np.float32, shape if mode == "w+" else None
        )
        if array.shape == shape and array.dtype == np.float32:
            return array
    except (ValueError, OSError) as exc:
        reason = str(exc)
    raise ArtifactError(
        f"The teacher's outputs in '{path}' cannot be used: {reason}.",
        f"Expected float32 {list(shape)} as distill writes them.",
        "Delete the file; it is computed anew.",
    )
