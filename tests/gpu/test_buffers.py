"""Buffers hold what they were made for and no more, and reach the GPU by copies or by mapping."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from gpu.driver.double import OUT_OF_MEMORY, Double
from hydra_edge.errors import InputError
from hydra_edge.gpu.buffers import Buffer
from hydra_edge.gpu.device import Device, Stream

pytestmark = pytest.mark.gpu


@pytest.fixture
def stream(device: Device) -> Iterator[Stream]:
    with device.current():
        stream = Stream(device)
        yield stream
        stream.destroy()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.bool_, np.int8])
def test_to_the_gpu_and_back(device: Device, stream: Stream, dtype: type) -> None:
    values = np.arange(24).astype(dtype).reshape(2, 3, 4)
    there = Buffer(device, "there", values.nbytes)
    back = Buffer(device, "back", values.nbytes)
    there.view(values.shape, values.dtype)[...] = values
    view = back.view(values.shape, values.dtype)
    view[...] = 0
    there.upload(values.nbytes, stream)
    device.driver.memcpy_dtod_async(back.address, there.address, values.nbytes, stream.raw)
    back.download(values.nbytes, stream)
    stream.synchronize()
    np.testing.assert_array_equal(view, values)
    there.free()
    back.free()


def test_a_part_of_it(device: Device, stream: Stream) -> None:
    buffer = Buffer(device, "x", 40)
    whole = buffer.view((10,), np.dtype(np.float32))
    whole[...] = range(10)
    buffer.upload(40, stream)
    stream.synchronize()
    whole[...] = -1
    buffer.download(12, stream)
    stream.synchronize()
    assert whole.tolist() == [0, 1, 2, -1, -1, -1, -1, -1, -1, -1]
    assert buffer.view((3,), np.dtype(np.float32)).tolist() == [0, 1, 2]
    buffer.free()


@pytest.mark.parametrize(
    ("shape", "size"), [((11,), 44), ((2, 6), 48), ((-1, -1), 4), ((10, 1, 1, 2), 80)]
)
def test_it_holds_no_more(
    device: Device, stream: Stream, shape: tuple[int, ...], size: int
) -> None:
    buffer = Buffer(device, "x", 40)
    with pytest.raises(
        InputError, match=rf"'x' of the shape .* has {size} bytes. Its buffer has 4"
    ):
        buffer.view(shape, np.dtype(np.float32))
    buffer.free()


def test_an_empty_one(device: Device, stream: Stream) -> None:
    buffer = Buffer(device, "x", 0)
    buffer.upload(0, stream)
    buffer.download(0, stream)
    assert buffer.view((0, 3), np.dtype(np.float32)).size == 0
    buffer.free()


def test_free_is_free(device: Device, double: Double, stream: Stream) -> None:
    """At once, although a view of it is still known to somebody; and twice is fine."""
    before = double.counts()
    buffer = Buffer(device, "x", 40)
    view = buffer.view((10,), np.dtype(np.float32))
    buffer.free()
    assert double.counts() == before
    buffer.free()
    del view


def test_shared_memory_is_mapped(device: Device, double: Double, stream: Stream) -> None:
    with double.having(integrated=1):
        shared = Device()
    buffer = Buffer(shared, "x", 16)
    back = Buffer(device, "back", 16)
    counts = double.counts()
    buffer.view((4,), np.dtype(np.int32))[...] = [1, 2, 3, 4]
    buffer.upload(16, stream)
    device.driver.memcpy_dtod_async(back.address, buffer.address, 16, stream.raw)
    back.download(16, stream)
    stream.synchronize()
    assert back.view((4,), np.dtype(np.int32)).tolist() == [1, 2, 3, 4]
    assert counts.device_bytes == 16  # that of `back`
    buffer.free()
    back.free()
    shared.close()


@pytest.mark.parametrize(("size", "is_mapped"), [(64 * 1024, True), (64 * 1024 + 1, False)])
def test_large_buffers_are_not_mapped(
    double: Double, stream: Stream, size: int, is_mapped: bool
) -> None:
    with double.having(integrated=1):
        shared = Device()
    before = double.counts().device_bytes
    buffer = Buffer(shared, "x", size)
    assert double.counts().device_bytes == before + (0 if is_mapped else size)
    view = buffer.view((size,), np.dtype(np.uint8))
    view[...] = 7
    buffer.upload(size, stream)
    stream.synchronize()
    view[...] = 0
    buffer.download(size, stream)
    stream.synchronize()
    assert (view == (0 if is_mapped else 7)).all()
    buffer.free()
    shared.close()


def test_no_memory_on_the_gpu(device: Device, double: Double, stream: Stream) -> None:
    before = double.counts()
    with (
        double.having(elsewhere_bytes=double.get("memory_bytes")),
        pytest.raises(device.driver.MemoryError) as caught,
    ):
        Buffer(device, "x", 40)
    assert double.counts() == before  # although the error's traceback knows the buffer
    assert caught.tb is not None
    double.fail("cuMemHostAlloc", OUT_OF_MEMORY)
    with pytest.raises(device.driver.MemoryError):
        Buffer(device, "x", 40)
    assert double.counts() == before
