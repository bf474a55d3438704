"""`quantize`: explicit precision in the graph, before fusion.

int8 is symmetric W8A8: one scale per activation tensor, one per output channel of each weight, zero
point 0. Q/DQ stand only in front of Conv, Gemm, MatMul and average pooling, never behind them: that
is what TensorRT fuses best, and lowerings for other runtimes can move them. Softmax and entropies
stay fp32, because mutual information is a small difference of large terms.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
)
from rich.progress import Progress

from hydra_edge import anatomy, ops, surgery
from hydra_edge.artifacts.arrays import any_batch, check_arrays, load_dataset, to_numpy
from hydra_edge.artifacts.files import sha256
from hydra_edge.artifacts.graph import Graph, TensorSpec
from hydra_edge.errors import HydraError, InputError, QuantizationError
from hydra_edge.half_precision import to_fp16

Array = npt.NDArray[np.generic]
Calibration = (
    str | Path | Array | Mapping[str, Array] | Iterable[Array] | Iterable[Mapping[str, Array]]
)

PRECISIONS = ("fp32", "fp16", "int8")
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
_MATMULS = ("Conv", "Gemm", "MatMul")
_POOLING = ("AveragePool", "GlobalAveragePool", "ReduceMean")
_INT8_KINDS = (*_MATMULS, *_POOLING)
_CALIBRATION_BATCH = 32
# "entropy" compares thresholds that leave at least `_QUANTIZED_BINS` of `_BINS` bins, so the two
# must differ: ONNX Runtime's default of 128 for both leaves one threshold, the largest value. 2048
# bins let it clip to a sixteenth, as in Migacz, "8-bit Inference with TensorRT" (GTC 2017).
_BINS = 2048
_QUANTIZED_BINS = 128


@dataclass(frozen=True)
class Precision:
    """What body and heads are stored and multiplied in; each one of `PRECISIONS`."""

    body: str = "fp32"
    heads: str = "fp32"

    def __post_init__(self) -> None:
        for part in (self.body, self.heads):
            if part not in PRECISIONS:
                raise InputError(
                    f"Unknown precision '{part}'.",
                    f"There are: {', '.join(PRECISIONS)}.",
                    "Use one for all, or two as in 'body=int8,heads=fp16'.",
                )

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read ``"int8"`` (both parts) or ``"body=int8,heads=fp16"`` (a part left out is fp32)."""
        if "=" not in text:
            return cls(text, text)
        items = [item.strip().partition("=")[::2] for item in text.split(",")]
        parts = dict(items)
        if len(parts) < len(items):
            raise InputError(
                f"The precision '{text}' names a part twice.",
                "Each part has one precision.",
                "Write for example 'body=int8,heads=fp16'.",
            )
        unknown = sorted(set(parts) - {"body", "heads"})
        if unknown:
            raise InputError(
                f"Unknown part '{unknown[0]}' in the precision '{text}'.",
                "A student has two parts: body and heads.",
                "Write for example 'body=int8,heads=fp16'.",
            )
        return cls(**parts)

    def __str__(self) -> str:
        return self.body if self.body == self.heads else f"body={self.body},heads={self.heads}"

    def __contains__(self, precision: object) -> bool:
        return precision in (self.body, self.heads)


@dataclass(frozen=True)
class CalibrationOptions:
    """How activation ranges are found from calibration data.

    Attributes:
        method: ``"minmax"``, ``"entropy"`` (smallest KL divergence of the histogram) or
            ``"percentile"``.
        percentile: Share of values kept, in percent, for ``"percentile"``.
        progress: Show a progress bar.
    """

    method: str = "minmax"
    percentile: float = 99.99
    progress: bool = False

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise InputError(
                f"Unknown calibration method '{self.method}'.",
                f"There are: {', '.join(_METHODS)}.",
                "Pick one of those.",
            )
        if not 50.0 < self.percentile <= 100.0:
            raise InputError(
                f"The calibration percentile is {self.percentile}.",
                "It is the share of values kept, in percent.",
                "Use a number above 50 and up to 100, e.g. 99.99.",
            )


