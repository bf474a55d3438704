"""Counted by hand, and the same for a fused graph as for its source."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import Net, conv_student, feeds_for, heads_of, linear, mlp_heads, student

from hydra_edge import fusion, quantization
from hydra_edge.artifacts.graph import Graph
from hydra_edge.costs import cost
from hydra_edge.errors import GraphError


def parsed(body: str, head: str = "float[batch,4] x) => (float[batch,5] y)") -> Graph:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20, "own" : 1]> g ({head} {{ {body} }}'
    )
    return Graph(model)


def test_gemm_and_weights() -> None:
    net = Net()
    graph = net.graph({linear(net, net.input("x", ("batch", 6)), 6, 5): ("batch", 5)})
    found = cost(graph)
    assert found.flops_per_sample == 2 * 6 * 5
    assert found.parameters == 6 * 5 + 5
    assert found.weight_bytes == 4 * found.parameters


def test_convolutions() -> None:
    net = Net()
    x = net.input("x", ("batch", 4, 8, 8))
    grouped = net.op("Conv", x, net.random(6, 2, 3, 3), group=2, pads=[1, 1, 1, 1])
    up = net.op("ConvTranspose", grouped, net.random(6, 5, 2, 2), strides=[2, 2])
    found = cost(net.graph({up: ("batch", 5, 16, 16)}))
    assert found.flops_per_sample == 2 * (6 * 8 * 8) * (2 * 9) + 2 * (6 * 8 * 8) * (5 * 4)


def test_integer_layers() -> None:
    net = Net()
    x = net.input("x", ("batch", 4, 8, 8), TensorProto.UINT8)
    s, z, zw = net.const(0.1), net.const(0, np.uint8), net.const(0, np.int8)
    w = net.const(np.ones((6, 4, 1, 1)), np.int8)
    conv = net.op("QLinearConv", x, s, z, w, s, zw, s, z)
    counted = net.op("ConvInteger", conv, net.const(np.ones((3, 6, 1, 1)), np.int8))
    flat = net.op("Flatten", conv)
    other = net.op("QLinearMatMul", flat, s, z, net.const(np.ones((384, 2)), np.int8), s, zw, s, z)
    last = net.op("MatMulInteger", other, net.const(np.ones((2, 7)), np.int8))
    graph = net.graph(
        {counted: ("batch", 3, 8, 8), last: ("batch", 7)},
        dtypes={counted: TensorProto.INT32, last: TensorProto.INT32},
    )
    products = 6 * 64 * 4 + 3 * 64 * 6 + 384 * 2 + 2 * 7
    assert cost(graph).flops_per_sample == 2 * products


def test_transposed_gemm() -> None:
    graph = parsed(
        "y = Gemm <transA: int = 1> (w, x)", "float[batch,4] x, float[batch,5] w) => (float[5,4] y)"
    )
    assert cost(graph).flops_per_sample == 2 * 5 * 4


@pytest.mark.parametrize(
    "graph",
    [
        mlp_heads(),
        mlp_heads(4, hidden=(5, 7), style="matmul_add", body=False),
        student(3, norm="layer"),
        conv_student(),
        heads_of(lambda net, x, _: linear(net, net.op("Relu", linear(net, x, 6, 5)), 5, 4)),
    ],
    ids=["mlp", "deep", "summary", "conv", "no body"],
)
def test_a_fused_graph_costs_what_its_source_does(graph: Graph) -> None:
    fused = fusion.fuse(graph)
    assert any(group.fused for group in fused.fusion)
    assert cost(fused).flops_per_sample == cost(graph).flops_per_sample


def test_a_quantized_graph_costs_the_same_arithmetic_and_fewer_bytes() -> None:
    graph = student(3, k=8, hidden=(16,), c=4)
    int8 = quantization.quantize(graph, "int8", calibration=[feeds_for(graph, 16)])
    fused = fusion.fuse(int8)
    assert "QuantizedGroupedMatMul" in {node.op_type for node in fused.model.graph.node}
    found = cost(fused)
    assert found.flops_per_sample == cost(int8).flops_per_sample == cost(graph).flops_per_sample
    assert found.weight_bytes < cost(graph).weight_bytes


def test_a_fixed_batch_is_divided_out() -> None:
    net = Net()
    graph = net.graph({linear(net, net.input("x", (8, 6)), 6, 5): (8, 5)})
    assert cost(graph).flops_per_sample == 2 * 6 * 5


def test_a_batch_without_a_name_is_one() -> None:
    net = Net()
    graph = net.graph({linear(net, net.input("x", (None, 6)), 6, 5): (None, 5)})
    assert cost(graph).flops_per_sample == 2 * 6 * 5


def test_shapes_in_the_file_help_where_inference_stops() -> None:
    graph = parsed(
        "h = own.Unknown (x) y = MatMul (h, w)",
        "float[batch,4] x, float[6,5] w) => (float[batch,5] y)",
    )
    # Without this the 6 columns of h are known to nobody.
    with pytest.raises(GraphError, match=r"'h' at the MatMul '.*' is unknown\. .* Give all axes"):
        cost(graph)
    graph.model.graph.value_info.append(
        helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", 6])
    )
    assert cost(graph).flops_per_sample == 2 * 6 * 5


def test_only_the_batch_may_be_unknown() -> None:
    graph = parsed("y = MatMul (x, x)", "float[batch,n,n] x) => (float[batch,n,n] y)")
    with pytest.raises(GraphError, match="the batch a fixed size"):
        cost(graph)


def test_layers_inside_control_flow_are_not_counted_silently() -> None:
    inner = "g () => (float[1] z) { z = MatMul (w, w) }"
    graph = parsed(
        f"y = If (c) <then_branch: graph = {inner}, else_branch: graph = {inner}>",
        "bool c, float[1] w) => (float[1] y)",
    )
    with pytest.raises(GraphError, match=r"A MatMul lies inside the If .* without control flow"):
        cost(graph)


def test_indices_are_stored_but_are_no_parameters() -> None:
    graph = parsed(
        "s = Constant <value_ints: ints = [1, 4]> () a = Constant <value_float: float = 2.0> () "
        "r = Reshape (x, s) y = Mul (r, a)",
        "float[batch,4] x) => (float[1,4] y)",
    )
    assert (cost(graph).weight_bytes, cost(graph).parameters) == (2 * 8 + 4, 1)


def test_four_bits_are_half_a_byte() -> None:
    graph = parsed("y = Identity (x)")
    packed = helper.make_tensor("w", TensorProto.INT4, [5], [1, 2, 3, 4, 5])
    graph.model.graph.initializer.append(packed)
    assert (cost(graph).weight_bytes, cost(graph).parameters) == (3, 5)
