"""Engines for GeForce RTX cards, built for real on a machine without one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx_models import conv_student, feeds_for, mlp_heads

from hydra_edge import lowering, pipeline, runtime, targets
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends import tensorrt_rtx
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.errors import (
    CompilationError,
    DeviceMismatchError,
    InputError,
    MissingDependencyError,
)
from hydra_edge.fusion import fuse
from hydra_edge.programs import BuildOptions, BuildRequest
from hydra_edge.quantization import quantize

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
CARDS = [target.name for target in targets.TARGETS if target.backend == "tensorrt_rtx"]


def graph() -> Graph:
    return mlp_heads(m=4, k=64, hidden=(64,), c=10)


def built(precision: str, target: str) -> Engine:
    source = graph()
    return pipeline.build(source, target, precision=precision, calibration=feeds_for(source, 40))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-weight-only"])
@pytest.mark.parametrize("target", ["rtx-3090", "rtx-4090", "rtx-5090"])
def test_heads_are_fused_in_every_precision(target: str, precision: str) -> None:
    engine = built(precision, target)
    program = engine.programs["main"]
    assert (engine.target, engine.backend) == (target, "tensorrt_rtx")
    assert program.lowering == "qdq"
    assert program.lowering_ms == {}
    assert len(program.payload) > 1000
    assert engine.metrics == {}  # nothing ran, so nothing was measured
    assert "tensorrt-rtx" in engine.tools


@pytest.mark.parametrize(
    ("precision", "target"), [("fp8", "rtx-4090"), ("int4-weight-only", "rtx-3090")]
)
def test_other_precisions_are_built_unfused(precision: str, target: str) -> None:
    assert built(precision, target).programs["main"].lowering == "unfused"


def test_generations_give_different_engines() -> None:
    payloads = {built("fp16", card).programs["main"].payload for card in ("rtx-3090", "rtx-5090")}
    assert len(payloads) == 2


def test_a_file_that_holds_everything_but_runs_elsewhere(tmp_path: Path) -> None:
    engine = built("int8", "rtx-4090")
    path = engine.save(tmp_path / "s.hydra")
    again = Engine.load(path)
    assert again.programs["main"].payload == engine.programs["main"].payload
    with pytest.raises(DeviceMismatchError, match="The engine is for a GPU, sm_89") as caught:
        runtime.load(path)
    assert caught.value.exit_code == 4


def test_data_is_judged_on_the_graph(tmp_path: Path) -> None:
    source = conv_student()
    data = feeds_for(source, 64)
    engine = pipeline.build(source, "rtx-4090", precision="fp16", data=data)
    assert engine.metrics["top1_agreement"] > 0.9
    assert (
        engine.metrics["max_abs_mean_prob"] > 0
    )  # of the fp16 graph, not of its source with itself
    assert "p50_ms" not in engine.metrics


def test_a_lowering_that_computes_something_else_is_not_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine does not run here, but what it was built from is judged."""
    other = mlp_heads(m=4, k=64, hidden=(64,), c=10, seed=1)
    monkeypatch.setattr(lowering, "lower", lambda graph, name: other)
    with pytest.raises(CompilationError, match="No lowering reproduces the graph: qdq"):
        compile(graph(), "rtx-4090")


def test_fp8_is_refused_before_the_builder_is_asked() -> None:
    source = graph()
    stored = quantize(source, "fp8", calibration=feeds_for(source, 40))
    with pytest.raises(CompilationError, match=r"stored in fp8, for rtx-3090") as caught:
        compile(fuse(stored), "rtx-3090", unfused=stored)
    assert "sm_86" in caught.value.why


def test_an_open_axis_is_named() -> None:
    source = graph()
    request = BuildRequest((targets.find("rtx-4090"),), source.inputs, (1, 8, 32))
    spec = source.inputs[0]
    odd = replace(request, inputs=(replace(spec, shape=(spec.shape[0], "length")),))
    with pytest.raises(CompilationError, match="open axes length"):
        tensorrt_rtx.build(source.model, odd)


def test_its_own_words_are_in_the_message() -> None:
    source = graph()
    turing = targets.find("rtx-4090")
    assert turing.gpu is not None
    turing = replace(turing, name="turing", gpu=replace(turing.gpu, compute_capability=75))
    request = BuildRequest((turing,), source.inputs, (1, 8, 32))
    with pytest.raises(CompilationError, match="FP32 GEMM is not supported"):
        tensorrt_rtx.build(source.model, request)


def test_an_unknown_lowering() -> None:
    with pytest.raises(InputError, match="Unknown lowering 'wide'"):
        compile(graph(), "rtx-4090", options=CompileOptions(lowering="wide"))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match="rtx"):
        compile(graph(), "rtx-4090")


def test_equal_graphs_are_recorded_alike() -> None:
    first, second = (built("fp16", "rtx-4090") for _ in range(2))
    golden = [engine.programs["main"].golden for engine in (first, second)]
    for name, array in golden[0].outputs.items():
        np.testing.assert_array_equal(array, golden[1].outputs[name])


