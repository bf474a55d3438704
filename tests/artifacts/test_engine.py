"""An engine file is read completely and as written, or refused with a reason."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx_models import tiny_engine

from hydra_edge.artifacts.engine import MANIFEST, Engine, Golden, Program
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.errors import ArtifactError, InputError

ENGINE = tiny_engine()
DATA = ENGINE.to_bytes()
Edit = Callable[[dict[str, bytes], dict[str, object]], None]


def read(folder: Path, data: bytes) -> Engine:
    path = folder / "e.hydra"
    path.write_bytes(data)
    return Engine.load(path)


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(
    members: list[tuple[str, bytes]],
    *,
    comment: bytes | None = None,
    kind: int = zipfile.ZIP_STORED,
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=kind)
        manifest = dict(members).get(MANIFEST, b"")
        archive.comment = (
            hashlib.sha256(manifest).hexdigest().encode() if comment is None else comment
        )
    return buffer.getvalue()


def forged(edit: Edit) -> bytes:
    """A file whose digests are all right, made by somebody who knows the format."""
    members = members_of(DATA)
    manifest = json.loads(members.pop(MANIFEST))
    edit(members, manifest)
    if isinstance(manifest.get("members"), dict):
        manifest["members"] = {n: hashlib.sha256(d).hexdigest() for n, d in members.items()}
    return zipped([(MANIFEST, json.dumps(manifest).encode()), *members.items()])


def assert_equal(a: Engine, b: Engine) -> None:
    assert a.to_bytes() == b.to_bytes()


def test_round_trip(tmp_path: Path) -> None:
    path = ENGINE.save(tmp_path / "e.hydra")
    again = Engine.load(path)
    assert path.read_bytes() == DATA == again.to_bytes()
    for name in ("target", "task", "kind", "heads", "labels", "precision", "metrics", "tools"):
        assert getattr(again, name) == getattr(ENGINE, name)
    ours, theirs = ENGINE.programs["main"], again.programs["main"]
    for name in ("inputs", "outputs", "batch", "optional", "lowering", "lowering_ms", "payload"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert theirs.graph.data == ours.graph.data
    np.testing.assert_array_equal(theirs.golden.inputs["x"], ours.golden.inputs["x"])
    assert again.size_bytes == len(ours.payload)


def with_golden(outputs: dict[str, np.ndarray]) -> Engine:
    program = ENGINE.programs["main"]
    golden = Golden(program.golden.inputs, outputs, 0.5)
    return replace(ENGINE, programs={"main": replace(program, golden=golden)})


@pytest.mark.parametrize(
    "array",
    [
        np.asarray(3.5, np.float32),
        np.zeros((0, 3), np.int64),
        np.asarray([True, False]),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(20, dtype=np.float16)[::3],
        np.arange(3, dtype=">i4"),
    ],
    ids=["scalar", "empty", "bool", "fortran", "strided", "big endian"],
)
def test_arrays_of_every_kind_round_trip(tmp_path: Path, array: np.ndarray) -> None:
    engine = with_golden({"logits": array})
    again = read(tmp_path, engine.to_bytes()).programs["main"].golden.outputs["logits"]
    assert (again.shape, again.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(again, array)


def test_same_engine_same_bytes_in_any_order() -> None:
    program = ENGINE.programs["main"]
    swapped = replace(
        ENGINE, programs={"b_side": program, "main": program}, metrics={"b": 1.0, "a": 2.0}
    )
    same = replace(
        ENGINE, programs={"main": program, "b_side": program}, metrics={"a": 2.0, "b": 1.0}
    )
    assert swapped.to_bytes() == same.to_bytes()
    assert tiny_engine().to_bytes() == DATA


def test_several_programs_round_trip(tmp_path: Path) -> None:
    program = ENGINE.programs["main"]
    engine = replace(ENGINE, programs={"encode": program, "main": program, "step": program})
    assert sorted(read(tmp_path, engine.to_bytes()).programs) == ["encode", "main", "step"]


def test_assets_round_trip_and_are_digested(tmp_path: Path) -> None:
    engine = replace(ENGINE, assets={"tokenizer.json": b"{}", "words": b"\x00\xff"})
    data = engine.to_bytes()
    assert read(tmp_path, data).assets == engine.assets
    assert read(tmp_path, DATA).assets == {}
    assert "assets/words" in json.loads(members_of(data)[MANIFEST])["members"]
    at = data.index(b"\x00\xff", data.index(b"assets/words"))
    damaged = bytearray(data)
    damaged[at] = 1
    with pytest.raises(ArtifactError):
        read(tmp_path, bytes(damaged))


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A.json", ".x", "x.", "x..y"])
def test_assets_with_odd_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="An asset is called"):
        replace(ENGINE, assets={name: b""})

    def add(members: dict[str, bytes], _: dict[str, object]) -> None:
        members[f"assets/{name}"] = b""

    with pytest.raises(ArtifactError, match="not a usable"):
        read(tmp_path, forged(add))


def test_any_zip_tool_opens_it() -> None:
    names = sorted(members_of(DATA))
    assert names == [
        "golden/main/inputs/0.npy",
        "golden/main/outputs/0.npy",
        "graphs/main.onnx",
        "manifest.json",
        "programs/main.bin",
    ]


# damage


@pytest.mark.parametrize("end", [0, 1, 10, *range(50, len(DATA), len(DATA) // 40), len(DATA) - 1])
def test_truncated(tmp_path: Path, end: int) -> None:
    with pytest.raises(ArtifactError, match=r"e.hydra' is not a usable .hydra engine"):
        read(tmp_path, DATA[:end])


def test_every_flipped_byte_is_caught_or_harmless(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    caught = 0
    for position in rng.choice(len(DATA), 300, replace=False):
        damaged = bytearray(DATA)
        damaged[position] ^= int(rng.integers(1, 256))
        try:
            assert_equal(read(tmp_path, bytes(damaged)), ENGINE)
        except ArtifactError:
            caught += 1
    assert caught > 200  # what is left is zip's own bookkeeping, e.g. dates


def test_flipped_bytes_of_content_are_all_caught(tmp_path: Path) -> None:
    for name, content in members_of(DATA).items():
        start = DATA.index(content)
        for offset in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(DATA)
            damaged[start + offset] ^= 1
            with pytest.raises(ArtifactError):
                read(tmp_path, bytes(damaged))
        assert name


@pytest.mark.parametrize(
    "data",
    [b"hello\n", b"", b"PK\x05\x06" + b"\0" * 18, b"\x93NUMPY", zipped([("a", b"b")])],
    ids=["text", "empty", "empty zip", "npy", "other zip"],
)
def test_other_files(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"is not a usable .hydra engine"):
        read(tmp_path, data)


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not exist. Expected a .hydra engine"):
        Engine.load(tmp_path / "nothing.hydra")
    with pytest.raises(ArtifactError, match="is a folder"):
        Engine.load(tmp_path)


# tricks with zip


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "\\\\host\\evil", "..\\evil"]
)
def test_names_that_point_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="points outside the file"):
        read(tmp_path, zipped([*members_of(DATA).items(), (name, b"x")]))


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members(tmp_path: Path, kind: int) -> None:
    with pytest.raises(ArtifactError, match="is compressed or encrypted"):
        read(tmp_path, zipped(list(members_of(DATA).items()), kind=kind))


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = zipped([(MANIFEST, b"0" * 50_000_000)], kind=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    with pytest.raises(ArtifactError, match="is compressed"):
        read(tmp_path, bomb)


def test_a_size_that_is_not_there(tmp_path: Path) -> None:
    data = zipped([(MANIFEST, b"{}")])
    size = data.rindex(b"PK\x01\x02") + 20
    for offset in (0, 4):  # compressed and real size
        data = data[: size + offset] + (2**31).to_bytes(4, "little") + data[size + offset + 4 :]
    with pytest.raises(ArtifactError, match="claims 2147483648 bytes of content"):
        read(tmp_path, data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members(tmp_path: Path) -> None:
    items = list(members_of(DATA).items())
    with pytest.raises(ArtifactError, match="Two of its members have the same name"):
        read(tmp_path, zipped([*items, items[-1]]))


def test_an_extra_member(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="disagree about the member 'extra'"):
        read(tmp_path, zipped([*members_of(DATA).items(), ("extra", b"x")]))


@pytest.mark.parametrize("name", [n for n in members_of(DATA) if n != MANIFEST])
def test_a_missing_member(tmp_path: Path, name: str) -> None:
    members = members_of(DATA)
    del members[name]
    with pytest.raises(ArtifactError, match=f"disagree about the member '{name}'"):
        read(tmp_path, zipped(list(members.items())))


def test_a_replaced_member(tmp_path: Path) -> None:
    members = {**members_of(DATA), "programs/main.bin": b"other"}
    with pytest.raises(
        ArtifactError, match=r"'programs/main.bin' does not have the recorded sha256"
    ):
        read(tmp_path, zipped(list(members.items())))


def test_a_changed_manifest(tmp_path: Path) -> None:
    members = members_of(DATA)
    comment = hashlib.sha256(members[MANIFEST]).hexdigest().encode()
    members[MANIFEST] = members[MANIFEST].replace(b'"fp32"', b'"fp16"')
    with pytest.raises(ArtifactError, match="Its manifest was changed after it was written"):
        read(tmp_path, zipped(list(members.items()), comment=comment))


# a consistent file with odd content


def manifest_edit(**changes: object) -> Edit:
    return lambda members, manifest: manifest.update(changes)


def program_edit(**changes: object) -> Edit:
    return lambda members, manifest: manifest["programs"]["main"].update(changes)  # type: ignore[index]


def test_forging_is_possible_at_all(tmp_path: Path) -> None:
    engine = read(tmp_path, forged(manifest_edit(precision="fp16")))
    assert engine.precision == "fp16"


def test_a_newer_schema(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"schema 2; this version reads up to 1. Upgrade"):
        read(tmp_path, forged(manifest_edit(schema=2)))


ODD_MANIFESTS: dict[str, Edit] = {
    "another format": manifest_edit(format="zip"),
    "no schema": lambda _, manifest: manifest.pop("schema"),  # type: ignore[dict-item, return-value]
    "schema text": manifest_edit(schema="1"),
    "no programs": manifest_edit(programs={}),
    "program list": manifest_edit(programs=[]),
    "program name": lambda _, m: m.update(programs={"Main!": m["programs"]["main"]}),  # type: ignore[index, return-value]
    "members list": manifest_edit(members=[]),
    "labels": manifest_edit(labels=3),
    "metrics": manifest_edit(metrics={"a": "fast"}),
    "metrics list": manifest_edit(metrics=["a"]),
    "tools": manifest_edit(tools=None),
    "task": manifest_edit(task=["classification"]),
    "heads": manifest_edit(heads="three"),
    "calibration": manifest_edit(calibration_sha256=7),
    "batch order": program_edit(batch=[8, 4, 1]),
    "batch zero": program_edit(batch=[0, 1, 2]),
    "batch of two": program_edit(batch=[1, 2]),
    "batch infinite": program_edit(batch=[1, 2, float("inf")]),
    "inputs": program_edit(inputs=[{"name": "x"}]),
    "inputs text": program_edit(inputs="x"),
    "no inputs": program_edit(inputs=[]),
    "dtype": program_edit(inputs=[{"name": "x", "dtype": "no", "shape": []}]),
    "optional text": program_edit(optional="logits"),
    "tolerance": program_edit(tolerance="loose"),
    "tolerance that all pass": program_edit(tolerance=float("nan")),
    "tolerance infinite": program_edit(tolerance=float("inf")),
    "tolerance negative": program_edit(tolerance=-1e-4),
    "scalar input": program_edit(inputs=[{"name": "x", "dtype": "float32", "shape": []}]),
    "timings": program_edit(lowering_ms=[1]),
    "golden names": program_edit(golden_inputs=["x", "y"]),
    "lost key": lambda _, m: m["programs"]["main"].pop("batch"),  # type: ignore[index, return-value]
}


@pytest.mark.parametrize("case", ODD_MANIFESTS)
def test_odd_manifests(tmp_path: Path, case: str) -> None:
    with pytest.raises(ArtifactError, match=r"e.hydra' is not a usable .hydra engine"):
        read(tmp_path, forged(ODD_MANIFESTS[case]))


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"null", b"{", b"\xff", b"[" * 100_000])
def test_manifests_that_are_no_object(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(ArtifactError):
        read(tmp_path, zipped([(MANIFEST, text)]))


def npy(header: str, data: bytes = b"", magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return magic + len(text).to_bytes(2, "little") + text + data


def described(shape: str, descr: str = "'<f4'", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


ODD_ARRAYS = {
    "more than there is": npy(described("(1000000000000,)"), b"\0" * 16),
    "less than there is": npy(described("(2,)"), b"\0" * 16),
    "overflow to zero": npy(described("(4611686018427387904, 4)")),
    "overflow to fit": npy(described("(4611686018427387905, 4)"), b"\0" * 16),
    "negative": npy(described("(-1, -4)"), b"\0" * 16),
    "objects": npy(described("(2,)", "'|O'"), b"\0" * 16),
    "fortran": npy(described("(2, 2)", fortran="True"), b"\0" * 16),
    "expression": npy("__import__('os').getcwd()"),
    "no dict": npy("3"),
    "version 2": npy(described("(4,)"), b"\0" * 16, b"\x93NUMPY\x02\x00"),
    "no magic": b"hello",
    "empty": b"",
    "sizeless": npy(described("(4,)", "'<U0'")),
}


@pytest.mark.parametrize("case", ODD_ARRAYS)
def test_odd_arrays(tmp_path: Path, case: str) -> None:
    def edit(members: dict[str, bytes], _: dict[str, object]) -> None:
        members["golden/main/inputs/0.npy"] = ODD_ARRAYS[case]

    with pytest.raises(ArtifactError, match=r"is not a usable .hydra engine"):
        read(tmp_path, forged(edit))


def test_a_damaged_graph_inside_names_itself(tmp_path: Path) -> None:
    def edit(members: dict[str, bytes], _: dict[str, object]) -> None:
        members["graphs/main.onnx"] = b"hello"

    with pytest.raises(ArtifactError, match=r"e.hydra:graphs/main' is not a valid ONNX model"):
        read(tmp_path, forged(edit))


def test_a_failed_write_keeps_the_old_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ENGINE.save(tmp_path / "e.hydra")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ArtifactError, match="older file there is untouched"):
        replace(ENGINE, precision="int8").save(path)
    monkeypatch.undo()
    assert_equal(Engine.load(path), ENGINE)


def test_spec_axes_keep_names_and_sizes(tmp_path: Path) -> None:
    program: Program = ENGINE.programs["main"]
    odd = replace(program, inputs=(TensorSpec("x", "float32", ("3", 3, "?")),))
    again = read(tmp_path, replace(ENGINE, programs={"main": odd}).to_bytes())
    assert again.programs["main"].inputs == odd.inputs


@pytest.mark.parametrize("change", [lambda data: data + b"xx", lambda data: b"xx" + data])
def test_nothing_may_stand_around_the_content(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(ArtifactError, match=r"more than its members|missing or damaged"):
        read(tmp_path, change(with_golden({"y": np.zeros(3, np.float32)}).to_bytes()))
