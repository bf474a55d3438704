"""What every backend must do, whatever it builds with.

Run as a script it checks TensorRT's builder, in a process whose ``tensorrt`` has no GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
from onnx_models import Net, conv_student, feeds_for, mlp_heads, student

from hydra_edge import lowering, targets
from hydra_edge.artifacts.graph import Graph
from hydra_edge.errors import CompilationError
from hydra_edge.exporting import summarize
from hydra_edge.fusion import fuse
from hydra_edge.programs import Backend, BuildRequest, Built
from hydra_edge.quantization import quantize

Build = Callable[[object, BuildRequest], Built]
GRAPHS = {
    "mlp": lambda: student(k=16, hidden=(32,)),
    "linear": lambda: student(k=16, hidden=()),
    "norm": lambda: student(k=16, hidden=(32,), norm="layer", activation="Gelu"),
    "conv": conv_student,
    "gaussian": lambda: summarize(mlp_heads(k=16, c=6), "regression", "logits"),
    "plain": lambda: mlp_heads(k=16, m=2, kind="outputs"),
}
PRECISIONS = ("fp32", "fp16", "int8", "int8-weight-only")


def offers_everything(backend: Backend) -> None:
    """Every member of the protocol, with its parameters."""
    for name, member in vars(Backend).items():
        if name.startswith("_") or not callable(member):
            continue
        expected = [p for p in inspect.signature(member).parameters if p != "self"]
        assert list(inspect.signature(getattr(backend, name)).parameters) == expected, name
    assert backend.LOWERINGS
    assert isinstance(backend.SEVERAL_TARGETS, bool)


def request_for(graph: Graph, target: str) -> BuildRequest:
    return BuildRequest((targets.find(target),), graph.inputs, (1, 2, 4))


def lowered(graph: Graph, precision: str, how: str) -> Graph:
    stored = graph
    if precision != "fp32":
        stored = quantize(graph, precision, calibration=feeds_for(graph, 30))
    return lowering.lower(fuse(stored), how)


def builds_every_graph(build: Build, target: str, how: str, precision: str) -> None:
    for name, make in GRAPHS.items():
        graph = make()
        built = build(lowered(graph, precision, how).model, request_for(graph, target))
        assert len(built.payload) > 500, name


def refuses_with_its_own_words(build: Build, target: str) -> None:
    """An operator that nobody has; the message names it."""
    net = Net()
    x = net.input("x", ("batch", 4))
    graph = net.graph({net.op("Relu", x): ("batch", 4)})
    graph.model.graph.node[0].op_type = "Unheard"
    with pytest.raises(CompilationError, match="Unheard"):
        build(graph.model, request_for(graph, target))


def leaves_the_model_alone(build: Build, target: str, how: str) -> None:
    graph = student(k=16)
    model = lowered(graph, "fp32", how).model
    before = model.SerializeToString(deterministic=True)
    build(model, request_for(graph, target))
    assert model.SerializeToString(deterministic=True) == before


def runs_what_it_builds(backend: Backend, build: Build, target: str, how: str) -> None:
    """On batches of the range: outputs by name, in order, in their types; and is then closed."""
    graph = student(k=16)
    built = build(lowered(graph, "fp32", how).model, request_for(graph, target))
    runner = backend.open(built.payload, 1, built.facts)
    names = ["mutual_information", "mean_prob"]
    for batch in (1, 4):
        entropy, probability = runner.run(feeds_for(graph, batch), names)
        assert (entropy.shape, probability.shape) == ((batch,), (batch, 4))
        assert probability.dtype == np.float32
        np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-5)
    assert runner.run(feeds_for(graph, 2), []) is not None
    runner.close()


def has_new_weights_after_a_refit(backend: Backend, build: Build, target: str, how: str) -> None:
    old, new = (lowered(student(k=16, seed=seed), "fp32", how).model for seed in (1, 2))
    import onnx

    request = request_for(student(k=16), target)
    weights = {
        tensor.name: np.asarray(onnx.numpy_helper.to_array(tensor))
        for tensor in new.graph.initializer
    }
    built = build(old, request)
    changed = backend.refit(built.payload, weights, built.facts)
    feeds = feeds_for(student(k=16), 2)
    answers = []
    for payload in (changed.payload, build(new, request).payload):
        runner = backend.open(payload, 1, built.facts)
        answers.append(runner.run(feeds, ["mean_prob"])[0])
        runner.close()
    np.testing.assert_array_equal(*answers)


def builder_side(build: Build, target: str, how: str) -> None:
    """All that a builder can be asked where its engines do not run."""
    for precision in PRECISIONS:
        builds_every_graph(build, target, how, precision)
    refuses_with_its_own_words(build, target)
    leaves_the_model_alone(build, target, how)


def tensorrt_builder() -> Build:
    """TensorRT's builder, without the device that `tensorrt.build` looks at."""
    import tensorrt as trt

    from hydra_edge.backends import tensorrt
    from hydra_edge.gpu import building

    def build(model: object, request: BuildRequest) -> Built:
        product = building.Product("TensorRT", trt, tensorrt._configure(trt, request))
        plan = building.build(product, model, request)  # type: ignore[arg-type]
        return Built(plan.data, plan.notes)

    return build


if __name__ == "__main__":
    builder_side(tensorrt_builder(), "jetson-agx-orin", "qdq")
    print("conforms")
