"""Greedy search as one run: a captioner's ``step`` inside of ONNX's Loop.

To be called for every word is much of what a small network costs. The loop is made of the compiled
program when a session first speaks, and takes its memory a second time; nothing of it is in the
file. TensorRT's programs are not ONNX; there states stay on the device instead, from step to step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, ValueInfoProto, helper

from hydra_edge.captioning.vocabulary import END_INDEX
from hydra_edge.errors import CompilationError

WORD, STATE, NEXT_STATE = "word", "state", "next_state"
DOUBTS = ("predictive_entropy", "expected_entropy", "mutual_information")
# Where a word is a column [R, 1], to pick its probability from [R, V].
_BODY = """
<ir_version: 8, opset_import: ["" : 18]>
body (float[R, V] mean_prob, bool[R] greedy_ended) => (bool greedy_going, int64[R] greedy_next)
<int64 greedy_end = {{{end}}}, int64[1] greedy_column = {{1}}>
{{
    greedy_likeliest = ArgMax <axis: int = -1, keepdims: int = 0> (mean_prob)
    greedy_next = Where (greedy_ended, greedy_end, greedy_likeliest)
    greedy_next_column = Unsqueeze (greedy_next, greedy_column)
    greedy_chosen_column = GatherElements <axis: int = 1> (mean_prob, greedy_next_column)
    greedy_chosen = Squeeze (greedy_chosen_column, greedy_column)
    greedy_now_ended = Equal (greedy_next, greedy_end)
    greedy_open = Not (greedy_now_ended)
    greedy_open_number = Cast <to: int = 7> (greedy_open)
    greedy_any_open = ReduceMax <keepdims: int = 0> (greedy_open_number)
    greedy_going = Cast <to: int = 9> (greedy_any_open)
    greedy_said = Identity (greedy_next)
}}
"""
_FIRST = """
first (float[R, S] greedy_start) => (int64[R] greedy_begin, bool[R] greedy_none)
<bool greedy_always = {{1}}>
{{
    greedy_rows = Shape <end: int = 1> (greedy_start)
    greedy_begin = ConstantOfShape <value: tensor = int64[1] {{{end}}}> (greedy_rows)
    greedy_none = ConstantOfShape <value: tensor = bool[1] {{0}}> (greedy_rows)
}}
"""
START, MOST = "greedy_start", "greedy_most"
OUTPUTS = tuple(f"greedy_all_{name}" for name in ("words", "prob", *DOUBTS))


class Spoken(NamedTuple):
    """What greedy search says of R regions in T steps; behind a caption's end is the end again.

    Attributes:
        words: ``[T, R]``.
        prob: Their mean probability ``[T, R]``.
        doubts: Total, expected and mutual information ``[T, 3, R]``, in nats.
    """

    words: npt.NDArray[np.int64]
    prob: npt.NDArray[np.floating]
    doubts: npt.NDArray[np.floating]


def looped(step: bytes) -> bytes:
    """The program that speaks whole captions.

    Args:
        step: A ``step`` as ONNX Runtime runs it; see `hydra_edge.captioning.exporting`.

    Returns:
        An ONNX model from `START`, states ``[R, S]``, and `MOST`, a number of words and ends, to
        the `OUTPUTS`: words, the probability of each, and the three `DOUBTS`, all ``[T, R]``.

    Raises:
        CompilationError: The step lacks an input or output.
    """
    model = onnx.ModelProto.FromString(step)
    inputs = {value.name: value for value in model.graph.input}
    given = {value.name for value in model.graph.output}
    if missing := ({WORD, STATE} - set(inputs)) | ({"mean_prob", NEXT_STATE, *DOUBTS} - given):
        raise CompilationError(
            f"The program 'step' has no '{min(missing)}'.",
            "Words are searched from one state to the next, by their mean probability.",
            "Export it with export_captioner.",
        )
    added = onnx.parser.parse_model(_BODY.format(end=END_INDEX)).graph
    body = helper.make_graph(
        [*model.graph.node, *added.node],
        "step",
        [
            _scalar("greedy_index", TensorProto.INT64),
            _scalar("greedy_went", TensorProto.BOOL),
            inputs[WORD],
            _any("greedy_ended", TensorProto.BOOL),
            inputs[STATE],
        ],
        [
            _scalar("greedy_going", TensorProto.BOOL),
            _any("greedy_next", TensorProto.INT64),
            _any("greedy_now_ended", TensorProto.BOOL),
            _any(NEXT_STATE, inputs[STATE].type.tensor_type.elem_type),
            _any("greedy_said", TensorProto.INT64),
            *(_any(name, TensorProto.FLOAT) for name in ("greedy_chosen", *DOUBTS)),
        ],
    )
    first = onnx.parser.parse_graph(_FIRST.format(end=END_INDEX))
    loop = helper.make_node(
        "Loop",
        [MOST, "greedy_always", "greedy_begin", "greedy_none", START],
        ["greedy_last", "greedy_done", "greedy_rest", *OUTPUTS],
        "greedy",
        body=body,
    )
    start = ValueInfoProto.FromString(inputs[STATE].SerializeToString())
    start.name = START
    types = (TensorProto.INT64, *[TensorProto.FLOAT] * 4)
    graph = helper.make_graph(
        [*first.node, loop],
        "greedy",
        [start, _scalar(MOST, TensorProto.INT64)],
        [_any(name, kind) for name, kind in zip(OUTPUTS, types, strict=True)],
        [*model.graph.initializer, *added.initializer, *first.initializer],
    )
    whole = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    data: bytes = whole.SerializeToString(deterministic=True)
    return data


def _scalar(name: str, kind: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [])


def _any(name: str, kind: int) -> ValueInfoProto:
    """A tensor whose shape is left to the runtime."""
    return helper.make_tensor_value_info(name, kind, None)
