"""Visual Genome's region descriptions: ``region_descriptions.json`` and a folder of images.

Text is prepared as DenseCap does: lower case, no punctuation, captions of too many words left out,
words that are too rare unknown. Images are scaled to one size, each side by itself.

Sources: Krishna et al. 2016, arXiv 1602.07332; Johnson et al. 2016, arXiv 1511.07571.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hydra_edge.captioning.pictures import read_picture
from hydra_edge.captioning.scenes import Scene
from hydra_edge.captioning.vocabulary import MAX_WORDS, Vocabulary, words_of
from hydra_edge.errors import ArtifactError, InputError

_IMAGES = (".jpg", ".jpeg", ".png")
_LEAST = 15  # times that DenseCap wants to see a word


@dataclass(frozen=True)
class _Annotation:
    """One region as it stands in the file, in pixels of the original image."""

    left: float
    top: float
    width: float
    height: float
    words: tuple[str, ...]


class VisualGenome:
    """Scenes of Visual Genome, read from disk one at a time; a sequence.

    Args:
        regions: ``region_descriptions.json``.
        images: Folder with the images, ``ID.jpg``; images that lie elsewhere are left out.
        size: Height and width to scale images to.
        sizes: ``image_data.json``, if there is one: the images' sizes that boxes refer to. Without
            it they refer to the files.
        words: Captions with more words are left out.
        ids: Numbers of the images to take, for a split; None for all.

    Raises:
        ArtifactError: A file is missing or of another format.
        InputError: No image is left.
    """

    def __init__(
        self,
        regions: str | Path,
        images: str | Path,
        size: tuple[int, int],
        *,
        sizes: str | Path | None = None,
        words: int = MAX_WORDS,
        ids: Sequence[int] | None = None,
    ) -> None:
        self.size = size
        self._sizes = {} if sizes is None else _sizes_of(Path(sizes))
        wanted = None if ids is None else set(ids)
        files = {
            path.stem: path for path in sorted(Path(images).glob("*")) if path.suffix in _IMAGES
        }
        self._scenes: list[tuple[int, Path, list[_Annotation]]] = []
        for number, found in _regions_of(Path(regions), words):
            path = files.get(str(number))
            if path is not None and found and (wanted is None or number in wanted):
                self._scenes.append((number, path, found))
        if not self._scenes:
            raise InputError(
                f"No image in '{images}' has a region in '{regions}'.",
                f"An image is called by its number, with {', '.join(_IMAGES)}; regions of more "
                f"than {words} words are left out.",
                "Check the folder, and which part of Visual Genome it holds.",
            )

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Scene:
        number, path, found = self._scenes[index]
        image, (width, height) = read_picture(path, *self.size)
        width, height = self._sizes.get(number, (width, height))
        corners = np.asarray([[a.left, a.top, a.left + a.width, a.top + a.height] for a in found])
        boxes = np.clip(corners / [width, height, width, height], 0, 1)
        seen = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
        captions = [
            " ".join(a.words) for a, inside in zip(found, seen.tolist(), strict=True) if inside
        ]
        return Scene(image, boxes[seen], tuple(captions), str(number))

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(len(self)))

    def vocabulary(self, least: int = _LEAST) -> Vocabulary:
        """Words that appear ``least`` times or more; all others are unknown."""
        every = (" ".join(a.words) for _, _, found in self._scenes for a in found)
        return Vocabulary.of(every, least)


def _regions_of(path: Path, most: int) -> Iterator[tuple[int, list[_Annotation]]]:
    """Numbers of images and what stands there about them."""
    for entry in _list_in(path):
        try:
            regions = [
                _Annotation(
                    left=float(region["x"]),
                    top=float(region["y"]),
                    width=float(region["width"]),
                    height=float(region["height"]),
                    words=tuple(words_of(region["phrase"])),
                )
                for region in entry["regions"]
            ]
            number = int(entry["id"] if "id" in entry else entry["image_id"])
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise _odd(path, f"an entry of it lacks something: {exc!r}") from exc
        yield number, [region for region in regions if 0 < len(region.words) <= most]


def _sizes_of(path: Path) -> dict[int, tuple[int, int]]:
    """Width and height of images by number."""
    try:
        return {
            int(entry["image_id"] if "image_id" in entry else entry["id"]): (
                int(entry["width"]),
                int(entry["height"]),
            )
            for entry in _list_in(path)
        }
    except (KeyError, TypeError, ValueError) as exc:
        raise _odd(path, f"an entry of it lacks something: {exc!r}") from exc


def _list_in(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise _odd(path, str(exc)) from exc
    if not isinstance(entries, list):
        raise _odd(path, "it holds no list")
    return entries


def _odd(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"'{path}' cannot be read as a file of Visual Genome.",
        f"It is missing or of another format: {reason.rstrip('.')}.",
        "Use region_descriptions.json and image_data.json as they are downloaded, unpacked.",
    )
