"""`refit`: new weights for an engine, without a build.

A student that was trained on, or of which only the heads are new, has the layers that its engine
was built from: only numbers differ. They are replaced by name, those that differ alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx

from hydra_edge import backends, equivalence, lowering, ops
from hydra_edge.artifacts import joining
from hydra_edge.artifacts.engine import MAIN, Engine, Golden, Program
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import evaluate
from hydra_edge.compilation import UNFUSED
from hydra_edge.errors import CompilationError, DeviceMismatchError, InputError
from hydra_edge.fusion import fuse

Array = npt.NDArray[np.generic]
_NAMED = 5  # weights that a message lists


@dataclass(frozen=True)
class Refit:
    """An engine with new weights.

    Attributes:
        engine: It.
        changed: Names of the weights that were replaced, by program.
    """

    engine: Engine
    changed: Mapping[str, tuple[str, ...]]


def refit(engine: Engine, graphs: Graph | Mapping[str, Graph]) -> Refit:
    """Give an engine the weights of other graphs with the same layers.

    Args:
        engine: A built engine; of TensorRT, one that was built refittable, on its device.
        graphs: What the engine's graph was before fusion, with other weights, in the engine's
            precision; for an engine of several programs, by program.

    Returns:
        The engine with the new weights, proved against the new graph on the recorded inputs.

    Raises:
        InputError: A graph has another precision, other layers, or the same weights.
        DeviceMismatchError: The engine is not built, or its backend cannot change weights.
        CompilationError: With the new weights the engine computes something else than the graph.
    """
    if not engine.is_built:
        raise DeviceMismatchError(
            "The engine is not built yet.",
            "There is nothing to change: it is built from the graph in it.",
            "Compile the new graph instead.",
        )
    if isinstance(graphs, Graph) and len(engine.programs) > 1:
        raise InputError(
            "One graph was given.",
            f"The engine has the programs {', '.join(engine.programs)}.",
            "Say which one it is for: refit(engine, {NAME: graph}), or --program NAME.",
        )
    given = {next(iter(engine.programs)): graphs} if isinstance(graphs, Graph) else graphs
    engines = {name: joining.only(engine, name) for name in engine.programs}
    changed = {}
    for name, graph in given.items():
        joining.find(engine, name)
        program, changed[name] = _refit(engines[name], graph)
        engines[name] = replace(
            engines[name],
            programs={MAIN: program},
            source_sha256=program.graph.sha256,
            calibration_sha256=program.graph.metadata.calibration_sha256,
            metrics={k: v for k, v in engines[name].metrics.items() if k.startswith("p50_ms")},
        )
    return Refit(joining.join(engines), changed)


def _refit(engine: Engine, graph: Graph) -> tuple[Program, tuple[str, ...]]:
    """One program, which is the only one of its engine."""
    (program,) = engine.programs.values()
    if graph.metadata.precision != engine.precision:
        raise InputError(
            f"The graph is stored in {graph.metadata.precision}, the engine in {engine.precision}.",
            "Weights are replaced one by one, in the type that the engine has.",
            f"Quantize the graph first: hydra-edge quantize --precision {engine.precision}.",
        )
    backend = backends.find(engine.backend)
    unfused = program.lowering == UNFUSED
    how = backend.PLAIN if unfused else program.lowering
    source = graph if unfused else fuse(graph)
    old, new = (ops.inline(lowering.lower(one, how).model) for one in (program.graph, source))
    _require_same_layers(old, new)
    changed = _different(old, new)
    if not changed:
        raise InputError(
            "The graph has the weights that the engine has.",
            "There is nothing to change.",
            "Give the graph of the new student.",
        )
    payload = program.payload
    if program.is_stripped:
        payload = backend.refit(payload, _weights(old), program.facts).payload
    built = backend.refit(payload, changed, program.facts)
    record = Golden(
        program.golden.inputs,
        evaluate(source.model, dict(program.golden.inputs)),
        program.golden.tolerance,
    )
    runner = backend.open(built.payload, None, built.facts)
    error = equivalence.replay(runner, record)
    runner.close()
    if error > record.tolerance:
        raise CompilationError(
            f"With the new weights the engine differs from its graph by {error:.2g}.",
            f"Up to {record.tolerance:g} (relative RMS) is rounding: a weight was not replaced.",
            "Compile the new graph; and please report both.",
        )
    payload = built.stripped or built.payload
    refitted = replace(program, graph=source, payload=payload, golden=record)
    return refitted, tuple(changed)


def fill(engine: Engine) -> Engine:
    """Give programs that were stored without weights those of their graphs, to load them."""
    backend = backends.find(engine.backend)
    programs = dict(engine.programs)
    for name, program in programs.items():
        if program.is_stripped:
            how = backend.PLAIN if program.lowering == UNFUSED else program.lowering
            model = ops.inline(lowering.lower(program.graph, how).model)
            built = backend.refit(program.payload, _weights(model), program.facts)
            programs[name] = replace(program, payload=built.payload)
    return replace(engine, programs=programs)


def _require_same_layers(old: onnx.ModelProto, new: onnx.ModelProto) -> None:
    """Weights are matched by name, so all else has to be the same."""

    def skeleton(model: onnx.ModelProto) -> list[tuple[object, ...]]:
        nodes = [
            (
                *(node.op_type, node.domain, tuple(node.input), tuple(node.output)),
                tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute)),
            )
            for node in model.graph.node
        ]
        weights = sorted((t.name, t.data_type, tuple(t.dims)) for t in model.graph.initializer)
        return [*nodes, *weights]

    ours, theirs = skeleton(old), skeleton(new)
    if ours == theirs:
        return
    odd = [entry for entry in theirs if entry not in ours] or [e for e in ours if e not in theirs]
    named = ", ".join(f"{entry[0]} {entry[-1]}" for entry in odd[:_NAMED])
    raise InputError(
        "The graph has other layers than the engine.",
        f"Among what differs: {named or 'the order of its nodes'}.",
        "Compile it: only an engine of the same layers can take its weights.",
    )


def _weights(model: onnx.ModelProto) -> dict[str, Array]:
    return {
        tensor.name: np.asarray(onnx.numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
    }


def _different(old: onnx.ModelProto, new: onnx.ModelProto) -> dict[str, Array]:
    before = _weights(old)
    return {
        name: values
        for name, values in _weights(new).items()
        if values.tobytes() != before[name].tobytes()
    }