def quantize(
    graph: Graph,
    precision: str | Precision,
    *,
    calibration: Calibration | None = None,
    options: CalibrationOptions | None = None,
) -> Graph:
    """Store and multiply body and heads in lower precision, explicitly.

    Args:
        graph: An unfused fp32 graph.
        precision: ``"fp32"``, ``"fp16"``, ``"int8"`` or a `Precision` with different parts.
        calibration: Representative inputs, needed for int8: an array ``[N, ...]``, arrays by input
            name, an ``.npz`` file of those, or an iterable of batches of either.
        options: How activation ranges are found; minmax by default.

    Returns:
        A graph with the same inputs and outputs; int8 parts behind Q/DQ, fp16 parts between casts.

    Raises:
        InputError: Calibration data is missing or does not fit the inputs.
        QuantizationError: The graph is fused or quantized already, or ONNX Runtime failed.
    """
    wanted = Precision.parse(precision) if isinstance(precision, str) else precision
    options = options or CalibrationOptions()
    _require_plain(graph)
    if "int8" in wanted and calibration is None:
        raise InputError(
            "int8 needs calibration data, and none was given.",
            "Activation scales come from representative inputs.",
            "Pass calibration=…: a few hundred unlabelled samples of the training distribution.",
        )
    if wanted == Precision():
        return graph.derive(graph.model, "quantize:fp32", precision="fp32")
    core, summary = _cut(graph)
    core = _optimize(core)
    digest = None
    if "int8" in wanted:
        assert calibration is not None
        reader = _Reader(calibration, graph.inputs, options)
        core = _int8(core, wanted, reader, options)
        digest = reader.digest()
    if "fp16" in wanted:
        core = to_fp16(core, set(_nodes_in(core, wanted, "fp16", None)))
    model = summary.attach(core)
    return graph.derive(
        model, f"quantize:{wanted}", precision=str(wanted), calibration_sha256=digest
    )


def _require_plain(graph: Graph) -> None:
    found = {node.op_type for node in graph.model.graph.node}
    if found & {"GroupedMatMul", "QuantizedGroupedMatMul"}:
        raise QuantizationError(
            "The graph is fused already.",
            "Calibrators know standard operators only.",
            "Quantize first, then fuse.",
        )
    if found & {"QuantizeLinear", "DequantizeLinear"}:
        raise QuantizationError(
            "The graph holds QuantizeLinear or DequantizeLinear already.",
            "Quantizing twice would put one rounding on top of another.",
            "Fuse and compile it as it is, or start from the fp32 graph.",
        )


@dataclass(frozen=True)
class _Summary:
    """The summary part of a graph, kept aside while the rest is quantized."""

    nodes: tuple[gs.Node, ...]
    outputs: tuple[gs.Tensor, ...]
    like: onnx.ModelProto

    def attach(self, core: onnx.ModelProto) -> onnx.ModelProto:
        """The quantized core with the summary behind it again."""
        graph = surgery.open_model(core)
        tensors = graph.tensors()

        def inner(tensor: gs.Tensor) -> gs.Tensor:
            return tensors.setdefault(
                tensor.name, gs.Variable(tensor.name, tensor.dtype, tensor.shape)
            )

        for node in self.nodes:
            graph.nodes.append(
                gs.Node(
                    node.op,
                    node.name,
                    dict(node.attrs),
                    [inner(tensor) for tensor in node.inputs],
                    [inner(tensor) for tensor in node.outputs],
                    domain=node.domain,
                )
            )
        graph.outputs = [inner(tensor) for tensor in self.outputs]
        for tensor, old in zip(graph.outputs, self.outputs, strict=True):
            tensor.dtype, tensor.shape = old.dtype, old.shape
        return surgery.close_model(graph, like=self.like)