def test_one_engine_for_several_generations() -> None:
    alone = built("fp16", "rtx-4090").programs["main"]
    engine = built("fp16", "rtx-3090, rtx-4090,rtx-5090,rtx-5080")
    assert engine.target == "rtx-3090,rtx-4090,rtx-5090,rtx-5080"
    program = engine.programs["main"]
    assert program.facts["built_for"]["compute_capabilities"] == [86, 89, 120]  # type: ignore[index, call-overload]
    assert program.payload != alone.payload
    assert len(program.payload) < 2 * len(alone.payload)  # weights are there once


def test_a_precision_that_one_of_them_lacks() -> None:
    source = graph()
    stored = quantize(source, "fp8", calibration=feeds_for(source, 40))
    with pytest.raises(CompilationError, match="stored in fp8, for rtx-3090"):
        compile(stored, "rtx-4090,rtx-3090")


@pytest.mark.parametrize("others", ["cpu", "jetson-agx-orin", "rtx-3090,l4"])
def test_what_one_engine_cannot_serve(others: str) -> None:
    with pytest.raises(InputError, match="One engine was asked for"):
        compile(graph(), f"rtx-4090,{others}")
    with pytest.raises(InputError, match="Only an engine of TensorRT-RTX serves several devices"):
        compile(graph(), "jetson-agx-orin,jetson-orin-nano")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"refittable": True}, "Without a GPU its builder gives no such engine"),
        ({"timing_cache": Path("t.cache")}, "It times nothing when it builds"),
        ({"dla_core": 0}, "GeForce cards have no such accelerator"),
        ({"hardware_compatible": True}, "name all targets: --target rtx-3090"),
        ({"optimization_level": 5}, "It chooses its kernels on the card"),
    ],
)
def test_options_that_it_does_not_have(option: dict[str, object], words: str) -> None:
    options = CompileOptions(build=BuildOptions(**option))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words):
        compile(graph(), "rtx-4090", options=options)


def test_a_note_says_what_was_not_built() -> None:
    (note,) = built("int4-weight-only", "rtx-4090").programs["main"].notes
    assert note.startswith("not as 'qdq': The heads")


def test_tf32_is_off_unless_asked_for() -> None:
    source = graph()
    plain, fast = (
        compile(source, "rtx-4090", options=CompileOptions(build=BuildOptions(tf32=tf32)))
        for tf32 in (False, True)
    )
    assert plain.programs["main"].payload != fast.programs["main"].payload


def test_several_profiles() -> None:
    one, two = (
        compile(graph(), "rtx-4090", options=CompileOptions(build=BuildOptions(profiles=ranges)))
        for ranges in ((), ((1, 1, 1),))
    )
    assert one.programs["main"].payload != two.programs["main"].payload


def test_a_plugin_node_never_reaches_the_parser() -> None:
    """With a creator for the node the parser would end the process: here is proof, and our guard.

    Each in a process of its own.
    """
    script = f"""
import subprocess
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import tensorrt_rtx as trt
from onnx_models import feeds_for, student
from hydra_edge import lowering, ops, targets
from hydra_edge.backends import tensorrt_rtx
from hydra_edge.errors import CompilationError
from hydra_edge.fusion import fuse
from hydra_edge.programs import BuildOptions, BuildRequest
from hydra_edge.quantization import quantize

class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = "HydraHeads", "1", "hydra"
        self.field_names = trt.PluginFieldCollection([])
    def create_plugin(self, name, fields, phase):
        return Plugin()

class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
    def __init__(self):
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuild.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        self.plugin_name, self.plugin_version, self.plugin_namespace = "HydraHeads", "1", "hydra"
        self.num_outputs = 6
    def get_capability_interface(self, kind):
        return self

source = student(k=16)
graph = lowering.lower(fuse(quantize(source, "fp16")), "plugin")
creator = Creator()
trt.get_plugin_registry().register_creator(creator, "hydra")
if sys.argv[1] == "ours":
    request = BuildRequest((targets.find("rtx-4090"),), graph.inputs, (1, 2, 4))
    try:
        tensorrt_rtx.build(graph.model, request)
    except CompilationError as refused:
        print(refused)
else:
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    trt.OnnxParser(network, logger).parse(ops.inline(graph.model).SerializeToString())
    print("parsed")
"""
    ours, bare = (
        subprocess.run([sys.executable, "-c", script, who], capture_output=True, text=True)
        for who in ("ours", "bare")
    )
    assert ours.returncode == 0, ours.stderr
    assert "The graph holds the plugin node 'HydraHeads', for TensorRT-RTX" in ours.stdout
    assert "ends the process" in ours.stdout
    assert bare.returncode < 0  # a signal: nothing to catch
    assert "parsed" not in bare.stdout
