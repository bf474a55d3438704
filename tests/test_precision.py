"""What a precision says, read and written, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from hydra_edge.errors import InputError
from hydra_edge.precision import PRECISIONS, Precision


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", Precision("int8", "int8")),
        ("body=int8,heads=fp16", Precision("int8", "fp16")),
        ("heads=int8", Precision("fp32", "int8")),
        ("heads=fp16, body=int8", Precision("int8", "fp16")),
        ("int8,head.3=fp16", Precision("int8", "int8", {3: "fp16"})),
        ("int8,layer./a/b=c=fp32", Precision("int8", "int8", layers={"/a/b=c": "fp32"})),
        ("heads=int4-weight-only,block=32", Precision("fp32", "int4-weight-only", block=32)),
    ],
)
def test_parse(text: str, expected: Precision) -> None:
    assert Precision.parse(text) == expected
    assert Precision.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4", "Unknown precision 'int4'. There are: fp32, fp16, int8"),
        ("", "Unknown precision ''"),
        ("body=", "Unknown precision ''"),
        ("tail=int8", "Unknown part 'tail'"),
        ("int8,heads=fp16", "names a part twice"),
        ("body=int8,fp16", "'fp16' in the precision 'body=int8,fp16' names no part"),
        ("int8,head.x=fp16", "Unknown part 'head.x'"),
        ("int4-weight-only,block=48", "Blocks of 48 rows"),
        ("int8,layer.a=int3", "Unknown precision 'int3'"),
        ("body=int8,body=fp16", "names a part twice"),
        ("int8,head.²=fp16", "Unknown part 'head.²'"),
        ("int8,head.-1=fp16", "Unknown part 'head.-1'"),
        ("int8,layer.=fp16", "Unknown part 'layer.'"),
        ("int4-weight-only,block=", "Unknown part 'block'"),
        ("int8,head.01=fp16,head.1=fp32", "names a part twice"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Precision.parse(text)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_read_back(precision: str) -> None:
    for text in (precision, f"body={precision},heads=fp16", f"{precision},head.0=fp32"):
        assert str(Precision.parse(str(Precision.parse(text)))) == str(Precision.parse(text))
    assert Precision.parse(precision) == Precision(precision, precision)


def test_overrides_are_written_in_order() -> None:
    mixed = Precision("int8", "int8", {10: "fp16", 2: "fp32"}, {"b": "fp16", "a": "fp8"})
    assert str(mixed) == "int8,head.2=fp32,head.10=fp16,layer.a=fp8,layer.b=fp16"


def test_what_it_holds() -> None:
    mixed = Precision("fp16", "fp32", {1: "int8"}, {"a": "fp8"})
    assert [kind for kind in PRECISIONS if kind in mixed] == ["fp32", "fp16", "int8", "fp8"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp16", False),
        ("int8-weight-only", False),
        ("int4-weight-only", False),
        ("int8", True),
        ("heads=fp8", True),
        ("head.3=int8", True),
        ("fp16,layer.a=int8", True),
    ],
)
def test_who_needs_calibration(text: str, expected: bool) -> None:
    assert Precision.parse(text).needs_calibration == expected


def test_who_tells_heads_apart() -> None:
    assert Precision("int8", "fp32").tells_heads_apart
    assert Precision("int8", "int8", {0: "fp32"}).tells_heads_apart
    assert not Precision("int8", "int8", layers={"a": "fp32"}).tells_heads_apart


def test_nobody_can_change_it() -> None:
    overrides = {0: "fp16"}
    precision = Precision("int8", "int8", overrides)
    overrides[1] = "fp32"
    assert dict(precision.head_overrides) == {0: "fp16"}
    with pytest.raises(TypeError):
        precision.head_overrides[0] = "fp32"  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        precision.body = "fp16"  # type: ignore[misc]
    assert precision == Precision("int8", "int8", {0: "fp16"})
    assert len({precision, Precision("int8", "int8", {0: "fp16"})}) == 1


def test_the_parts_of_one_made_by_hand_are_checked() -> None:
    for wrong in (
        lambda: Precision("int9"),
        lambda: Precision(heads="int9"),
        lambda: Precision(head_overrides={0: "int9"}),
        lambda: Precision(layers={"a": "int9"}),
    ):
        with pytest.raises(InputError, match=r"Unknown precision 'int9'.*Write for example"):
            wrong()
    with pytest.raises(InputError, match=r"Blocks of 16 rows.*blocks of 32, 64, 128.*block=64"):
        Precision("int4-weight-only", block=16)