def _cut(graph: Graph) -> tuple[onnx.ModelProto, _Summary]:
    """Take the summary functions off: what is left ends at the per-head outputs."""
    surgeon = surgery.open_model(graph.model)
    nodes = tuple(node for node in surgeon.nodes if node.domain == ops.DOMAIN)
    outputs = tuple(surgeon.outputs)
    written = {tensor.name for node in nodes for tensor in node.outputs}
    ends = [tensor for tensor in outputs if tensor.name not in written]
    for node in nodes:
        for tensor in node.inputs:
            if all(tensor is not end for end in ends):
                ends.append(tensor)
    frozen = tuple(
        gs.Node(n.op, n.name, dict(n.attrs), list(n.inputs), list(n.outputs), domain=n.domain)
        for n in nodes
    )
    for node in nodes:
        node.inputs.clear()
        node.outputs.clear()
    surgeon.outputs = ends
    _name_nodes(surgeon.nodes)
    return surgery.close_model(surgeon, like=graph.model), _Summary(frozen, outputs, graph.model)


def _optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and batch norms with ONNX Runtime, in standard operators only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimized.onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        try:
            ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as exc:  # its exceptions share no public base class
            raise _failed("load the graph", exc) from exc
        optimized = onnx.load(path)
    # It imports every domain it knows, which another runtime might not.
    used = {node.domain for node in optimized.graph.node} | {""}
    kept = [entry for entry in optimized.opset_import if entry.domain in used]
    del optimized.opset_import[:]
    optimized.opset_import.extend(kept)
    # Tells the quantizer that this was done; it warns otherwise.
    optimized.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    _name_nodes(optimized.graph.node)
    return optimized


def _name_nodes(nodes: Sequence[onnx.NodeProto | gs.Node]) -> None:
    """Give every node a name of its own, because body and heads are told apart by them."""
    taken = {node.name for node in nodes}
    seen: set[str] = set()
    for index, node in enumerate(nodes):
        if not node.name or node.name in seen:
            node.name = next(
                name for n in itertools.count() if (name := f"node_{index}_{n}") not in taken
            )
            taken.add(node.name)
        seen.add(node.name)


def _int8(
    model: onnx.ModelProto, wanted: Precision, reader: _Reader, options: CalibrationOptions
) -> onnx.ModelProto:
    nodes = _nodes_in(model, wanted, "int8", _INT8_KINDS)
    if not nodes:
        raise QuantizationError(
            f"Nothing in the graph can be quantized to {wanted}.",
            f"int8 needs {', '.join(_MATMULS)} nodes with constant weights in that part.",
            "Check which part holds the weights with `hydra-edge inspect`.",
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            # The calibrators print; what they have to say is in our progress bar.
            with reader, contextlib.redirect_stdout(io.StringIO()):
                return _calibrate_and_quantize(model, nodes, reader, options, Path(folder))
        except HydraError:  # from the reader: the calibration data does not fit
            raise
        except Exception as exc:  # the quantizer raises whatever its parts raise
            raise _failed("calibrate and quantize the graph", exc) from exc


def _calibrate_and_quantize(
    model: onnx.ModelProto,
    nodes: list[str],
    reader: _Reader,
    options: CalibrationOptions,
    folder: Path,
) -> onnx.ModelProto:
    """What `quantize_static` does; that one passes no histogram bins to the calibrator."""
    onnx.save(model, folder / "model.onnx")
    extra = {"symmetric": True, "percentile": options.percentile, "num_bins": _BINS}
    calibrator = create_calibrator(
        folder / "model.onnx",
        list(_INT8_KINDS),
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=_METHODS[options.method],
        extra_options=extra | {"num_quantized_bins": _QUANTIZED_BINS},
    )
    calibrator.collect_data(reader)
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=calibrator.compute_data(),
        nodes_to_quantize=nodes,
        nodes_to_exclude=[],
        op_types_to_quantize=list(_INT8_KINDS),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(_INT8_KINDS),
        },
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(folder / "quantized.onnx")
    return onnx.load(folder / "quantized.onnx")


