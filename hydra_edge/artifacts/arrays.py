"""Arrays that users hand in, from files or other libraries, checked against what is declared."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hydra_edge.artifacts.files import NPY_HEADER_ERRORS, read_bytes
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.errors import ArtifactError, InputError

Array = npt.NDArray[np.generic]


def load_arrays(path: str | Path) -> dict[str, Array]:
    """Read ``.npz`` (arrays by name) or ``.npy`` (one array, named ``""``); never a pickle.

    Raises:
        ArtifactError: It is missing, another format, or holds pickled objects.
    """
    if not Path(path).is_file():
        read_bytes(path, "an .npy or .npz file")  # says what is wrong
    try:
        with open(path, "rb") as stream:  # numpy leaves a file of its own open when it fails
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"": loaded}
            with loaded:
                arrays = {name: loaded[name] for name in loaded.files}
        odd = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        if odd:
            raise ValueError(f"its member '{odd[0]}' is no array")
        return arrays
    # A header may claim any size (MemoryError); an encrypted zip raises RuntimeError.
    except (
        *(ValueError, OSError, EOFError, KeyError, MemoryError, RuntimeError),
        *(zipfile.BadZipFile, zlib.error, *NPY_HEADER_ERRORS),
    ) as exc:
        raise ArtifactError(
            f"'{path}' is not a usable .npy or .npz file.",
            f"Reading it failed: {str(exc).rstrip('.')}.",
            "Save arrays with numpy.save or numpy.savez; pickled objects are never loaded.",
        ) from exc


def load_dataset(
    path: str | Path, specs: tuple[TensorSpec, ...]
) -> tuple[dict[str, Array], Array | None]:
    """Read inputs, and labels if there are any, from ``.npz`` or ``.npy``.

    Labels are the array called ``labels``. If there is one input and one other array, that is it,
    whatever its name; otherwise inputs go by name and other arrays are left out.

    Raises:
        ArtifactError: The file cannot be read.
    """
    arrays = load_arrays(path)
    labels = arrays.pop("labels", None)
    names = {spec.name for spec in specs}
    if len(specs) == 1 and len(arrays) == 1:
        return {specs[0].name: next(iter(arrays.values()))}, labels
    return {name: array for name, array in arrays.items() if name in names}, labels


def to_numpy(value: object, name: str) -> Array:
    """Take an array of any library that numpy understands: numpy, DLPack, or array-likes.

    Raises:
        InputError: It lies on another device, needs a gradient, or is no array of numbers.
    """
    if isinstance(value, np.ndarray):
        return value
    try:
        if hasattr(value, "__dlpack__"):
            try:
                array: Array = np.from_dlpack(value)
            except (AttributeError, TypeError):
                array = np.asarray(value)
        else:
            array = np.asarray(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as exc:
        raise InputError(
            f"The value for '{name}' cannot be read as an array on the CPU.",
            f"{type(value).__name__} says: {str(exc).strip().rstrip('.')}.",
            "Detach it and copy it to the CPU first, e.g. tensor.detach().cpu().",
        ) from exc
    if array.dtype == object or array.dtype.kind in "SUV":
        raise InputError(
            f"The value for '{name}' is {type(value).__name__}, not an array of numbers.",
            "It has no numeric dtype.",
            "Pass a numpy array, a torch tensor or any DLPack array.",
        )
    return array


def any_batch(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """``specs`` for callers that split and pad: a fixed axis 0 may have any size."""
    return tuple(
        replace(spec, shape=("batch", *spec.shape[1:]))
        if spec.shape and isinstance(spec.shape[0], int)
        else spec
        for spec in specs
    )


class Shaped(Protocol):
    """An array, wherever it lies."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its elements."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...


def check_arrays(values: Mapping[str, Array], specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Check that ``values`` are exactly the declared inputs.

    Returns:
        C-contiguous arrays by input name, in declared order.

    Raises:
        InputError: A name is missing or unknown, or a shape, dtype or batch does not fit.
    """
    check_shapes(values, specs)
    return {spec.name: in_c_order(values[spec.name]) for spec in specs}


def in_c_order(array: Array) -> Array:
    """The array, or a copy, with consecutive elements."""
    return np.ascontiguousarray(array) if array.ndim else array


@cache
def _name(dtype: np.dtype[Any]) -> str:
    """Its name; numpy puts it together anew each time, which costs as much as all other checks."""
    return str(dtype)


def check_shapes(values: Mapping[str, Shaped], specs: tuple[TensorSpec, ...]) -> None:
    """Check that ``values``, on whatever device, are exactly the declared inputs.

    Raises:
        InputError: A name is missing or unknown, or a shape, dtype or batch does not fit.
    """
    if unknown := values.keys() - {spec.name for spec in specs}:
        raise InputError(
            f"There is no input '{min(unknown)}'.",
            f"The inputs are {'; '.join(map(str, specs))}.",
            "Use those names.",
        )
    batches = {}
    for spec in specs:
        array = values.get(spec.name)
        if array is None:
            raise InputError(
                f"The input '{spec.name}' is missing.",
                f"The inputs are {'; '.join(map(str, specs))}.",
                "Pass all of them.",
            )
        shape = array.shape
        if _name(array.dtype) != spec.dtype:
            raise InputError(
                f"The input '{spec.name}' has dtype {array.dtype}.",
                f"The engine takes {spec.dtype}; converting silently could hide a wrong scale.",
                f"Convert it: x.astype('{spec.dtype}').",
            )
        fits = len(shape) == len(spec.shape) and all(
            size == found or isinstance(size, str)
            for size, found in zip(spec.shape, shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"The input '{spec.name}' has shape {list(shape)}.",
                f"Declared is {spec}.",
                "Give it that rank and those sizes; named axes may have any size.",
            )
        if spec.shape and isinstance(spec.shape[0], str):
            batches[spec.name] = shape[0]
    if len(set(batches.values())) > 1:
        raise InputError(
            f"The inputs have different batch sizes: {batches}.",
            "Axis 0 of every input is the batch.",
            "Give all inputs the same number of samples.",
        )
    if 0 in batches.values():
        raise InputError(
            "The batch is empty.", "There is nothing to run.", "Pass at least one sample."
        )
