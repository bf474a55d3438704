"""The layer on a real GPU, with our kernels' library as the engine. It has never run there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpu.driver.double import Double
from gpu.kernel_engine import INPUTS, LARGEST, KernelEngine
from hydra_edge import kernels
from hydra_edge.gpu.arrays import Foreign
from hydra_edge.gpu.device import Device
from hydra_edge.gpu.running import EngineRunner, Limits
from kernels.gpu import library_path

pytestmark = pytest.mark.gpu
X = np.random.default_rng(1).standard_normal((LARGEST, INPUTS)).astype(np.float16)


@pytest.fixture
def engine(device: Device) -> KernelEngine:
    if Double.is_loaded():
        pytest.skip("the kernels do not run on the double of the driver")
    path = library_path()
    if path is None:
        pytest.skip("libhydra_kernels.so is not built")
    with device.current():
        return KernelEngine(device, kernels.load(path))


@pytest.fixture
def runner(engine: KernelEngine) -> Iterator[EngineRunner]:
    runner = EngineRunner(engine, Device(), Limits(lanes=3))
    yield runner
    runner.close()


def check(engine: KernelEngine, runner: EngineRunner, size: int) -> None:
    names = [tensor.name for tensor in engine.outputs]
    found = dict(zip(names, runner.run({"x": X[:size]}, names), strict=True))
    for name, array in engine.expected(X[:size]).items():
        # Sums of 256 products of fp16 in fp32, and what the summary makes of their error.
        np.testing.assert_allclose(found[name], array, rtol=2e-3, atol=2e-3, err_msg=name)


def test_batches_and_graphs(engine: KernelEngine, runner: EngineRunner) -> None:
    for size in (1, 2, 8, 9, 33, LARGEST):
        plain = runner.run({"x": X[:size]}, ("logits", "mutual_information"))
        for _ in range(5):
            check(engine, runner, size)
            again = runner.run({"x": X[:size]}, ("logits", "mutual_information"))
            for one, other in zip(plain, again, strict=True):
                np.testing.assert_array_equal(one, other)  # a graph launches the same kernels
    assert runner.plain_because is None or "graphs already" in runner.plain_because


def test_callers_at_once(engine: KernelEngine, runner: EngineRunner) -> None:
    def work(seed: int) -> None:
        for size in np.random.default_rng(seed).integers(1, LARGEST + 1, 50):
            check(engine, runner, int(size))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_arrays_that_stay_on_the_gpu(engine: KernelEngine, runner: EngineRunner) -> None:
    torch = pytest.importorskip("torch")
    wanted = engine.expected(X[:8])
    names = list(wanted)
    for _ in range(20):
        x = torch.from_numpy(X[:8]).cuda() * 1
        found = dict(zip(names, runner.run_on_device({"x": Foreign(x, "x")}, names), strict=True))
        del x
        for name, array in wanted.items():
            tensor = torch.from_dlpack(found[name])
            np.testing.assert_allclose(tensor.cpu().numpy(), array, rtol=2e-3, atol=2e-3)
