"""A graph file opens everywhere, and whatever else is opened as one is refused politely."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx_models import Net, linear, mlp_heads, student

from hydra_edge.artifacts.graph import (
    METADATA_KEY,
    FusionGroup,
    Graph,
    Metadata,
    TensorSpec,
)
from hydra_edge.errors import ArtifactError, HydraError
from hydra_edge.fusion import fuse

FULL = Metadata(
    task="classification",
    kind="student",
    heads=3,
    logits="head_logits",
    labels=("cat", "dög"),
    precision="body=int8,heads=fp16",
    calibration_sha256="ab" * 32,
    fusion=(FusionGroup("x", 3, ("Gemm",), True), FusionGroup("y", 2, (), False, "because")),
    provenance=("export", "quantize", "fuse"),
)


def test_round_trip(tmp_path: Path) -> None:
    graph = Graph(student().model, FULL)
    again = Graph.load(graph.save(tmp_path / "a.onnx"))
    assert again.metadata == FULL
    assert again.data == graph.data == (tmp_path / "a.onnx").read_bytes()
    assert again.sha256 == graph.sha256
    assert Graph.load(again.save(tmp_path / "b.onnx")).data == graph.data


def test_it_is_plain_onnx(tmp_path: Path) -> None:
    path = student().save(tmp_path / "a.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map.keys() == {METADATA_KEY}


def test_saving_does_not_touch_the_model(tmp_path: Path) -> None:
    graph = Graph(mlp_heads().model, FULL)
    graph.save(tmp_path / "a.onnx")
    assert not graph.model.metadata_props


def test_files_of_others_have_no_metadata(tmp_path: Path) -> None:
    onnx.save(mlp_heads().model, tmp_path / "a.onnx")
    assert Graph.load(tmp_path / "a.onnx").metadata == Metadata()


def test_our_entry_is_replaced_and_others_kept() -> None:
    model = mlp_heads().model
    for key in ("author", METADATA_KEY, "licence"):
        model.metadata_props.add(key=key, value="{}")
    props = Graph.parse(Graph(model, FULL).data).model.metadata_props
    assert [p.key for p in props] == ["author", "licence", METADATA_KEY]


def test_specs() -> None:
    net = Net()
    x = net.input("x", ("batch", None, 4))
    net.input("ids", ("batch",), TensorProto.INT64)
    net.input("words", (2,), TensorProto.STRING)
    net.input("t", ())
    net.input("h", (1,), TensorProto.BFLOAT16)
    graph = net.graph({net.op("Relu", x): ("batch", None, 4)})
    assert [str(spec) for spec in graph.inputs[:4]] == [
        "x: float32[batch, ?, 4]",
        "ids: int64[batch]",
        "words: object[2]",
        "t: float32[]",
    ]
    assert "Graph(model, 1 nodes: x: float32[batch, ?, 4]; ids" in str(graph)


def test_sizes_that_are_no_sizes_are_open() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [0, -1, 3])
    assert TensorSpec.from_value_info(value).shape == ("?", "?", 3)


def test_values_that_are_no_tensors() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [2]))
    assert TensorSpec.from_value_info(helper.make_value_info("s", kind)).dtype == "unknown"
    strange = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    strange.type.tensor_type.elem_type = 999
    assert TensorSpec.from_value_info(strange).dtype == "unknown"


def test_initializers_are_no_inputs() -> None:
    graph = mlp_heads()
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    assert [spec.name for spec in Graph(model).inputs] == ["x"]
    assert fuse(Graph(model)).fusion[0].fused


def test_derive_adds_a_step() -> None:
    graph = Graph(mlp_heads().model, FULL)
    derived = graph.derive(graph.model, "step", precision="fp16")
    assert derived.metadata == replace(
        FULL, precision="fp16", provenance=(*FULL.provenance, "step")
    )
    assert graph.metadata == FULL


# metadata


def test_metadata_round_trip_is_one_sorted_line() -> None:
    for metadata in (FULL, Metadata()):
        text = metadata.to_json()
        assert Metadata.from_json(text) == metadata
        assert "\n" not in text
        assert list(json.loads(text)) == sorted(json.loads(text))


def changed(**changes: object) -> str:
    return json.dumps({**json.loads(FULL.to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "3",
        '{"schema": 1}',
        "[" * 100_000,
        changed(schema=None),
        changed(schema="1"),
        changed(labels=None),
        changed(fusion=3),
        changed(fusion=[{}]),
        changed(fusion=[[]]),
        changed(surprise=1),
        changed(heads="many"),
        changed(task=["classification"]),
        changed(logits=7),
        changed(kind=None),
    ],
)
def test_damaged_metadata(text: str) -> None:
    with pytest.raises(ArtifactError, match="hydra_edge metadata cannot be read"):
        Metadata.from_json(text)


def test_newer_metadata() -> None:
    with pytest.raises(ArtifactError, match=r"has schema 2. This version reads up to schema 1"):
        Metadata.from_json(changed(schema=2))


def test_a_file_with_newer_metadata(tmp_path: Path) -> None:
    model = mlp_heads().model
    model.metadata_props.add(key=METADATA_KEY, value=changed(schema=99))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match="Upgrade hydra-edge"):
        Graph.load(tmp_path / "a.onnx")


# bad files


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'.*nothing.onnx' does not exist. Expected an ONNX"):
        Graph.load(tmp_path / "nothing.onnx")
    with pytest.raises(ArtifactError, match="is a folder"):
        Graph.load(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"hello, this is text\n", b"<html></html>", b"\x00" * 100, b"PK\x03\x04" * 10],
    ids=["empty", "newline", "text", "html", "zeros", "zip"],
)
def test_other_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"a.onnx' is not a valid ONNX model"):
        Graph.load(tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match="'the given bytes' is not a valid ONNX model"):
        Graph.parse(data)


def test_truncated_files(tmp_path: Path) -> None:
    data = student().data
    for end in range(0, len(data) - 1, len(data) // 60):
        (tmp_path / "a.onnx").write_bytes(data[:end])
        with pytest.raises(ArtifactError):
            Graph.load(tmp_path / "a.onnx")


def test_an_invalid_model(tmp_path: Path) -> None:
    model = mlp_heads().model
    model.graph.node[0].input[0] = "nobody"
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="nobody"):
        Graph.load(tmp_path / "a.onnx")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    data = mlp_heads().data.replace(b"Relu", b"Re\xff\xfe")
    with pytest.raises(ArtifactError, match="a name in it is not text"):
        Graph.parse(data)


def external(folder: Path) -> Path:
    net = Net()
    x = net.input("x", ("batch", 64))
    model = net.graph({linear(net, x, 64, 32): ("batch", 32)}).model
    onnx.save(model, folder / "a.onnx", save_as_external_data=True, location="a.bin")
    return folder / "a.onnx"


def test_external_data_is_read(tmp_path: Path) -> None:
    graph = Graph.load(external(tmp_path))
    assert {t.data_location for t in graph.model.graph.initializer} == {TensorProto.DEFAULT}
    moved = tmp_path / "moved"
    moved.mkdir()
    again = Graph.load(graph.save(moved / "b.onnx"))
    assert again.data == graph.data


@pytest.mark.parametrize("damage", ["missing", "truncated", "outside"])
def test_external_data_that_is_not_there(tmp_path: Path, damage: str) -> None:
    path = external(tmp_path)
    if damage == "missing":
        (tmp_path / "a.bin").unlink()
    elif damage == "truncated":
        (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:100])
    else:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../../../etc/passwd"
        path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="external data files lie beside it"):
        Graph.load(path)


@pytest.mark.filterwarnings("ignore")  # onnx warns about what the damage left
def test_random_damage_never_escapes(tmp_path: Path) -> None:
    data = student().data
    rng = np.random.default_rng(0)
    path = tmp_path / "a.onnx"
    for _ in range(300):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[position] = int(rng.integers(256))
        path.write_bytes(bytes(damaged))
        try:
            graph = Graph.load(path)
            str(graph)
            fuse(graph)
        except HydraError:
            pass


def test_random_bytes_never_escape(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for size in (1, 2, 3, 8, 50, 1000):
        for _ in range(50):
            with pytest.raises(HydraError):
                Graph.parse(rng.bytes(size))
