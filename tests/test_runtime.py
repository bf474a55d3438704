"""A session takes any batch of any library, from any thread, and says what it cannot take."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnx_models import Net, activate, feeds_for, join, linear, student, tiny_engine

from hydra_edge import compilation, detection
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import Graph
from hydra_edge.backends.onnxruntime import build, evaluate
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.errors import (
    ArtifactError,
    CompilationError,
    DeviceMismatchError,
    GateError,
    InputError,
)
from hydra_edge.exporting import merge, summarize
from hydra_edge.fusion import fuse
from hydra_edge.runtime import EnsembleSession, Session, load, require_same_inputs

GRAPH = fuse(student(m=3, k=6, c=4))
X = feeds_for(GRAPH, 23)["x"]


def quick_compile(graph: Graph, batch: tuple[int, int, int] = (1, 2, 8)) -> Engine:
    """Timing is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "_TIMING_SECONDS", 0.0)
        return compile(graph, options=CompileOptions(batch=batch, lowering="wide"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return quick_compile(GRAPH)


@pytest.fixture(scope="module")
def session(engine: Engine) -> Iterator[Session]:
    with load(engine) as opened:
        yield opened


def expected(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return evaluate(graph.model, feeds)


def assert_close(found: object, wanted: dict[str, np.ndarray], names: list[str]) -> None:
    for name in names:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)  # type: ignore[index]


# what goes in


class OnlyDLPack:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: object) -> object:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        torch.from_numpy,
        OnlyDLPack,
        lambda x: {"x": x},
        lambda x: {"x": torch.from_numpy(x)},
        np.asfortranarray,
        lambda x: torch.from_numpy(x.copy()).T.contiguous().T,
    ],
    ids=["numpy", "torch", "dlpack", "mapping", "mapping of torch", "fortran", "strided torch"],
)
def test_arrays_of_any_library(session: Session, wrap: object) -> None:
    found = session.run(wrap(X[:5]))  # type: ignore[operator]
    assert_close(found, expected(GRAPH, {"x": X[:5]}), list(found))
    assert "head_logits" not in found


def test_a_tensor_that_needs_a_gradient(session: Session) -> None:
    with pytest.raises(InputError, match=r"'x' cannot be read.*tensor.detach\(\).cpu\(\)"):
        session.run(torch.from_numpy(X).requires_grad_())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X.astype(np.float64), "dtype float64. The engine takes float32"),
        (X[:, :5], r"shape \[23, 5\]"),
        (X[0], r"shape \[6\]"),
        (X[:0], "The batch is empty"),
        ({"y": X}, r"There is no input 'y'. The inputs are x: float32\[batch, 6\]"),
        ({}, "The input 'x' is missing"),
        ({"x": X, "y": X}, "There is no input 'y'"),
        ("picture.png", "not an array of numbers"),
        (None, "not an array of numbers"),
    ],
)
def test_what_does_not_fit(session: Session, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        session.run(value)


def test_inputs_are_not_changed(session: Session) -> None:
    before = X.copy()
    session.run(X)
    np.testing.assert_array_equal(X, before)


def two_inputs() -> Graph:
    net = Net()
    a, b = net.input("a", ("batch", 6)), net.input("b", ("batch", 4))
    h = net.op("Add", linear(net, a, 6, 5), linear(net, b, 4, 5))
    return net.graph({linear(net, activate(net, h, "Silu"), 5, 3): ("batch", 3)})


def test_two_inputs_need_names() -> None:
    graph = two_inputs()
    feeds = feeds_for(graph, 19)
    with load(quick_compile(graph)) as session:
        found = session.run(feeds)
        assert_close(found, expected(graph, feeds), list(found))
        with pytest.raises(InputError, match="has 2 inputs and one array was given"):
            session.run(feeds["a"])
        with pytest.raises(InputError, match="different batch sizes"):
            session.run({"a": feeds["a"], "b": feeds["b"][:3]})


# batches


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 17, 23])
def test_any_batch_is_split_and_joined(session: Session, size: int) -> None:
    found = session.run(X[:size], head_logits=True)
    wanted = expected(GRAPH, {"x": X[:size]})
    assert {name: array.shape for name, array in found.items()} == {
        name: array.shape for name, array in wanted.items()
    }
    assert_close(found, wanted, list(wanted))


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 9, 11, 17])
def test_a_short_batch_is_padded(size: int) -> None:
    with load(quick_compile(GRAPH, (4, 4, 8))) as session:
        found = session.run(X[:size], head_logits=True)
    assert_close(found, expected(GRAPH, {"x": X[:size]}), list(found))


