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
        l4t: Releases of Jetson Linux that it is, as far as ``/etc/nv_tegra_release`` matters.
    """

    name: str
    tensorrt: str
    cuda: str
    python: str = ""
    l4t: tuple[str, ...] = ()

    def is_linux(self, l4t: str) -> bool:
        """Whether Jetson Linux ``36.4.3`` is one of ``36.4``."""
        return any(f"{l4t}.".startswith(f"{release}.") for release in self.l4t)


@dataclass(frozen=True)
class PowerMode:
    """What ``nvpmodel`` switches a Jetson to.

    Attributes:
        name: As ``nvpmodel -q`` says it.
        number: What ``nvpmodel -m`` takes.
    """

    name: str
    number: int


@dataclass(frozen=True)
class Gpu:
    """What a device can do at most.

    Attributes:
        compute_capability: 87 for 8.7.
        sm_count: Streaming multiprocessors.
        clock_ghz: Highest clock without overclocking; of a Jetson, in its first power mode.
        memory_gb: Of the module or card; shared with the CPU on a Jetson.
        bandwidth_gb_s: Of that memory.
        fp16: Multiply-adds per SM and clock.
        int8: The same of int8.
        fp8: The same of fp8; 0 where there is none.
        dla: Deep-learning accelerators beside it.
        power: What the module or board may draw.
        source: Where the figures are from, and which of them nobody prints.
        modes: Power modes of a Jetson, the fastest first.
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
    modes: tuple[PowerMode, ...] = ()

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
        known_as: What the driver calls the card, or a part of what a Jetson calls itself.
    """

    name: str
    backend: str
    precisions: tuple[str, ...]
    description: str
    gpu: Gpu | None = None
    software: tuple[Software, ...] = ()
    known_as: str = ""

    @property
    def is_jetson(self) -> bool:
        """Whether it is a module with its own system, which brings TensorRT along."""
        return any(one.l4t for one in self.software)


_INTEGERS = ("fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only")
_AND_FP8 = (*_INTEGERS, "fp8")
_JP62 = Software("jp6.2", "10.3", "12.6", "3.10", ("36.4", "36.5"))
_JP70 = Software("jp7.0", "10.13", "13.0", "3.12", ("38",))
_JP72 = Software("jp7.2", "10.16", "13.2", "3.12", ("39",))
ORIN_RELEASES = (_JP62, _JP72)
THOR_RELEASES = (_JP70, _JP72)
TENSORRT_RELEASES = (Software("trt10", "10.3", "12.6"), Software("trt11", "11.4", "13.2"))
RTX_RELEASES = (Software("rtx1.7", "1.7", "13.2"),)
_ORIN_SHEET = (
    "Jetson Orin module data sheets; tensor rate: Jetson AGX Orin technical brief; power modes: "
    "nvpmodel configuration of Jetson Linux 36.4"
)
_SUPER_SHEET = f"{_ORIN_SHEET}, flashed with its Super modes"
_GA102 = "NVIDIA Ampere GA102 whitepaper"
_ADA = "NVIDIA Ada architecture whitepaper"
_BLACKWELL = "NVIDIA RTX Blackwell architecture whitepaper"
_HOPPER = "NVIDIA H100 architecture whitepaper"


def _modes(**numbers: int) -> tuple[PowerMode, ...]:
    return tuple(PowerMode(name.lstrip("_"), number) for name, number in numbers.items())


TARGETS = (
    Target(
        "cpu",
        "onnxruntime",
        ("fp32", "fp16", "int8"),
        "Any CPU, by ONNX Runtime. fp16 is stored as fp16 and mostly computed as fp32.",
    ),
    Target(
        "jetson-orin-nano-4gb",
        "tensorrt",
        _INTEGERS,
        "Jetson Orin Nano 4 GB Super.",
        Gpu(
            *(87, 4, 1.02, 4, 51, 1024, 2048, 0, 0),
            power="7 to 25 W",
            source=_SUPER_SHEET,
            modes=_modes(MAXN_SUPER=2, _25W=1, _10W=0),
        ),
        ORIN_RELEASES,
        "Orin Nano",
    ),
    Target(
        "jetson-orin-nano",
        "tensorrt",
        _INTEGERS,
        "Jetson Orin Nano 8 GB Super.",
        Gpu(
            *(87, 8, 1.02, 8, 102, 1024, 2048, 0, 0),
            power="7 to 25 W",
            source=_SUPER_SHEET,
            modes=_modes(MAXN_SUPER=2, _25W=1, _15W=0),
        ),
        ORIN_RELEASES,
        "Orin Nano",
    ),
    Target(
        "jetson-orin-nx-8gb",
        "tensorrt",
        _INTEGERS,
        "Jetson Orin NX 8 GB Super.",
        Gpu(
            *(87, 8, 1.173, 8, 102.4, 1024, 2048, 0, 1),
            power="10 to 40 W",
            source=_SUPER_SHEET,
            modes=_modes(MAXN_SUPER=0, _40W=4, _20W=3, _15W=2, _10W=1),
        ),
        ORIN_RELEASES,
        "Orin NX",
    ),
    Target(
        "jetson-orin-nx",
        "tensorrt",
        _INTEGERS,
        "Jetson Orin NX 16 GB Super.",
        Gpu(
            *(87, 8, 1.173, 16, 102.4, 1024, 2048, 0, 2),
            power="10 to 40 W",
            source=_SUPER_SHEET,
            modes=_modes(MAXN_SUPER=0, _40W=4, _25W=3, _15W=2, _10W=1),
        ),
        ORIN_RELEASES,
        "Orin NX",
    ),
    Target(
        "jetson-agx-orin-32gb",
        "tensorrt",
        _INTEGERS,
        "Jetson AGX Orin 32 GB.",
        Gpu(
            *(87, 14, 0.93, 32, 204.8, 1024, 2048, 0, 2),
            power="15 to 40 W",
            source=_ORIN_SHEET,
            modes=_modes(MAXN=0, MODE_40W=3, MODE_30W=2, MODE_15W=1),
        ),
        ORIN_RELEASES,
        "AGX Orin",
    ),
    Target(
        "jetson-agx-orin",
        "tensorrt",
        _INTEGERS,
        "Jetson AGX Orin 64 GB.",
        Gpu(
            *(87, 16, 1.3, 64, 204.8, 1024, 2048, 0, 2),
            power="15 to 60 W",
            source=_ORIN_SHEET,
            modes=_modes(MAXN=0, MODE_50W=3, MODE_30W=2, MODE_15W=1),
        ),
        ORIN_RELEASES,
        "AGX Orin",
    ),
    Target(
        "jetson-thor",
        "tensorrt",
        _AND_FP8,
        "Jetson AGX Thor, T5000.",
        Gpu(
            *(110, 20, 1.575, 128, 273, 4096, 0, 8192, 0),
            power="40 to 130 W",
            source=(
                "Jetson Thor data sheet; fp8 and fp16 follow from its sparse fp4 figure, and no "
                "int8 rate is printed; power modes: Jetson Linux 38, as users of it report them"
            ),
            modes=_modes(MAXN=0, _120W=1, _90W=2, _70W=3),
        ),
        THOR_RELEASES,
        "Thor",
    ),
    Target(
        "l4",
        "tensorrt",
        _AND_FP8,
        "NVIDIA L4.",
        Gpu(*(89, 58, 2.04, 24, 300, 512, 1024, 1024, 0), power="72 W", source="L4 data sheet"),
        TENSORRT_RELEASES,
        "NVIDIA L4",
    ),
    Target(
        "a100",
        "tensorrt",
        _INTEGERS,
        "NVIDIA A100 80 GB, SXM.",
        Gpu(*(80, 108, 1.41, 80, 2039, 1024, 2048, 0, 0), power="400 W", source="A100 data sheet"),
        TENSORRT_RELEASES,
        "NVIDIA A100-SXM4-80GB",
    ),
    Target(
        "h100",
        "tensorrt",
        _AND_FP8,
        "NVIDIA H100 80 GB, SXM.",
        Gpu(*(90, 132, 1.83, 80, 3350, 2048, 4096, 4096, 0), power="700 W", source=_HOPPER),
        TENSORRT_RELEASES,
        "NVIDIA H100 80GB HBM3",
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
        TENSORRT_RELEASES,
        "NVIDIA H200",
    ),
    Target(
        "rtx-3080",
        "tensorrt_rtx",
        _INTEGERS,
        "GeForce RTX 3080 10 GB.",
        Gpu(*(86, 68, 1.71, 10, 760, 256, 1024, 0, 0), power="320 W", source=_GA102),
        RTX_RELEASES,
        "NVIDIA GeForce RTX 3080",
    ),
    Target(
        "rtx-3090",
        "tensorrt_rtx",
        _INTEGERS,
        "GeForce RTX 3090.",
        Gpu(*(86, 82, 1.695, 24, 936, 256, 1024, 0, 0), power="350 W", source=_GA102),
        RTX_RELEASES,
        "NVIDIA GeForce RTX 3090",
    ),
    Target(
        "rtx-4080",
        "tensorrt_rtx",
        _AND_FP8,
        "GeForce RTX 4080.",
        Gpu(*(89, 76, 2.505, 16, 716.8, 256, 1024, 512, 0), power="320 W", source=_ADA),
        RTX_RELEASES,
        "NVIDIA GeForce RTX 4080",
    ),
    Target(
        "rtx-4090",
        "tensorrt_rtx",
        _AND_FP8,
        "GeForce RTX 4090.",
        Gpu(*(89, 128, 2.52, 24, 1008, 256, 1024, 512, 0), power="450 W", source=_ADA),
        RTX_RELEASES,
        "NVIDIA GeForce RTX 4090",
    ),
    Target(
        "rtx-5080",
        "tensorrt_rtx",
        _AND_FP8,
        "GeForce RTX 5080.",
        Gpu(*(120, 84, 2.617, 16, 960, 256, 1024, 512, 0), power="360 W", source=_BLACKWELL),
        RTX_RELEASES,
        "NVIDIA GeForce RTX 5080",
    ),
    Target(
        "rtx-5090",
        "tensorrt_rtx",
        _AND_FP8,
        "GeForce RTX 5090.",
        Gpu(*(120, 170, 2.407, 32, 1792, 256, 1024, 512, 0), power="575 W", source=_BLACKWELL),
        RTX_RELEASES,
        "NVIDIA GeForce RTX 5090",
    ),
)

RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)  # what TensorRT-RTX 1.7 builds for
LOCAL = "local"  # what is asked for when the row of this machine is meant: see `detection`

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


def precisions_of(compute_capability: int, backend: str) -> tuple[str, ...]:
    """What a GPU of this generation multiplies and the backend builds, the most exact first."""
    precisions = _AND_FP8 if compute_capability >= 89 else _INTEGERS
    if backend == "tensorrt_rtx" and compute_capability == 75:
        return precisions[1:]  # it refuses matrix products of fp32
    return precisions


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
            f"There are: {LOCAL}, {', '.join(target.name for target in TARGETS)}.",
            "Pick one of those; `hydra-edge targets` lists them with their precisions.",
        )
    return at_release(target, release) if release else target


def at_release(target: Target, release: str) -> Target:
    """The row with one of its releases alone.

    Raises:
        InputError: There is no such release for it.
    """
    software = tuple(one for one in target.software if one.name == release)
    if not software:
        known = ", ".join(f"{target.name}@{one.name}" for one in target.software) or target.name
        raise InputError(
            f"There is no release '{release}' for '{target.name}'.",
            f"There are: {known}.",
            "Pick one of those, or leave it out.",
        )
    return replace(target, software=software)
