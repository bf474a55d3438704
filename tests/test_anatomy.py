"""Body and heads are told apart by structure."""

from __future__ import annotations

from onnx_models import conv_student

from hydra_edge import anatomy, surgery


def test_head_nodes_are_the_branches_and_their_join() -> None:
    graph = conv_student()
    model = surgery.open_model(graph.model)
    names = anatomy.head_nodes(model)
    inside = sorted(str(node.op) for node in model.nodes if node.name in names)
    assert inside == ["Concat"] + ["Gemm"] * 6 + ["Relu"] * 3 + ["Unsqueeze"] * 3
