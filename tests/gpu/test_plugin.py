"""The plugin's library is found in the installed package, and nowhere else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import hydra_edge
from hydra_edge.errors import DeviceMismatchError, MissingDependencyError
from hydra_edge.gpu import plugin
from hydra_edge.ops import packing


class Registry:
    """TensorRT's; ``finds``: whether there is a plugin in what it loads."""

    def __init__(self, *, finds: bool = True) -> None:
        self.finds, self.loaded = finds, list[str]()

    def get_creator(self, name: str, version: str, namespace: str) -> object:
        assert (name, version, namespace) == ("HydraHeads", "1", "hydra")
        return object() if self.finds and self.loaded else None

    def load_library(self, path: str) -> None:
        self.loaded.append(path)


def module(registry: Registry) -> SimpleNamespace:
    return SimpleNamespace(__version__="10.3.0", get_plugin_registry=lambda: registry)


def library(folder: Path, layout: str) -> Path:
    """A shared library that says what layout it reads."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    source = folder / "plugin.c"
    source.write_text(f'const char* hydra_plugin_layout(void) {{ return "{layout}"; }}')
    path = folder / "libhydra_plugin10.so"
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", path], check=True)
    return path


def test_it_lies_beside_the_kernels() -> None:
    """Where CMake installs both."""
    package = Path(hydra_edge.__file__).parent
    assert plugin.path_for("10.13.3.9") == package / "libhydra_plugin10.so"
    assert plugin.path_for("11.4.0") == package / "libhydra_plugin11.so"
    text = (package.parent / "kernels" / "plugin" / "CMakeLists.txt").read_text()
    assert "DESTINATION hydra_edge" in text


def test_it_is_loaded_once(tmp_path: Path) -> None:
    path, registry = library(tmp_path, packing.LAYOUT), Registry()
    for _ in range(2):
        plugin.load(module(registry), tmp_path)  # type: ignore[arg-type]
    assert registry.loaded == [str(path)]


def test_without_it(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"libhydra_plugin10\.so is not there") as c:
        plugin.load(module(Registry()), tmp_path)  # type: ignore[arg-type]
    assert "--lowering qdq" in c.value.fix


def test_of_another_layout(tmp_path: Path) -> None:
    library(tmp_path, "hydra-mma16-1")
    registry = Registry()
    with pytest.raises(DeviceMismatchError, match="reads weights in the layout hydra-mma16-1"):
        plugin.load(module(registry), tmp_path)  # type: ignore[arg-type]
    assert registry.loaded == []


def test_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "libhydra_plugin10.so").write_text("no library")
    with pytest.raises(MissingDependencyError, match="cannot be loaded"):
        plugin.load(module(Registry()), tmp_path)  # type: ignore[arg-type]


def test_in_which_tensorrt_finds_nothing(tmp_path: Path) -> None:
    library(tmp_path, packing.LAYOUT)
    with pytest.raises(MissingDependencyError, match=r"TensorRT 10\.3\.0 found no plugin"):
        plugin.load(module(Registry(finds=False)), tmp_path)  # type: ignore[arg-type]
