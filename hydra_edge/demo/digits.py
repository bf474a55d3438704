"""The demo's data: scikit-learn's handwritten digits, shifted versions of them, and a transfer set.

The shifted sets are never trained on. The transfer set is what the student learns from: images on
which the members disagree are where the ensemble's uncertainty can be seen, and a plain training
set has hardly any.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from hydra_edge.errors import require

Images = npt.NDArray[np.float32]
SIZE = 8


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 1, 8, 8]`` in 0..1 and labels ``[N]``."""

    train: Images
    train_labels: npt.NDArray[np.int64]
    test: Images
    test_labels: npt.NDArray[np.int64]


def load() -> Digits:
    """1797 digits, 30 % of them for testing, the same split every time."""
    datasets = require("sklearn.datasets", "metrics")
    selection = require("sklearn.model_selection", "metrics")
    bunch = datasets.load_digits()
    images = (bunch.images / 16.0).astype(np.float32)[:, None]
    labels = bunch.target.astype(np.int64)
    train, test, train_labels, test_labels = selection.train_test_split(
        images, labels, test_size=0.3, stratify=labels, random_state=0
    )
    return Digits(train, train_labels, test, test_labels)


def shifted(test: Images) -> dict[str, Images]:
    """Out-of-distribution sets: every test digit turned by 45 to 135 degrees, and uniform noise."""
    ndimage = require("scipy.ndimage", "metrics")
    rng = np.random.default_rng(12345)
    angles = rng.uniform(45, 135, len(test)) * rng.choice([-1, 1], len(test))
    rotated = [
        ndimage.rotate(image[0], angle, reshape=False, order=1)
        for image, angle in zip(test, angles, strict=True)
    ]
    noise = rng.uniform(0, 1, (len(test), 1, SIZE, SIZE))
    return {
        "rotated": np.clip(np.stack(rotated), 0, 1).astype(np.float32)[:, None],
        "noise": noise.astype(np.float32),
    }


@dataclass(frozen=True)
class Jitter:
    """Random rotation (degrees), scale, shift (half widths) and shear, each up to its value."""

    rotation: float
    scale: float = 0.0
    shift: float = 0.0
    shear: float = 0.0


AUGMENTATION = Jitter(12, 0.1, 0.12, 0.1)
_MILD = Jitter(15, 0.15, 0.2, 0.15)
_TURNED = Jitter(180)
_WILD = Jitter(180, 0.3, 0.25, 0.2)


class Painter:
    """Draws random images and distortions from one generator, so that a seed gives one data set."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        """One number per image, shaped to broadcast."""
        values = torch.rand(count, 1, 1, 1, generator=self.generator)
        return values * (high - low) + low

    def jitter(self, images: torch.Tensor, amount: Jitter) -> torch.Tensor:
        """Distort each image in its own way."""
        count = len(images)

        def spread(width: float) -> torch.Tensor:
            return self.uniform(count, -width, width).reshape(count)

        angle = spread(amount.rotation * math.pi / 180)
        wide, high = 1 + spread(amount.scale), 1 + spread(amount.scale)
        cos, sin = torch.cos(angle), torch.sin(angle)
        shear = spread(amount.shear)
        x = torch.stack([cos / wide, (shear - sin) / wide, spread(amount.shift)], 1)
        y = torch.stack([sin / high, cos / high, spread(amount.shift)], 1)
        matrix = torch.stack([x, y], 1)
        grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, align_corners=False)

    def pick(self, images: torch.Tensor, count: int) -> torch.Tensor:
        """Random images, with replacement."""
        return images[torch.randint(len(images), (count,), generator=self.generator)]

    def smooth(self, count: int, points: int) -> torch.Tensor:
        """Random images with only ``points`` × ``points`` degrees of freedom."""
        coarse = torch.rand(count, 1, points, points, generator=self.generator)
        return functional.interpolate(coarse, size=SIZE, mode="bilinear")

    def noise(self, count: int) -> torch.Tensor:
        """Uniform, faint, Gaussian, sparse and smooth noise, in random order."""
        part = count // 6
        shape = (part, 1, SIZE, SIZE)

        def flat() -> torch.Tensor:
            return torch.rand(shape, generator=self.generator)

        floor = self.uniform(part, 0, 0.5)
        normal = torch.randn(shape, generator=self.generator)
        images = torch.cat(
            [
                flat(),
                flat(),
                floor + (1 - floor) * self.uniform(part, 0.1, 1) * flat(),
                self.uniform(part, 0, 1) + self.uniform(part, 0.05, 0.6) * normal,
                flat() * (flat() < self.uniform(part, 0.05, 0.8)),
                self.smooth(part // 2, 2),
                self.smooth(count - 5 * part - part // 2, 4),
            ]
        )
        return images[torch.randperm(count, generator=self.generator)]


def transfer_set(train: Images, count: int = 12000, seed: int = 0) -> Images:
    """The training images and about ``count`` more, from nearly digits to pure noise."""
    painter = Painter(1000 + seed)
    digits = torch.from_numpy(train)

    def pick(size: int) -> torch.Tensor:
        return painter.pick(digits, size)

    def mixed(size: int) -> torch.Tensor:
        share = painter.uniform(size, 0.2, 0.8)
        return share * pick(size) + (1 - share) * painter.jitter(pick(size), AUGMENTATION)

    def patched(size: int) -> torch.Tensor:
        mask = painter.smooth(size, 2) > 0.5
        return torch.where(mask, painter.jitter(pick(size), _WILD), pick(size))

    def veiled(size: int) -> torch.Tensor:
        share = painter.uniform(size, 0.1, 0.9)
        return share * pick(size) + (1 - share) * painter.noise(size)

    def grainy(size: int) -> torch.Tensor:
        grain = torch.randn(size, 1, SIZE, SIZE, generator=painter.generator)
        turned = painter.jitter(pick(size), _TURNED)
        return turned + painter.uniform(size, 0.05, 0.7) * grain

    recipe: list[tuple[float, Callable[[int], torch.Tensor]]] = [
        (0.35, lambda size: painter.jitter(pick(size), _MILD)),
        (0.10, lambda size: painter.jitter(pick(size), _TURNED)),
        (0.10, lambda size: painter.jitter(pick(size), _WILD)),
        (0.12, mixed),
        (0.05, patched),
        (0.17, painter.noise),
        (0.055, veiled),
        (0.055, grainy),
    ]
    parts = [digits, *(draw(int(share * count)) for share, draw in recipe)]
    return torch.cat(parts).clamp(0, 1).numpy()
