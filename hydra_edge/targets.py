"""What engines are compiled for: one row per device, plain data.

Figures are those of the maker's data sheets; every row says which. Arithmetic is per SM and clock:
dense multiply-adds of tensor cores with 32-bit sums. Times SMs, clock and two it gives the
operations per second that a data sheet prints. 0 means that no figure is published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydra_edge.errors import DeviceMismatchError, InputError


@dataclass(frozen=True)
class Software:
    """A release that runs on a device, e.g. ``jetson-orin-nano@jp6.2``.

    Attributes:
        name: What stands behind the ``@``.
        tensorrt: Version of TensorRT, or of TensorRT-RTX, that it brings or needs.
        cuda: Version of CUDA.
        python: Version of Python that NVIDIA's packages are made for; "" for any.
    """

    name: str
    tensorrt: str
    cuda: str
    python: str = ""


@dataclass(frozen=True)
class Gpu:
    """What a device can do at most.

    Attributes:
        compute_capability: 87 for 8.7.
        sm_count: Streaming multiprocessors.
        clock_ghz: Highest clock without overclocking.
        memory_gb: Of the module or card; shared with the CPU on a Jetson.
        bandwidth_gb_s: Of that memory.
        fp16: Multiply-adds per SM and clock.
        int8: The same of int8.
        fp8: The same of fp8; 0 where there is none.
        dla: Deep-learning accelerators beside it.
        power: Power modes, or the board's power.
        source: Where the figures are from.
    """

    compute_capability: int
    sm_count: int
    clock_ghz: float
    memory_gb: float
    bandwidth_gb_s: float
    fp16: int
    int8: int
    fp8: int
    dla: int
    power: str
    source: str

    def operations_per_s(self, precision: str) -> float:
        """Dense operations, two per multiply-add; 0 where none are published.

        Weights stored in few bits multiply in fp16. fp32 multiplies outside of tensor cores.
        """
        per_clock = {
            "fp32": 64 if self.compute_capability in (75, 80) else 128,
            "int8": self.int8,
            "fp8": self.fp8,
        }.get(precision, self.fp16)
        return 2e9 * per_clock * self.sm_count * self.clock_ghz


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        name: What the user types, e.g. ``"cpu"``.
        backend: File name (without ``.py``) under ``hydra_edge/backends``.
        precisions: Precisions the backend runs there, the most exact first.
        description: One line for ``hydra-edge targets``.
        gpu: What the device can do, if it is a GPU.
        software: Releases that run on it, the oldest first.
    """

    name: str
    backend: str
    precisions: tuple[str, ...]
    description: str
    gpu: Gpu | None = None
    software: tuple[Software, ...] = ()


_INTEGERS = ("fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only")
_AND_FP8 = (*_INTEGERS, "fp8")
_JP62 = Software("jp6.2", "10.3", "12.6", "3.10")
_JP70 = Software("jp7.0", "10.13", "13.0", "3.12")
_JP72 = Software("jp7.2", "10.16", "13.2", "3.12")
_ORIN = (_JP62, _JP72)
_SERVER = (Software("trt10", "10.3", "12.6"), Software("trt11", "11.4", "13.2"))
_RTX = (Software("rtx1.7", "1.7", "13.2"),)
_ORIN_SHEET = "Jetson Orin module data sheets; tensor rate: Jetson AGX Orin technical brief"
_GA102 = "NVIDIA Ampere GA102 whitepaper"
_ADA = "NVIDIA Ada architecture whitepaper"
_BLACKWELL = "NVIDIA RTX Blackwell architecture whitepaper"
_HOPPER = "NVIDIA H100 architecture whitepaper"