def fixed_batch(size: int, heads: int) -> Graph:
    net = Net()
    x = net.input("x", (size, 6))
    rows = [
        net.op("Unsqueeze", linear(net, x, 6, 4), net.const([0], np.int64)) for _ in range(heads)
    ]
    graph = net.graph({net.op("Concat", *rows, axis=0, name="logits"): (heads, size, 4)})
    return summarize(graph, "classification", "logits")


@pytest.mark.parametrize("size", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("heads", [3, 4])  # 4 heads, batch 4: the axis cannot be told by its size
def test_a_fixed_batch_takes_any_batch(size: int, heads: int) -> None:
    graph = fixed_batch(4, heads)
    with load(quick_compile(graph)) as session:
        found = session.run(X[:size], head_logits=True)
    padded = np.concatenate([X[:size], X[: 12 - size]])
    parts = [expected(graph, {"x": padded[i : i + 4]}) for i in (0, 4, 8)]
    for name, array in found.items():
        axis = 1 if name == "head_logits" else 0
        whole = np.concatenate([part[name] for part in parts], axis)
        np.testing.assert_allclose(array, whole.take(range(size), axis), rtol=1e-4, atol=1e-5)


def test_logits_whose_batch_axis_has_another_name() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    join(net, [linear(net, x, 6, 4) for _ in range(3)], 4)
    graph = net.graph({"logits": (3, "rows", 4)})
    with load(quick_compile(graph)) as session:
        found = session.run(X)
    assert_close(found, expected(graph, {"x": X}), ["logits"])


@pytest.mark.parametrize("shape", [(), (6,)])
def test_outputs_that_cannot_be_joined_say_so(shape: tuple[int, ...]) -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    axes = net.const([0], np.int64) if shape else ""
    graph = net.graph({net.op("ReduceSum", x, axes, keepdims=0, name="total"): shape})
    with load(quick_compile(graph)) as session:
        np.testing.assert_allclose(
            session.run(X[:8]).total, X[:8].sum(0 if shape else None), rtol=1e-4, atol=1e-5
        )
        with pytest.raises(InputError, match=r"The output 'total' is .* for 8 samples"):
            session.run(X[:9])


# head logits, programs, life cycle


def test_head_logits_only_on_request(session: Session) -> None:
    assert "head_logits" not in session.run(X)
    assert session.run(X, head_logits=True)["head_logits"].shape == (3, 23, 4)


def test_head_logits_that_are_not_there() -> None:
    net = Net()
    x = net.input("x", ("batch", 6))
    join(net, [linear(net, x, 6, 4) for _ in range(3)], 4)
    graph = net.graph({"logits": (3, "batch", 4)})
    graph = summarize(graph, "classification", "logits", head_logits=False)
    with (
        load(quick_compile(fuse(graph))) as session,
        pytest.raises(InputError, match=r"no per-head output. It was exported without head_logits"),
    ):
        session.run(X, head_logits=True)


def test_an_unknown_program(session: Session) -> None:
    with pytest.raises(InputError, match=r"has no program 'step'. It has: main"):
        session.run(X, program="step")


def test_a_closed_session(engine: Engine) -> None:
    session = load(engine)
    session.close()
    session.close()
    for call in (
        lambda: session.run(X),
        lambda: session.run_on_device(X),
        lambda: session.submit(X),
        session.self_test,
    ):
        with pytest.raises(InputError, match="The session is closed"):
            call()


def test_repr_and_specs(session: Session) -> None:
    assert repr(session) == "Session(model, cpu, fp32, heads=3)"
    assert [spec.name for spec in session.inputs] == ["x"]
    assert [spec.name for spec in session.outputs][-1] == "head_logits"
    assert session.threads >= 1


def test_threads(engine: Engine) -> None:
    with load(engine, threads=2) as session:
        assert session.threads == 2
    for threads in (0, -1):
        with pytest.raises(InputError, match=f"{threads} threads were asked for"):
            load(engine, threads=threads)


def test_eight_threads_at_once(session: Session) -> None:
    sizes = [1, 3, 8, 11, 23]
    wanted = {size: session.run(X[:size], head_logits=True) for size in sizes}

    def work(seed: int) -> None:
        for size in np.random.default_rng(seed).choice(sizes, 40):
            found = session.run(X[:size], head_logits=True)
            for name, array in wanted[size].items():
                np.testing.assert_array_equal(found[name], array)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


# files, devices, self-test


def test_a_file(engine: Engine, tmp_path: Path) -> None:
    path = engine.save(tmp_path / "e.hydra")
    for given in (path, str(path)):
        with load(given) as session:
            found = session.run(X)
    assert_close(found, expected(GRAPH, {"x": X}), list(found))
    with pytest.raises(ArtifactError, match="does not exist"):
        load(tmp_path / "nothing.hydra")


def test_an_engine_of_another_backend(engine: Engine) -> None:
    other = replace(engine, backend="tpu")
    with pytest.raises(DeviceMismatchError, match=r"needs the backend 'tpu'.*onnxruntime"):
        load(other)


def test_a_payload_that_does_not_load(engine: Engine) -> None:
    program = replace(engine.programs["main"], payload=b"hello")
    with pytest.raises(CompilationError, match=r"ONNX Runtime cannot load the model. It says"):
        load(replace(engine, programs={"main": program}))


def test_self_test_passes(session: Session) -> None:
    (error,) = session.self_test().values()
    assert error < 1e-5


def test_self_test_fails_on_another_payload(engine: Engine) -> None:
    other = build(fuse(student(seed=9)).model).payload
    program = replace(engine.programs["main"], payload=other)
    with (
        load(replace(engine, programs={"main": program})) as session,
        pytest.raises(GateError, match=r"Program 'main' differs by .* from its recording"),
    ):
        session.self_test()


def test_self_test_names_the_program_that_is_wrong(engine: Engine) -> None:
    right, other = engine.programs["main"], build(fuse(student(seed=9)).model).payload
    programs = {"main": right, "step": right}
    with load(replace(engine, programs=programs)) as session:
        assert set(session.self_test()) == {"main", "step"}
        for name, array in session.run(X).items():
            np.testing.assert_array_equal(session.run(X, program="step")[name], array)
    programs["step"] = replace(right, payload=other)
    with (
        load(replace(engine, programs=programs)) as session,
        pytest.raises(GateError, match="Program 'step' differs by"),
    ):
        session.self_test()


# ensembles


def member(seed: int, c: int = 4, x: str = "x") -> Graph:
    net = Net(seed=seed)
    source = net.input(x, ("batch", 6))
    h = net.op("Relu", linear(net, source, 6, 5))
    return net.graph({linear(net, h, 5, c): ("batch", c)})


def test_an_ensemble_session_is_the_merged_graph() -> None:
    members = [member(seed) for seed in range(3)]
    merged = merge(members)
    ensemble = EnsembleSession([load(quick_compile(graph)) for graph in members])
    assert ensemble.inputs == members[0].inputs
    with load(quick_compile(merged)) as session:
        for size in (1, 23):
            found = ensemble.run(X[:size], head_logits=True)
            wanted = session.run(X[:size], head_logits=True)
            assert list(found) == list(wanted)
            for name, array in wanted.items():
                assert found[name].dtype == array.dtype
                np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)
            assert "head_logits" not in ensemble.run(X[:size])
    ensemble.close()
    with pytest.raises(InputError, match="The session is closed"):
        ensemble.run(X)


