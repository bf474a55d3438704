"""Arrays of others are read where they are, after whoever writes them; ours can be handed on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu.conftest import Start
from gpu.driver.double import LAUNCH_FAILED, Double
from gpu.engines import HEADS, WIDTH, CopyEngine, check, expected, samples
from hydra_edge.errors import ExecutionError, InputError
from hydra_edge.gpu import dlpack
from hydra_edge.gpu.arrays import DeviceArray, Foreign, is_on_gpu
from hydra_edge.gpu.device import Device, Stream
from hydra_edge.gpu.running import EngineRunner

pytestmark = pytest.mark.gpu
X = samples(8)
ON_DEFAULT = 1  # CUDA's default stream, as __cuda_array_interface__ spells it


class Producer:
    """Memory on the GPU that is still being written, on a stream of its own."""

    def __init__(self, device: Device, values: np.ndarray, stream: Any = None) -> None:
        self.device, self.values, self.stream = device, values, stream
        with device.current():
            self.memory = device.driver.mem_alloc(values.nbytes + 512)
            self.pinned = device.driver.pagelocked_empty(values.nbytes, np.uint8)
        self.pinned[:] = values.reshape(-1).view(np.uint8)
        self.address = int(self.memory)

    def write(self) -> None:
        """Put the copy of the values on its stream."""
        with self.device.current():
            self.device.driver.memcpy_htod_async(self.address, self.pinned, self.stream)

    def interface(self, stream: int | None, **changes: object) -> dict[str, object]:
        return {
            "shape": self.values.shape,
            "typestr": self.values.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "stream": stream,
            **changes,
        }

    def free(self) -> None:
        with self.device.current():
            self.device.driver.Context.synchronize()
            self.memory.free()
            self.pinned.base.free()
            self.stream = None


class WithInterface:
    def __init__(self, interface: dict[str, object]) -> None:
        self.__cuda_array_interface__ = interface


class WithCapsule:
    """As torch and CuPy do it: whoever asks with a stream lets that stream wait."""

    def __init__(self, producer: Producer, ordinal: int = 0) -> None:
        self.producer, self.ordinal = producer, ordinal
        self.asked: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.ordinal

    def __dlpack__(self, *, stream: int) -> object:
        self.asked.append(stream)
        p = self.producer
        if stream != -1:
            # PyCUDA knows no stream by its handle; waiting here is as good.
            p.device.driver.Event().record(p.stream).synchronize()
        where = (dlpack.CUDA, self.ordinal)
        return dlpack.write(p, p.address, p.values.shape, p.values.dtype, where)


@pytest.fixture
def producer(device: Device) -> Iterator[Producer]:
    made = Producer(device, X)
    yield made
    made.free()


@pytest.fixture
def busy(device: Device) -> Iterator[Producer]:
    """One that writes on a stream of its own, which does not wait for the default one."""
    with device.current():
        made = Producer(device, X, device.driver.Stream(1))
    yield made
    made.free()


def check_foreign(runner: EngineRunner, value: object, x: np.ndarray) -> None:
    foreign = Foreign(value, "x")
    for name, found in zip(
        ("logits", "mean"), runner.run({"x": foreign}, ("logits", "mean")), strict=True
    ):
        np.testing.assert_array_equal(found, expected(x)[name])


def test_what_is_on_a_gpu(producer: Producer) -> None:
    assert is_on_gpu(WithInterface(producer.interface(None)))
    assert is_on_gpu(WithCapsule(producer))
    for value in (X, [1.0], "x", None, np.float32(1)):
        assert not is_on_gpu(value)


@pytest.mark.parametrize("stream", [None, ON_DEFAULT])
def test_an_array_on_the_default_stream(
    device: Device, start: Start, producer: Producer, stream: int | None
) -> None:
    runner = start(CopyEngine(device))
    producer.write()
    check_foreign(runner, WithInterface(producer.interface(stream)), X)


def test_an_array_on_another_stream(device: Device, start: Start, busy: Producer) -> None:
    runner = start(CopyEngine(device))
    busy.write()
    check_foreign(runner, WithInterface(busy.interface(int(busy.stream.handle))), X)


def test_an_array_of_dlpack(device: Device, start: Start, busy: Producer) -> None:
    runner = start(CopyEngine(device))
    busy.write()
    value = WithCapsule(busy)
    check_foreign(runner, value, X)
    first, second = value.asked
    assert first == -1
    assert second not in (-1, 0, 1, 2)  # a stream of our own


def test_an_array_of_pycuda(device: Device, start: Start) -> None:
    gpuarray = pytest.importorskip("pycuda.gpuarray")
    runner = start(CopyEngine(device))
    with device.current():
        value = gpuarray.to_gpu(X)
        check_foreign(runner, value, X)
        value.gpudata.free()


def test_it_is_read_where_it_is(
    device: Device, double: Double, start: Start, producer: Producer
) -> None:
    runner = start(CopyEngine(device))
    producer.write()
    calls = [double.calls("cuMemcpyHtoDAsync"), double.calls("cuMemcpyDtoDAsync")]
    foreign = Foreign(WithInterface(producer.interface(None)), "x")
    runner.run({"x": foreign}, ("mean",))
    assert double.calls("cuMemcpyHtoDAsync") == calls[0]
    assert double.calls("cuMemcpyDtoDAsync") == calls[1] + 1 + HEADS  # those of the copy engine


def test_an_address_that_an_engine_could_not_read(
    device: Device, start: Start, producer: Producer
) -> None:
    """TensorRT wants 256 bytes of alignment; a view of somebody's array may have less."""
    runner = start(CopyEngine(device))
    producer.address += 4 * WIDTH
    producer.write()
    check_foreign(runner, WithInterface(producer.interface(None)), X)