TARGETS = (
    Target(
        "cpu",
        "onnxruntime",
        ("fp32", "fp16", "int8"),
        "Any CPU that ONNX Runtime supports. fp16 is stored as fp16 and mostly computed as fp32.",
    ),
    Target(
        "jetson-orin-nano",
        "tensorrt",
        _INTEGERS,
        "Jetson Orin Nano 8 GB, in its Super mode.",
        Gpu(
            *(87, 8, 1.02, 8, 102, 1024, 2048, 0, 0),
            power="7, 15, 25 W, MAXN SUPER",
            source=_ORIN_SHEET,
        ),
        _ORIN,
    ),
    Target(
        "jetson-orin-nx",
        "tensorrt",
        _INTEGERS,
        "Jetson Orin NX 16 GB.",
        Gpu(
            *(87, 8, 0.918, 16, 102.4, 1024, 2048, 0, 2),
            power="10, 15, 25 W, MAXN",
            source=_ORIN_SHEET,
        ),
        _ORIN,
    ),
    Target(
        "jetson-agx-orin",
        "tensorrt",
        _INTEGERS,
        "Jetson AGX Orin 64 GB.",
        Gpu(
            *(87, 16, 1.3, 64, 204.8, 1024, 2048, 0, 2),
            power="15, 30, 50 W, MAXN",
            source=_ORIN_SHEET,
        ),
        _ORIN,
    ),
    Target(
        "jetson-thor",
        "tensorrt",
        _AND_FP8,
        "Jetson AGX Thor, T5000.",
        Gpu(
            *(110, 20, 1.575, 128, 273, 4096, 0, 8192, 0),
            power="40 to 130 W",
            source="Jetson Thor data sheet; fp8 and fp16 from its sparse fp4 figure",
        ),
        (_JP70, _JP72),
    ),
    Target(
        "l4",
        "tensorrt",
        _AND_FP8,
        "NVIDIA L4.",
        Gpu(*(89, 58, 2.04, 24, 300, 512, 1024, 1024, 0), power="72 W", source="L4 data sheet"),
        _SERVER,
    ),
    Target(
        "a100",
        "tensorrt",
        _INTEGERS,
        "NVIDIA A100 80 GB, SXM.",
        Gpu(*(80, 108, 1.41, 80, 2039, 1024, 2048, 0, 0), power="400 W", source="A100 data sheet"),
        _SERVER,
    ),
    Target(
        "h100",
        "tensorrt",
        _AND_FP8,
        "NVIDIA H100 80 GB, SXM.",
        Gpu(*(90, 132, 1.83, 80, 3350, 2048, 4096, 4096, 0), power="700 W", source=_HOPPER),
        _SERVER,
    ),
    Target(
        "h200",
        "tensorrt",
        _AND_FP8,
        "NVIDIA H200 141 GB, SXM.",
        Gpu(
            *(90, 132, 1.83, 141, 4800, 2048, 4096, 4096, 0),
            power="700 W",
            source=f"{_HOPPER}; H200 data sheet",
        ),
        _SERVER,
    ),
    Target(
        "rtx-3080",
        "tensorrt_rtx",
        _INTEGERS,
        "GeForce RTX 3080 10 GB.",
        Gpu(*(86, 68, 1.71, 10, 760, 256, 1024, 0, 0), power="320 W", source=_GA102),
        _RTX,
    ),
    Target(
        "rtx-3090",
        "tensorrt_rtx",
        _INTEGERS,
        "GeForce RTX 3090.",
        Gpu(*(86, 82, 1.695, 24, 936, 256, 1024, 0, 0), power="350 W", source=_GA102),
        _RTX,
    ),
    Target(
        "rtx-4080",
        "tensorrt_rtx",
        _AND_FP8,
        "GeForce RTX 4080.",
        Gpu(*(89, 76, 2.505, 16, 716.8, 256, 1024, 512, 0), power="320 W", source=_ADA),
        _RTX,
    ),
    Target(
        "rtx-4090",
        "tensorrt_rtx",
        _AND_FP8,
        "GeForce RTX 4090.",
        Gpu(*(89, 128, 2.52, 24, 1008, 256, 1024, 512, 0), power="450 W", source=_ADA),
        _RTX,
    ),
    Target(
        "rtx-5080",
        "tensorrt_rtx",
        _AND_FP8,
        "GeForce RTX 5080.",
        Gpu(*(120, 84, 2.617, 16, 960, 256, 1024, 512, 0), power="360 W", source=_BLACKWELL),
        _RTX,
    ),
    Target(
        "rtx-5090",
        "tensorrt_rtx",
        _AND_FP8,
        "GeForce RTX 5090.",
        Gpu(*(120, 170, 2.407, 32, 1792, 256, 1024, 512, 0), power="575 W", source=_BLACKWELL),
        _RTX,
    ),
)

# What people ask for and cannot have: the reason, and the way out.
REFUSED = {
    "jetson-xavier": (
        "JetPack 5 is its last, with TensorRT 8.5; engines need 10.3 or newer.",
        "Use a Jetson Orin, or the target 'cpu' on the device.",
    ),
    "jetson-nano": (
        "JetPack 4 is its last, with TensorRT 8.2; engines need 10.3 or newer.",
        "Use a Jetson Orin, or the target 'cpu' on the device.",
    ),
}


def find(name: str) -> Target:
    """Return the target called ``name``, such as ``cpu`` or ``jetson-orin-nano@jp6.2``.

    Returns:
        The row; with a release behind the ``@`` its `software` is that one alone.

    Raises:
        InputError: There is no such target, or no such release for it.
        DeviceMismatchError: It is too old for this version.
    """
    device, _, release = name.partition("@")
    for family, (why, fix) in REFUSED.items():
        if device == family or device.startswith(f"{family}-"):
            raise DeviceMismatchError(f"'{device}' is not supported.", why, fix)
    target = next((target for target in TARGETS if target.name == device), None)
    if target is None:
        raise InputError(
            f"Unknown target '{name}'.",
            f"There are: {', '.join(target.name for target in TARGETS)}.",
            "Pick one of those; `hydra-edge targets` lists them with their precisions.",
        )
    if not release:
        return target
    software = tuple(one for one in target.software if one.name == release)
    if not software:
        known = ", ".join(f"{device}@{one.name}" for one in target.software) or device
        raise InputError(
            f"There is no release '{release}' for '{device}'.",
            f"There are: {known}.",
            "Pick one of those, or leave it out.",
        )
    return replace(target, software=software)
