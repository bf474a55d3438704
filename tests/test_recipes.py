"""Recipes: what a TOML file builds, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import recipe_project
import torch

from hydra_edge.errors import ArtifactError, InputError
from hydra_edge.processes import Processes
from hydra_edge.recipes import Recipe
from hydra_edge.teacher_formats import Format


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return recipe_project.write(tmp_path, "project_of_recipes")


def changed(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_a_recipe_builds_what_it_names(path: Path) -> None:
    changed(path, "epochs_mean = 1", 'epochs_mean = 1\ntemperature = [1.0, 4.0]\nteacher="online"')
    changed(path, "data = ", 'augment = "project_of_recipes:quick"\nlabels = ["a", "b"]\ndata = ')
    recipe = Recipe.load(path)
    assert recipe.config.temperatures == (1.0, 4.0)
    assert recipe.labels == ("a", "b")
    assert [file.name for _, file in recipe.members if file] == [
        "member-0.safetensors",
        "member-1.safetensors",
        "wide.safetensors",
    ]
    share = recipe.ensemble(Processes(1, 2))
    assert (share.indices, share.heads, len(share.members)) == ((1,), 3, 1)
    assert recipe.ensemble(Processes(0, 2)).indices == (0, 2)
    assert recipe.ensemble(Processes(4, 5)).indices == ()
    assert recipe.ensemble(Processes(4, 5), teaching=True).indices == (1,)
    x = torch.rand(2, 6)
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    torch.testing.assert_close(share(x)[0], layers(x))
    assert np.shape(recipe.data()) == (64, 6)
    augment = recipe.augment()
    assert augment is not None
    assert augment(x, torch.Generator()) is x
    assert len(recipe.student().heads) == 3
    assert (recipe.workdir, recipe.output) == (
        path.parent / "run",
        path.parent / "student.safetensors",
    )
    assert recipe.predictions is None


def test_predictions_are_described(path: Path) -> None:
    changed(
        path,
        "[student]",
        '[predictions]\nfolder="kept"\nformat="top-k"\ntop_k=2\nblock=9\nbatch_size=5\n[student]',
    )
    recipe = Recipe.load(path)
    assert recipe.predictions == path.parent / "kept"
    assert recipe.storage.format == Format("top-k", 2)
    assert (recipe.storage.block, recipe.teaching_batch) == (9, 5)


@pytest.mark.filterwarnings("default")
def test_a_student_by_name(path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    tiny = (
        "{hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,"
        " image_size=8, patch_size=4, num_channels=1}"
    )
    line = 'factory = "project_of_recipes:student"'
    by_name = f'body = "transformers:vit"\noptions = {tiny}\noutputs = 3\nhidden = [5, 4]'
    changed(path, line, by_name)
    student = Recipe.load(path).student()
    assert student(torch.rand(2, 1, 8, 8)).shape == (3, 2, 3)
    assert len(student.heads[0]) == 5  # type: ignore[arg-type]
    changed(path, "hidden = [5, 4]", 'heads = "linear"\ncount = 2')
    assert Recipe.load(path).student()(torch.rand(2, 1, 8, 8)).shape == (2, 2, 3)
    changed(path, '"linear"', '"conv"')
    with pytest.raises(InputError, match="heads is 'conv'"):
        Recipe.load(path).student()
    changed(path, "outputs = 3", "")
    with pytest.raises(InputError, match=r"has a body and no outputs.*outputs = C"):
        Recipe.load(path).student()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("workdir = ", "workdri = ", r"has 'workdri'\. Known are augment, data"),
        ("batch_size = 16", "batchsize = 16", r"has 'batchsize' in \[distillation\]"),
        ("batch_size = 16", 'batch_size = "16"', r"wrong type in \[distillation\]"),
        ("batch_size = 16", "batch_size = 0", "batch_size is 0"),
        ("batch_size = 16", "batch_size =", "is not TOML"),
        ("[student]", "[[student]]\n[student.x]", "has 'x' in"),
        ('"wide.safetensors"', '"narrow.safetensors"', r"'narrow.safetensors' matches no file"),
        ('factory = "project_of_recipes:wide"', "", r"\[\[members\]\] without a factory"),
    ],
)
def test_mistakes_are_found_when_it_is_read(path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.load(changed(path, old, new))


def test_tables_that_are_none(path: Path) -> None:
    path.write_text('student = "a"')
    with pytest.raises(InputError, match=r"gives student = 'a'.*Write \[student\]"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("old", "new", "part", "message"),
    [
        (":student", ":body", "student", "returned a Linear.*Return hydra_edge.Hydra"),
        ('factory = "project_of_recipes:student"', "", "student", "describes no student"),
        ('data = "project_of_recipes:data"', "", "data", "names no data"),
    ],
)
def test_mistakes_are_found_when_it_is_used(
    path: Path, old: str, new: str, part: str, message: str
) -> None:
    recipe = Recipe.load(changed(path, old, new))
    with pytest.raises(InputError, match=message):
        getattr(recipe, part)()


def test_members_are_needed_and_must_fit(path: Path) -> None:
    recipe = Recipe.load(changed(path, ":wide", ":member"))
    with pytest.raises(ArtifactError, match=r"wide.safetensors' does not fit Sequential"):
        recipe.ensemble(Processes())
    text = path.read_text()
    path.write_text(text[: text.index("[[members]]")] + text[text.index("[student]") :])
    with pytest.raises(InputError, match="names no members"):
        Recipe.load(path).ensemble(Processes())
    with pytest.raises(ArtifactError, match="does not exist"):
        Recipe.load(path.parent / "none.toml")
