"""README and guides are executed as written: Python and shell blocks, in order, in an empty folder.

Blocks without a language are for a device that is not here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + GUIDES
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What the README calls the user's own files.
PREPARE = """
import numpy as np, torch, hydra_edge as he
from sklearn.datasets import load_digits
from torch import nn

digits = load_digits()
images = (digits.images / 16).astype("float32").reshape(-1, 64)
np.savez("calibration.npz", input=images[:500])
np.savez("test.npz", input=images[1500:], labels=digits.target[1500:])
np.save("input.npy", images[:3])


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(64, 10) for _ in range(4))

    def forward(self, x):
        return torch.stack([head(x) for head in self.heads])


for m in range(5):
    he.export(nn.Linear(64, 10), images[:1]).save(f"member{m}.onnx")
body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
he.export(he.Hydra(body, he.mlp_heads(5, 64, 10)), images[:1]).save("student.onnx")
he.export(Foreign(), images[:1]).save("heads.onnx")
"""
# Setting up an environment inside a test would take minutes; CI runs these two for real.
NOT_HERE = re.compile(r"^(make|pip) ", re.MULTILINE)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's own files, made once."""
    pytest.importorskip("torch", reason="it makes the student")
    folder = tmp_path_factory.mktemp("prepared")
    subprocess.run([sys.executable, "-c", PREPARE], cwd=folder, check=True, capture_output=True)
    return folder


def run_blocks(page: Path, folder: Path) -> int:
    """How many blocks of a page ran."""
    blocks = BLOCK.findall(page.read_text())
    ran = 0
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, _, code in blocks:
        if language not in ("python", "bash") or NOT_HERE.search(code):
            continue
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        ran += 1
    return ran


@pytest.mark.filterwarnings("default")
def test_readme_blocks_run(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    assert run_blocks(PAGES[0], tmp_path) >= 4
    assert (tmp_path / "report.html").stat().st_size > 1000


# The least number of blocks that each has; they train students, which takes minutes together.
BLOCKS = {
    "dense-captioning.md": 3,
    "gpu.md": 3,
    "jetson.md": 2,
    "scaling.md": 4,
    "troubleshooting.md": 0,
    "vqa.md": 3,
}


def test_every_guide_is_run_some_night() -> None:
    assert [page.name for page in GUIDES] == list(BLOCKS)


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "least"), BLOCKS.items())
def test_blocks_of_guides_run(name: str, least: int, prepared: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    pytest.importorskip("transformers", reason="a student has a body of that library")
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    assert run_blocks(ROOT / "docs" / name, tmp_path) >= least


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_verb_and_public_name_is_documented() -> None:
    """What the README shows exists: verbs of the command line and names of the package."""
    import hydra_edge as he
    from hydra_edge.cli import app

    text = PAGES[0].read_text()
    verbs = {command.name for command in app.registered_commands}
    shown = set(re.findall(r"^hydra-edge (\w+)", text, re.MULTILINE))
    assert shown <= verbs
    assert set(re.findall(r"\bhe\.(\w+)", text)) <= set(he.__all__)
