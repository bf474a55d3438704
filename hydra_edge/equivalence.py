"""Do two graphs compute the same? The question every rewrite must answer before it returns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx

from hydra_edge.artifacts.engine import Golden
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.backends import onnxruntime as backend
from hydra_edge.errors import GraphError
from hydra_edge.ops import heads
from hydra_edge.ops.ensemble_summary import ENTROPIES
from hydra_edge.programs import Runner

Array = npt.NDArray[np.generic]

# fp32 sums in another order differ by about 1e-6 of the largest term; 1e-4 leaves room for depth.
FLOAT_TOLERANCE = 1e-4
# With Q/DQ inside, a value that lies halfway between two integers may round either way, and the
# layer behind it moves by one step of 127. Over 99 batches of 16 digits the worst head of the
# demo's student moves by 1.4 % (median) and at most 2.5 %; swapped heads or a wrong scale move it
# by tens of percent.
QUANTIZED_TOLERANCE = 5e-2
# fp16 keeps 11 bits: 5e-4 relative per operation.
HALF_TOLERANCE = 1e-2
BFLOAT_TOLERANCE = 4e-2  # 8 bits: 4e-3
# Of a captioner: an entropy in nats, and a deviation of sides that are fractions of the image.
_BOX_DOUBTS = ("score_mi", "box_spread")


def random_inputs(
    specs: tuple[TensorSpec, ...], *, batch: int = 16, seed: int = 0
) -> dict[str, Array]:
    """Inputs that fit ``specs``: normal floats, small integers, ``batch`` for every named axis.

    Raises:
        GraphError: An input has no numeric type.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for spec in specs:
        shape = tuple(size if isinstance(size, int) else batch for size in spec.shape)
        if spec.dtype in ("unknown", "object"):
            raise GraphError(
                f"The input '{spec}' is not a tensor of numbers with a declared type.",
                "No random values can be made for it, so a rewrite could not be checked.",
                "Export the model with typed, numeric inputs.",
            )
        dtype = np.dtype(spec.dtype)
        if np.issubdtype(dtype, np.floating):
            feeds[spec.name] = rng.standard_normal(shape).astype(dtype)
        else:
            feeds[spec.name] = rng.integers(0, 2, shape).astype(dtype)
    return feeds


def tolerance_of(model: onnx.ModelProto) -> float:
    """The relative error that two faithful versions of ``model`` may show."""
    ops = {node.op_type for node in model.graph.node}
    if ops & {"QuantizeLinear", "QuantizedGroupedMatMul"}:
        return QUANTIZED_TOLERANCE
    stored = {tensor.data_type for tensor in model.graph.initializer}
    if onnx.TensorProto.BFLOAT16 in stored:
        return BFLOAT_TOLERANCE
    if (
        onnx.TensorProto.FLOAT16 in stored or heads.OP in ops
    ):  # whose hidden activations have 16 bits or fewer
        return HALF_TOLERANCE
    return FLOAT_TOLERANCE


def difference(a: Array, b: Array, smallest_scale: float = 0.0) -> float:
    """Relative error of ``a`` against ``b``, RMS over RMS.

    Tensors of three and more axes are measured per slice of axis 0, which is the head, and the
    worst counts: one wrong head among many right ones is not averaged away. Slices far quieter than
    the whole are measured against 1e-3 of it, and nothing against less than ``smallest_scale``.
    Shapes that differ, and NaNs and infinities that do not match, count as infinitely far.
    """
    if a.shape != b.shape:
        return float("inf")
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(y)
    if (
        not np.array_equal(x[~finite], y[~finite], equal_nan=True)
        or not np.isfinite(x[finite]).all()
    ):
        return float("inf")
    x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
    if x.size == 0:
        return 0.0
    axes = tuple(range(1 if x.ndim > 2 else 0, x.ndim))
    error = np.sqrt(np.mean((x - y) ** 2, axis=axes))
    scale = np.sqrt(np.mean(y**2, axis=axes))
    floor = 1e-3 * float(np.sqrt(np.mean(y**2))) + 1e-6
    return float(np.max(error / np.maximum(scale, max(floor, smallest_scale))))


def worst_difference(
    model: onnx.ModelProto,
    expected: Mapping[str, Array],
    feeds: dict[str, Array],
    logits: str | None = None,
) -> tuple[str, float]:
    """The output on which a model differs most from its reference, and by how much.

    Args:
        model: The model to judge.
        expected: What the reference gives for ``feeds``, by output name.
        feeds: Inputs.
        logits: The per-head output, if known: then it alone is compared, because everything behind
            it is the same summary op. Otherwise all floating-point outputs are.
    """
    names = [logits] if logits is not None and logits in expected else _comparable(expected)
    found = backend.evaluate(model, feeds, names)
    errors = {name: error_of(name, found[name], expected) for name in found}
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]


def replay(runner: Runner, record: Golden) -> float:
    """How far a program is from its recorded outputs: the worst relative RMS over outputs."""
    names = _comparable(record.outputs)
    found = dict(zip(names, runner.run(record.inputs, names), strict=True))
    return _worst(found, record)


def distance(model: onnx.ModelProto, record: Golden) -> float:
    """How far a model is from the recorded outputs, as ONNX Runtime computes it unoptimized."""
    found = backend.evaluate(model, dict(record.inputs), _comparable(record.outputs))
    return _worst(found, record)


def _worst(found: Mapping[str, Array], record: Golden) -> float:
    return max(error_of(name, array, record.outputs) for name, array in found.items())


def _comparable(outputs: Mapping[str, Array]) -> list[str]:
    """Floating-point outputs; votes are left out: a tie that rounds the other way moves them."""
    return [
        name
        for name, array in outputs.items()
        if name != "variation_ratio" and np.issubdtype(array.dtype, np.floating)
    ] or list(outputs)


def error_of(name: str, found: Array, expected: Mapping[str, Array]) -> float:
    """`difference`, with a sensible scale for measures of doubt.

    Where an ensemble is sure, its entropies and the variance between its heads are close to 0, and
    rounding moves them by much of themselves. An entropy changes by about as many nats as the
    logits change, so it is measured against at least 1; a variance against the total one.
    """
    scale = 1.0 if name in (*ENTROPIES, *_BOX_DOUBTS) else 0.0
    if name == "epistemic_variance" and "aleatoric_variance" in expected:
        scale = float(np.sqrt(np.mean(np.square(expected["aleatoric_variance"], dtype=np.float64))))
    return difference(found, expected[name], scale)
