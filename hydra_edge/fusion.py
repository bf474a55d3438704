"""`fuse`: M isomorphic branches become one branch of stacked ops.

`branches` finds them, `stacking` knows how each operator acts on M branches at once; here the
result takes the place of the branches, and is compared with its source before it is returned.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from hydra_edge import branches, equivalence, surgery
from hydra_edge.artifacts.graph import FusionGroup, Graph
from hydra_edge.branches import Branches
from hydra_edge.errors import FusionError, InputError
from hydra_edge.stacking import Emitted, Stacker, UnsupportedError


def fuse(graph: Graph) -> Graph:
    """Fuse every set of parallel heads whose operators have a stacked form.

    Args:
        graph: Any graph; heads may be plain or behind symmetric int8 Q/DQ.

    Returns:
        A graph with the same inputs and outputs. Its ``fusion`` says what was fused, and what was
        left alone and why. Fusing twice changes nothing.

    Raises:
        FusionError: The result differs from ``graph``, or could not be compared with it.
    """
    surgeon = surgery.open_model(graph.model)
    groups = [_fuse_one(surgeon, candidate) for candidate in branches.find(surgeon)]
    if not any(group.fused for group in groups):
        if graph.metadata.fusion is not None:
            return graph
        return Graph(graph.model, replace(graph.metadata, fusion=tuple(groups)))
    earlier = tuple(group for group in graph.fusion if group.fused)
    model = surgery.close_model(surgeon, like=graph.model)
    fused = graph.derive(model, "fuse", fusion=(*earlier, *groups))
    _check(fused, graph)
    return fused


def _fuse_one(surgeon: gs.Graph, candidate: Branches) -> FusionGroup:
    problem = candidate.problem
    if not problem:
        stacker = Stacker(candidate, surgery.fresh_name(surgeon, "hydra"))
        try:
            _replace(surgeon, candidate, stacker, _join(candidate, stacker, stacker.result()))
        except UnsupportedError as exc:  # raised before the graph was touched
            problem = str(exc)
    return FusionGroup(
        source=candidate.source(),
        heads=candidate.heads,
        ops=tuple(step.op for step in candidate.steps),
        fused=not problem,
        reason=problem,
    )


def _join(candidate: Branches, stacker: Stacker, value: Emitted) -> list[gs.Tensor]:
    """What replaces the results of the join, made from the stacked value ``[M, ...]``."""
    join, x = candidate.join, value.tensor
    if join.kind == "outputs":
        return [
            stacker.node(
                "Gather",
                [x, stacker.constant(np.asarray(head, np.int64))],
                tensor.dtype,
                tensor.shape,
                {"axis": 0},
            )
            for head, tensor in enumerate(join.results)
        ]
    result = join.results[0]
    rank = value.rank + 1 if join.kind == "stack" else value.rank
    axis = join.axis % rank
    if axis:
        order = [*range(1, axis + 1), 0, *range(axis + 1, value.rank + 1)]
        x = stacker.node("Transpose", [x], result.dtype, None, {"perm": order})
    if join.kind == "concat":
        if result.shape is None:
            raise UnsupportedError("the branches are concatenated to an unknown shape")
        shape = list(result.shape)
        # 0 copies a size from the input, which has the same axes up to the one that is merged.
        rest = [size if isinstance(size, int) else -1 for size in shape[axis:]]
        if rest.count(-1) > 1:
            raise UnsupportedError("the branches are concatenated before an axis of unknown size")
        target = np.asarray([0] * axis + rest, np.int64)
        x = stacker.node("Reshape", [x, stacker.constant(target)], result.dtype, shape, {})
    return [x]


def _replace(
    surgeon: gs.Graph, candidate: Branches, stacker: Stacker, results: list[gs.Tensor]
) -> None:
    """Put the emitted nodes into the graph and let them write the tensors the join wrote."""
    surgeon.nodes.extend(stacker.nodes)
    for old, new in zip(candidate.join.results, results, strict=True):
        old.inputs.clear()
        producer = new.inputs[0]
        readers = [node for node in new.outputs if node is not producer]
        producer.outputs[0] = old
        for reader in readers:
            reader.inputs = [old if tensor is new else tensor for tensor in reader.inputs]


def _check(fused: Graph, graph: Graph) -> None:
    feeds = equivalence.random_inputs(graph.inputs)
    try:
        name, error = equivalence.worst_difference(
            fused.model, graph.model, feeds, graph.metadata.logits
        )
    except InputError as exc:
        raise FusionError(
            "The fused graph cannot be compared with its source: neither runs on random inputs.",
            exc.why,
            "Export the model with fixed sizes for all axes but the batch, or compile it unfused.",
        ) from exc
    limit = equivalence.tolerance_of(graph.model)
    if error > limit:
        raise FusionError(
            f"The fused graph differs from its source by {error:.2g} (relative RMS) on '{name}'.",
            f"Up to {limit:g} is rounding; more is a wrong rewrite.",
            "The source graph is unchanged: compile it unfused, and please report the graph.",
        )
