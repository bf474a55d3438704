"""A generated data set that takes looking: coloured shapes in places, and questions about them.

A scene is a 24 × 24 image with two to four objects, one a cell of a 3 × 3 grid. A question asks for
a colour, a shape, a number, a place, what is in a place, whether something is there, or how two
objects lie to each other; the answer depends on both question and image. Answers of one kind of
question are about equally frequent, so that a model that does not look does not get far. Ten
people answer each question, and now and then one of them uses another word or is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]

GRID = 3
CELL = 8  # pixels
SIZE = GRID * CELL
PEOPLE = 10
COLORS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.7, 0.15),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.9, 0.85, 0.1),
}
SHAPES = ("circle", "square", "triangle")
PLACES = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
# What else people say for the same thing.
SYNONYMS: Mapping[str, str] = {
    "red": "crimson",
    "green": "dark green",
    "blue": "navy",
    "yellow": "gold",
    "circle": "disc",
    "square": "box",
    "triangle": "pyramid",
    "center": "middle",
    "nothing": "empty",
    "top": "upper middle",
    "bottom": "lower middle",
}
_SPRITE = 7  # pixels: an object moves by one in its cell
_SYNONYM_SHARE = 0.04  # of single answers
_ERROR_SHARE = 0.03


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        color: Its colour.
        shape: Its shape.
        cell: Its place, an index into `PLACES`.
    """

    color: str
    shape: str
    cell: int

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: What it asks for: see `KINDS`.
        text: The question.
        answer: The right answer.
        answers: What ten people said.
    """

    kind: str
    text: str
    answer: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Scenes:
    """Questions, each with an image of its own.

    Attributes:
        images: ``[N, 3, 24, 24]`` in 0..1.
        scenes: What is on them.
        questions: One per image.
    """

    images: Images
    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]

    @property
    def texts(self) -> list[str]:
        """The questions' texts."""
        return [question.text for question in self.questions]


def generate(count: int, seed: int) -> Scenes:
    """Draw ``count`` scenes and ask one question about each; the same seed gives the same set.

    Args:
        count: N.
        seed: Of everything that is random.
    """
    rng = Random(seed)  # noqa: S311 - nothing here is secret
    scenes: list[Scene] = []
    questions: list[Question] = []
    while len(scenes) < count:
        kind = _ROUND[len(scenes) % len(_ROUND)]
        scene = draw_scene(rng)
        asked = KINDS[kind](scene, rng)
        if asked is not None:
            text, answer = asked
            scenes.append(scene)
            questions.append(Question(kind, text, answer, _people(answer, kind, rng)))
    order = rng.sample(range(count), count)
    shuffled = tuple(scenes[i] for i in order)
    return Scenes(paint(shuffled, seed), shuffled, tuple(questions[i] for i in order))


def draw_scene(rng: Random) -> Scene:
    """Two to four objects in different places."""
    cells = sorted(rng.sample(range(GRID * GRID), rng.randint(2, 4)))
    # Few colours and shapes in some scenes, so that there is something to count.
    colors = rng.sample(list(COLORS), rng.randint(1, len(COLORS)))
    shapes = rng.sample(SHAPES, rng.randint(1, len(SHAPES)))
    return tuple(Thing(rng.choice(colors), rng.choice(shapes), cell) for cell in cells)


