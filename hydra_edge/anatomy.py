"""Which nodes of a graph are body and which are heads, alike or not, quantized or not."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from hydra_edge.branches import MATMULS
from hydra_edge.joins import is_computed

_WEIGHTED = (*MATMULS, "ConvTranspose", "Einsum", "GRU", "LSTM", "RNN")


def head_nodes(graph: gs.Graph) -> set[str]:
    """Names of all nodes in heads, alike or not, and of the nodes that join them.

    Heads meet in the last join of the graph: a Concat with no weights behind it, or the outputs
    themselves. What all the tensors that meet there need is the body; what only some of them need
    is heads. Empty when nothing with weights is left for heads, as in a graph that is stacked.
    """
    parents = {
        id(node): tuple(tensor.inputs[0] for tensor in node.inputs if tensor.inputs)
        for node in graph.nodes
    }
    ends, joins = _last_join(graph)
    ends = _without_inner(ends, parents)
    if len(ends) < 2:
        return set()
    body = _ancestors([ends[0]], parents)
    for end in ends[1:]:
        body &= _ancestors([end], parents)
    inside = _ancestors(ends, parents) - body
    heads = [node for node in graph.nodes if id(node) in inside]
    if not any(node.op in _WEIGHTED for node in heads):
        return set()
    return {str(node.name) for node in (*heads, *joins)}


def _last_join(graph: gs.Graph) -> tuple[list[gs.Node], list[gs.Node]]:
    """The nodes whose results meet last, and the Concats where they do, seen from the outputs."""
    ends: dict[int, gs.Node] = {}
    joins: dict[int, gs.Node] = {}
    for output in filter(is_computed, graph.outputs):
        pending, seen, joined = [output.inputs[0]], set(), False
        while pending:
            node = pending.pop()
            if id(node) in seen or node.op in _WEIGHTED:
                continue
            seen.add(id(node))
            sources = [tensor.inputs[0] for tensor in node.inputs if is_computed(tensor)]
            if node.op == "Concat" and len(sources) > 1:
                joined = True
                joins[id(node)] = node
                ends |= {id(source): source for source in sources}
            else:
                pending.extend(sources)
        if not joined:
            ends[id(output.inputs[0])] = output.inputs[0]
    return list(ends.values()), list(joins.values())


def _without_inner(ends: list[gs.Node], parents: dict[int, tuple[gs.Node, ...]]) -> list[gs.Node]:
    """``ends`` without those that only pass on what the weights of others read, e.g. features."""
    last = [_last_weighted(end, parents) for end in ends]
    weighted = [node for nodes in last for node in nodes]
    inner = _ancestors([parent for node in weighted for parent in parents[id(node)]], parents)
    return [
        end
        for end, nodes in zip(ends, last, strict=True)
        if any(id(node) not in inner for node in nodes)
    ]


def _last_weighted(end: gs.Node, parents: dict[int, tuple[gs.Node, ...]]) -> list[gs.Node]:
    """The nodes with weights that ``end`` reads with no other weights in between."""
    pending, seen, found = [end], set(), []
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in _WEIGHTED:
            found.append(node)
        else:
            pending.extend(parents[id(node)])
    return found


def _ancestors(nodes: list[gs.Node], parents: dict[int, tuple[gs.Node, ...]]) -> set[int]:
    """Ids of ``nodes`` and of all nodes they need."""
    pending, seen = list(nodes), set()
    while pending:
        node = pending.pop()
        if id(node) not in seen:
            seen.add(id(node))
            pending.extend(parents[id(node)])
    return seen


def heads(graph: gs.Graph) -> tuple[frozenset[str], ...]:
    """Names of the nodes of every head, in the order in which heads meet.

    A node that several heads need, but not all of them, belongs to none. Empty when there are no
    heads; see `head_nodes`.
    """
    parents = {
        id(node): tuple(tensor.inputs[0] for tensor in node.inputs if tensor.inputs)
        for node in graph.nodes
    }
    ends = _without_inner(_last_join(graph)[0], parents)
    if len(ends) < 2:
        return ()
    needed = [_ancestors([end], parents) for end in ends]
    users: dict[int, int] = {}
    for nodes in needed:
        for identity in nodes:
            users[identity] = users.get(identity, 0) + 1
    names = {id(node): str(node.name) for node in graph.nodes}
    found = tuple(
        frozenset(names[identity] for identity in nodes if users[identity] == 1) for nodes in needed
    )
    weighted = {str(node.name) for node in graph.nodes if node.op in _WEIGHTED}
    return found if all(nodes & weighted for nodes in found) else ()
