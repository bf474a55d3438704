"""Generated scenes: coloured shapes of two sizes, and what each is and where it lies.

Whatever a caption says can be seen, but not always clearly: sizes near the limit, colours side by
side, noise, and neighbours that lie as much above as to the left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from hydra_edge.captioning.scenes import Boxes, Image, Scene
from hydra_edge.captioning.vocabulary import Vocabulary

SIZE = 64
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.65, 0.2),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.9, 0.85, 0.15),
    "purple": (0.55, 0.2, 0.7),
    "orange": (0.95, 0.55, 0.1),
    "cyan": (0.2, 0.8, 0.85),
    "pink": (0.95, 0.55, 0.75),
}
_SMALL, _LARGE = (6.0, 7.5), (10.0, 13.0)  # half widths in pixels
_MOST = 3
_APART = 1.15  # centres lie further apart than this times the sum of the half widths
_OVERSAMPLING = 2
Mask = npt.NDArray[np.float64]
# Where a shape is, in half widths from its centre.
_INSIDE: Mapping[str, Callable[[Mask, Mask], npt.NDArray[np.bool_]]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.95,
    "triangle": lambda u, v: (v <= 1) & (np.abs(u) <= (v + 1) / 2),
    "diamond": lambda u, v: np.abs(u) + np.abs(v) <= 1,
    "cross": lambda u, v: (
        (np.minimum(np.abs(u), np.abs(v)) <= 0.33) & (np.maximum(np.abs(u), np.abs(v)) <= 1)
    ),
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.3),
}

SHAPES = tuple(_INSIDE)


def vocabulary() -> Vocabulary:
    """All words of the captions."""
    words = " ".join(("a small large left right of above below another", *COLOURS, *SHAPES))
    return Vocabulary.of([words])


def draw(count: int, seed: int, *, noise: tuple[float, float] = (0.0, 0.1)) -> list[Scene]:
    """Scenes of one to three shapes; a seed gives the same ones every time.

    Args:
        count: How many.
        seed: Of everything random in them.
        noise: Smallest and largest standard deviation of the pixels' noise.
    """
    rng = np.random.default_rng(seed)
    return [_scene(rng, noise, 0.05, f"{seed}-{index}") for index in range(count)]


def draw_shifted(count: int, seed: int) -> dict[str, list[Scene]]:
    """Scenes as no member was trained on: much noise, and colours half-way between two names."""
    rng = np.random.default_rng(seed)
    return {
        "noisy": [_scene(rng, (0.2, 0.35), 0.05, f"noisy-{i}") for i in range(count)],
        "mixed": [_scene(rng, (0.0, 0.12), 0.3, f"mixed-{i}") for i in range(count)],
    }


def draw_transfer(count: int, seed: int) -> Image:
    """Images to distil on ``[count, 3, 64, 64]``: clear ones, and ones on which members disagree.

    No image of `draw_shifted` is among them, but noise and mixed colours are.
    """
    rng = np.random.default_rng(seed)
    kinds = (((0.0, 0.12), 0.05), ((0.05, 0.3), 0.1), ((0.0, 0.2), 0.25), ((0.0, 0.12), 0.05))
    return np.stack([_scene(rng, *kinds[index % len(kinds)], "").image for index in range(count)])


def _scene(rng: np.random.Generator, noise: tuple[float, float], mixing: float, name: str) -> Scene:
    wanted = int(rng.integers(1, _MOST + 1))
    placed: list[tuple[float, float, float]] = []
    for _ in range(40):
        if len(placed) == wanted:
            break
        half = float(rng.uniform(*(_SMALL, _LARGE)[int(rng.integers(2))]))
        x, y = rng.uniform(half + 1, SIZE - half - 1, 2)
        clear = (max(abs(x - u), abs(y - v)) > _APART * (half + h) for u, v, h in placed)
        if all(clear):
            placed.append((float(x), float(y), half))
    image = np.full((3, SIZE, SIZE), rng.uniform(0.25, 0.55)) + rng.uniform(-0.05, 0.05, (3, 1, 1))
    names = list(COLOURS)
    described = []
    for x, y, half in placed:
        colour, other = rng.choice(len(names), 2, replace=False)
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        share = rng.uniform(0, mixing)
        paint = (1 - share) * np.asarray(COLOURS[names[colour]])
        paint = paint + share * np.asarray(COLOURS[names[other]]) + rng.normal(0, 0.03, 3)
        mask, rows, columns = _mask(shape, x, y, half)
        part = image[:, rows, columns]
        image[:, rows, columns] = part * (1 - mask) + np.clip(paint, 0, 1)[:, None, None] * mask
        size = "small" if half < (_SMALL[1] + _LARGE[0]) / 2 else "large"
        described.append(f"a {size} {names[colour]} {shape}")
    image = image + rng.normal(0, rng.uniform(*noise), image.shape)
    boxes = np.asarray([[x - h, y - h, x + h, y + h] for x, y, h in placed]) / SIZE
    pixels = np.clip(image, 0, 1).astype(np.float32)
    return Scene(pixels, boxes, tuple(_captions(boxes, described)), name)


def _captions(boxes: Boxes, described: list[str]) -> list[str]:
    """Each shape by itself and, where there are others, how it lies to the nearest."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    captions = []
    for index, own in enumerate(described):
        others = [other for other in range(len(described)) if other != index]
        if not others:
            captions.append(own)
            continue
        nearest = min(others, key=lambda o: float(np.abs(centres[o] - centres[index]).max()))
        across, down = centres[nearest] - centres[index]
        if abs(across) > abs(down):
            where = "left of" if across > 0 else "right of"
        else:
            where = "above" if down > 0 else "below"
        captions.append(f"{own} {where} another")
    return captions


def _mask(shape: str, x: float, y: float, half: float) -> tuple[Mask, slice, slice]:
    """How much of each pixel a shape covers, within the rows and columns that it can cover."""
    rows, columns = (slice(max(0, int(c - half)), min(SIZE, int(c + half) + 1)) for c in (y, x))
    down, across = (
        (np.arange((s.stop - s.start) * _OVERSAMPLING) + 0.5) / _OVERSAMPLING + s.start
        for s in (rows, columns)
    )
    inside = _INSIDE[shape]((across[None] - x) / half, (down[:, None] - y) / half)
    blocks = inside.reshape(len(down) // _OVERSAMPLING, _OVERSAMPLING, -1, _OVERSAMPLING)
    return np.asarray(blocks.mean((1, 3))), rows, columns
