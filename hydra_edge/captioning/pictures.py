"""Image files as inputs of a captioner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hydra_edge.artifacts.graph import TensorSpec
from hydra_edge.captioning.scenes import Image
from hydra_edge.errors import ArtifactError, InputError, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def open_picture(path: str | Path) -> Any:
    """An image file as RGB.

    Raises:
        ArtifactError: It is missing or no image.
        MissingDependencyError: Pillow is not installed.
    """
    pillow = require("PIL.Image", "captioning")
    try:
        with pillow.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, pillow.DecompressionBombError) as exc:
        raise ArtifactError(
            f"'{path}' cannot be read as an image.",
            f"Pillow says: {str(exc).rstrip('.')}.",
            "Check the path, and that the file is a whole PNG, JPEG, BMP or WebP.",
        ) from exc


def read_picture(path: str | Path, height: int, width: int) -> tuple[Image, tuple[int, int]]:
    """An image file at the size a captioner takes; its sides are scaled by themselves.

    Boxes are fractions of the image, so they fit the file as well.

    Args:
        path: The file.
        height: Of the result.
        width: Of the result.

    Returns:
        ``[3, height, width]`` in 0..1, and the file's own width and height.

    Raises:
        ArtifactError: It is missing or no image.
        MissingDependencyError: Pillow is not installed.
    """
    picture = open_picture(path)
    resampling = require("PIL.Image", "captioning").Resampling.BILINEAR
    scaled = np.asarray(picture.resize((width, height), resampling), np.float32) / 255
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)), picture.size


def size_of(spec: TensorSpec) -> tuple[int, int]:
    """Height and width of the images that an input takes.

    Raises:
        InputError: They are not fixed.
    """
    height, width = (*spec.shape[2:], None, None)[:2]
    if len(spec.shape) != 4 or not isinstance(height, int) or not isinstance(width, int):
        raise InputError(
            f"The input is {spec}.",
            "An image file is scaled to the size that a captioner takes, [B, 3, H, W].",
            "Export the captioner with an example of a fixed size.",
        )
    return height, width
