"""What this machine is: a driver's library and files of a Jetson, both as they could be."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hydra_edge import detection, targets
from hydra_edge.detection import Detection, detect
from hydra_edge.errors import DeviceMismatchError, InputError

NVML = Path(__file__).parent / "data" / "nvml.c"
Machine = Callable[..., Detection]


@pytest.fixture
def card(tmp_path: Path) -> Machine:
    """A machine with a driver that answers so."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")

    def found(
        name: str,
        capability: int,
        memory_mib: int,
        count: int = 1,
        refuses: str = "",
        old: bool = False,
    ) -> Detection:
        library = tmp_path / f"libnvidia-ml-{len(list(tmp_path.iterdir()))}.so"
        macros = {
            "NAME": f'"{name}"',
            "CAPABILITY": capability,
            "MEMORY_MIB": memory_mib,
            "COUNT": count,
            "REFUSES": f'"{refuses}"',
        }
        flags = [f"-D{key}={value}" for key, value in macros.items()] + ["-DOLD"] * old
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, NVML, *flags], check=True)
        return detect(tmp_path / "no files", str(library))

    return found


@pytest.fixture
def jetson(tmp_path: Path) -> Machine:
    """A machine with the files of a Jetson."""

    def found(
        model: str, memory_gib: float, l4t: str = "36.4.3", chip: str = "tegra234"
    ) -> Detection:
        major, _, revision = l4t.partition(".")
        for name, text in {
            "proc/device-tree/model": f"{model}\0",
            "proc/device-tree/compatible": f"nvidia,p3768-0000\0nvidia,{chip}\0",
            "proc/meminfo": f"MemTotal:       {int(memory_gib * 2**20)} kB\nMemFree: 17 kB\n",
            "etc/nv_tegra_release": f"# R{major} (release), REVISION: {revision}, GCID: 1\n",
        }.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if not l4t:
            (tmp_path / "etc/nv_tegra_release").unlink()
        return detect(tmp_path, "libno-such-library.so")

    return found


@pytest.mark.parametrize(
    ("name", "capability", "memory_mib", "target"),
    [
        ("NVIDIA GeForce RTX 4090", 89, 24564, "rtx-4090"),
        ("NVIDIA GeForce RTX 3080", 86, 10240, "rtx-3080"),
        ("NVIDIA L4", 89, 23034, "l4"),
        ("NVIDIA A100-SXM4-80GB", 80, 81920, "a100"),
        ("NVIDIA H100 80GB HBM3", 90, 81559, "h100"),
        ("NVIDIA H200", 90, 143771, "h200"),
        ("NVIDIA GeForce RTX 5090", 120, 32607, "rtx-5090"),
    ],
)
def test_cards_of_the_table(
    card: Machine, name: str, capability: int, memory_mib: int, target: str
) -> None:
    found = card(name, capability, memory_mib)
    assert found.target is targets.find(target)
    assert found.found == f"{name}, sm_{capability}, {memory_mib / 1024:.1f} GiB."
    assert found.system == "driver 580.65.06, CUDA up to 13.2"


def test_a_card_without_a_row(card: Machine) -> None:
    found = card("NVIDIA RTX A4000", 86, 16376)
    target, gpu = found.target, found.target.gpu
    assert (target.name, target.backend) == ("nvidia-rtx-a4000", "tensorrt_rtx")
    assert target.precisions == targets.find("rtx-3090").precisions
    assert target.software == targets.RTX_RELEASES
    assert gpu is not None
    assert (gpu.compute_capability, gpu.sm_count, gpu.clock_ghz) == (86, 48, 1.56)
    assert gpu.memory_gb == 16.0
    assert gpu.bandwidth_gb_s == pytest.approx(448.1)  # 7001 MHz, twice, 32 bytes
    assert (gpu.fp16, gpu.int8, gpu.fp8) == (0, 0, 0)
    assert "bandwidth computed from memory clock and bus width" in gpu.source
    assert "the table has no row for it" in found.found


def test_relatives_of_the_rows_are_not_taken_for_them(card: Machine) -> None:
    assert card("NVIDIA GeForce RTX 3080", 86, 12288).target.name == "nvidia-geforce-rtx-3080"
    found = card("NVIDIA GeForce RTX 4080 SUPER", 89, 16376)
    assert found.target.name == "nvidia-geforce-rtx-4080-super"