def test_it_goes_with_arrays_of_the_cpu(device: Device, start: Start, producer: Producer) -> None:
    """A graph was captured for the buffers; what lies elsewhere is run without it."""
    runner = start(CopyEngine(device))
    producer.write()
    for _ in range(4):
        check(runner, X[::-1])
        check_foreign(runner, WithInterface(producer.interface(None)), X)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": (4, 32)}, r"has the strides \[1, 8\]. .* Make it contiguous"),
        ({"shape": (8, 4), "strides": (20, 4)}, r"has the strides \[5, 1\]"),
    ],
)
def test_strides(producer: Producer, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Foreign(WithInterface(producer.interface(None, **changes)), "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": None},
        {"strides": (20, 4)},
        {"shape": (1, 5), "strides": (999 * 4, 4)},
        {"shape": (0, 5), "strides": (4, 4)},
    ],
)
def test_strides_of_consecutive_elements(producer: Producer, changes: dict[str, object]) -> None:
    foreign = Foreign(WithInterface(producer.interface(None, **changes)), "x")
    assert foreign.ndim == 2


def test_another_shape(device: Device, start: Start, producer: Producer) -> None:
    runner = start(CopyEngine(device))
    wrong = Foreign(WithInterface(producer.interface(None, shape=(4, 10))), "x")
    with pytest.raises(InputError, match=r"'x' is float32\[4, 10\]"):
        runner.run({"x": wrong}, ("mean",))


def test_another_gpu(device: Device, start: Start, producer: Producer) -> None:
    runner = start(CopyEngine(device))
    foreign = Foreign(WithCapsule(producer, ordinal=3), "x")
    with pytest.raises(InputError, match=r"'x' lies on GPU 3. The engine runs on GPU 0"):
        runner.run({"x": foreign}, ("mean",))


def test_what_a_library_refuses(producer: Producer) -> None:
    class Refusing(WithCapsule):
        def __dlpack__(self, *, stream: int) -> object:
            raise BufferError("it needs a gradient.")

    with pytest.raises(InputError, match=r"'x' cannot be read on the GPU. Refusing says: it needs"):
        Foreign(Refusing(producer), "x")


def test_a_type_that_numpy_lacks(producer: Producer) -> None:
    class Complex(WithCapsule):
        def __dlpack__(self, *, stream: int) -> object:
            return np.zeros(3, np.complex64).__dlpack__()

    with pytest.raises(InputError, match="elements of a type that no engine takes"):
        Foreign(Complex(producer), "x")


# outputs that stay on the GPU


def test_outputs_that_stay(device: Device, start: Start, producer: Producer) -> None:
    runner = start(CopyEngine(device))
    producer.write()
    for value in (X, Foreign(WithInterface(producer.interface(None)), "x")):
        mean, logits = runner.run_on_device({"x": value}, ("mean", "logits"))
        np.testing.assert_array_equal(mean.numpy(), X)
        np.testing.assert_array_equal(logits.numpy(), expected(X)["logits"])
        assert (mean.shape, mean.ndim, len(mean), mean.dtype) == (X.shape, 2, 8, X.dtype)
    assert repr(mean) == f"DeviceArray([8, 5], float32, {device.name})"


def test_no_output_comes_back(device: Device, double: Double, start: Start) -> None:
    runner = start(CopyEngine(device))
    copies = double.calls("cuMemcpyDtoHAsync")
    runner.run_on_device({"x": X}, ("mean", "logits"))
    assert double.calls("cuMemcpyDtoHAsync") == copies


def test_each_has_memory_of_its_own(device: Device, start: Start) -> None:
    runner = start(CopyEngine(device), lanes=1)
    (first,) = runner.run_on_device({"x": X}, ("mean",))
    (second,) = runner.run_on_device({"x": -X}, ("mean",))
    check(runner, X[::-1])
    np.testing.assert_array_equal(first.numpy(), X)
    np.testing.assert_array_equal(second.numpy(), -X)


