"""Bodies by name: tiny models of transformers built here, and timm's interface in its place."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from hydra_edge import bodies
from hydra_edge.bodies import Body
from hydra_edge.errors import InputError, MissingDependencyError

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
VIT = {**TINY, "image_size": 8, "patch_size": 4, "num_channels": 1}
BERT = {**TINY, "vocab_size": 30, "max_position_embeddings": 12}


@pytest.fixture
def _hf() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.usefixtures("_hf")
@pytest.mark.filterwarnings("default")
def test_a_kind_of_model_with_random_weights() -> None:
    body = bodies.load("transformers:vit", {**VIT, "pool": "mean"})
    assert (body.features, body.inputs, body.training) == (8, ("pixel_values",), True)
    x = torch.rand(2, 1, 8, 8)
    assert body(x).shape == (2, 8)
    hidden = body.eval().network(x).last_hidden_state
    torch.testing.assert_close(body(x), hidden.mean(1))
    for pool, expected in (("first", hidden[:, 0]), ("max", hidden.amax(1))):
        body.pool = pool
        torch.testing.assert_close(body(x), expected)
    body.pool = "auto"
    torch.testing.assert_close(body(x), body.network(x).pooler_output)


@pytest.mark.usefixtures("_hf")
@pytest.mark.filterwarnings("default")
def test_several_inputs_go_in_by_name() -> None:
    options = {**BERT, "inputs": ["input_ids", "attention_mask"]}
    body = bodies.load("transformers:bert", options).eval()
    tokens = torch.randint(30, (2, 5))
    masks = torch.ones(2, 5, dtype=torch.long)
    masks[:, 3:] = 0
    short = bodies.Body(body.network, 8, ("input_ids",))(tokens[:, :3])
    torch.testing.assert_close(body(tokens, masks), short, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"got 1 inputs.*input_ids, attention_mask"):
        body(tokens)


@pytest.mark.usefixtures("_hf")
@pytest.mark.filterwarnings("default")
def test_weights_from_a_local_folder(tmp_path: Path) -> None:
    first = bodies.load("transformers:vit", VIT)
    first.network.save_pretrained(tmp_path / "vit")  # type: ignore[operator]
    again = bodies.load("transformers:vit", {}, tmp_path)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(again.eval()(x), first.eval()(x))


@pytest.mark.usefixtures("_hf")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("transformers:no_such_kind", {}, r"transformers cannot build 'no_such_kind'"),
        ("transformers:vit", {**VIT, "hidden_size": "x"}, "transformers cannot build 'vit'"),
    ],
)
def test_what_transformers_refuses_is_reported(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        bodies.load(name, options)


@pytest.mark.parametrize("name", ["vit", "keras:vit", "timm:", ":vit"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InputError, match=rf"'{name}' does not name a body.*timm:resnet18"):
        bodies.load(name, {})
    with pytest.raises(InputError, match=r"pool is 'sum'.*auto, first, mean, max"):
        bodies.load("timm:resnet18", {"pool": "sum"})


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_libraries_that_are_not_there_say_how_to_get_them(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent:
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == library:
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    message = rf"'{library}' is not installed.*pip install 'hydra-edge\[{library}\]'"
    with pytest.raises(MissingDependencyError, match=message):
        bodies.load(f"{library}:any", {})


def test_timm_is_asked_for_features_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm itself wants torchvision and is not installed here: this is its interface, not timm."""
    asked: dict[str, object] = {}

    class Network(nn.Module):
        num_features = 6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) @ torch.ones(x.shape[1], 6)

    def create_model(name: str, **options: object) -> nn.Module:
        asked.update(options, name=name)
        if name == "none":
            raise RuntimeError("Unknown model (none)")
        return Network()

    timm = ModuleType("timm")
    timm.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    body = bodies.load("timm:resnet18", {"in_chans": 1, "pretrained": True, "pool": "mean"})
    assert asked == {"name": "resnet18", "in_chans": 1, "pretrained": True, "num_classes": 0}
    assert body.features == 6
    assert body(torch.rand(2, 3, 4, 4)).shape == (2, 6)
    bodies.load("timm:resnet18", {})
    assert asked["pretrained"] is False
    with pytest.raises(InputError, match=r"timm cannot build 'none' with \{\}: Unknown model"):
        bodies.load("timm:none", {})


def test_maps_of_features_are_pooled() -> None:
    x = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(Body(nn.Identity(), 3)(x), x.mean((2, 3)))
    torch.testing.assert_close(Body(nn.Identity(), 3, pool="max")(x), x.amax((2, 3)))