def test_what_is_no_ensemble(session: Session) -> None:
    with pytest.raises(InputError, match="An ensemble of 0 sessions cannot be formed"):
        EnsembleSession([])
    with pytest.raises(InputError, match="exactly one array, its logits"):
        EnsembleSession([session])
    sessions = [load(quick_compile(member(0))), load(quick_compile(member(1, c=5)))]
    with pytest.raises(InputError, match="must have the same size"):
        EnsembleSession(sessions)


def test_require_same_inputs(session: Session) -> None:
    other = load(quick_compile(member(0, x="image")))
    assert require_same_inputs({"a": session, "b": session}) == session.inputs
    with pytest.raises(InputError, match=r"'b' takes image: .* The others take x: "):
        require_same_inputs({"a": session, "b": other})
    with pytest.raises(InputError, match="There is no session"):
        require_same_inputs({})


def test_integer_and_bool_inputs() -> None:
    net = Net()
    ids = net.input("ids", ("batch", 3), TensorProto.INT64)
    mask = net.input("mask", ("batch", 3), TensorProto.BOOL)
    words = net.op("Gather", net.random(10, 4), ids)
    kept = net.op("Where", net.op("Unsqueeze", mask, net.const([2], np.int64)), words, net.const(0))
    graph = net.graph(
        {net.op("ReduceSum", kept, net.const([1], np.int64), keepdims=0): ("batch", 4)}
    )
    rng = np.random.default_rng(0)
    feeds = {"ids": rng.integers(0, 10, (20, 3)), "mask": rng.random((20, 3)) > 0.5}
    with load(quick_compile(graph)) as session:
        found = session.run(feeds)
        assert_close(found, expected(graph, feeds), list(found))
        with pytest.raises(InputError, match="Check shapes and value ranges"):
            session.run({**feeds, "ids": feeds["ids"] + 100})


