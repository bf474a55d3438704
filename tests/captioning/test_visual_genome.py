"""Visual Genome's files: a tiny set of the same format, and files of another one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hydra_edge.captioning.visual_genome import VisualGenome
from hydra_edge.errors import ArtifactError, InputError

pillow = pytest.importorskip("PIL.Image")


def region(number: int, x: int, y: int, width: int, height: int, phrase: str) -> dict[str, object]:
    sides = {"x": x, "y": y, "width": width, "height": height}
    return {"region_id": number, "image_id": 1, "phrase": phrase, **sides}


REGIONS = [
    {
        "id": 1,
        "regions": [
            region(1, 0, 0, 20, 10, "A red HAT, on a man's head."),
            region(2, 30, 10, 100, 100, "the hat"),  # reaches beyond the image
            region(3, 5, 5, 5, 5, " ".join(["word"] * 16)),
            region(4, 50, 5, 5, 5, "outside"),
            region(5, 0, 0, 3, 3, "…"),
        ],
    },
    {"id": 2, "regions": [region(6, 0, 0, 5, 5, "a hat")]},
    {"id": 3, "regions": [region(7, 0, 0, 5, 5, "lies elsewhere")]},
]
SIZES = [{"image_id": 1, "width": 80, "height": 40}, {"image_id": 2, "width": 10, "height": 10}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "region_descriptions.json").write_text(json.dumps(REGIONS))
    (tmp_path / "image_data.json").write_text(json.dumps(SIZES))
    (tmp_path / "images").mkdir()
    pillow.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "images" / "1.png")
    pillow.new("L", (10, 10), 128).save(tmp_path / "images" / "2.jpg")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path


def opened(folder: Path, **options: object) -> VisualGenome:
    path = folder / "region_descriptions.json"
    return VisualGenome(path, folder / "images", (8, 16), **options)  # type: ignore[arg-type]


def test_scenes(folder: Path) -> None:
    scenes = list(opened(folder))
    assert [scene.name for scene in scenes] == ["1", "2"]
    first = scenes[0]
    assert first.captions == ("a red hat on a mans head", "the hat")
    np.testing.assert_allclose(first.boxes, [[0, 0, 0.5, 0.5], [0.75, 0.5, 1, 1]])
    assert first.image.shape == (3, 8, 16)
    np.testing.assert_allclose(first.image[:, 3, 3], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(scenes[1].image, 128 / 255, atol=0.02)  # grey, and JPEG


def test_boxes_refer_to_the_sizes_that_are_given(folder: Path) -> None:
    scenes = opened(folder, sizes=folder / "image_data.json")
    np.testing.assert_allclose(scenes[0].boxes[0], [0, 0, 0.25, 0.25])
    assert scenes[0].captions[-1] == "outside"  # the image is larger than the file


def test_splits_words_and_vocabulary(folder: Path) -> None:
    assert [scene.name for scene in opened(folder, ids=[2, 7])] == ["2"]
    assert opened(folder, words=2)[0].captions == ("the hat",)
    assert opened(folder).vocabulary(least=3).words[2:] == ("a", "hat")
    assert len(opened(folder)) == 2


def test_nothing_is_left(folder: Path) -> None:
    with pytest.raises(InputError, match="has a region in"):
        opened(folder, ids=[99])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read as a file of Visual Genome"),
        ("{}", "it holds no list"),
        ('[{"id": 1}]', "lacks something: KeyError"),
        ('[{"id": 1, "regions": [{"x": 1}]}]', "lacks something"),
        (
            '[{"id": 1, "regions": [{"x": 1, "y": 1, "width": 1, "height": 1, "phrase": 3}]}]',
            "lack",
        ),
        ("[7]", "lacks something"),
    ],
)
def test_files_of_another_format(folder: Path, text: str, reason: str) -> None:
    (folder / "region_descriptions.json").write_text(text)
    with pytest.raises(ArtifactError, match=reason):
        opened(folder)


def test_sizes_of_another_format(folder: Path) -> None:
    (folder / "image_data.json").write_text('[{"image_id": 1}]')
    with pytest.raises(ArtifactError, match=r"image_data\.json"):
        opened(folder, sizes=folder / "image_data.json")
    with pytest.raises(ArtifactError, match="cannot be read as a file of Visual Genome"):
        opened(folder, sizes=folder / "missing.json")


def test_an_image_that_is_none(folder: Path) -> None:
    (folder / "images" / "2.jpg").write_text("hello")
    with pytest.raises(ArtifactError, match="cannot be read as an image"):
        opened(folder)[1]
