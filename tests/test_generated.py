"""Hundreds of generated graphs: fused, they compute the same, or they are left as they were."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from generated_graphs import Case, cases
from hypothesis import HealthCheck, assume, event, given, settings
from onnx.reference import ReferenceEvaluator
from onnx_models import feeds_for, ops_of

from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import LOWERINGS, evaluate
from hydra_edge.equivalence import difference
from hydra_edge.errors import HydraError
from hydra_edge.fusion import fuse
from hydra_edge.lowering import lower

Arrays = dict[str, npt.NDArray[np.generic]]
SEEN: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def statistics(request: pytest.FixtureRequest) -> Iterator[None]:
    """Say at the end what was generated, so that nobody trusts a run in which nothing was fused."""
    yield
    lines = "\n".join(f"  {count:6d}  {name}" for name, count in sorted(SEEN.items()))
    if request.config.get_verbosity() > 0:
        print(f"\ngenerated graphs\n{lines}")


def batches_of(graph: Graph) -> tuple[int, ...]:
    return (2, 5) if isinstance(graph.inputs[0].shape[0], str) else (1,)


def outputs_of(graph: Graph, batch: int) -> Arrays:
    return evaluate(graph.model, feeds_for(graph, batch))


def assert_close(found: Arrays, expected: Arrays, tolerance: float, what: str) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert difference(found[name], array) <= tolerance, (what, name)


def group_of(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)


def by_reference(graph: Graph, batch: int) -> Arrays | None:
    """ONNX's own implementation; None where it lacks an operator or fails on it.

    Its grouped ConvTranspose adds the bias of the first group to all of them.
    """
    if any(n.op_type == "ConvTranspose" and group_of(n) > 1 for n in graph.model.graph.node):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = ReferenceEvaluator(graph.model).run(None, feeds_for(graph, batch))
        except Exception:  # it raises whatever its parts raise
            return None
    return dict(zip([spec.name for spec in graph.outputs], values, strict=True))


# Deadlines make no sense on shared machines; the profile sets how many examples there are.
@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    print_blob=True,
)
@given(case=cases())
def test_generated_graphs(case: Case) -> None:
    graph = case.graph
    try:
        expected = {batch: outputs_of(graph, batch) for batch in batches_of(graph)}
    except HydraError:
        SEEN["does not run in ONNX Runtime"] += 1
        assume(False)
    assume(all(np.isfinite(a).all() for arrays in expected.values() for a in arrays.values()))
    fused = fuse(graph)
    done = [group for group in fused.fusion if group.fused]
    codes = {group.code for group in fused.fusion if not group.fused}
    assert not codes & {"not-equal", "not-checked"}, fused.fusion
    SEEN[
        "fused" if done else "left alone: " + (", ".join(sorted(codes)) or "nothing parallel")
    ] += 1
    for note in case.notes:
        SEEN[f"drawn: {note}"] += 1
    event("fused" if done else "left alone")
    assert done or not case.must_fuse, fused.fusion
    assert fused.inputs == graph.inputs
    assert fused.outputs == graph.outputs
    assert fuse(fused).data == fused.data
    assert fuse(graph).data == fused.data
    if not done:
        assert fused.model.SerializeToString() == graph.model.SerializeToString()
    for batch, arrays in expected.items():
        assert_close(outputs_of(fused, batch), arrays, case.tolerance, "fused")
        for name in LOWERINGS:
            lowered = lower(fused, name)
            assert_close(outputs_of(lowered, batch), arrays, case.tolerance, name)
    batch, arrays = next(iter(expected.items()))
    reference = by_reference(graph, batch)
    if reference is None or any(
        difference(reference[name], arrays[name]) > case.tolerance for name in arrays
    ):
        SEEN["reference evaluator lacks or differs on the original"] += 1
        return
    again = by_reference(fused, batch)
    if again is None and {"ConvTranspose", "MaxPool", "AveragePool"} & set(ops_of(fused)):
        return  # its pooling gives a wrong shape for uneven pads, which only a Reshape notices
    assert again is not None, ops_of(fused)
    SEEN["agrees in the reference evaluator, too"] += 1
    assert_close(again, reference, case.tolerance, "reference")
