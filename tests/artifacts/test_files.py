"""A failed write leaves the old file; a failed read names the file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hydra_edge.artifacts.files import read_bytes, sha256, write_atomic
from hydra_edge.errors import ArtifactError


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert write_atomic(path, b"one") == path
    write_atomic(str(path), b"two")
    assert read_bytes(path, "bytes") == b"two"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "ours", b"")
    (tmp_path / "theirs").write_bytes(b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "theirs")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failure_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(ArtifactError, match=r"Writing '.*a.bin' failed: No space left.*untouched"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_an_interrupt_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.bin", b"new")
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"folder' is a folder"):
        write_atomic(tmp_path / "folder", b"")
    with pytest.raises(ArtifactError, match=r"The folder '.*missing' is missing or not writable"):
        write_atomic(tmp_path / "missing" / "a.bin", b"")
    with pytest.raises(ArtifactError, match="Cannot write"):
        write_atomic(tmp_path / "file" / "a.bin", b"")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"nothing' does not exist. Expected an engine"):
        read_bytes(tmp_path / "nothing", "an engine")
    with pytest.raises(ArtifactError, match=r"is a folder. Expected an engine"):
        read_bytes(tmp_path, "an engine")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_bytes(tmp_path / "file" / "inside", "an engine")


def test_sha256() -> None:
    assert sha256(b"").startswith("e3b0c44298fc1c14")
