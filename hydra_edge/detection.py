"""What this machine is, as a target: what stands behind the name ``local``.

A Jetson says what it is in files; any other GPU is asked through NVML, the driver's own library.
Neither takes CUDA or torch. What the table has no row for gets a row of what could be asked, with 0
for the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from hydra_edge import targets
from hydra_edge.targets import Gpu, PowerMode, Target

NVML = "libnvidia-ml.so.1"
_GIB = 2**30
_OLDEST = 75  # tensor cores that multiply int8, and TensorRT from 10.5 on
# Of the memory a row names, what a system reports: the rest is firmware's, or corrects errors.
_MEMORY_RANGE = (0.8, 1.02)
_CHIPS = {"tegra234": "jetson-agx-orin", "tegra264": "jetson-thor"}  # and a row of that generation
_SM_CLOCK, _MEMORY_CLOCK = 1, 2  # nvmlClockType_t


@dataclass(frozen=True)
class Detection:
    """What was found.

    Attributes:
        target: A row of the table, or one made of what the device says; "cpu" without a usable GPU.
        found: One sentence on the device and the row, or why it is "cpu".
        system: Version of the driver, or of Jetson Linux and its power mode; may be empty.
    """

    target: Target
    found: str
    system: str = ""


def find(name: str) -> Target:
    """The target called ``name``; for ``local``, or ``local@RELEASE``, that of this machine.

    Raises:
        InputError: There is no such target, or no such release for it.
        DeviceMismatchError: It is too old.
    """
    device, _, release = name.partition("@")
    if device != targets.LOCAL:
        return targets.find(name)
    target = detect().target
    return targets.at_release(target, release) if release else target


def detect(root: Path = Path("/"), nvml: str = NVML) -> Detection:
    """Look at this machine.

    Args:
        root: Where its files begin.
        nvml: The driver's library, by name or path.
    """
    chip = re.search(r"nvidia,(tegra\d+)", _text(root / "proc/device-tree/compatible"))
    return _jetson(root, chip[1]) if chip else _card(nvml)


def _jetson(root: Path, chip: str) -> Detection:
    model = _text(root / "proc/device-tree/model").rstrip("\0\n")
    total = re.search(r"MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"))
    memory = int(total[1]) * 1024 if total else 0
    release = re.search(r"R(\d+).*?REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
    l4t = f"{release[1]}.{release[2]}" if release else ""
    system = f"Jetson Linux {l4t or 'unknown'}"
    said = f"{model}, {memory / _GIB:.1f} GiB, {system}"
    if chip not in _CHIPS:
        why = f"{said}: no Jetson Orin or Thor, the only ones that engines are built for."
        return Detection(targets.find("cpu"), why, system)
    rows = [row for row in targets.TARGETS if row.is_jetson and row.known_as in model]
    row = next((row for row in rows if _same_memory(row, memory)), None)
    target = row or _jetson_like(targets.find(_CHIPS[chip]), model, memory)
    mine = tuple(one for one in target.software if one.is_linux(l4t))
    oldest = target.software[0]
    if l4t and not mine and _numbers(l4t) < _numbers(oldest.l4t[0]):
        why = f"{said}: its TensorRT is too old; {oldest.name} is the oldest that will do."
        return Detection(targets.find("cpu"), why, system)
    if row is None:
        said = f"{said}; the table has no row for it, so little is known of it"
    elif "Super" in row.description and "Super" not in model:
        said = f"{said}; not flashed with its Super modes, so slower than its row"
    if l4t and not mine:
        said = f"{said}; a release that the table does not know"
    modes, current = _power_modes(root)
    assert target.gpu is not None
    gpu = replace(target.gpu, modes=modes or target.gpu.modes)
    target = replace(target, gpu=gpu, software=mine or target.software)
    return Detection(target, f"{said}.", f"{system}, power mode {current}" if current else system)


def _power_modes(root: Path) -> tuple[tuple[PowerMode, ...], str]:
    """What ``nvpmodel`` can switch to, the fastest first, and where it stands; numbers differ."""
    listed = re.findall(
        r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _text(root / "etc/nvpmodel.conf")
    )
    modes = [PowerMode(name, int(number)) for number, name in listed]
    status = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    current = next((mode.name for mode in modes if status and mode.number == int(status[1])), "")
    return tuple(sorted(modes, key=_watts, reverse=True)), current


def _watts(mode: PowerMode) -> float:
    """What it allows; a mode without a number, MAXN, allows everything."""
    number = re.search(r"\d+", mode.name)
    return float(number[0]) if number else math.inf


def _jetson_like(like: Target, model: str, memory: int) -> Target:
    """A module without a row: what its generation has in common, and its memory."""
    assert like.gpu is not None
    gpu = Gpu(
        compute_capability=like.gpu.compute_capability,
        sm_count=0,
        clock_ghz=0,
        memory_gb=round(memory / _GIB, 1),
        bandwidth_gb_s=0,
        fp16=0,
        int8=0,
        fp8=0,
        dla=0,
        power="see `sudo nvpmodel -q`",
        source="what the module says of itself",
    )
    about = f"{model}, which has no row."
    return replace(like, name=_slug(model), description=about, gpu=gpu, known_as=model)


def _card(nvml: str) -> Detection:
    system = ""
    try:
        with contextlib.closing(_Nvml(nvml)) as library:
            system = library.driver()
            return _of_cards(library.cards(), system)
    except _RefusedError as refused:
        return Detection(targets.find("cpu"), str(refused), system)


def _of_cards(cards: list[_Card], system: str) -> Detection:
    if not cards:
        return Detection(targets.find("cpu"), "A driver of NVIDIA, but no GPU of it.", system)
    card = cards[0]
    sm = f"sm_{card.compute_capability}"
    said = f"{card.name}, {sm}, {card.memory_bytes / _GIB:.1f} GiB"
    if len(cards) > 1:
        said = f"{said}, the first of {len(cards)} GPUs"
    if card.compute_capability < _OLDEST:
        why = f"{said}: older than sm_{_OLDEST}, the first that engines are built for."
        return Detection(targets.find("cpu"), why, system)
    for row in targets.TARGETS:
        if row.known_as == card.name and _same_memory(row, card.memory_bytes):
            return Detection(row, f"{said}.", system)
    return Detection(
        _card_like(card), f"{said}; the table has no row for it, so little is known of it.", system
    )


def _card_like(card: _Card) -> Target:
    """A card without a row: what NVML says of it."""
    rtx = "RTX" in card.name and card.compute_capability in targets.RTX_CAPABILITIES
    backend = "tensorrt_rtx" if rtx else "tensorrt"
    cores_per_sm = 64 if card.compute_capability in (75, 80) else 128
    # Memory transfers twice per clock as NVML counts them: so it comes to what data sheets print.
    bandwidth = 2e6 * card.memory_clock_mhz * card.bus_bits / 8 / 1e9
    how = "computed from memory clock and bus width" if bandwidth else "not known"
    gpu = Gpu(
        compute_capability=card.compute_capability,
        sm_count=card.cores // cores_per_sm,
        clock_ghz=card.clock_mhz / 1e3,
        memory_gb=round(card.memory_bytes / _GIB, 1),
        bandwidth_gb_s=round(bandwidth, 1),
        fp16=0,
        int8=0,
        fp8=0,
        dla=0,
        power="see `nvidia-smi -q -d POWER`",
        source=f"what NVML says of it; bandwidth {how}; no tensor rates",
    )
    return Target(
        name=_slug(card.name),
        backend=backend,
        precisions=targets.precisions_of(card.compute_capability, backend),
        description=f"{card.name}, which has no row.",
        gpu=gpu,
        software=targets.RTX_RELEASES if rtx else targets.TENSORRT_RELEASES,
        known_as=card.name,
    )


@dataclass(frozen=True)
class _Card:
    """What NVML says of a GPU; 0 where it does not."""

    name: str
    compute_capability: int
    memory_bytes: int
    cores: int
    clock_mhz: int
    memory_clock_mhz: int
    bus_bits: int


class _RefusedError(Exception):
    """Why there is no GPU to ask, as a sentence."""


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


class _Nvml:
    """The few questions of NVML that are asked here."""

    def __init__(self, library: str) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError:
            raise _RefusedError(f"No GPU of NVIDIA: {library} is not here.") from None
        self._library.nvmlErrorString.restype = ctypes.c_char_p
        self._ask("nvmlInit_v2")

    def close(self) -> None:
        self._library.nvmlShutdown()

    def driver(self) -> str:
        text = ctypes.create_string_buffer(96)
        version = ctypes.c_int()
        self._ask("nvmlSystemGetDriverVersion", text, len(text))
        self._ask("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version))
        cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return f"driver {text.value.decode()}, CUDA up to {cuda}"

    def cards(self) -> list[_Card]:
        count = self._number("nvmlDeviceGetCount_v2")
        return [self._card(index) for index in range(count)]

    def _card(self, index: int) -> _Card:
        card = ctypes.c_void_p()
        self._ask("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(card))
        name = ctypes.create_string_buffer(96)
        self._ask("nvmlDeviceGetName", card, name, len(name))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._ask(
            "nvmlDeviceGetCudaComputeCapability", card, ctypes.byref(major), ctypes.byref(minor)
        )
        memory = _Memory()
        self._ask("nvmlDeviceGetMemoryInfo", card, ctypes.byref(memory))
        maximum = "nvmlDeviceGetMaxClockInfo"
        return _Card(
            name=name.value.decode(),
            compute_capability=10 * major.value + minor.value,
            memory_bytes=memory.total,
            cores=self._optional("nvmlDeviceGetNumGpuCores", card),
            clock_mhz=self._optional(maximum, card, ctypes.c_uint(_SM_CLOCK)),
            memory_clock_mhz=self._optional(maximum, card, ctypes.c_uint(_MEMORY_CLOCK)),
            bus_bits=self._optional("nvmlDeviceGetMemoryBusWidth", card),
        )

    def _optional(self, function: str, *arguments: object) -> int:
        """A number, or 0 where this driver or this GPU has none."""
        try:
            return self._number(function, *arguments)
        except (AttributeError, _RefusedError):
            return 0

    def _number(self, function: str, *arguments: object) -> int:
        value = ctypes.c_uint()
        self._ask(function, *arguments, ctypes.byref(value))
        return value.value

    def _ask(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            why = self._library.nvmlErrorString(status).decode()
            raise _RefusedError(f"No GPU of NVIDIA answers: {function} says '{why}'.")


def _same_memory(row: Target, memory: int) -> bool:
    low, high = _MEMORY_RANGE
    return row.gpu is not None and low <= memory / _GIB / row.gpu.memory_gb <= high


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def _slug(name: str) -> str:
    """A name as it could stand in the table."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _text(path: Path) -> str:
    """What a file holds; nothing when it is not there."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
