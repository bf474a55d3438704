"""What targets have, and what not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hydra_edge import features, targets
from hydra_edge.cli import app


def there(name: str) -> dict[str, bool]:
    return {feature.name: feature.there for feature in features.of(targets.find(name))}


def note(target: targets.Target, name: str) -> str:
    return next(feature.note for feature in features.of(target) if feature.name == name)


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("jetson-agx-orin", {"fp8", "hardware-compatible engines"}),
        ("jetson-orin-nano", {"fp8", "DLA", "hardware-compatible engines"}),
        ("jetson-thor", {"int8 tensor rate", "DLA", "hardware-compatible engines"}),
        ("a100", {"fp8", "DLA"}),
        ("h200", {"DLA"}),
        ("rtx-3090", {"fp8", "DLA", "plugin", "refit"}),
        ("rtx-5090", {"DLA", "plugin", "refit"}),
        ("cpu", {"plugin", "CUDA graphs"}),
    ],
)
def test_what_is_there(name: str, absent: set[str]) -> None:
    found = there(name)
    assert {feature for feature, has in found.items() if not has} == absent
    assert len(found) == (2 if name == "cpu" else 7)


def test_notes_say_how_much() -> None:
    orin = targets.find("jetson-agx-orin")
    assert note(orin, "fp8") == "tensor cores of sm_87 do not multiply it"
    assert note(orin, "int8 tensor rate") == "85.2 TOPS dense, 2 times fp16"
    assert note(orin, "DLA").startswith("2, ")
    assert note(targets.find("rtx-4090"), "int8 tensor rate").endswith("4 times fp16")
    assert "cards of sm_89" in note(targets.find("rtx-4090"), "hardware-compatible engines")


def test_options_that_notes_name_are_there() -> None:
    """Options of `compile`, and a verb."""
    words = {
        word
        for target in targets.TARGETS
        for feature in features.of(target)
        for word in feature.note.replace("`", "").split()
    }
    options = {word for word in words if word.startswith("--")}
    assert options == {"--dla-core", "--hardware-compatible", "--refittable"}
    shown = CliRunner().invoke(app, ["compile", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(option in shown for option in options)
    assert CliRunner().invoke(app, ["refit", "--help"]).exit_code == 0


def test_turing_is_too_old_for_compatible_engines() -> None:
    row = targets.find("l4")
    assert row.gpu is not None
    turing = replace(row, gpu=replace(row.gpu, compute_capability=75))
    assert "this kind of device alone" in note(turing, "hardware-compatible engines")


def test_a_card_without_known_rates() -> None:
    row = targets.find("l4")
    assert row.gpu is not None
    unknown = replace(row, gpu=replace(row.gpu, fp16=0, int8=0))
    assert note(unknown, "int8 tensor rate") == "none is published"
