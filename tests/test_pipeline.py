"""The chain as one call."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import hydra_edge as he
from hydra_edge.errors import GateError, InputError
from hydra_edge.exporting import summarize
from hydra_edge.pipeline import build, pays
from hydra_edge.verification import Gates

FEATURES, HIDDEN, CLASSES, HEADS = 16, 24, 5, 4
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((96, FEATURES)).astype(np.float32)


@pytest.fixture(scope="module")
def graph() -> he.Graph:
    heads = "\n".join(
        f"h{m} = Gemm(r, w{m}, b{m})\na{m} = Relu(h{m})\nl{m} = Gemm(a{m}, v{m}, c{m})\n"
        f"u{m} = Unsqueeze(l{m}, axes)"
        for m in range(HEADS)
    )
    joined = ", ".join(f"u{m}" for m in range(HEADS))
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {FEATURES}] input) => (float[{HEADS}, batch, {CLASSES}] head_logits)
        <int64[1] axes = {{0}}> {{
        f = MatMul(input, w)
        r = Relu(f)
        {heads}
        head_logits = Concat <axis = 0> ({joined}) }}"""
    )
    shapes = {"w": (FEATURES, HIDDEN)}
    for m in range(HEADS):
        shapes |= {f"w{m}": (HIDDEN, HIDDEN), f"b{m}": (HIDDEN,)}
        shapes |= {f"v{m}": (HIDDEN, CLASSES), f"c{m}": (CLASSES,)}
    for name, shape in shapes.items():
        values = (RNG.standard_normal(shape) / 3).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return summarize(he.Graph(model), "classification", "head_logits")


def test_int8_engine_with_its_twin_and_its_drift(graph: he.Graph) -> None:
    steps: list[str] = []
    engine = build(graph, precision="int8", calibration=INPUTS, data=INPUTS, on_step=steps.append)
    assert [step.split()[0] for step in steps] == ["quantize", "fuse", "compile", "time", "verify"]
    assert engine.precision == "int8"
    assert engine.calibration_sha256
    assert engine.metrics["mi_rank_correlation"] > 0.95
    assert engine.metrics["p50_ms_fp32_twin"] > 0
    assert pays(engine) in (True, False)
    group = engine.programs["main"].graph.fusion[0]
    assert (group.heads, group.fused) == (HEADS, True)
    with he.load(engine) as session, he.load(build(graph)) as exact:
        assert session.self_test()["main"] <= engine.programs["main"].golden.tolerance
        difference = session.run(INPUTS).mean_prob - exact.run(INPUTS).mean_prob
        assert np.abs(difference).max() < 0.05


def test_fp32_has_no_twin(graph: he.Graph) -> None:
    assert pays(build(graph)) is None


def test_a_failed_gate_returns_no_engine(graph: he.Graph) -> None:
    with pytest.raises(GateError, match="int8 engine drifted from its source: mean epistemic"):
        build(
            graph,
            precision="int8",
            calibration=INPUTS,
            data=INPUTS,
            gates=Gates(mi_ratio=(2.0, 3.0)),
        )


def test_data_is_checked_before_the_slow_steps(graph: he.Graph) -> None:
    steps: list[str] = []
    silent = he.Graph(graph.model, replace(graph.metadata, logits=None))
    with pytest.raises(InputError, match="the graph has no task or per-head output"):
        build(silent, data=INPUTS, on_step=steps.append)
    with pytest.raises(InputError, match="has shape"):
        build(graph, data=INPUTS[:, :3], on_step=steps.append)
    assert not steps
    assert "mi_ratio" not in build(silent).metrics
