"""The table of targets is consistent with itself, and with the backends there are."""

from __future__ import annotations

import pytest

from hydra_edge import backends, targets
from hydra_edge.errors import DeviceMismatchError, InputError
from hydra_edge.lowering import EXPLICIT, LOWERINGS, PLUGIN
from hydra_edge.quantization import PRECISIONS


def test_names_are_unique_and_found() -> None:
    names = [target.name for target in targets.TARGETS]
    assert len(set(names)) == len(names)
    for target in targets.TARGETS:
        assert targets.find(target.name) is target


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_every_row_makes_sense(target: targets.Target) -> None:
    assert set(target.precisions) <= set(PRECISIONS)
    assert target.precisions
    assert target.description.endswith(".")
    gpu = target.gpu
    assert (gpu is None) == (target.name == "cpu")
    if gpu is not None:
        assert gpu.source
        assert target.software
        assert target.known_as
        assert target.precisions == targets.precisions_of(gpu.compute_capability, target.backend)
        assert (gpu.fp8 > 0) == ("fp8" in target.precisions)
        assert min(gpu.sm_count, gpu.clock_ghz, gpu.memory_gb, gpu.bandwidth_gb_s, gpu.fp16) > 0
        assert (target.backend == "tensorrt_rtx") <= (
            gpu.compute_capability in targets.RTX_CAPABILITIES
        )
        numbers = [mode.number for mode in gpu.modes]
        assert bool(numbers) == target.is_jetson == target.name.startswith("jetson")
        assert len(set(numbers)) == len(numbers)
        assert not numbers or gpu.modes[0].name.startswith("MAXN")


@pytest.mark.parametrize("name", sorted({target.backend for target in targets.TARGETS}))
def test_every_backend_of_the_table_is_there(name: str) -> None:
    backend = backends.find(name)
    assert set(backend.LOWERINGS) <= {*LOWERINGS, EXPLICIT, PLUGIN}
    pytest.importorskip(name, reason=f"the library {name} is not installed")
    assert backend.versions()


def test_what_a_device_is_called_tells_rows_apart() -> None:
    """By name alone, or of Jetson modules by name and memory."""
    rows = [target for target in targets.TARGETS if target.gpu is not None]
    assert len({(row.known_as, row.is_jetson and row.gpu.memory_gb) for row in rows}) == len(rows)
    families = {row.known_as for row in rows if row.is_jetson}
    assert not any(a in b for a in families for b in families if a != b)


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("jetson-agx-orin", "int8", 85),
        ("a100", "fp16", 312),
        ("a100", "fp32", 19.5),
        ("h100", "fp16", 989),
        ("h100", "int8", 1979),
        ("l4", "fp8", 242),
        ("rtx-3090", "int8", 284),
        ("jetson-orin-nano", "int8", 67 / 2),  # printed with sparsity, which doubles it
        ("jetson-orin-nano-4gb", "int8", 67 / 4),  # half as many SMs
        ("jetson-orin-nx", "int8", (157 - 2 * 40) / 2),  # without the two DLAs
        ("jetson-orin-nx-8gb", "int8", (117 - 40) / 2),
        ("jetson-thor", "fp8", 2070 / 4),  # printed for sparse fp4
        ("rtx-3080", "fp16", 59.5),
        ("rtx-4080", "fp16", 97.5),
        ("rtx-4080", "int8", 389.9),
        ("rtx-4080", "fp32", 48.7),
        ("rtx-4090", "fp16", 165.2),
        ("rtx-5080", "fp16", 112.6),
        ("rtx-5080", "int8", 450.2),
        ("rtx-5080", "int8", 1801 / 4),  # printed for sparse fp4
        ("rtx-5090", "fp8", 419),
    ],
)
def test_rates_are_those_that_are_printed(name: str, precision: str, tera: float) -> None:
    """Dense; the makers' figures, in 10^12 operations per second."""
    gpu = targets.find(name).gpu
    assert gpu is not None
    assert gpu.operations_per_s(precision) / 1e12 == pytest.approx(tera, rel=0.01)


def test_releases() -> None:
    target = targets.find("jetson-orin-nano@jp6.2")
    assert [one.tensorrt for one in target.software] == ["10.3"]
    with pytest.raises(InputError, match=r"no release 'jp7\.0' for 'jetson-orin-nano'.*jp6\.2"):
        targets.find("jetson-orin-nano@jp7.0")
    with pytest.raises(InputError, match="no release 'x' for 'cpu'"):
        targets.find("cpu@x")


def test_what_a_generation_multiplies() -> None:
    assert targets.precisions_of(89, "tensorrt")[-1] == "fp8"
    assert "fp8" not in targets.precisions_of(87, "tensorrt")
    assert targets.precisions_of(75, "tensorrt")[0] == "fp32"
    assert targets.precisions_of(75, "tensorrt_rtx")[0] == "fp16"


@pytest.mark.parametrize("name", ["jetson-xavier", "jetson-xavier-nx", "jetson-nano@jp4.6"])
def test_what_is_too_old(name: str) -> None:
    with pytest.raises(DeviceMismatchError, match="TensorRT 8"):
        targets.find(name)


@pytest.mark.parametrize("name", ["", "CPU", "toaster"])
def test_an_unknown_target(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"Unknown target '{name}'. There are: local, cpu, jetson"
    ):
        targets.find(name)


@pytest.mark.parametrize("name", ["", "tpu", "__init__", "../os"])
def test_an_unknown_backend(name: str) -> None:
    with pytest.raises(DeviceMismatchError, match="onnxruntime"):
        backends.find(name)
