"""The generated data set: answers follow from the scene, images show it, questions alone do not."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest

from hydra_edge.vqa import scenes
from hydra_edge.vqa.answers import consensus
from hydra_edge.vqa.scenes import CELL, COLORS, GRID, PLACES, SHAPES, SIZE, Question, Scene, Thing

DATA = scenes.generate(1300, 3)


def solve(text: str, scene: Scene) -> str:
    """The answer, found from the words of the question without the generator's help."""
    words = text.rstrip("?").replace("objects", "object").split()
    colors = [word for word in words if word in COLORS]
    shapes = [word.rstrip("s") for word in words if word.rstrip("s") in SHAPES]
    fitting = [
        thing
        for thing in scene
        if (not colors or thing.color in colors) and (not shapes or thing.shape in shapes)
    ]
    if "how" in words:
        return str(len(fitting))
    if "color" in words:
        return fitting[0].color
    if "shape" in words:
        return fitting[0].shape
    if "where" in words or "part" in words:
        return PLACES[fitting[0].cell]
    if len(colors) == 2:
        first, second = (next(t for t in scene if t.color == color) for color in colors)
        a, b = divmod(first.cell, GRID), divmod(second.cell, GRID)
        holds = {"left": a[1] < b[1], "right": a[1] > b[1], "above": a[0] < b[0]}
        holds["below"] = a[0] > b[0]
        return "yes" if next(holds[word] for word in words if word in holds) else "no"
    if words[0] in ("is", "do"):
        return "yes" if fitting else "no"
    place = " ".join(words[words.index("the") + 1 :])
    there = [str(thing) for thing in scene if PLACES[thing.cell] == place]
    return there[0] if there else "nothing"


def test_answers_follow_from_the_scene() -> None:
    for scene, question in zip(DATA.scenes, DATA.questions, strict=True):
        assert solve(question.text, scene) == question.answer, (question, scene)
    assert {question.kind for question in DATA.questions} == set(scenes.KINDS)


def test_the_same_seed_gives_the_same_set_and_another_another() -> None:
    again, other = scenes.generate(50, 3), scenes.generate(50, 4)
    assert again.questions == scenes.generate(50, 3).questions
    np.testing.assert_array_equal(again.images, scenes.generate(50, 3).images)
    assert other.questions != again.questions
    assert not np.array_equal(other.images, again.images)


def test_images_show_the_scene() -> None:
    assert DATA.images.shape == (1300, 3, SIZE, SIZE)
    assert DATA.images.dtype == np.float32
    assert DATA.images.min() >= 0
    assert DATA.images.max() <= 1
    for image, scene in zip(DATA.images[:200], DATA.scenes, strict=False):
        filled = {thing.cell: thing for thing in scene}
        for cell in range(GRID * GRID):
            row, column = (CELL * part for part in divmod(cell, GRID))
            area = image[:, row : row + CELL, column : column + CELL]
            middle = area[:, 3:5, 3:5].mean((1, 2))
            colored = np.ptp(middle) > 0.3
            assert colored == (cell in filled), (cell, scene)
            if cell in filled:
                nearest = min(
                    COLORS,
                    key=lambda name: float(np.abs(middle - 0.9 * np.array(COLORS[name])).sum()),
                )
                assert nearest == filled[cell].color


def test_shapes_look_different() -> None:
    images = scenes.paint(tuple((Thing("red", shape, 4),) for shape in SHAPES), 0)
    drawn = {tuple((image[0] > 0.6).ravel()) for image in images}
    assert len(drawn) == len(SHAPES)
    assert scenes.paint((), 0).shape == (0, 3, SIZE, SIZE)
    assert np.ptp(scenes.paint(((),), 0)) < 0.4  # nothing but noise


def test_answers_are_balanced_within_a_kind() -> None:
    """The most frequent answer to each text does not get far."""
    large = scenes.generate(2500, 5).questions
    by_text: dict[str, Counter[str]] = {}
    for question in large:
        by_text.setdefault(question.text, Counter())[question.answer] += 1
    guessed = sum(counts.most_common(1)[0][1] for counts in by_text.values())
    assert guessed / len(large) < 0.5


def test_ten_people_agree_on_most_answers() -> None:
    scores = [consensus(question.answers).get(question.answer, 0.0) for question in DATA.questions]
    assert all(len(question.answers) == 10 for question in DATA.questions)
    assert np.mean(np.asarray(scores) == 1) > 0.99
    several = [question for question in DATA.questions if len(set(question.answers)) > 1]
    assert 0.2 < len(several) / len(DATA.questions) < 0.8


def test_mistakes_are_of_the_same_kind() -> None:
    said = Counter(
        answer
        for question in DATA.questions
        if question.kind == "count"
        for answer in question.answers
    )
    assert set(said) <= {"0", "1", "2", "3", "4"}


@pytest.mark.parametrize("kind", sorted(scenes.KINDS))
def test_every_kind_can_be_asked_of_some_scenes(kind: str) -> None:
    rng = Random(0)  # noqa: S311 - nothing here is secret
    asked = [scenes.KINDS[kind](scenes.draw_scene(rng), rng) for _ in range(200)]
    found = [pair for pair in asked if pair is not None]
    assert len(found) > 10
    assert all(isinstance(Question(kind, *pair, ()), Question) for pair in found)
