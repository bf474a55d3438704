"""Calibration data, and the values that the tensors of a graph take on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from rich.console import Console
from rich.progress import Progress

from hydra_edge import scales
from hydra_edge.artifacts.arrays import any_batch, check_arrays, load_dataset, to_numpy
from hydra_edge.artifacts.files import read_bytes, sha256, write_atomic
from hydra_edge.artifacts.graph import Graph, TensorSpec
from hydra_edge.backends.onnxruntime import Observer
from hydra_edge.errors import ArtifactError, InputError

Array = npt.NDArray[np.generic]
Calibration = (
    str | Path | Array | Mapping[str, Array] | Iterable[Array] | Iterable[Mapping[str, Array]]
)
_BATCH = 32
_WEIGHT_METHODS = ("minmax", "mse")
_CACHE_SCHEMA = 2
# A cut in so small a part of a histogram is known to a few bins only.
_COARSE = 1 / 32


@dataclass(frozen=True)
class CalibrationOptions:
    """How scales are found.

    Attributes:
        method: For activations in int8: ``"minmax"``, ``"percentile"``, ``"entropy"`` (smallest KL
            divergence of the histogram) or ``"mse"`` (smallest squared error). Those in fp8,
            whose steps shrink with the values, always keep the largest.
        percentile: Share of values other than 0 that is kept, in percent, for ``"percentile"``.
        weights: For weights: ``"minmax"`` or ``"mse"``.
        equalize: Move scale from wide channels to narrow ones, across layers, before quantizing.
        correct_bias: Add to biases what quantization shifts their layers' outputs by on average.
        cache: A file that remembers what was measured; that is used again for the same graph,
            data and method, and anything else is measured and added.
        progress: Show a progress bar.
    """

    method: str = "minmax"
    percentile: float = 99.99
    weights: str = "minmax"
    equalize: bool = False
    correct_bias: bool = False
    cache: str | Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for what, method, known in (
            ("calibration method", self.method, scales.METHODS),
            ("method for weights", self.weights, _WEIGHT_METHODS),
        ):
            if method not in known:
                raise InputError(
                    f"Unknown {what} '{method}'.",
                    f"There are: {', '.join(known)}.",
                    "Pick one of those.",
                )
        if not 50.0 < self.percentile <= 100.0:
            raise InputError(
                f"The calibration percentile is {self.percentile}.",
                "It is the share of values kept, in percent.",
                "Use a number above 50 and up to 100, e.g. 99.99.",
            )


class Samples:
    """Calibration data, checked and cut into batches; it may be run through several times."""

    def __init__(
        self, calibration: Calibration, specs: tuple[TensorSpec, ...], *, progress: bool = False
    ) -> None:
        self.batches = list(_split(calibration, specs, _BATCH))
        self.progress = progress
        if not self.batches:
            raise InputError(
                "The calibration data is empty.",
                "Activation scales come from at least one batch.",
                "Pass a few hundred representative samples.",
            )
        # One per input, so that equal data cut into other batches has an equal digest.
        hashes = {spec.name: hashlib.sha256() for spec in specs}
        shapes: dict[str, tuple[int, ...]] = {}
        for feeds in self.batches:
            for name, array in feeds.items():
                if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                    raise InputError(
                        f"The calibration data for '{name}' holds NaN or infinity.",
                        "The scale of everything behind it would be lost.",
                        "Remove those samples.",
                    )
                if shapes.get(name) != array.shape[1:]:  # axes of no fixed size
                    shapes[name] = array.shape[1:]
                    hashes[name].update(repr(array.shape[1:]).encode())
                hashes[name].update(array.tobytes())
        parts = [f"{name} {digest.hexdigest()}" for name, digest in sorted(hashes.items())]
        self.digest = sha256("\n".join(parts).encode())

    def __len__(self) -> int:
        return sum(len(next(iter(feeds.values()))) for feeds in self.batches)

    def run(
        self, model: onnx.ModelProto, tensors: Sequence[str], what: str
    ) -> Iterator[dict[str, Array]]:
        """Values of ``tensors`` for batch after batch, with a progress bar."""
        observer = Observer(model, tensors)
        console = Console(stderr=True)
        shown = self.progress and console.is_terminal
        with Progress(console=console, disable=not shown, transient=True) as progress:
            task = progress.add_task(what, total=len(self))
            for feeds in self.batches:
                yield observer.run(feeds)
                progress.advance(task, len(next(iter(feeds.values()))))


def thresholds(
    model: onnx.ModelProto, tensors: Sequence[str], samples: Samples, options: CalibrationOptions
) -> dict[str, float]:
    """The largest magnitude of every tensor that is kept, by the method of ``options``.

    The data runs through the graph once for the largest values and, unless those are all that is
    asked for, once more for histograms. Cutting the data into other batches changes nothing.

    Raises:
        InputError: A tensor takes values without a range.
        ArtifactError: The cache is something else.
    """
    tensors = sorted(set(tensors))
    if options.cache is None:
        return _measured(model, tensors, samples, options)
    key, path = _key(model, tensors, samples, options), Path(options.cache)
    known = _cached(path)
    if key not in known:
        known[key] = _measured(model, tensors, samples, options)
        text = json.dumps({"schema": _CACHE_SCHEMA, "measured": known}, indent=1)
        write_atomic(path, text.encode())
    return known[key]


def _measured(
    model: onnx.ModelProto, tensors: Sequence[str], samples: Samples, options: CalibrationOptions
) -> dict[str, float]:
    peaks = dict.fromkeys(tensors, 0.0)
    for values in samples.run(model, tensors, "finding the largest values"):
        for name, array in values.items():
            peak = np.abs(array).max(initial=0.0)
            peaks[name] = float(np.maximum(peaks[name], peak))  # NaN stays NaN, unlike in max()
    _require_finite(peaks)
    if options.method == "minmax":
        return peaks
    found, tops = peaks, {name: peak for name, peak in peaks.items() if peak > 0}
    while tops:
        counts = {name: np.zeros(scales.BINS) for name in tops}
        for values in samples.run(model, sorted(tops), "counting values"):
            for name, array in values.items():
                counts[name] += scales.histogram(array, tops[name])
        limit = scales.LIMITS["int8"]
        cuts = {
            name: scales.threshold(count, tops[name], options.method, options.percentile, limit)
            for name, count in counts.items()
        }
        found = found | cuts
        # A far outlier leaves all other values in a few bins; the others look at it themselves.
        closer = options.method == "percentile"
        tops = {n: cut for n, cut in cuts.items() if closer and cut <= _COARSE * tops[n]}
    return found


def _require_finite(peaks: Mapping[str, float]) -> None:
    bad = next((name for name, peak in peaks.items() if not np.isfinite(peak)), None)
    if bad is not None:
        raise InputError(
            f"The tensor '{bad}' holds NaN or infinity on the calibration data.",
            "No scale fits such values.",
            "Check the graph on this data in fp32 first.",
        )


def _key(
    model: onnx.ModelProto, tensors: Sequence[str], samples: Samples, options: CalibrationOptions
) -> str:
    parts = [
        Graph(model).sha256,
        samples.digest,
        options.method,
        repr(options.percentile) if options.method == "percentile" else "",
        *tensors,
    ]
    return sha256("\n".join(parts).encode())


def _cached(path: Path) -> dict[str, dict[str, float]]:
    """What earlier runs found, by question."""
    if not path.exists():
        return {}
    try:
        data = json.loads(read_bytes(path, "a calibration cache"))
        if data["schema"] != _CACHE_SCHEMA:
            return {}
        return {
            str(key): {str(name): float(value) for name, value in found.items()}
            for key, found in data["measured"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ArtifactError(
            f"'{path}' is not a calibration cache.",
            f"Reading it failed: {exc!r}.",
            "Name another file, or delete this one.",
        ) from exc


def _split(
    calibration: Calibration, specs: tuple[TensorSpec, ...], size: int
) -> Iterator[dict[str, Array]]:
    """Whatever the user gave, checked, as batches of ``size`` samples by input name.

    Samples of equal shape fill up each other's batches, because results of a matmul depend on the
    batch in the last bits: with the user's own batches, so would thresholds.
    """
    fixed = specs[0].shape[0] if specs[0].shape else None
    step = fixed if isinstance(fixed, int) else size
    rest: dict[str, Array] = {}
    for given in _mappings(calibration, specs):
        whole = check_arrays(given, any_batch(specs))
        if rest and any(rest[name].shape[1:] != array.shape[1:] for name, array in whole.items()):
            yield check_arrays(rest, specs)
        elif rest:
            whole = {name: np.concatenate([rest[name], array]) for name, array in whole.items()}
        count = len(whole[specs[0].name])
        full = count - count % step
        for start in range(0, full, step):
            batch = {name: array[start : start + step] for name, array in whole.items()}
            yield check_arrays(batch, specs)
        rest = {name: array[full:] for name, array in whole.items()} if full < count else {}
    if rest:
        yield check_arrays(rest, specs)


def _mappings(
    calibration: Calibration, specs: tuple[TensorSpec, ...]
) -> Iterator[Mapping[str, Array]]:
    if isinstance(calibration, str | Path):
        calibration, _ = load_dataset(calibration, specs)
    if not isinstance(calibration, Iterable):
        raise InputError(
            f"The calibration data is {calibration!r}.",
            "It is an array, arrays by input name, a file of those, or batches of them.",
            "Pass for example an array of a few hundred samples.",
        )
    single = isinstance(calibration, Mapping) or hasattr(calibration, "__dlpack__")
    batches: Iterable[object] = [calibration] if single else calibration
    for batch in batches:
        given = batch if isinstance(batch, Mapping) else {specs[0].name: batch}
        yield {name: to_numpy(value, name) for name, value in given.items()}
