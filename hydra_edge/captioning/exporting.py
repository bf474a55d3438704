"""`export_captioner`: a captioning network as the graphs of an engine's programs.

encode:  image [B, 3, H, W] -> boxes, scores, score_mi, box_spread, state [B, N, S]
step:    word [R], state [R, S] -> the summary of M vocabulary heads, next_state [R, S]
reorder: state [R, S], row [R] -> picked [R, S]
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from torch import nn

from hydra_edge import ops
from hydra_edge.artifacts.graph import Graph
from hydra_edge.captioning.greedy_loop import NEXT_STATE, STATE, WORD
from hydra_edge.captioning.networks import (
    CaptionEnsemble,
    CaptionNetwork,
    for_steps,
    summarize_votes,
)
from hydra_edge.exporting import BATCH, LOGITS, export, summarize

ENCODE, STEP, REORDER = "encode", "step", "reorder"
BOX_OUTPUTS = ("boxes", "scores", "score_mi", "box_spread")
IMAGE, ROW, PICKED = "image", "row", "picked"
TASK = "dense_captioning"
_IR_VERSION = 8  # of opset 18


def export_captioner(network: nn.Module, image: object) -> dict[str, Graph]:
    """Export a member, a student or an ensemble.

    Args:
        network: A `CaptionNetwork`.
        image: An example, ``[1, 3, H, W]``.

    Returns:
        The graphs of the programs ``encode``, ``step`` and ``reorder``, by name. The second ends in
        the task's summary op, and its labels are the vocabulary. The third serves beam search on
        devices whose arrays only a program can gather.

    Raises:
        ExportError: Torch cannot export the network.
    """
    known: CaptionNetwork = network  # type: ignore[assignment]
    kind = "student" if known.head_count > 1 else "member"
    kind = "ensemble" if isinstance(network, CaptionEnsemble) else kind
    encode = export(
        _Encode(network), image, input_names=[IMAGE], output_names=[*BOX_OUTPUTS, STATE]
    )
    width = encode.outputs[-1].shape[-1]
    assert isinstance(width, int)
    rows = (np.zeros(2, np.int64), np.zeros((2, width), np.float32))
    step = export(
        _Step(for_steps(network)),
        rows,
        input_names=[WORD, STATE],
        output_names=[LOGITS, NEXT_STATE],
    )
    step = summarize(
        step,
        TASK,
        LOGITS,
        labels=known.vocabulary,
        keep=[NEXT_STATE],
        omit=["variation_ratio"],  # a tenth of the nodes, and no caption asks for it
    )
    graphs = {ENCODE: encode, STEP: step, REORDER: _reorder(width)}
    return {
        name: graph.derive(graph.model, f"program:{name}", task=TASK, kind=kind)
        for name, graph in graphs.items()
    }


class _Encode(nn.Module):
    """An image's boxes, each with its doubts, and the state its caption begins with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        votes, states = self.network.encode(image)  # type: ignore[operator]
        return (*summarize_votes(votes), states)


class _Step(nn.Module):
    """One word further."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, word: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, states = self.network.step(word, state)  # type: ignore[operator]
        return logits, states


def _reorder(width: int) -> Graph:
    """Rows of a state ``[R, width]``."""
    real, whole = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    state = onnx.helper.make_tensor_value_info(STATE, real, [BATCH, width])
    row = onnx.helper.make_tensor_value_info(ROW, whole, [BATCH])
    picked = onnx.helper.make_tensor_value_info(PICKED, real, [BATCH, width])
    node = onnx.helper.make_node("Gather", [STATE, ROW], [PICKED], "gather", axis=0)
    graph = onnx.helper.make_graph([node], "hydra", [state, row], [picked])
    opset = onnx.helper.make_opsetid("", ops.MINIMUM_OPSET)
    return Graph(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION))
