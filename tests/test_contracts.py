"""Rules of the project that a machine can check."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hydra_edge

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "hydra_edge").rglob("*.py"))
CODE = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}


def declared() -> dict[str, str]:
    """Public names and their modules, from the block for type checkers."""
    tree = ast.parse(Path(hydra_edge.__file__).read_text())
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # `as` is what makes it public
            found[alias.name] = str(node.module)
    return found


def test_all_is_sorted_and_complete() -> None:
    assert hydra_edge.__all__ == sorted(set(hydra_edge.__all__))
    assert set(hydra_edge.__all__) == {*declared(), "__version__"}
    assert set(hydra_edge.__all__) <= set(dir(hydra_edge))


@pytest.mark.parametrize("name", sorted(declared()))
def test_every_public_name_is_the_declared_one(name: str) -> None:
    home = importlib.import_module(declared()[name])
    assert getattr(hydra_edge, name) is getattr(home, name)


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hydra_edge.nothing  # type: ignore[attr-defined]


def test_import_is_lean() -> None:
    script = (
        "import sys; import hydra_edge; "
        "heavy = {'numpy', 'torch', 'onnx', 'onnxruntime', 'typer', 'rich', 'onnx_graphsurgeon'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cli", "numpy torch onnx onnxruntime onnx_graphsurgeon"),
        ("pipeline", "torch sklearn scipy torchmetrics matplotlib onnxscript accelerate"),
        ("runtime", "torch sklearn scipy torchmetrics matplotlib onnx_graphsurgeon typer rich"),
    ],
)
def test_modules_load_only_what_they_need(module: str, absent: str) -> None:
    script = f"import sys; import hydra_edge.{module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not set(absent.split()) & set(done.stdout.split())


def fastest(*arguments: str, runs: int = 8) -> float:
    """Seconds a fresh interpreter takes; the best of several runs, so noise does not count."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_importing_takes_80_ms_at_most() -> None:
    assert fastest("import hydra_edge") - fastest("pass") <= 0.080


def test_help_takes_300_ms_at_most() -> None:
    assert fastest("from hydra_edge.cli import main; main()", "--help") <= 0.300


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert not re.findall(r"(?<![\w.<~])/(?:work|tmp|home|root|Users|mnt)\b", text)


def test_no_module_is_called_anything() -> None:
    parts = {part for path in CODE for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not parts & VAGUE


def test_no_monkeypatches_environment_or_bare_excepts() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), path
            assert not (isinstance(node, ast.Attribute) and node.attr == "environ"), path


def test_every_error_has_three_parts() -> None:
    """`raise SomeError("one text")` would fail with a TypeError only when it happens."""
    kinds = {
        name
        for name, value in vars(importlib.import_module("hydra_edge.errors")).items()
        if isinstance(value, type) and issubclass(value, hydra_edge.HydraError)
    }
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in kinds:
                starred = any(isinstance(arg, ast.Starred) for arg in node.args)
                assert starred or len(node.args) == 3, f"{path}:{node.lineno}"


def test_tests_mirror_modules() -> None:
    """A test file without a module is named after something that is no longer there."""
    others = {
        "test_contracts.py",
        "test_benchmark.py",
        "test_conformance.py",
        "test_device_builds.py",
        "test_corpus.py",
        "test_docs.py",
        "test_examples.py",
        "test_generated.py",
        "test_gpu.py",
        "test_mutations.py",
        "test_readme.py",
        "test_static_gates.py",
        "test_tensorrt_api.py",
    }
    kernels = ROOT / "kernels"
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        relative = path.relative_to(ROOT / "tests")
        name = relative.name.removeprefix("test_")
        if relative.parts[0] == "kernels" and relative.name not in others:
            stem = name.removesuffix(".py")
            sources = (kernels / "hydra" / f"{stem}.cuh", kernels / f"{stem}.cpp", kernels / stem)
            assert any(source.exists() for source in sources), relative
            continue
        module = ROOT / "hydra_edge" / relative.with_name(name)
        if relative.name not in others:
            assert module.exists() or module.with_suffix("").is_dir(), relative