def _nodes_in(
    model: onnx.ModelProto, wanted: Precision, precision: str, kinds: tuple[str, ...] | None
) -> list[str]:
    """Names of the nodes of ``kinds`` that lie in the parts that get ``precision``."""
    heads = _heads(model) if wanted.body != wanted.heads else set()
    return [
        node.name
        for node in model.graph.node
        if (kinds is None or node.op_type in kinds)
        and (wanted.heads if node.name in heads else wanted.body) == precision
    ]


def _heads(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes in heads; a graph without any has one precision only."""
    found = anatomy.head_nodes(surgery.open_model(model))
    if not found:
        raise QuantizationError(
            "The graph has no heads to tell from its body.",
            "Heads are matmuls side by side whose results one Concat joins, or that are outputs.",
            "Use one precision for all, e.g. 'int8'.",
        )
    return found


def _failed(what: str, exc: Exception) -> QuantizationError:
    return QuantizationError(
        f"ONNX Runtime could not {what}.",
        f"It says: {(str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip('.')}.",
        "Check that the graph runs in ONNX Runtime and that calibration data fits it.",
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds batches to the calibrator, checks them and hashes them on the way."""

    def __init__(
        self,
        calibration: Calibration,
        specs: tuple[TensorSpec, ...],
        options: CalibrationOptions,
    ) -> None:
        # The histogram calibrators stack what they saw, so every batch must have the same size.
        batch = _CALIBRATION_BATCH if options.method == "minmax" else 1
        self._batches = _split(calibration, specs, batch)
        # One per input, so that equal data cut into other batches has an equal digest.
        self._hashes: dict[str, Any] = {}
        self._progress = Progress(disable=not options.progress, transient=True)
        self._task = self._progress.add_task("calibrating", total=_length(calibration))
        self._seen = 0

    def __enter__(self) -> _Reader:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def get_next(self) -> dict[str, Array] | None:
        """The next batch, or None at the end."""
        feeds = next(self._batches, None)
        if feeds is None:
            if not self._seen:
                raise InputError(
                    "The calibration data is empty.",
                    "Activation scales come from at least one batch.",
                    "Pass a few hundred representative samples.",
                )
            return None
        for name, array in feeds.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise InputError(
                    f"The calibration data for '{name}' holds NaN or infinity.",
                    "The scale of everything behind it would be lost.",
                    "Remove those samples.",
                )
            self._hashes.setdefault(name, hashlib.sha256()).update(array.tobytes())
        count = len(next(iter(feeds.values())))
        self._seen += count
        self._progress.advance(self._task, count)
        return feeds

    def digest(self) -> str:
        """sha256 of everything that was fed."""
        parts = [f"{name} {self._hashes[name].hexdigest()}" for name in sorted(self._hashes)]
        return sha256("\n".join(parts).encode())


def _length(calibration: Calibration) -> int | None:
    if isinstance(calibration, np.ndarray):
        return len(calibration)
    if isinstance(calibration, Mapping) and calibration:
        return len(next(iter(calibration.values())))
    return None


def _split(
    calibration: Calibration, specs: tuple[TensorSpec, ...], size: int
) -> Iterator[dict[str, Array]]:
    """Whatever the user gave, checked, as batches of at most ``size`` samples by input name."""
    fixed = specs[0].shape[0] if specs[0].shape else None
    step = fixed if isinstance(fixed, int) else size
    for given in _mappings(calibration, specs):
        whole = check_arrays(given, any_batch(specs))
        for start in range(0, len(whole[specs[0].name]), step):
            batch = {name: array[start : start + step] for name, array in whole.items()}
            yield check_arrays(batch, specs)


def _mappings(
    calibration: Calibration, specs: tuple[TensorSpec, ...]
) -> Iterator[Mapping[str, Array]]:
    if isinstance(calibration, str | Path):
        calibration, _ = load_dataset(calibration, specs)
    single = isinstance(calibration, Mapping) or hasattr(calibration, "__dlpack__")
    batches: Iterable[object] = [calibration] if single else calibration
    for batch in batches:
        given = batch if isinstance(batch, Mapping) else {specs[0].name: batch}
        yield {name: to_numpy(value, name) for name, value in given.items()}