def test_one_session_feeds_another(device: Device, start: Start) -> None:
    one, other = start(CopyEngine(device)), start(CopyEngine(device))
    (mean,) = one.run_on_device({"x": X}, ("mean",))
    for value in (mean, WithInterface(mean.__cuda_array_interface__)):
        check_foreign(other, value, X)


def test_dlpack_of_ours(device: Device, start: Start) -> None:
    (mean,) = start(CopyEngine(device)).run_on_device({"x": X}, ("mean",))
    assert mean.__dlpack_device__() == (dlpack.CUDA, 0)
    content = dlpack.read(mean.__dlpack__(stream=None, max_version=(1, 0)))
    assert (content.address, content.shape, content.dtype) == (mean.address, (8, 5), X.dtype)
    for asked in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="handed on where it is, without a copy"):
            mean.__dlpack__(**asked)
    mean.__dlpack__(copy=False, dl_device=(dlpack.CUDA, 0))
    with pytest.raises((BufferError, RuntimeError), match=r"[Uu]nsupported device"):
        np.from_dlpack(mean)  # the error arrives, and nothing is leaked


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.bool_])
def test_other_types_come_back(device: Device, start: Start, dtype: type) -> None:
    x = (X * 3).astype(dtype)
    (mean,) = start(CopyEngine(device, dtype=dtype)).run_on_device({"x": x}, ("mean",))
    np.testing.assert_array_equal(mean.numpy(), x)
    assert dlpack.read(mean.__dlpack__()).dtype == x.dtype


def test_they_outlive_the_session(device: Device, double: Double) -> None:
    before = double.counts()
    own = Device()
    runner = EngineRunner(CopyEngine(device), own)
    (mean,) = runner.run_on_device({"x": X}, ("mean",))
    runner.close()
    capsule = mean.__dlpack__()
    del runner, own
    np.testing.assert_array_equal(mean.numpy(), X)
    del mean
    assert double.counts().device_bytes == before.device_bytes + X.nbytes
    with ThreadPoolExecutor(1) as pool:  # the last one may be any thread
        holder = [capsule]
        del capsule
        pool.submit(holder.clear).result()
    gc.collect()
    assert double.counts().left_over() == before.left_over()


def test_an_empty_array(device: Device) -> None:
    with device.current():
        array = DeviceArray(device, (0, 3), np.dtype(np.float32))
    assert array.numpy().shape == (0, 3)
    assert array.nbytes == 0


def test_no_memory_for_outputs(device: Device, double: Double, start: Start) -> None:
    runner = start(CopyEngine(device))
    check(runner, X)
    with (
        double.having(elsewhere_bytes=double.get("memory_bytes") - double.counts().device_bytes),
        pytest.raises(ExecutionError, match="cuMemAlloc failed: out of memory"),
    ):
        runner.run_on_device({"x": X}, ("mean",))
    double.fail("cuStreamSynchronize", LAUNCH_FAILED)
    with pytest.raises(ExecutionError, match="unspecified launch failure"):
        runner.run_on_device({"x": X}, ("mean",))
    (mean,) = runner.run_on_device({"x": X}, ("mean",))
    np.testing.assert_array_equal(mean.numpy(), X)


# with torch, where it has a GPU


@pytest.fixture
def torch() -> Any:
    if Double.is_loaded():
        pytest.skip("torch does not run on the double of the driver")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch


def test_tensors_of_torch(device: Device, start: Start, torch: Any) -> None:
    runner = start(CopyEngine(device))
    stream = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            x = torch.randn(4096, 4096, device="cuda")
            x = (x @ x)[:8, :WIDTH].contiguous()
            check_foreign(runner, x, x.cpu().numpy())


def test_torch_takes_ours(device: Device, start: Start, torch: Any) -> None:
    runner = start(CopyEngine(device))
    (mean,) = runner.run_on_device({"x": X}, ("mean",))
    tensor = torch.from_dlpack(mean)
    assert tensor.data_ptr() == mean.address
    del mean
    np.testing.assert_array_equal((tensor + 1).cpu().numpy(), X + 1)


def test_torch_still_works_after_a_session(device: Device, torch: Any) -> None:
    runner = EngineRunner(CopyEngine(device), Device())
    runner.close()
    device.close()
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_our_streams_wait(device: Device) -> None:
    """The array's own stream is the default one here, for which ours does not wait by itself."""
    producer = Producer(device, X)
    with device.current():
        stream = Stream(device)
        producer.write()
        Foreign(WithInterface(producer.interface(None)), "x").wait(device, stream)
        back = device.driver.pagelocked_empty(X.nbytes, np.uint8)
        device.driver.memcpy_dtoh_async(back, producer.address, stream.raw)
        stream.synchronize()
        np.testing.assert_array_equal(back.view(np.float32).reshape(X.shape), X)
        back.base.free()
        stream.destroy()
    producer.free()
