"""Pictures with boxes and captions on them, and pictures as inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.captioning.captioner import Region
from hydra_edge.captioning.decoding import Caption
from hydra_edge.captioning.drawing import draw, paint
from hydra_edge.captioning.pictures import read_picture, size_of
from hydra_edge.errors import ArtifactError, InputError

pillow = pytest.importorskip("PIL.Image")
BLUE, PINK = (0, 114, 178), (170, 40, 100)


def region(box: tuple[float, float, float, float], doubt: float) -> Region:
    words = ("a", "red", "circle", "<end>")
    doubts = np.full(4, doubt)
    caption = Caption(np.asarray([2, 3, 4, 0]), -1.0, doubts * 2, doubts, doubts)
    return Region(box, 0.9, 0.01, 0.02, 3, "a red circle", words, caption)


def test_a_box_has_the_colour_of_its_doubt() -> None:
    picture = pillow.new("RGB", (100, 50), (255, 255, 255))
    plain = np.asarray(paint(picture, []))
    for doubt, colour, other in ((0.0, BLUE, PINK), (0.5, PINK, BLUE)):
        found = np.asarray(paint(picture, [region((0.1, 0.2, 0.5, 0.8), doubt)]))
        left, top, right, bottom = 74, 74, 330, 266  # of 640 × 320, and a margin of 10
        edge = found[(top + bottom) // 2, left + 1 : left + 4]
        assert (edge == colour).all(1).any()
        inside = found[(top + bottom) // 2, (left + right) // 2]
        assert inside.tolist() == [255, 255, 255]
        assert not (found[:330, :650] == other).all(-1).any()
    assert plain.shape[1] > 640


def test_a_file(tmp_path: Path) -> None:
    picture = pillow.new("RGB", (1000, 700), (200, 200, 200))
    path = draw(picture, [region((0, 0, 1, 1), 0.1)] * 3, tmp_path / "drawn.png")
    with pillow.open(path) as drawn:
        assert drawn.format == "PNG"
        assert drawn.size[0] > 1000
        assert drawn.size[1] == 720
    with pytest.raises(InputError, match="is no picture that can be drawn"):
        draw(picture, [], tmp_path / "drawn.txt")


def test_a_picture_as_input(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 4), np.uint8)
    pixels[..., 1], pixels[..., 3] = 255, 255
    pillow.fromarray(pixels).save(tmp_path / "green.png")
    image, size = read_picture(tmp_path / "green.png", 8, 8)
    assert size == (40, 20)
    assert image.dtype == np.float32
    assert image[:, 4, 4].tolist() == [0, 1, 0]
    assert size_of(TensorSpec("image", "float32", ("batch", 3, 8, 9))) == (8, 9)
    with pytest.raises(InputError, match="scaled to the size"):
        size_of(TensorSpec("image", "float32", ("batch", 3, "h", "w")))
    with pytest.raises(ArtifactError, match=r"missing\.png' cannot be read as an image"):
        read_picture(tmp_path / "missing.png", 8, 8)
