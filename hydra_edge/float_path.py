"""Exact rewrites of what a runtime does not multiply in integers: weights alone, and fp8.

A weight in few bits whose input is in floats is dequantized by ONNX Runtime at every call. Written
as Cast and Mul of constants it becomes floats once, when the program is loaded; the file keeps the
few bits. Q and DQ of fp8, for which ONNX Runtime has no kernels and whose optimizer takes them for
int8 (1.32), become casts.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from hydra_edge import integer_path

Array = npt.NDArray[np.generic]
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FP8 = frozenset(
    np.dtype(kind)
    for kind in (
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e5m2fnuz,
    )
)


def dequantize_at_load(graph: gs.Graph) -> None:
    """Turn weights into floats once, where no reader multiplies their integers, or it does wrong.

    ONNX Runtime (1.32) takes the scales of a quantized MatMul for one per column, whatever they
    are, so that it multiplies by the wrong ones or reads behind their end, and sums in 32 bits.
    """
    for node in [n for n in graph.nodes if n.op == "DequantizeLinear" and n.inputs]:
        if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs):
            continue
        readers = list(node.outputs[0].outputs)
        misread = _is_misread(node) and any(
            reader.op == "MatMul" and _is_integer(reader) for reader in readers
        )
        if misread or all(reader.op in _LAYERS and not _is_integer(reader) for reader in readers):
            _to_floats(graph, node)


def cast_fp8(graph: gs.Graph) -> None:
    """Q of fp8 is a division and a saturating cast, DQ a cast and a product."""
    for node in [node for node in graph.nodes if node.op.endswith("eLinear")]:
        if len(node.inputs) < 3:
            continue
        if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
            continue
        if node.inputs[1].values.size > 1 and node.inputs[0].shape is None:
            continue
        if np.asarray(node.inputs[2].values).dtype not in _FP8 or np.any(node.inputs[2].values):
            continue
        if node.op == "DequantizeLinear":
            _to_floats(graph, node)
            continue
        rows = _Rows(graph, node)
        kind = onnx.helper.np_dtype_to_tensor_dtype(node.inputs[2].values.dtype)
        y = rows.emit("Div", [node.inputs[0], rows.along(node.inputs[1])])
        rows.finish("Cast", [y], to=int(kind), saturate=int(node.attrs.get("saturate", 1)))


def _is_integer(layer: gs.Node) -> bool:
    """Whether its input comes out of a DequantizeLinear, too."""
    x = layer.inputs[0]
    return bool(x.inputs) and x.inputs[0].op == "DequantizeLinear"


def _is_misread(node: gs.Node) -> bool:
    """Whether a MatMul of ``[K, N]`` by columns, summed in 32 bits, would be another one."""
    values, scale = (np.asarray(tensor.values) for tensor in node.inputs[:2])
    if (
        values.ndim == 2
        and values.dtype in (np.int8, np.uint8)
        and not integer_path.fits_32_bits(values)
    ):
        return True
    axis = int(node.attrs.get("axis", 1))
    columns = values.ndim == 2 and axis % 2 == 1 and not node.attrs.get("block_size", 0)
    return scale.size > 1 and not columns


def _to_floats(graph: gs.Graph, node: gs.Node) -> None:
    """Computed in fp32 as a runtime does it: in fp16 large integers are rounded, or infinite."""
    rows = _Rows(graph, node)
    scale = node.inputs[1]
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.asarray(scale.values).dtype)
    wanted = int(node.attrs.get("output_dtype", 0)) or int(kind)
    if kind == onnx.TensorProto.FLOAT16:
        kind = onnx.TensorProto.FLOAT
        scale = gs.Constant(f"{rows.stem}/scale", scale.values.astype(np.float32))
    y = rows.emit("Cast", [node.inputs[0]], to=int(kind))
    if len(node.inputs) > 2 and np.any(node.inputs[2].values):
        zero = gs.Constant(f"{rows.stem}/zero", node.inputs[2].values.astype(scale.values.dtype))
        y = rows.emit("Sub", [y, rows.along(zero)])
    operands = [y, rows.along(scale)]
    if wanted == kind:
        rows.finish("Mul", operands)
    else:
        rows.finish("Cast", [rows.emit("Mul", operands)], to=wanted)


class _Rows:
    """Replaces one Q or DQ by nodes that act on its scales and zero points as it does."""

    def __init__(self, graph: gs.Graph, node: gs.Node) -> None:
        self.graph = graph
        self.node = node
        self.stem = f"{node.outputs[0].name}/float"
        self.count = 0

    def emit(self, op: str, inputs: list[gs.Tensor], **attrs: object) -> gs.Variable:
        """A new node with one new output."""
        self.count += 1
        y = gs.Variable(f"{self.stem}/{op}_{self.count}")
        self.graph.nodes.append(gs.Node(op, f"{y.name}_node", attrs, inputs, [y]))
        return y

    def finish(self, op: str, inputs: list[gs.Tensor], **attrs: object) -> None:
        """A new node that writes what the old one wrote."""
        output = self.node.outputs[0]
        self.node.inputs.clear()
        self.node.outputs.clear()
        self.graph.nodes.append(gs.Node(op, f"{self.stem}/{op}_last", attrs, inputs, [output]))

    def along(self, parameter: gs.Constant) -> gs.Tensor:
        """A scale or zero point so that it broadcasts against the values."""
        values: Array = np.asarray(parameter.values)
        block = int(self.node.attrs.get("block_size", 0))
        axis = int(self.node.attrs.get("axis", 1))
        shape = self.node.inputs[0].shape
        if block:
            axis %= len(shape)
            index = gs.Constant(f"{self.stem}/index", np.arange(shape[axis]) // block)
            return self.emit("Gather", [parameter, index], axis=axis)
        if values.size == 1:
            return gs.Constant(f"{parameter.name}/scalar/{self.stem}", values.reshape(()))
        broadcast = [1] * len(shape)
        broadcast[axis] = -1
        return gs.Constant(f"{parameter.name}/rows/{self.stem}", values.reshape(broadcast))