@pytest.mark.parametrize(
    ("name", "capability", "backend", "lacking"),
    [
        ("NVIDIA A40", 86, "tensorrt", ["fp8"]),
        ("NVIDIA H100 PCIe", 90, "tensorrt", []),
        ("Quadro RTX 5000", 75, "tensorrt_rtx", ["fp32", "fp8"]),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 120, "tensorrt_rtx", []),
        ("NVIDIA RTX of tomorrow", 130, "tensorrt", []),
    ],
)
def test_what_builds_for_other_cards(
    card: Machine, name: str, capability: int, backend: str, lacking: list[str]
) -> None:
    target = card(name, capability, 49140).target
    assert target.backend == backend
    every = targets.find("rtx-4090").precisions
    assert [precision for precision in every if precision not in target.precisions] == lacking
    assert target.gpu is not None
    assert target.gpu.sm_count == (96 if capability == 75 else 48)  # 64 cores each, or 128


@pytest.mark.parametrize("refused", ["nvmlDeviceGetMemoryBusWidth", "nvmlDeviceGetMaxClockInfo"])
def test_no_bandwidth_is_made_up(card: Machine, refused: str) -> None:
    gpu = card("NVIDIA A40", 86, 46068, refuses=refused).target.gpu
    assert gpu is not None
    assert gpu.bandwidth_gb_s == 0
    assert "bandwidth not known" in gpu.source


def test_an_old_driver_counts_no_cores(card: Machine) -> None:
    gpu = card("NVIDIA A40", 86, 46068, old=True).target.gpu
    assert gpu is not None
    assert (gpu.sm_count, gpu.bandwidth_gb_s) == (0, 448.1)


def test_several_cards(card: Machine) -> None:
    found = card("NVIDIA L4", 89, 23034, count=2)
    assert found.target.name == "l4"
    assert found.found.endswith("the first of 2 GPUs.")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"capability": 61}, "NVIDIA TITAN, sm_61, 12.0 GiB: older than sm_75"),
        ({"count": 0}, "A driver of NVIDIA, but no GPU of it."),
        ({"refuses": "nvmlInit_v2"}, "No GPU of NVIDIA answers: nvmlInit_v2 says 'Not Supported'."),
        ({"refuses": "nvmlDeviceGetMemoryInfo"}, "nvmlDeviceGetMemoryInfo says 'Not Supported'."),
    ],
)
def test_no_usable_card(card: Machine, options: dict[str, int | str], why: str) -> None:
    found = card("NVIDIA TITAN", **{"capability": 86, "memory_mib": 12288, **options})
    assert found.target is targets.find("cpu")
    assert why in found.found
    assert bool(found.system) == ("nvmlInit_v2" not in options.values())


def test_no_driver(tmp_path: Path) -> None:
    assert detect(tmp_path, "libno-such-library.so") == Detection(
        targets.find("cpu"), "No GPU of NVIDIA: libno-such-library.so is not here."
    )


SUPER = "NVIDIA Jetson {} Engineering Reference Developer Kit Super"


@pytest.mark.parametrize(
    ("model", "memory_gib", "l4t", "target"),
    [
        (SUPER.format("Orin Nano"), 7.4, "36.4.3", "jetson-orin-nano@jp6.2"),
        (SUPER.format("Orin Nano"), 3.4, "36.5.0", "jetson-orin-nano-4gb@jp6.2"),
        (SUPER.format("Orin NX"), 15.3, "39.2.0", "jetson-orin-nx@jp7.2"),
        (SUPER.format("Orin NX"), 7.4, "36.4.0", "jetson-orin-nx-8gb@jp6.2"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 61.4, "36.4.4", "jetson-agx-orin@jp6.2"),
        ("Jetson AGX Orin", 29.9, "39.2", "jetson-agx-orin-32gb@jp7.2"),
    ],
)
def test_orin(jetson: Machine, model: str, memory_gib: float, l4t: str, target: str) -> None:
    found = jetson(model, memory_gib, l4t)
    assert found.target == targets.find(target)
    assert found.found == f"{model}, {memory_gib:.1f} GiB, Jetson Linux {l4t}."
    assert found.system == f"Jetson Linux {l4t}"


def test_thor(jetson: Machine) -> None:
    found = jetson("NVIDIA Jetson AGX Thor Developer Kit", 122.8, "38.2.1", "tegra264")
    assert found.target == targets.find("jetson-thor@jp7.0")