def paint(scenes: tuple[Scene, ...], seed: int) -> Images:
    """Images of scenes, ``[N, 3, 24, 24]``: every object moves a little and has its own shade."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((len(scenes), 3, SIZE, SIZE), np.float32)
    images = 0.03 * images + rng.uniform(0.1, 0.4, (len(scenes), 1, 1, 1)).astype(np.float32)
    things = [(index, thing) for index, scene in enumerate(scenes) for thing in scene]
    if not things:
        return images
    owners = np.asarray([index for index, _ in things])
    cells = np.asarray([thing.cell for _, thing in things])
    colors = np.asarray([COLORS[thing.color] for _, thing in things], np.float32)
    colors *= rng.uniform(0.8, 1.0, (len(things), 1))
    masks = np.stack([_MASKS[thing.shape] for _, thing in things])
    moves = rng.integers(0, CELL - _SPRITE + 1, (2, len(things)))
    top, left = cells // GRID * CELL + moves[0], cells % GRID * CELL + moves[1]
    for y, x in np.ndindex(_SPRITE, _SPRITE):  # all objects at once, pixel by pixel
        hit = masks[:, y, x]
        images[owners[hit], :, top[hit] + y, left[hit] + x] = colors[hit]
    return np.clip(images, 0, 1)


def _masks() -> dict[str, npt.NDArray[np.bool_]]:
    y, x = np.mgrid[:_SPRITE, :_SPRITE] - (_SPRITE - 1) / 2
    radius = _SPRITE / 2
    return {
        "circle": (x**2 + y**2 <= (radius - 0.3) ** 2),
        "square": (np.maximum(abs(x), abs(y)) <= radius - 1),
        "triangle": (abs(x) <= (y + radius) / 2),
    }


_MASKS = _masks()


# ---- questions: each gives text and answer, or None where the scene does not allow it

_Asked = tuple[str, str] | None


def _one(scene: Scene, attribute: str, rng: Random) -> Thing | None:
    """An object that is the only one with its colour or shape."""
    values = [getattr(thing, attribute) for thing in scene]
    alone = [thing for thing, value in zip(scene, values, strict=True) if values.count(value) == 1]
    return rng.choice(alone) if alone else None


def _color(scene: Scene, rng: Random) -> _Asked:
    thing = _one(scene, "shape", rng)
    if thing is None:
        return None
    forms = ("what color is the {}?", "what is the color of the {}?")
    return rng.choice(forms).format(thing.shape), thing.color


def _shape(scene: Scene, rng: Random) -> _Asked:
    thing = _one(scene, "color", rng)
    if thing is None:
        return None
    forms = ("what shape is the {} object?", "what is the shape of the {} object?")
    return rng.choice(forms).format(thing.color), thing.shape


def _count(scene: Scene, rng: Random) -> _Asked:
    wanted = rng.randint(0, 3)
    by_shape = rng.random() < 0.5
    names = SHAPES if by_shape else tuple(COLORS)
    values = [thing.shape if by_shape else thing.color for thing in scene]
    fitting = [name for name in names if values.count(name) == wanted]
    if not fitting:
        return None
    name = rng.choice(fitting)
    plural = f"{name}s" if by_shape else f"{name} objects"
    return f"how many {plural} are there?", str(wanted)


def _exists(scene: Scene, rng: Random) -> _Asked:
    there = {(thing.color, thing.shape) for thing in scene}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(there))
        answer = "yes"
    else:  # colour and shape are there, but not together
        colors, shapes = ({pair[i] for pair in there} for i in (0, 1))
        mixed = sorted((c, s) for c in colors for s in shapes if (c, s) not in there)
        if not mixed:
            return None
        color, shape = rng.choice(mixed)
        answer = "no"
    return rng.choice(("is there a {} {}?", "do you see a {} {}?")).format(color, shape), answer


def _where(scene: Scene, rng: Random) -> _Asked:
    thing = _one(scene, "color", rng)
    if thing is None:
        return None
    forms = ("where is the {} object?", "in which part is the {} object?")
    return rng.choice(forms).format(thing.color), PLACES[thing.cell]


def _what(scene: Scene, rng: Random) -> _Asked:
    if rng.random() < 0.05:
        free = sorted(set(range(len(PLACES))) - {thing.cell for thing in scene})
        return f"what is in the {PLACES[rng.choice(free)]}?", "nothing"
    thing = rng.choice(scene)
    return f"what is in the {PLACES[thing.cell]}?", str(thing)


def _relation(scene: Scene, rng: Random) -> _Asked:
    first = _one(scene, "color", rng)
    second = _one(scene, "color", rng)
    if first is None or second is None or first is second:
        return None
    across = rng.choice(("left", "right", "above", "below"))
    a, b = (divmod(thing.cell, GRID) for thing in (first, second))
    apart = b[1] - a[1] if across in ("left", "right") else b[0] - a[0]
    apart = apart if across in ("left", "above") else -apart
    if apart == 0:
        return None
    text = f"{across} of" if across in ("left", "right") else across
    answer = "yes" if apart > 0 else "no"
    return f"is the {first.color} object {text} the {second.color} object?", answer


KINDS: Mapping[str, Callable[[Scene, Random], _Asked]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "exists": _exists,
    "where": _where,
    "what": _what,
    "relation": _relation,
}
_ROUND = (*KINDS, *(kind for kind in KINDS if kind != "relation"))  # the hardest kind is rarer


def _people(answer: str, kind: str, rng: Random) -> tuple[str, ...]:
    """Ten answers: mostly the right one, sometimes another word for it, rarely a wrong one."""
    said = []
    for _ in range(PEOPLE):
        chance = rng.random()
        if chance < _ERROR_SHARE:
            said.append(_mistake(answer, kind, rng))
        elif chance < _ERROR_SHARE + _SYNONYM_SHARE:
            said.append(SYNONYMS.get(answer, answer))
        else:
            said.append(answer)
    return tuple(said)


def _mistake(answer: str, kind: str, rng: Random) -> str:
    others: Mapping[str, tuple[str, ...]] = {
        "color": tuple(COLORS),
        "shape": SHAPES,
        "count": ("0", "1", "2", "3", "4"),
        "exists": ("yes", "no"),
        "relation": ("yes", "no"),
        "where": PLACES,
    }
    if kind == "what":
        return f"{rng.choice(list(COLORS))} {rng.choice(SHAPES)}"
    return rng.choice([other for other in others[kind] if other != answer])
