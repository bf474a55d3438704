"""Images as a model takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import ArtifactError, InputError, require

FORMATS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class ImageFormat:
    """What a model expects an image to be.

    Attributes:
        height: Rows.
        width: Columns.
        mean: Taken off each of red, green and blue, which lie in 0..1.
        std: Divides what is left.

    Raises:
        InputError: A size or a divisor is not positive.
    """

    height: int
    width: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or not min(self.std) > 0:
            raise InputError(
                f"The image format is {self.height} x {self.width}, std {self.std}.",
                "Sizes start at 1, and values are divided by std.",
                "Give positive numbers.",
            )


def read_image(path: str | Path, form: ImageFormat) -> npt.NDArray[np.float32]:
    """Read a picture, scale it to the model's size and normalize it.

    Args:
        path: An image file.
        form: What the model expects.

    Returns:
        ``[3, height, width]``: red, green, blue.

    Raises:
        ArtifactError: The file is missing or no image.
        MissingDependencyError: Pillow is not installed.
    """
    pillow = require("PIL.Image", "vqa")
    try:
        with pillow.open(path) as image:
            scaled = image.convert("RGB").resize(
                (form.width, form.height), pillow.Resampling.BILINEAR
            )
            pixels = np.asarray(scaled, np.float32) / 255
    # Damaged files raise SyntaxError, too; a picture of enormous size DecompressionBombError.
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as exc:
        raise ArtifactError(
            f"'{path}' cannot be read as an image.",
            f"Pillow says: {str(exc).rstrip('.')}.",
            f"Pass one of {', '.join(FORMATS)}, or an .npy array.",
        ) from exc
    normal = (pixels - np.asarray(form.mean)) / np.asarray(form.std)
    return np.ascontiguousarray(normal.transpose(2, 0, 1), np.float32)
