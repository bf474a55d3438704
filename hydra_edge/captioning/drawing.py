"""A picture with its regions: boxes, captions, and how sure each is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra_edge.artifacts.files import write_atomic
from hydra_edge.captioning.captioner import Region
from hydra_edge.errors import InputError, require

_LEAST_SIDE = 640  # a small picture is enlarged, or its captions would cover it
_MARGIN, _LINE = 10, 24
_BACKGROUND, _TEXT, _FAINT = (250, 250, 248), (30, 30, 30), (110, 110, 110)
# From agreement to disagreement, all dark enough for white text: Wong 2011, Nature Methods 8, 441.
_COLOURS = ((0, 114, 178), (0, 158, 115), (213, 94, 0), (170, 40, 100))
_LIMITS = (0.02, 0.08, 0.25)  # nats of mutual information per word, between the colours
_AGREEMENT = ("heads agree", "mostly", "hardly", "disagree")
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def draw(picture: Any, regions: Sequence[Region], path: str | Path) -> Path:
    """Draw regions on a picture, with a list of captions beside it.

    A box has the colour of its caption's mutual information per word, and is drawn thinner where an
    object is less likely. Words on which the heads disagree are underlined.

    Args:
        picture: Of Pillow, in RGB.
        regions: What was found on it.
        path: File to write: .png, .jpg or .webp.

    Returns:
        The path written.

    Raises:
        InputError: The file has another suffix.
        ArtifactError: It cannot be written.
        MissingDependencyError: Pillow is not installed.
    """
    import io

    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise InputError(
            f"'{path}' is no picture that can be drawn.",
            f"Pictures are written as {', '.join(_FORMATS)}.",
            "Name a .png file.",
        )
    stream = io.BytesIO()
    paint(picture, regions).save(stream, _FORMATS[path.suffix.lower()])
    return write_atomic(path, stream.getvalue())


def paint(picture: Any, regions: Sequence[Region]) -> Any:
    """`draw` without a file: the picture, in Pillow's own form."""
    pillow = require("PIL.Image", "captioning")
    drawing = require("PIL.ImageDraw", "captioning")
    fonts = require("PIL.ImageFont", "captioning")
    scale = max(1.0, _LEAST_SIDE / max(picture.size))
    width, height = (round(side * scale) for side in picture.size)
    font, small = fonts.load_default(17), fonts.load_default(14)
    lines = len(regions) * (2 * _LINE + 8) + 2 * _LINE + 3 * _MARGIN
    column = round(max([280.0, *(font.getlength(region.text) + 60 for region in regions)]))
    canvas = pillow.new(
        "RGB", (width + column + 3 * _MARGIN, max(height, lines) + 2 * _MARGIN), _BACKGROUND
    )
    nearest = scale >= 2  # pixels that can be seen should look like pixels
    resampling = pillow.Resampling.NEAREST if nearest else pillow.Resampling.BILINEAR
    canvas.paste(picture.resize((width, height), resampling), (_MARGIN, _MARGIN))
    pen = drawing.Draw(canvas)
    for number, region in reversed(list(enumerate(regions, 1))):
        _frame(pen, region, number, (width, height), font)
    left, top = width + 2 * _MARGIN, _MARGIN
    for number, region in enumerate(regions, 1):
        _entry(pen, region, number, (left, top), font, small)
        top += 2 * _LINE + 8
    _legend(pen, (left, canvas.size[1] - 2 * _MARGIN - _LINE), small)
    return canvas


def _level(region: Region) -> int:
    doubt = region.per_word["mutual"]
    return sum(doubt >= limit for limit in _LIMITS)


def _frame(pen: Any, region: Region, number: int, size: tuple[int, int], font: Any) -> None:
    """One box, its number in a corner inside the picture."""
    colour = _COLOURS[_level(region)]
    corners = [round(_MARGIN + part * size[axis % 2]) for axis, part in enumerate(region.box)]
    stroke = 2 + round(2 * region.score)
    pen.rectangle(corners, outline=(255, 255, 255), width=stroke + 2)
    pen.rectangle(
        [corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1],
        outline=colour,
        width=stroke,
    )
    text = str(number)
    wide = font.getlength(text) + 10
    top = corners[1] - 22 if corners[1] - 22 >= _MARGIN else corners[1]
    pen.rectangle([corners[0], top, corners[0] + wide, top + 22], fill=colour)
    pen.text((corners[0] + 5, top + 1), text, (255, 255, 255), font)


def _entry(
    pen: Any, region: Region, number: int, place: tuple[int, int], font: Any, small: Any
) -> None:
    """A caption of the list, and its figures below."""
    left, top = place
    colour = _COLOURS[_level(region)]
    pen.rectangle([left, top, left + 24, top + 22], fill=colour)
    pen.text((left + 12, top + 11), str(number), (255, 255, 255), font, anchor="mm")
    x = left + 34.0
    for word, doubt in zip(region.words, region.caption.mutual, strict=True):
        if word not in region.text.split():  # the end
            continue
        pen.text((x, top + 1), word, _TEXT, font)
        long = font.getlength(word)
        level = sum(doubt >= limit for limit in _LIMITS)
        if level > 1:
            pen.line([x, top + 22, x + long, top + 22], _COLOURS[level], 2)
        x += long + font.getlength(" ")
    figures = (
        f"object {region.score:.0%}   total {region.total:.2f}   "
        f"data {region.expected:.2f}   model {region.mutual:.2f} nats"
    )
    pen.text((left + 34, top + _LINE), figures, _FAINT, small)


def _legend(pen: Any, place: tuple[int, int], font: Any) -> None:
    left, top = place
    for colour, text in zip(_COLOURS, _AGREEMENT, strict=True):
        pen.rectangle([left, top + 4, left + 12, top + 16], fill=colour)
        pen.text((left + 17, top + 1), text, _FAINT, font)
        left += round(font.getlength(text)) + 32
