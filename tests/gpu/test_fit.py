"""An engine that is not for this machine is refused, with both sides and the way out named."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gpu.driver.double import Double
from hydra_edge.errors import ArtifactError, DeviceMismatchError
from hydra_edge.gpu.device import Device
from hydra_edge.gpu.fit import (
    BuiltFor,
    Machine,
    Plugin,
    check,
    find_jetpack,
    find_machine,
    find_plugin,
)

PLUGIN = Plugin("hydra-mma16-2", "1")
BUILT = BuiltFor("tensorrt", "10.3.0", (87,), jetpack="6.2", plugin=PLUGIN)
ORIN = Machine("Orin", 87, "tensorrt", "10.3.0", "6.2", PLUGIN)
SERVER = BuiltFor("tensorrt", "10.13.3.9", (89,))
L4 = Machine("NVIDIA L4", 89, "tensorrt", "10.13.3.9")


@pytest.mark.parametrize(
    ("built", "machine"),
    [
        (BUILT, ORIN),
        (SERVER, L4),
        (replace(SERVER, compute_capabilities=(86, 89)), L4),
        (SERVER, replace(L4, version="10.13.3.30")),  # another build of that release
        (SERVER, replace(L4, plugin=PLUGIN)),  # which it does not need
        (replace(SERVER, hardware="ampere_plus"), replace(L4, compute_capability=80)),
        (replace(SERVER, hardware="ampere_plus"), replace(L4, compute_capability=120)),
        (BUILT, replace(ORIN, jetpack=None)),  # a container without the file that says it
        (replace(BUILT, jetpack=None), ORIN),
    ],
)
def test_what_fits(built: BuiltFor, machine: Machine) -> None:
    check(built, machine)


@pytest.mark.parametrize(
    ("built", "machine", "message"),
    [
        (
            BUILT,
            replace(ORIN, compute_capability=110),
            r"not for this machine, Orin \(sm_110\). It was built for sm_87, here is sm_110\.",
        ),
        (SERVER, replace(L4, version="10.13.2.6"), "TensorRT 10.13.3.9 for that one only, here is"),
        (SERVER, replace(L4, version="11.4.0.106"), "for that one only, here is 11.4.0.106"),
        (
            SERVER,
            replace(L4, product="tensorrt_rtx"),
            r"It was built by TensorRT, here is TensorRT-RTX\.",
        ),
        (BUILT, replace(ORIN, jetpack="7.2"), "built on JetPack 6.2, here is JetPack 7.2"),
        (
            replace(SERVER, hardware="ampere_plus"),
            replace(L4, compute_capability=75),
            "built for sm_89 and all newer than sm_80 outside of Jetsons, here is sm_75",
        ),
        (
            replace(BUILT, hardware="ampere_plus"),
            replace(ORIN, compute_capability=110),
            "outside of Jetsons, here is sm_110",
        ),
        (
            replace(SERVER, hardware="same_compute_capability"),
            replace(L4, compute_capability=90),
            "built for sm_89, here is sm_90",
        ),
        (
            BUILT,
            replace(ORIN, plugin=None),
            r"plugin library 1 for weights packed as hydra-mma16-2, here is none: it was not built",
        ),
        (
            BUILT,
            replace(ORIN, plugin=Plugin("hydra-mma16-3", "1")),
            "packed as hydra-mma16-2, here is 1 for weights packed as hydra-mma16-3",
        ),
        (BUILT, replace(ORIN, plugin=Plugin("hydra-mma16-2", "2")), "here is 2 for weights"),
    ],
)
def test_what_does_not_fit(built: BuiltFor, machine: Machine, message: str) -> None:
    with pytest.raises(DeviceMismatchError, match=message) as caught:
        check(built, machine)
    assert caught.value.exit_code == 4
    assert "hydra-edge compile FILE.hydra --target local" in caught.value.fix
    assert "load(..., rebuild=True)" in caught.value.fix


def test_everything_is_said_at_once() -> None:
    machine = Machine("Thor", 110, "tensorrt", "10.13.3", "7.0", None)
    with pytest.raises(DeviceMismatchError) as caught:
        check(BUILT, machine)
    assert caught.value.why == (
        "It was built by TensorRT 10.3.0 for that one only, here is 10.13.3. "
        "It was built for sm_87, here is sm_110. "
        "It was built on JetPack 6.2, here is JetPack 7.0. "
        "It needs the plugin library 1 for weights packed as hydra-mma16-2, here is none: it was "
        "not built when hydra-edge was installed."
    )


@pytest.mark.parametrize("built", [BUILT, SERVER, replace(SERVER, hardware="ampere_plus")])
def test_facts_in_a_manifest(built: BuiltFor) -> None:
    assert BuiltFor.from_json(json.loads(json.dumps(built.to_json()))) == built


@pytest.mark.parametrize(
    "changes",
    [
        {"compute_capabilities": None},
        {"compute_capabilities": ["x"]},
        {"version": None},
        {"product": "tensorflow"},
        {"plugin": {"layout": "x"}},
        {"plugin": "x"},
        {"path": "libevil.so"},
    ],
)
def test_facts_that_are_none(changes: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match=r"does not say what it was built for: .* Compile it"):
        BuiltFor.from_json({**BUILT.to_json(), **changes})  # type: ignore[arg-type]


# what is here


@pytest.mark.parametrize(
    ("line", "jetpack"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "6.2"),
        ("# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64", "6.2"),
        ("# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64", "7.0"),
        (
            "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref",
            "of Jetson Linux 35.4.1, which is not known",
        ),
        ("# R360 (release), REVISION: 4.3", "of Jetson Linux 360.4.3, which is not known"),
        ("# R36 (release), REVISION: 40.3", "of Jetson Linux 36.40.3, which is not known"),
        ("hello", "of an unknown Jetson Linux, 'hello'"),
        ("", "of an unknown Jetson Linux, ''"),
    ],
)
def test_which_jetpack(tmp_path: Path, line: str, jetpack: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(f"{line}\n# R38 (release), REVISION: 2.0\n")
    assert find_jetpack(tmp_path) == jetpack


def test_no_jetson(tmp_path: Path) -> None:
    assert find_jetpack(tmp_path) is None


def library(folder: Path, text: str) -> None:
    """Compile what may or may not be our plugin."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    source = folder / "plugin.c"
    source.write_text(text)
    target = folder / "libhydra_plugin10.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)


