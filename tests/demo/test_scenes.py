"""Generated scenes: the same for a seed, and as their captions say."""

from __future__ import annotations

import numpy as np

from hydra_edge.captioning.vocabulary import UNKNOWN_INDEX
from hydra_edge.demo import scenes


def test_a_seed_gives_the_same_scenes() -> None:
    first, again, other = scenes.draw(5, 1), scenes.draw(5, 1), scenes.draw(5, 2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        assert a.captions == b.captions
    assert not np.array_equal(first[0].image, other[0].image)


def test_captions_say_what_is_there() -> None:
    vocabulary = scenes.vocabulary()
    counts = set()
    for scene in scenes.draw(60, 3, noise=(0.0, 0.0)):
        counts.add(len(scene.boxes))
        rows = vocabulary.encode(scene.captions)
        assert not (rows == UNKNOWN_INDEX).any()
        assert scene.image.min() >= 0
        assert scene.image.max() <= 1
        assert ((scene.boxes >= 0) & (scene.boxes <= 1)).all()
        centres = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
        for index, (box, caption) in enumerate(zip(scene.boxes, scene.captions, strict=True)):
            _, size, colour, shape, *where = caption.split()
            wide = (box[2] - box[0]) * scenes.SIZE
            assert (wide > 15) == (size == "large")
            if shape in ("circle", "square", "diamond", "cross"):  # filled in the middle
                x, y = (centres[index] * scenes.SIZE).astype(int)
                pixel = scene.image[:, y, x]
                distances = {
                    name: float(np.abs(pixel - paint).max())
                    for name, paint in scenes.COLOURS.items()
                }
                assert min(distances, key=distances.__getitem__) == colour
            if len(scene.boxes) == 2:
                across, down = centres[1 - index] - centres[index]
                word = where[0]
                expected = {"left": across, "right": -across, "above": down, "below": -down}[word]
                assert expected > 0
                assert expected >= max(abs(across), abs(down)) - 1e-9
            assert bool(where) == (len(scene.boxes) > 1)
    assert counts == {1, 2, 3}


def test_shifted_and_transfer_sets() -> None:
    shifted = scenes.draw_shifted(3, 4)
    assert {name: len(each) for name, each in shifted.items()} == {"noisy": 3, "mixed": 3}
    assert scenes.draw_transfer(5, 6).shape == (5, 3, 64, 64)
