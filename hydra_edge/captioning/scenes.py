"""What captioners learn from: images, their regions, and a caption for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]
Boxes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """One image and its regions.

    Attributes:
        image: ``[3, H, W]``, RGB in 0..1.
        boxes: ``[G, 4]``: left, top, right, bottom as fractions of the image.
        captions: One per box, of normalized words with single spaces.
        name: What to call it in messages, or empty.
    """

    image: Image = field(repr=False)
    boxes: Boxes
    captions: tuple[str, ...]
    name: str = ""


def images_of(scenes: Sequence[Scene]) -> Image:
    """``[N, 3, H, W]`` of scenes of one size."""
    return np.stack([scene.image for scene in scenes])
