"""TensorRT's objects behind the runner's interface: only with names that every version has.

The objects are stand-ins here: TensorRT deserializes nothing without a GPU. What they offer is
limited to the names that each version is listed with.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tensorrt_api import RTX, VERSIONS, load

from hydra_edge.errors import CompilationError, DeviceMismatchError
from hydra_edge.gpu import engines
from hydra_edge.gpu.engines import OutOfMemoryError
from hydra_edge.gpu.messages import Messages
from hydra_edge.gpu.tensorrt_engine import TensorRTEngine, deserialize

API = load()


class Member:
    """A value of an enumeration."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Member) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Limited:
    """An object with no other names than a version of TensorRT has."""

    def __init__(self, version: str, kind: str, **members: object) -> None:
        names = API[version][kind]
        for name, value in members.items():
            if name in names:
                setattr(self, name, value)


def enumeration(version: str, kind: str) -> object:
    return Limited(version, kind, **{name: Member(name) for name in API[version][kind]})


class Context:
    """What a test does with an execution context."""

    def __init__(self, version: str, profile: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.accepts = True
        self.capturable = True

        def note(name: str) -> Any:
            def call(*arguments: Any) -> bool:
                self.calls.append((name, *arguments))
                if name == "set_optimization_profile_async" and not self.accepts:
                    raise RuntimeError("as Python's binding does")
                return self.accepts

            return call

        self.real: Any = Limited(
            version,
            "IExecutionContext",
            **{name: note(name) for name in API[version]["IExecutionContext"]},
        )
        self.real.active_optimization_profile = profile
        if hasattr(self.real, "get_tensor_shape"):
            self.real.get_tensor_shape = lambda name: [3, -1]
        if hasattr(self.real, "is_stream_capturable"):
            self.real.is_stream_capturable = lambda stream: self.capturable


class Engine:
    """An engine with x [batch, 4] and mask [batch] in and y [2, batch, 3] out."""

    def __init__(self, version: str, context: Context | None, **changes: Any) -> None:
        self.tensors = {
            "x": ("INPUT", "HALF", (-1, 4), [(1, 4), (2, 4), (8, 4)]),
            "y": ("OUTPUT", "FLOAT", (2, -1, 3), None),
            "mask": ("INPUT", "BOOL", (-1,), [(1,), (2,), (6,)]),
            **changes.pop("tensors", {}),
        }
        location = changes.pop("location", "DEVICE")
        self.strategies: list[Member] = []

        def create(strategy: Member) -> object:
            self.strategies.append(strategy)
            return context and context.real

        self.real = Limited(
            version,
            "ICudaEngine",
            num_io_tensors=len(self.tensors),
            num_optimization_profiles=changes.pop("profiles", 1),
            device_memory_size_v2=changes.pop("memory", 1000),
            get_tensor_name=lambda number: list(self.tensors)[number],
            get_tensor_mode=lambda name: Member(self.tensors[name][0]),
            get_tensor_dtype=lambda name: Member(self.tensors[name][1]),
            get_tensor_shape=lambda name: list(self.tensors[name][2]),
            get_tensor_location=lambda name: Member(location),
            get_tensor_profile_shape=lambda name, profile: self.tensors[name][3],
            create_execution_context=create,
        )


class Said:
    """What TensorRT has said."""

    logger = None

    def words(self) -> str:
        return "It is full."


def adapted(engine: Engine, version: str = "10.3") -> TensorRTEngine:
    trt = SimpleNamespace(
        **{
            kind: enumeration(version, kind)
            for kind in ("TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy")
        }
    )
    return TensorRTEngine(trt, object(), engine.real, Said())  # type: ignore[arg-type]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_an_engine_says(version: str) -> None:
    engine = adapted(Engine(version, None), version)
    assert [str(tensor) for tensor in engine.inputs] == [
        "x: float16[batch, 4]",
        "mask: bool[batch]",
    ]
    assert engine.outputs == (engines.Tensor("y", (2, -1, 3), np.dtype(np.float32)),)
    assert engine.profiles == ((1, 6),)  # what all inputs take
    assert engine.device_memory_bytes == 1000
    assert engine.words() == "It is full."


def test_an_engine_of_one_batch_size() -> None:
    tensors = {"x": ("INPUT", "BF16", (4, 4), None), "mask": ("INPUT", "INT64", (4,), None)}
    engine = adapted(Engine("10.3", None, tensors=tensors, profiles=2))
    assert engine.profiles == ((4, 4), (4, 4))
    assert [tensor.dtype for tensor in engine.inputs] == [ml_dtypes.bfloat16, np.int64]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_context_works_in_memory_of_the_caller(version: str) -> None:
    context = Context(version)
    engine = Engine(version, context)
    made = adapted(engine, version).create_context(0, 77, 4096)
    assert engine.strategies == [Member("USER_MANAGED")]
    assert made.set_input_shape("x", (3, 4))
    assert made.set_tensor_address("x", 512)
    assert made.execute_async(77)
    assert made.get_tensor_shape("y") == (3, -1)
    assert made.set_profile(1, 77)
    assert context.calls == [
        ("set_device_memory", 4096, 1000),
        ("set_input_shape", "x", (3, 4)),
        ("set_tensor_address", "x", 512),
        ("execute_async_v3", 77),
        ("set_optimization_profile_async", 1, 77),
    ]
    assert made.is_capturable(77)
    context.capturable = False
    assert made.is_capturable(77) == (version != RTX)


def test_a_context_in_another_profile() -> None:
    context = Context("10.3")
    adapted(Engine("10.3", context, profiles=2, memory=0)).create_context(1, 77, 0)
    assert context.calls == [("set_optimization_profile_async", 1, 77)]
    context.accepts = False
    with pytest.raises(OutOfMemoryError, match="It is full"):
        adapted(Engine("10.3", context, profiles=2)).create_context(1, 77, 4096)


def test_a_profile_that_is_refused() -> None:
    context = Context("10.3")
    made = adapted(Engine("10.3", context, profiles=2)).create_context(0, 77, 4096)
    context.accepts = False
    assert made.set_profile(1, 77) is False


def test_a_closed_context_is_gone_although_a_traceback_knows_it() -> None:
    context = Context("10.3")
    gone = weakref.ref(context.real)
    engine = adapted(Engine("10.3", context, profiles=2))

    def fail() -> None:
        made = engine.create_context(0, 77, 4096)
        context.real = None
        try:
            raise ValueError(made)
        finally:
            made.close()

    with pytest.raises(ValueError, match="object at") as caught:
        fail()
    assert caught.tb is not None
    assert gone() is None


def test_a_context_without_its_profile_is_gone_although_a_traceback_knows_it() -> None:
    context = Context("10.3")
    context.accepts = False
    gone = weakref.ref(context.real)
    with pytest.raises(OutOfMemoryError) as caught:
        adapted(Engine("10.3", context, profiles=2, memory=0)).create_context(1, 77, 0)
    context.real = None
    assert caught.tb is not None
    assert gone() is None


def test_no_context() -> None:
    with pytest.raises(OutOfMemoryError, match=r"It is full$"):
        adapted(Engine("10.3", None)).create_context(0, 77, 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"x": ("INPUT", "INT4", (-1, 4), None)}}, "'x' .*: its elements are INT4"),
        ({"location": "HOST"}, "'x' .*: it lies on the CPU, as shapes do"),
        ({"tensors": {"x": ("INPUT", "HALF", (-1, -1), None)}}, "an axis behind the batch is open"),
        ({"tensors": {"x": ("INPUT", "HALF", (), None)}}, "it has no axis for the batch"),
    ],
)
def test_tensors_that_no_session_has(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CompilationError, match=message):
        adapted(Engine("10.3", None, **changes))


def test_the_runtime_is_let_go_last() -> None:
    engine = adapted(Engine("10.3", None))
    engine.close()
    assert engine._engine is None
    assert engine._runtime is None


def test_the_real_library_refuses() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    messages = Messages(trt)
    with pytest.raises(
        DeviceMismatchError,
        match=r"tensorrt_rtx 1\..* does not load the engine of 50 bytes. It says: .*rebuild=True",
    ):
        deserialize(trt, b"no engine " * 5, messages)