def test_super_modes_are_flashed_or_not(jetson: Machine) -> None:
    found = jetson("NVIDIA Jetson Orin Nano Developer Kit", 7.4)
    assert found.target.name == "jetson-orin-nano"
    assert "not flashed with its Super modes" in found.found
    assert "Super" not in jetson("NVIDIA Jetson AGX Orin Developer Kit", 61.4).found


def test_power_modes_are_those_of_the_device(jetson: Machine, tmp_path: Path) -> None:
    """Their numbers differ between modules and releases."""
    for name, text in {
        "etc/nvpmodel.conf": (
            "# < POWER_MODEL ID=id_num NAME=mode_name >\n< POWER_MODEL ID=0 NAME=15W >\nCPU 1\n"
            "< POWER_MODEL ID=3 NAME=7W >\n< POWER_MODEL ID=5 NAME=MAXN_SUPER >\n"
            "< POWER_MODEL ID=1 NAME=25W >\n"
        ),
        "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = jetson(SUPER.format("Orin Nano"), 7.4)
    assert found.target.gpu is not None
    modes = [(mode.name, mode.number) for mode in found.target.gpu.modes]
    assert modes == [("MAXN_SUPER", 5), ("25W", 1), ("15W", 0), ("7W", 3)]
    assert found.system == "Jetson Linux 36.4.3, power mode 25W"


@pytest.mark.parametrize(
    ("model", "memory_gib", "chip", "capability"),
    [
        ("NVIDIA Jetson Thor T4000", 61.0, "tegra264", 110),
        ("A carrier board of somebody else", 15.3, "tegra234", 87),
    ],
)
def test_a_module_without_a_row(
    jetson: Machine, model: str, memory_gib: float, chip: str, capability: int
) -> None:
    found = jetson(model, memory_gib, "39.2", chip)
    gpu = found.target.gpu
    assert gpu is not None
    assert found.target.backend == "tensorrt"
    assert [one.name for one in found.target.software] == ["jp7.2"]
    assert (gpu.compute_capability, gpu.memory_gb) == (capability, memory_gib)
    assert (gpu.sm_count, gpu.bandwidth_gb_s, gpu.fp16, gpu.int8) == (0, 0, 0, 0)
    assert "the table has no row for it" in found.found


@pytest.mark.parametrize(
    ("model", "l4t", "chip", "why"),
    [
        (SUPER.format("Orin Nano"), "36.3.0", "tegra234", "its TensorRT is too old; jp6.2 is the"),
        (SUPER.format("Orin NX"), "35.4.1", "tegra234", "its TensorRT is too old; jp6.2 is the"),
        ("NVIDIA Jetson AGX Xavier", "35.4.1", "tegra194", "no Jetson Orin or Thor"),
    ],
)
def test_too_old(jetson: Machine, model: str, l4t: str, chip: str, why: str) -> None:
    found = jetson(model, 7.4, l4t, chip)
    assert found.target is targets.find("cpu")
    assert why in found.found
    assert found.system == f"Jetson Linux {l4t}"


@pytest.mark.parametrize(("l4t", "said"), [("41.0", "does not know"), ("", "Jetson Linux unknown")])
def test_a_release_that_is_not_known(jetson: Machine, l4t: str, said: str) -> None:
    found = jetson(SUPER.format("Orin Nano"), 7.4, l4t)
    assert found.target == targets.find("jetson-orin-nano")
    assert said in found.found


def test_names(jetson: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert detection.find("rtx-4090") is targets.find("rtx-4090")
    here = jetson(SUPER.format("Orin Nano"), 7.4, "")
    monkeypatch.setattr(detection, "detect", lambda: here)
    assert detection.find("local") is here.target
    assert [one.name for one in detection.find("local@jp7.2").software] == ["jp7.2"]
    with pytest.raises(InputError, match=r"no release 'jp7\.0' for 'jetson-orin-nano'"):
        detection.find("local@jp7.0")
    with pytest.raises(InputError, match=r"Unknown target .toaster.\. There are: local, cpu"):
        detection.find("toaster")
    with pytest.raises(DeviceMismatchError, match="JetPack 5"):
        detection.find("jetson-xavier-nx")


def test_of_this_machine_a_target_is_found() -> None:
    found = detect()
    assert detection.find("local") == found.target
    assert found.found.endswith(".")
