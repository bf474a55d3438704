"""Arrays from files and from other libraries, and every way they can be wrong."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_edge.artifacts.arrays import (
    any_batch,
    check_arrays,
    load_arrays,
    load_dataset,
    to_numpy,
)
from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.errors import ArtifactError, HydraError, InputError

X = np.arange(12, dtype=np.float32).reshape(4, 3)
SPECS = (TensorSpec("x", "float32", ("batch", 3)),)
TWO = (*SPECS, TensorSpec("ids", "int64", ("batch",)))


def npy(array: np.ndarray, *, pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return stream.getvalue()


def lying_npy(shape: str, data: bytes = b"") -> bytes:
    """A header that claims more than is there."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (118 - len(header) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def raw_npy(header: str) -> bytes:
    """A header of any text."""
    return b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + f"{header}\n".encode()


# files


def test_files_round_trip(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    np.savez_compressed(tmp_path / "b.npz", x=X, y=X[0])
    assert list(load_arrays(tmp_path / "a.npy")) == [""]
    found = load_arrays(str(tmp_path / "b.npz"))
    assert list(found) == ["x", "y"]
    np.testing.assert_array_equal(found["x"], X)


BAD_FILES = {
    "text": b"hello, this is text\n" * 10,
    "empty": b"",
    "pickle": pickle.dumps([1, 2]),
    "objects": npy(np.asarray([{}, []], dtype=object), pickled=True),
    "truncated": npy(X)[:-5],
    "half a header": npy(X)[:20],
    "huge": lying_npy("(1152921504606846976,)"),
    "large": lying_npy("(100000000000,)"),
    "negative": lying_npy("(-4,)"),
    "no shape": lying_npy("'abc'"),
    "half a zip": b"PK\x03\x04" + b"\0" * 30,
    "size beyond 64 bits": lying_npy("(99999999999999999999999,)"),
    # numpy reads the header as Python text, and lets through what each of these makes that raise.
    "header that never ends": raw_npy("{'descr': '<f4', ("),
    "text that never ends": raw_npy("'''"),
    "header that is no Python": raw_npy("  x\n y"),
    "header with a list as key": raw_npy("{[]: 1}"),
    "header with half a type": raw_npy(
        "{'descr': ('<f4',), 'fortran_order': False, 'shape': (1,)}"
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data.npy"
    path.write_bytes(BAD_FILES[kind])
    with pytest.raises(ArtifactError, match=r"data.npy' is not a usable .npy or .npz file"):
        load_arrays(path)


@pytest.mark.parametrize("kind", ["text", "objects", "truncated", "huge", "large"])
def test_bad_members(tmp_path: Path, kind: str) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", npy(X))
        archive.writestr("y.npy", BAD_FILES[kind])
    with pytest.raises(ArtifactError, match="is not a usable"):
        load_arrays(tmp_path / "data.npz")


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ArtifactError, match=r"'readme.txt' is no array"):
        load_arrays(tmp_path / "data.npz")


def test_damaged_compressed_members(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "good.npz", x=np.random.default_rng(0).random(500))
    good = (tmp_path / "good.npz").read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(good), 60):
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.npz").write_bytes(bytes(damaged))
        with contextlib.suppress(HydraError):
            load_arrays(tmp_path / "bad.npz")


@pytest.mark.filterwarnings("ignore")  # numpy remarks on headers that look like Python 2
def test_a_flipped_bit_of_the_header_never_escapes(tmp_path: Path) -> None:
    good, path, refused = npy(X), tmp_path / "bad.npy", 0
    for position in range(0, 8 * 128, 3):
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            load_arrays(path)
        except ArtifactError:
            refused += 1
    assert 130 < refused < 8 * 128 // 3  # some flips only touch padding


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load_arrays(tmp_path / "nothing.npz")
    with pytest.raises(ArtifactError, match="is a folder"):
        load_arrays(tmp_path)


def test_datasets(tmp_path: Path) -> None:
    labels = np.arange(4)
    np.savez(tmp_path / "one.npz", pictures=X, labels=labels)
    inputs, found = load_dataset(tmp_path / "one.npz", SPECS)
    assert list(inputs) == ["x"]
    assert found is not None
    np.testing.assert_array_equal(found, labels)
    np.savez(tmp_path / "two.npz", x=X, ids=labels, extra=X)
    inputs, found = load_dataset(tmp_path / "two.npz", TWO)
    assert (sorted(inputs), found) == (["ids", "x"], None)
    np.savez(tmp_path / "many.npz", x=X, extra=X)
    assert list(load_dataset(tmp_path / "many.npz", SPECS)[0]) == ["x"]
    np.save(tmp_path / "plain.npy", X)
    assert list(load_dataset(tmp_path / "plain.npy", SPECS)[0]) == ["x"]


# other libraries


class OnlyDLPack:
    """An array that offers nothing but DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: object) -> object:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize(
    "value",
    [X, torch.from_numpy(X), OnlyDLPack(X), X.tolist(), memoryview(X)],
    ids=["numpy", "torch", "dlpack", "list", "buffer"],
)
def test_to_numpy(value: object) -> None:
    np.testing.assert_array_equal(to_numpy(value, "x"), X)


def test_torch_types_are_kept() -> None:
    for dtype in (torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8):
        value = torch.zeros(2, dtype=dtype)
        assert str(to_numpy(value, "x").dtype) == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, requires_grad=True),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
        [[1, 2], [3]],
    ],
    ids=["grad", "bfloat16", "meta", "sparse", "ragged"],
)
def test_what_is_no_array_on_the_cpu(value: object) -> None:
    with pytest.raises(InputError, match="The value for 'image' cannot be read as an array"):
        to_numpy(value, "image")


def test_gradients_are_named() -> None:
    with pytest.raises(InputError, match=r"requires? grad.*tensor.detach\(\).cpu\(\)"):
        to_numpy(torch.ones(2, requires_grad=True), "x")


@pytest.mark.parametrize("value", ["text", b"bytes", None, object(), {"x": X}, ["a", "b"]])
def test_what_has_no_numbers(value: object) -> None:
    with pytest.raises(InputError, match="not an array of numbers"):
        to_numpy(value, "x")


# checks


def test_check_arrays_orders_and_makes_contiguous() -> None:
    found = check_arrays({"ids": np.arange(8)[::2], "x": np.asfortranarray(X)}, TWO)
    assert list(found) == ["x", "ids"]
    assert all(array.flags.c_contiguous for array in found.values())
    np.testing.assert_array_equal(found["x"], X)


def test_scalars_keep_their_rank() -> None:
    specs = (*SPECS, TensorSpec("t", "float32", ()))
    assert (
        check_arrays({"x": X, "t": np.float32(3)[()] + np.zeros((), np.float32)}, specs)["t"].shape
        == ()
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "The input 'x' is missing"),
        ({"x": X}, "The input 'ids' is missing"),
        ({"x": X, "ids": np.arange(4), "z": X}, "There is no input 'z'. The inputs are x: float32"),
        ({"x": X.astype(np.float64), "ids": np.arange(4)}, r"dtype float64.*x.astype\('float32'\)"),
        ({"x": X.astype(">f4"), "ids": np.arange(4)}, "dtype >f4"),
        ({"x": X[:, :2], "ids": np.arange(4)}, r"shape \[4, 2\]. Declared is x: float32\[batch, 3"),
        ({"x": X[0], "ids": np.arange(4)}, r"shape \[3\]"),
        ({"x": X[None], "ids": np.arange(4)}, r"shape \[1, 4, 3\]"),
        ({"x": X, "ids": np.arange(3)}, r"different batch sizes: {'x': 4, 'ids': 3}"),
        ({"x": X[:0], "ids": np.arange(0)}, "The batch is empty"),
    ],
)
def test_check_arrays_refuses(values: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_arrays(values, TWO)


def test_any_batch_opens_axis_0_only() -> None:
    specs = (
        TensorSpec("a", "float32", (4, 3)),
        TensorSpec("b", "float32", ("n", 3)),
        TensorSpec("c", "float32", ()),
    )
    assert [spec.shape for spec in any_batch(specs)] == [("batch", 3), ("n", 3), ()]
