"""VQA v2 as it is published: questions, annotations, and a folder of images or of features.

``v2_OpenEnded_mscoco_*_questions.json`` holds ``{"questions": [{question_id, image_id, question},
…]}`` and ``v2_mscoco_*_annotations.json`` holds ``{"annotations": [{question_id, image_id, answers:
[{answer}, …]}, …]}`` with ten answers each. A file of the folder is an image, such as
``COCO_train2014_000000000009.jpg``, or features, such as ``9.npy``: its name ends in the image's
number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hydra_edge.artifacts.arrays import load_arrays
from hydra_edge.artifacts.files import read_bytes
from hydra_edge.errors import ArtifactError, InputError
from hydra_edge.vqa.images import FORMATS, ImageFormat, read_image

Array = npt.NDArray[np.generic]
_FEATURES = (".npy", ".npz")
_NUMBER = re.compile(r"(\d+)$")


@dataclass(frozen=True)
class Entry:
    """One question about one image.

    Attributes:
        question_id: The data set's number for it.
        image_id: The data set's number for the image.
        question: What is asked.
        answers: What people said; empty for a test set, whose annotations nobody has.
    """

    question_id: int
    image_id: int
    question: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class VqaFiles(Sequence[Entry]):
    """A split of VQA v2.

    Attributes:
        entries: Its questions, in the order of the questions file.
        pictures: Where the image or the features of each image lie, by its number.
    """

    entries: tuple[Entry, ...]
    pictures: Mapping[int, Path] = field(repr=False)

    @classmethod
    def load(
        cls, questions: str | Path, annotations: str | Path | None, folder: str | Path
    ) -> VqaFiles:
        """Read the two JSON files and find the pictures.

        Args:
            questions: ``v2_OpenEnded_mscoco_*_questions.json``.
            annotations: ``v2_mscoco_*_annotations.json``; None for a test set.
            folder: Holds one file per image: a picture, ``.npy`` or ``.npz``, whose name ends in
                the image's number.

        Returns:
            The split. Pictures are read one by one, see `picture`.

        Raises:
            ArtifactError: A file is missing or of another format.
            InputError: A question has no annotation or no picture.
        """
        said = {} if annotations is None else _answers(annotations)
        entries = []
        for item in _items(questions, "questions"):
            number = int(item["question_id"])
            if annotations is not None and number not in said:
                raise InputError(
                    f"Question {number} has no annotation in '{annotations}'.",
                    "The two files do not belong together, or one is cut short.",
                    "Pass the questions and annotations of the same split.",
                )
            entries.append(
                Entry(number, int(item["image_id"]), str(item["question"]), said.get(number, ()))
            )
        pictures = _pictures(Path(folder))
        missing = sorted({entry.image_id for entry in entries} - set(pictures))
        if missing:
            raise InputError(
                f"{len(missing)} images are not in '{folder}', the first is {missing[0]}.",
                f"It holds {len(pictures)} files whose names end in a number.",
                "Pass the folder of this split's images or features.",
            )
        return cls(tuple(entries), pictures)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        return self.entries[index]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def picture(self, index: int, form: ImageFormat | None = None) -> npt.NDArray[np.float32]:
        """What the model sees for question ``index``, without the batch axis.

        Args:
            index: Of the question.
            form: Size and normalization of images; features are taken as they are.

        Returns:
            An image ``[3, height, width]``, or features as they were stored.

        Raises:
            ArtifactError: The file cannot be read.
            InputError: It is an image and no form was given.
        """
        path = self.pictures[self.entries[index].image_id]
        if path.suffix in _FEATURES:
            return _features(path)
        if form is None:
            raise InputError(
                f"'{path.name}' is an image, and no size was given.",
                "A model takes images of one size.",
                "Pass form=ImageFormat(height, width).",
            )
        return read_image(path, form)


def _items(path: str | Path, name: str) -> list[dict[str, Any]]:
    data = read_bytes(path, "a VQA v2 JSON file")
    try:
        items = json.loads(data)[name]
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise TypeError(f"'{name}' is no list of objects")
        for item in items:
            int(item["question_id"]), int(item["image_id"])
        return items
    except (ValueError, TypeError, KeyError) as exc:
        raise ArtifactError(
            f"'{path}' holds no VQA {name}.",
            f"Reading it failed: {exc!r}.",
            f"Pass the file of VQA v2 that has '{name}'.",
        ) from exc


def _answers(path: str | Path) -> dict[int, tuple[str, ...]]:
    try:
        return {
            int(item["question_id"]): tuple(str(one["answer"]) for one in item["answers"])
            for item in _items(path, "annotations")
        }
    except (TypeError, KeyError) as exc:
        raise ArtifactError(
            f"'{path}' holds annotations without answers.",
            f"Reading it failed: {exc!r}.",
            "Pass the annotations of VQA v2, which list the answers of ten people.",
        ) from exc


def _pictures(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        raise ArtifactError(
            f"'{folder}' is no folder.", "It should hold images or features.", "Check the path."
        )
    found = {}
    for path in sorted(folder.iterdir()):
        number = _NUMBER.search(path.stem)
        if number and path.suffix.lower() in (*_FEATURES, *FORMATS):
            found[int(number[1])] = path
    return found


def _features(path: Path) -> npt.NDArray[np.float32]:
    arrays = load_arrays(path)
    # Bottom-up features are often stored beside boxes and class names.
    name = next((name for name in ("", "features", "x", "feat") if name in arrays), None)
    if name is None and len(arrays) != 1:
        raise ArtifactError(
            f"'{path}' holds {', '.join(sorted(arrays))}.",
            "It is not clear which are the features.",
            "Call that array 'features'.",
        )
    features = arrays[name] if name is not None else next(iter(arrays.values()))
    return np.asarray(features, np.float32)
