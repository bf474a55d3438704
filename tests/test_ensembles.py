"""Ensembles, students, head factories, and modules read from files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from hydra_edge.ensembles import (
    Ensemble,
    Hydra,
    linear_heads,
    load_factory,
    load_weights,
    mlp_heads,
    residual_heads,
    save_weights,
)
from hydra_edge.errors import ArtifactError, InputError

WriteModule = Callable[[str, str], None]


class Returns(nn.Module):
    """Gives back what it was built with, whatever the input."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.value


class Sum(nn.Module):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack(inputs).sum(0)


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        if tie:
            self.b.weight = self.a.weight


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    """Write a Python file into a fresh current directory."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield lambda name, text: (tmp_path / f"{name}.py").write_text(text) and None
    for name in set(sys.modules) - before:
        if name.startswith("users_"):
            del sys.modules[name]


# Ensemble and Hydra


def test_ensemble_stacks_its_members_in_order() -> None:
    members = linear_heads(3, 4, 2)
    ensemble = Ensemble(members, "classification", ["cat", "dog"])
    x = torch.randn(5, 4)
    assert torch.equal(ensemble(x), torch.stack([member(x) for member in members]))
    assert (ensemble.heads, ensemble.task, ensemble.labels) == (3, "classification", ("cat", "dog"))


def test_hydra_runs_its_body_once() -> None:
    body = nn.Linear(4, 6)
    calls: list[int] = []
    body.register_forward_hook(lambda *_: calls.append(1))
    student = Hydra(body, linear_heads(3, 6, 2), "regression")
    x = torch.randn(5, 4)
    y = student(x)
    assert len(calls) == 1
    assert torch.equal(y, torch.stack([head(body(x)) for head in student.heads]))
    assert (student.task, student.labels) == ("regression", ())


def test_several_inputs_reach_every_member_and_the_body() -> None:
    x = torch.ones(2, 3)
    assert torch.equal(Ensemble([Sum(), Sum()])(x, x, x), torch.full((2, 2, 3), 3.0))
    assert torch.equal(Hydra(Sum(), [nn.Identity()])(x, x), torch.full((1, 2, 3), 2.0))


def test_a_model_needs_members_of_the_right_kind() -> None:
    with pytest.raises(InputError, match="There is no member"):
        Ensemble([])
    with pytest.raises(InputError, match="There is no head"):
        Hydra(nn.Identity(), [])
    with pytest.raises(InputError, match="Head 1 is a builtin_function"):
        Hydra(nn.Identity(), [nn.Identity(), torch.relu])  # type: ignore[list-item]
    with pytest.raises(InputError, match="Unknown task 'juggling'"):
        Ensemble([nn.Identity()], "juggling")
    with pytest.raises(InputError, match="Unknown task 'juggling'"):
        Hydra(nn.Identity(), [nn.Identity()], "juggling")


def test_outputs_that_do_not_stack_name_the_culprit() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(InputError, match=r"Member 2 gives \[2, 5\] but member 0 gives \[2, 4\]"):
        Ensemble([nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 5)])(x)
    with pytest.raises(InputError, match=r"Head 1 gives \[2, 5\] but head 0 gives \[2, 4\]"):
        Hydra(nn.Identity(), [nn.Linear(3, 4), nn.Linear(3, 5)])(x)
    with pytest.raises(InputError, match="Member 1 returned a dict"):
        Ensemble([nn.Identity(), Returns({})])(x)


def test_other_failures_of_stacking_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="device"):
        Ensemble([Returns(torch.zeros(2)), Returns(torch.zeros(2, device="meta"))])()


# Head factories


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
@pytest.mark.parametrize("hidden", [(8,), (8, 7, 6)])
def test_mlp_heads_have_the_layers_asked_for(hidden: tuple[int, ...], norm: str | None) -> None:
    heads = mlp_heads(3, 5, 2, hidden, "gelu", norm)  # type: ignore[arg-type]
    kinds = [type(layer) for layer in heads[0].children()]
    norms = {None: [], "layer": [nn.LayerNorm], "batch": [nn.BatchNorm1d]}[norm]
    assert kinds == [nn.Linear, *norms, nn.GELU] * len(hidden) + [nn.Linear]
    assert heads[2](torch.randn(4, 5)).shape == (4, 2)


@pytest.mark.parametrize(
    ("activation", "kind"),
    [("relu", nn.ReLU), ("gelu", nn.GELU), ("silu", nn.SiLU), ("tanh", nn.Tanh)],
)
def test_activations_by_name(activation: str, kind: type[nn.Module]) -> None:
    (head,) = mlp_heads(1, 5, 2, activation=activation)  # type: ignore[arg-type]
    assert any(isinstance(layer, kind) for layer in head.children())


def test_heads_start_apart() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for heads in (linear_heads(2, 4, 2), mlp_heads(2, 4, 2), residual_heads(2, stage, 4, 2)):
        weights = [[p for p in head.parameters() if p.ndim > 1] for head in heads]
        assert weights[0]
        assert not any(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_residual_heads_copy_and_reinitialise_the_stage() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    stage(torch.randn(8, 3, 5, 5))
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    heads = residual_heads(2, stage, 4, 7)
    assert heads[1](torch.randn(6, 3, 9, 5)).shape == (6, 7)
    assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())
    copied = residual_heads(1, stage, 4, 7)[0].state_dict()
    assert not torch.equal(copied["0.0.weight"], before["0.weight"])
    assert torch.equal(copied["0.1.running_mean"], torch.zeros(4))


def test_residual_heads_need_a_way_to_reinitialise() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MultiheadAttention(4, 1))
    with pytest.raises(InputError, match=r"Submodule '1' \(MultiheadAttention\) has no reset_para"):
        residual_heads(2, stage, 4, 2)


def test_factories_check_their_arguments() -> None:
    with pytest.raises(InputError, match="count is 0"):
        linear_heads(0, 4, 2)
    with pytest.raises(InputError, match="outputs is -1"):
        residual_heads(1, nn.Identity(), 4, -1)
    with pytest.raises(InputError, match=r"hidden\[1\] is 0"):
        mlp_heads(1, 4, 2, (3, 0))
    with pytest.raises(InputError, match="hidden has 0 layers"):
        mlp_heads(1, 4, 2, ())
    with pytest.raises(InputError, match="hidden has 4 layers"):
        mlp_heads(1, 4, 2, (3, 3, 3, 3))
    with pytest.raises(InputError, match=r"Unknown activation 'step'.*relu, gelu, silu, tanh"):
        mlp_heads(1, 4, 2, activation="step")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"Unknown norm 'group'.*layer, batch"):
        mlp_heads(1, 4, 2, norm="group")  # type: ignore[arg-type]


# Factories named by text


def test_a_factory_in_the_current_directory(write_module: WriteModule) -> None:
    write_module("users_model", "from torch import nn\ndef small(): return nn.Linear(4, 3)\n")
    path = list(sys.path)
    assert load_factory("users_model:small")(torch.randn(2, 4)).shape == (2, 3)
    assert sys.path == path


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("users_model", "'users_model' does not name a factory.*colon.*Write it like"),
        ("users_model:", "does not name a factory"),
        (":small", "does not name a factory"),
        ("users_absent:small", "Module 'users_absent' cannot be found.*neither installed nor"),
        ("users_model.py:small", r"Module 'users_model\.py' cannot be found"),
        ("users_model:large", "Module 'users_model' has no function 'large'"),
        ("users_model:number", "Module 'users_model' has no function 'number'"),
        ("users_model:weights", "'users_model:weights' returned a dict"),
        ("users_model:needy", "raised TypeError: .*called without arguments"),
        ("users_importer:small", "raised ModuleNotFoundError: No module named 'users_dependency'"),
        ("users_broken:small", "raised SyntaxError"),
    ],
)
def test_a_factory_that_cannot_be_used(
    write_module: WriteModule, factory: str, message: str
) -> None:
    write_module(
        "users_model", "number = 3\ndef weights(): return {}\ndef needy(size): return size\n"
    )
    write_module("users_importer", "import users_dependency\n")
    write_module("users_broken", "def small(:\n")
    with pytest.raises(InputError, match=message):
        load_factory(factory)


# Weights


def test_weights_survive_a_round_trip(tmp_path: Path) -> None:
    source, target = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    source(torch.randn(9, 3))
    path = save_weights(source, tmp_path / "weights.safetensors")
    assert load_weights(target, path) is target
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"]


def test_tied_weights_are_stored_once_and_load_anywhere(tmp_path: Path) -> None:
    source = Tied()
    path = save_weights(source, tmp_path / "tied.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"a.weight", "a.bias", "b.bias"}
    tied = load_weights(Tied(), path)
    assert tied.a.weight is tied.b.weight
    untied = load_weights(Tied(tie=False), path)
    assert torch.equal(untied.a.weight, source.a.weight)
    assert torch.equal(untied.b.weight, source.a.weight)


@pytest.mark.parametrize("kept", ["a.weight", "b.weight"])
def test_tied_weights_of_another_writer(tmp_path: Path, kept: str) -> None:
    """Some writers drop one of the tied names and leave no note of it."""
    tensors = {kept: torch.ones(3, 3), "a.bias": torch.zeros(3), "b.bias": torch.zeros(3)}
    path = tmp_path / "tied.safetensors"
    safetensors.torch.save_file(tensors, path)
    assert torch.equal(load_weights(Tied(), path).a.weight, torch.ones(3, 3))


def test_views_of_one_storage_are_stored_apart(tmp_path: Path) -> None:
    module, target = nn.Module(), nn.Module()
    storage = torch.arange(6.0)
    for owner, values in ((module, storage), (target, torch.zeros(6))):
        owner.register_buffer("low", values[:4].reshape(2, 2).T)
        owner.register_buffer("high", values[2:])
    load_weights(target, save_weights(module, tmp_path / "views.safetensors"))
    assert torch.equal(target.get_buffer("low"), module.get_buffer("low"))
    assert torch.equal(target.get_buffer("high"), module.get_buffer("high"))


def test_weights_of_another_module_are_listed(tmp_path: Path) -> None:
    path = save_weights(
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)), tmp_path / "w.safetensors"
    )
    target = nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(4, 2, bias=False))
    with pytest.raises(ArtifactError) as caught:
        load_weights(target, path)
    assert "missing: 2.weight" in caught.value.what
    assert "unexpected: 1.weight" in caught.value.what
    assert "wrong shape: 0.weight [4, 3] instead of [5, 3], 0.bias [4]" in caught.value.what


def test_long_lists_of_names_are_cut(tmp_path: Path) -> None:
    path = save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match=r"missing: 0\.weight.* and 4 more; unexpected: "):
        load_weights(nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)]), path)


def test_weight_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent\.safetensors' does not exist"):
        load_weights(nn.Linear(2, 2), tmp_path / "absent.safetensors")
    (tmp_path / "model.pt").write_bytes(b"\x80\x04 a pickle, to all appearances")
    with pytest.raises(ArtifactError, match=r"model\.pt' cannot be read.*is a pickle"):
        load_weights(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_weights(nn.Linear(2, 2), tmp_path)


def test_a_failed_save_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Cannot write"):
        save_weights(nn.Linear(2, 2), tmp_path / "absent" / "w.safetensors")

    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"version": 1}

    with pytest.raises(InputError, match="State entry '_extra_state' is a dict"):
        save_weights(Extra(2, 2), tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_ensemble_from_checkpoints(tmp_path: Path, write_module: WriteModule) -> None:
    write_module("users_member", "from torch import nn\ndef member(): return nn.Linear(4, 3)\n")
    members = linear_heads(2, 4, 3)
    paths = [save_weights(m, tmp_path / f"{i}.safetensors") for i, m in enumerate(members)]
    ensemble = Ensemble.from_checkpoints("users_member:member", paths, labels=["a", "b", "c"])
    x = torch.randn(2, 4)
    assert torch.equal(ensemble(x), Ensemble(members)(x))
    assert ensemble.labels == ("a", "b", "c")
    with pytest.raises(InputError, match="There is no member"):
        Ensemble.from_checkpoints("users_member:member", [])
