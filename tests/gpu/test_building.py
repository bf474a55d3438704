"""What every build has in common; whole builds are in tests/backends."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_edge.errors import InputError
from hydra_edge.gpu import building
from hydra_edge.programs import BuildOptions, check_batch


class Cache:
    """A timing cache: what was read, and what it was combined with."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        """Of another device nothing is taken, unless that is asked for."""
        fits = ignore_mismatch or other.data.startswith(b"orin:")
        self.data += other.data if fits else b""
        return fits

    def serialize(self) -> bytes:
        return self.data


class Configuration:
    """TensorRT's, of a device that only takes caches that begin with its name."""

    def __init__(self) -> None:
        self.cache = Cache(b"")

    def create_timing_cache(self, data: bytes) -> Cache:
        return Cache(data)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.data and not cache.data.startswith(b"orin:"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache:
        return self.cache


def test_a_timing_cache_of_another_device_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "t.cache"
    path.write_bytes(b"thor: 1 2")
    configuration = Configuration()
    (note,) = building._load_timings(configuration, path)
    assert "'t.cache' is of another device or version, and was not used" in note
    assert configuration.cache.data == b""
    path.write_bytes(b"orin: 3")
    assert building._load_timings(configuration, path) == []
    assert configuration.cache.data == b"orin: 3"
    assert building._load_timings(configuration, None) == []


def test_what_another_build_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.cache"
    configuration = Configuration()
    assert building._load_timings(configuration, path) == []
    configuration.cache = Cache(b"orin: ours")
    path.write_bytes(b"orin: theirs")
    building._save_timings(configuration, path)
    assert path.read_bytes() == b"orin: oursorin: theirs"
    configuration.cache = Cache(b"orin: ours")
    path.write_bytes(b"thor: theirs")
    building._save_timings(configuration, path)
    assert path.read_bytes() == b"orin: ours"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimization_level": 6}, "TensorRT has the levels 0"),
        ({"optimization_level": -1}, "TensorRT has the levels 0"),
        ({"workspace_mb": 0}, "A build needs some scratch memory"),
        ({"dla_core": -1}, "They are counted from 0"),
        ({"timing_cache": Path("no such folder/t.cache")}, "Its folder does not exist"),
        ({"timing_cache": Path()}, "It is a folder"),
        ({"profiles": ((3, 2, 1),)}, "not decreasing"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        BuildOptions(**options)  # type: ignore[arg-type]


def test_options_travel() -> None:
    options = BuildOptions(
        profiles=((1, 1, 1), (2, 4, 8)), workspace_mb=7, refittable=True, timing_cache=Path("x")
    )
    assert options.asked_for() == ("profiles", "workspace_mb", "timing_cache", "refittable")
    assert options.asked_for("tf32", "refittable") == ("refittable",)
    again = BuildOptions.from_json(options.to_json())
    assert again == BuildOptions(profiles=((1, 1, 1), (2, 4, 8)), workspace_mb=7, refittable=True)
    assert BuildOptions.from_json({}) == BuildOptions()
    assert BuildOptions(progress=True).asked_for() == ()


def test_batches() -> None:
    check_batch((1, 1, 1))
    with pytest.raises(InputError, match=r"The batch range is \(0, 1, 1\)"):
        check_batch((0, 1, 1))