# a device has no torch


def test_loading_and_running_needs_no_training_library(engine: Engine, tmp_path: Path) -> None:
    path = engine.save(tmp_path / "e.hydra")
    np.save(tmp_path / "x.npy", X)
    script = f"""
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {{
                    "torch", "sklearn", "scipy", "torchmetrics", "matplotlib", "accelerate",
                    "safetensors", "onnxscript",
                }}:
                    raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

        sys.meta_path.insert(0, Blocked())
        import numpy as np
        import hydra_edge as he

        with he.load({str(path)!r}) as session:
            session.self_test()
            prediction = session.run(np.load({str(tmp_path / "x.npy")!r}), head_logits=True)
        assert prediction.mean_prob.shape == (23, 4)
        ensemble = he.EnsembleSession
        assert "torch" not in sys.modules
        print("fine")
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr


def test_a_tiny_engine_runs() -> None:
    with load(tiny_engine()) as session:
        np.testing.assert_array_equal(session.run(np.float32([[1, -1]])).logits, [[1, 0]])


def test_what_is_not_built_is_built_where_it_is_loaded(tmp_path: Path) -> None:
    path = compile(GRAPH, "jetson-agx-orin", batch=(1, 2, 8)).save(tmp_path / "s.hydra")
    with pytest.raises(DeviceMismatchError, match="The engine is not built yet") as caught:
        load(path)
    assert "load(..., rebuild=True)" in caught.value.fix
    before = path.read_bytes()
    with load(path, rebuild=True) as session:
        assert session.engine.target == detection.detect().target.name
        assert session.self_test()["main"] < 1e-4
    assert path.read_bytes() == before


def test_an_engine_for_a_gpu_is_built_again_for_what_is_here(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    engine = compile(GRAPH, "rtx-4090", batch=(1, 2, 8))
    with pytest.raises(DeviceMismatchError, match="The engine is for a GPU, sm_89"):
        load(engine)
    with load(engine, rebuild=True) as session:
        session.self_test()
    assert "building the engine again for this machine" in caplog.text