def test_the_installed_plugin(tmp_path: Path) -> None:
    library(tmp_path, 'const char *hydra_plugin_layout(void) { return "hydra-mma16-9"; }')
    assert find_plugin("10.3.0", tmp_path) == Plugin("hydra-mma16-9", "1")
    assert find_plugin("11.4.0", tmp_path) is None


def test_no_plugin(tmp_path: Path) -> None:
    (tmp_path / "libhydra_plugin11.so").write_bytes(b"no library")
    assert find_plugin("11.4.0", tmp_path) is None
    library(tmp_path, "int something_else;")
    assert find_plugin("10.3.0", tmp_path) is None


@pytest.mark.gpu
def test_this_machine(device: Device, tmp_path: Path) -> None:
    machine = find_machine(device, "tensorrt_rtx", "1.7.1", tmp_path)
    assert machine == Machine(device.name, device.compute_capability, "tensorrt_rtx", "1.7.1")


@pytest.mark.gpu
def test_a_jetson(double: Double, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
    library(tmp_path, 'const char *hydra_plugin_layout(void) { return "hydra-mma16-2"; }')
    orin = Device()
    machine = find_machine(orin, "tensorrt", "10.3.0", tmp_path, tmp_path)
    orin.close()
    assert machine == replace(ORIN, name="Driver double")
    check(BUILT, machine)
