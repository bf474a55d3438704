"""A GPU: a real one, or the double of its driver where `test_gpu.py` has put it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest

from gpu.driver.double import Double
from gpu.engines import CopyEngine
from hydra_edge.errors import MissingDependencyError
from hydra_edge.gpu.device import Device
from hydra_edge.gpu.running import EngineRunner, Limits

Start = Callable[..., EngineRunner]


@pytest.fixture(scope="session")
def driver() -> None:
    """Skips what needs a GPU where there is neither one nor the double."""
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("PyCUDA is not installed")
    try:
        Device().close()
    except MissingDependencyError as missing:
        pytest.skip(f"no GPU: {missing.why}")


@pytest.fixture
def device(driver: None) -> Iterator[Device]:
    """A GPU. Of the double, everything that was allocated must be free at the end."""
    before = Double().counts() if Double.is_loaded() else None
    made = Device()
    yield made
    made.close()
    if before:
        assert Double().counts().left_over() == before.left_over()


@pytest.fixture
def double(device: Device) -> Iterator[Double]:
    """The double, for tests that tell it to fail."""
    if not Double.is_loaded():
        pytest.skip("only the double of the driver can be told to fail")
    double = Double()
    yield double
    double.fail("", 0)


@pytest.fixture
def start(device: Device) -> Iterator[Start]:
    """Opens runners on copy engines, and closes them at the end."""
    opened: list[EngineRunner] = []

    def start(engine: CopyEngine, **limits: int) -> EngineRunner:
        opened.append(EngineRunner(engine, Device(), Limits(**limits)))
        return opened[-1]

    yield start
    for runner in opened:
        runner.close()
