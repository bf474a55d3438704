"""Exact rewrites that let an integer runtime see integer convolutions and matmuls.

ONNX Runtime runs a convolution in int8 only where QuantizeLinear stands directly behind it, a
matmul only where its bias is quantized, too, and its fast x86 kernels take unsigned activations.
Our canonical graphs have none of that (TensorRT wants Q/DQ in front of operators, and signed), so
the lowering moves and shifts them; the integers that are multiplied stay the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

Array = npt.NDArray[np.generic]

# Quantization is monotone and maps 0 to 0, so it commutes exactly with these.
_COMMUTES = frozenset(
    {"MaxPool", "Relu", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}
)
# What may lie between Q and DQ without looking at the zero point; Clip is ours, see `_rebuild`.
_CARRIES = frozenset({"MaxPool", "Clip", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})


def hoist_quantize(graph: gs.Graph) -> None:
    """Move QuantizeLinear up through ops that it commutes with, to the convolution they follow.

    ``Q(relu(conv))`` becomes ``clip(Q(conv), 0)`` and so on: the same integers, but now an integer
    runtime sees Q directly behind the convolution and runs all of it in int8.
    """
    for quantize in [node for node in graph.nodes if node.op == "QuantizeLinear"]:
        if not _is_symmetric_int8(quantize) or _is_output(graph, quantize.outputs[0]):
            continue
        path: list[gs.Node] = []
        tensor = quantize.inputs[0]
        while tensor.inputs and tensor.inputs[0].op in _COMMUTES and _only_reader(graph, tensor):
            path.append(tensor.inputs[0])
            tensor = tensor.inputs[0].inputs[0]
        if not path or not tensor.inputs or tensor.inputs[0].op != "Conv":
            continue
        if not _only_reader(graph, tensor):
            continue
        _rebuild(graph, quantize, tensor, path[::-1])


def _rebuild(graph: gs.Graph, quantize: gs.Node, start: gs.Tensor, path: list[gs.Node]) -> None:
    parameters = quantize.inputs[1:]
    stem = f"{quantize.outputs[0].name}/hoisted"
    current = gs.Variable(f"{stem}_0", dtype=np.int8, shape=start.shape)
    graph.nodes.append(
        gs.Node("QuantizeLinear", stem, inputs=[start, *parameters], outputs=[current])
    )
    zero = gs.Constant(f"{stem}_zero", np.zeros((), np.int8))
    for index, node in enumerate(path, 1):
        relu = node.op == "Relu"
        output = gs.Variable(f"{stem}_{index}", dtype=np.int8, shape=node.outputs[0].shape)
        inputs = [current, zero] if relu else [current, *node.inputs[1:]]
        attrs = {} if relu else dict(node.attrs)
        op = "Clip" if relu else node.op
        graph.nodes.append(gs.Node(op, f"{stem}_{op}_{index}", attrs, inputs, [output]))
        current = output
    old = quantize.outputs[0]
    for reader in list(old.outputs):
        reader.inputs = [current if tensor is old else tensor for tensor in reader.inputs]
    quantize.inputs.clear()


def _is_symmetric_int8(quantize: gs.Node) -> bool:
    if len(quantize.inputs) < 3:
        return False
    scale, zero_point = quantize.inputs[1:3]
    return (
        all(
            isinstance(tensor, gs.Constant) and tensor.values.size == 1
            for tensor in (scale, zero_point)
        )
        and zero_point.values.dtype == np.int8
        and not np.any(zero_point.values)
    )


def _only_reader(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return len(tensor.outputs) == 1 and not _is_output(graph, tensor)


def _is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(output is tensor for output in graph.outputs)


def integer_source(x: gs.Tensor) -> tuple[gs.Tensor, Array, gs.Constant | None] | None:
    """The integers that ``x`` was dequantized from, with one scale, and the zero point if not 0."""
    node = x.inputs[0] if x.inputs else None
    if node is None or node.op != "DequantizeLinear":
        return None
    source, *parameters = node.inputs
    if source.dtype not in (np.int8, np.uint8) or isinstance(source, gs.Constant):
        return None
    if not all(isinstance(p, gs.Constant) and p.values.size == 1 for p in parameters):
        return None
    zero_point = None
    if len(parameters) > 1 and np.any(parameters[1].values):
        zero_point = gs.Constant(
            f"{parameters[1].name}/scalar/{x.name}", np.asarray(parameters[1].values).reshape(())
        )
    return source, np.asarray(parameters[0].values).reshape(()), zero_point


def multiply_integers(graph: gs.Graph) -> None:
    """Multiply the integers behind two dequantized operands, and scale the product.

    ``DQ(x) @ DQ(w) + bias`` is ``((x - zero) @ w) * (x_scale * w_scale) + bias``. As it stands,
    ONNX Runtime dequantizes the weight at every call. A bias that is quantized as well is left to
    the runtime, which has a kernel for that.
    """
    for node in [node for node in graph.nodes if node.op in ("Gemm", "MatMul")]:
        source = integer_source(node.inputs[0])
        weight = _integer_weight(node)
        bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
        if source is None or weight is None or node.attrs.get("transA", 0):
            continue
        if bias is not None and bias.inputs and bias.inputs[0].op == "DequantizeLinear":
            continue
        _replace_product(graph, node, source, weight, bias)


def _integer_weight(node: gs.Node) -> tuple[Array, Array] | None:
    """``[K, N]`` int8 and one scale per column or for all, if the weight is stored so."""
    back = node.inputs[1].inputs[0] if node.inputs[1].inputs else None
    if back is None or back.op != "DequantizeLinear" or back.attrs.get("block_size", 0):
        return None
    if not all(isinstance(tensor, gs.Constant) for tensor in back.inputs):
        return None
    values, scale = (np.asarray(tensor.values) for tensor in back.inputs[:2])
    zero = back.inputs[2].values if len(back.inputs) > 2 else 0
    if values.dtype != np.int8 or values.ndim != 2 or np.any(zero) or scale.dtype != np.float32:
        return None
    if back.attrs.get("output_dtype", 0) not in (0, onnx.TensorProto.FLOAT):
        return None
    swapped = bool(node.attrs.get("transB", 0))
    if scale.size > 1 and int(back.attrs.get("axis", 1)) % 2 != (0 if swapped else 1):
        return None
    matrix = values.T if swapped else values
    return (matrix, scale.reshape(-1)) if fits_32_bits(matrix) else None


def fits_32_bits(matrix: Array) -> bool:
    """Whether no sum of products of integers of 8 bits along axis 0 leaves int32."""
    if len(matrix) * 255 * 255 < 1 << 31:
        return True
    return bool(np.abs(matrix.astype(np.int64)).sum(0).max(initial=0) * 255 < 1 << 31)


def _replace_product(
    graph: gs.Graph,
    node: gs.Node,
    source: tuple[gs.Tensor, Array, gs.Constant | None],
    weight: tuple[Array, Array],
    bias: gs.Tensor | None,
) -> None:
    x, x_scale, zero_point = source
    stem = f"{node.outputs[0].name}/integer"
    alpha, beta = (float(node.attrs.get(name, 1.0)) for name in ("alpha", "beta"))

    def emit(op: str, inputs: list[gs.Tensor], dtype: object, **attrs: object) -> gs.Variable:
        name = f"{stem}/{op}_{len(graph.nodes)}"
        y = gs.Variable(name, dtype)
        graph.nodes.append(gs.Node(op, f"{name}_node", attrs, inputs, [y]))
        return y

    matrix = gs.Constant(f"{stem}/weight", np.array(weight[0], order="C"))
    scale = gs.Constant(
        f"{stem}/scale", np.asarray(alpha * np.multiply(x_scale, weight[1]), np.float32)
    )
    operands = [x, matrix, *([] if zero_point is None else [zero_point])]
    product = emit("MatMulInteger", operands, np.int32)
    y = emit("Mul", [emit("Cast", [product], np.float32, to=1), scale], np.float32)
    if bias is not None:
        if beta != 1.0:
            factor = gs.Constant(f"{stem}/beta", np.asarray(beta, np.float32))
            bias = emit("Mul", [bias, factor], np.float32)
        y = emit("Add", [y, bias], np.float32)
    output = node.outputs[0]
    node.inputs.clear()
    node.outputs.clear()
    y.inputs[0].outputs = [output]


def shift_to_uint8(graph: gs.Graph) -> None:
    """Store activations as uint8 with zero point 128 instead of int8 with zero point 0.

    ``q + 128`` with zero point 128 is the same number; all readers are changed with the writer, or
    nothing is.
    """
    for quantize in [node for node in graph.nodes if node.op == "QuantizeLinear"]:
        if len(quantize.inputs) < 3 or not _is_zero(quantize.inputs[2]):
            continue
        if quantize.inputs[2].values.size != 1:  # ONNX Runtime wants unsigned ones of one scale
            continue
        carriers, ends = _readers(graph, quantize)
        written = [node.outputs[0] for node in (quantize, *carriers)]
        if any(_is_output(graph, tensor) for tensor in written):
            continue
        if not all(_can_shift(end, written) for end in ends):
            continue
        name = f"{quantize.outputs[0].name}/zero_point_128"
        shape = quantize.inputs[2].values.shape
        zero_point = gs.Constant(name, np.full(shape, 128, np.uint8))
        scalar = gs.Constant(f"{name}_scalar", np.asarray(128, np.uint8))
        quantize.inputs[2] = zero_point
        for tensor in written:
            tensor.dtype = np.uint8
        for node in carriers:
            if node.op == "Clip":
                node.inputs[1] = scalar
        for end in ends:
            end.inputs = [*end.inputs[:2], scalar if end.op == "MatMulInteger" else zero_point]


def _can_shift(end: gs.Node, written: list[gs.Tensor]) -> bool:
    """Whether ``end`` reads one of ``written`` as an operand whose zero point is free to change."""
    if not any(tensor is end.inputs[0] for tensor in written):
        return False
    if end.op == "MatMulInteger":
        return len(end.inputs) == 2 and all(tensor is not end.inputs[1] for tensor in written)
    return end.op == "DequantizeLinear" and (len(end.inputs) < 3 or _is_zero(end.inputs[2]))


def _readers(graph: gs.Graph, quantize: gs.Node) -> tuple[list[gs.Node], list[gs.Node]]:
    """The nodes that carry the integers on, and those that finally read them.

    What a node in a graph of its own carries on may leave that graph, so it is taken for a reader.
    """
    own = {id(node) for node in graph.nodes}
    carriers: list[gs.Node] = []
    ends: list[gs.Node] = []
    pending = list(quantize.outputs[0].outputs)
    while pending:
        node = pending.pop()
        if id(node) in own and node.op in _CARRIES and (node.op != "Clip" or _is_relu(node)):
            carriers.append(node)
            pending.extend(node.outputs[0].outputs)
        else:
            ends.append(node)
    return carriers, ends


def _is_relu(clip: gs.Node) -> bool:
    return len(clip.inputs) == 2 and _is_zero(clip.inputs[1])


def _is_zero(tensor: gs.Tensor) -> bool:
    return (
        isinstance(tensor, gs.Constant)
        and tensor.values.dtype == np.int8
        and not np.any(tensor.values)
    )
