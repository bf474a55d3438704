"""Pictures as a model takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydra_edge.errors import ArtifactError, InputError
from hydra_edge.vqa.images import ImageFormat, read_image


def test_channels_size_and_range(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, :2, 0] = 255
    pixels[:, 2:, 2] = 102
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", ImageFormat(2, 4))
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, pixels.transpose(2, 0, 1) / 255, atol=1e-6)
    normal = read_image(tmp_path / "x.png", ImageFormat(2, 4, (1, 0, 0), (1, 1, 0.4)))
    np.testing.assert_allclose(normal[:, 0, 3], [-1, 0, 1], atol=1e-6)
    assert read_image(tmp_path / "x.png", ImageFormat(5, 3)).shape == (3, 5, 3)


def test_grey_and_transparent_images_are_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (3, 3)).save(tmp_path / f"{mode}.png")
        assert read_image(tmp_path / f"{mode}.png", ImageFormat(3, 3)).shape == (3, 3, 3)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    for path in (tmp_path / "x.png", tmp_path / "none.png"):
        with pytest.raises(ArtifactError, match="cannot be read as an image"):
            read_image(path, ImageFormat(3, 3))
    Image.new("RGB", (30, 30)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="cannot be read as an image"):
        read_image(tmp_path / "half.png", ImageFormat(3, 3))


def test_formats_that_are_none() -> None:
    with pytest.raises(InputError, match="0 x 3"):
        ImageFormat(0, 3)
    with pytest.raises(InputError, match="std"):
        ImageFormat(3, 3, std=(1, 0, 1))
