"""Whether an engine is for this machine: facts compared before TensorRT tries to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hydra_edge import targets
from hydra_edge.artifacts.graph import Json
from hydra_edge.errors import ArtifactError, DeviceMismatchError
from hydra_edge.gpu import plugin
from hydra_edge.gpu.device import Device

Hardware = Literal["none", "same_compute_capability", "ampere_plus"]
PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_RELEASE_FILE = "etc/nv_tegra_release"
_RELEASE = re.compile(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)")


@dataclass(frozen=True)
class Plugin:
    """The library of our plugin: what an engine was built with, or what is installed.

    Attributes:
        layout: How it wants weights to be packed.
        version: Its version.
    """

    layout: str
    version: str

    def __str__(self) -> str:
        return f"{self.version} for weights packed as {self.layout}"


@dataclass(frozen=True)
class BuiltFor:
    """What an engine was built for and with; recorded in it.

    Attributes:
        product: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        version: Of that product.
        compute_capabilities: Generations of GPUs, e.g. 87.
        hardware: Which others it also runs on, as TensorRT's ``HardwareCompatibilityLevel``.
        jetpack: The JetPack of the Jetson it was built on, e.g. ``"6.2"``; None on other machines.
        plugin: Our plugin's library, if the engine has such layers.
    """

    product: str
    version: str
    compute_capabilities: tuple[int, ...]
    hardware: Hardware = "none"
    jetpack: str | None = None
    plugin: Plugin | None = None

    def to_json(self) -> dict[str, Json]:
        """As it stands in an engine's manifest."""
        facts: dict[str, Json] = asdict(self)
        facts["compute_capabilities"] = list(self.compute_capabilities)
        return facts

    @classmethod
    def from_json(cls, facts: Mapping[str, Json]) -> BuiltFor:
        """The inverse of `to_json`.

        Raises:
            ArtifactError: The facts are not those of such an engine.
        """
        try:
            known: dict[str, Any] = dict(facts)
            known["compute_capabilities"] = tuple(map(int, known["compute_capabilities"]))
            known["plugin"] = Plugin(**known["plugin"]) if known.get("plugin") else None
            built = cls(**known)
            _numbers(built.version), PRODUCTS[built.product]
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise ArtifactError(
                f"The engine does not say what it was built for: {dict(facts)}.",
                f"{type(exc).__name__}: {str(exc).rstrip('.')}.",
                "Compile it again with this version of hydra-edge.",
            ) from exc
        return built


@dataclass(frozen=True)
class Machine:
    """What is here.

    Attributes:
        name: Of the GPU.
        compute_capability: Of the GPU.
        product: What would load the engine: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        version: Of that product.
        jetpack: Which JetPack; None where it is no Jetson.
        plugin: Our plugin's library as it is installed, if it is.
    """

    name: str
    compute_capability: int
    product: str
    version: str
    jetpack: str | None = None
    plugin: Plugin | None = None


def find_machine(
    device: Device,
    product: str,
    version: str,
    root: Path = Path("/"),
    folder: Path | None = None,
) -> Machine:
    """What is here.

    Args:
        device: The GPU.
        product: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        version: What that module says its version is.
        root: Where the machine's files begin.
        folder: Where the plugin's library is; by default the installed package, and never what an
            engine's file names.
    """
    return Machine(
        name=device.name,
        compute_capability=device.compute_capability,
        product=product,
        version=version,
        jetpack=find_jetpack(root),
        plugin=find_plugin(version, folder) if product == "tensorrt" else None,
    )


def find_plugin(version: str, folder: Path | None = None) -> Plugin | None:
    """The installed library of our plugin for a version of TensorRT; None if it does not load."""
    try:
        layout = plugin.layout_of(plugin.path_for(version, folder))
    except (OSError, AttributeError):  # `plugin.load` says why
        return None
    return Plugin(layout, plugin.VERSION)


def find_jetpack(root: Path = Path("/")) -> str | None:
    """Which JetPack runs here.

    Args:
        root: Where the machine's files begin.

    Returns:
        E.g. ``"6.2"``, which 6.1 counts as: they have one TensorRT. ``"of Jetson Linux 40.1, which
        is not known"`` for a release without a row in `targets`; None where there is no Jetson.
    """
    try:
        line = (root / _RELEASE_FILE).read_text(errors="replace").partition("\n")[0]
    except OSError:
        return None
    found = _RELEASE.match(line)
    if found is None:
        return f"of an unknown Jetson Linux, '{line.strip()}'"
    linux = f"{found[1]}.{found[2]}"
    for release in (*targets.ORIN_RELEASES, *targets.THOR_RELEASES):
        if release.is_linux(linux):
            return release.name.removeprefix("jp")
    return f"of Jetson Linux {linux}, which is not known"


def check(built: BuiltFor, machine: Machine) -> None:
    """Say everything that keeps an engine from running here.

    Raises:
        DeviceMismatchError: It is for another machine; both sides and the way out are named.
    """
    reasons = [
        reason
        for reason in (
            _product(built, machine),
            _generation(built, machine),
            _jetpack(built, machine),
            _plugin(built, machine),
        )
        if reason
    ]
    if reasons:
        raise DeviceMismatchError(
            f"The engine is not for this machine, {machine.name} "
            f"(sm_{machine.compute_capability}).",
            " ".join(reasons),
            "Build it again here: hydra-edge compile FILE.hydra --target local, or "
            "load(..., rebuild=True).",
        )


def _product(built: BuiltFor, machine: Machine) -> str:
    ours, theirs = PRODUCTS[built.product], PRODUCTS[machine.product]
    if built.product != machine.product:
        return f"It was built by {ours}, here is {theirs}."
    # Builds of one patch release load each other's engines; releases do not.
    if _numbers(built.version) == _numbers(machine.version):
        return ""
    return f"It was built by {ours} {built.version} for that one only, here is {machine.version}."


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _generation(built: BuiltFor, machine: Machine) -> str:
    if machine.compute_capability in built.compute_capabilities:
        return ""
    # TensorRT has no compatibility between GPUs on a Jetson.
    anywhere = built.hardware == "ampere_plus" and not (built.jetpack or machine.jetpack)
    if anywhere and machine.compute_capability >= 80:
        return ""
    known = ", ".join(f"sm_{one}" for one in built.compute_capabilities)
    newer = " and all newer than sm_80 outside of Jetsons" * (built.hardware == "ampere_plus")
    return f"It was built for {known}{newer}, here is sm_{machine.compute_capability}."


def _jetpack(built: BuiltFor, machine: Machine) -> str:
    # Where a container does not show the file, what it was built for is told by its generation.
    if built.jetpack == machine.jetpack or not built.jetpack or not machine.jetpack:
        return ""
    return f"It was built on JetPack {built.jetpack}, here is JetPack {machine.jetpack}."


def _plugin(built: BuiltFor, machine: Machine) -> str:
    if built.plugin is None or built.plugin == machine.plugin:
        return ""
    here = machine.plugin or "none: it was not built when hydra-edge was installed"
    return f"It needs the plugin library {built.plugin}, here is {here}."
