"""Files in the format of VQA v2, made here, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from questions import write_split

from hydra_edge.errors import ArtifactError, InputError
from hydra_edge.vqa.answers import Vocabulary
from hydra_edge.vqa.files import VqaFiles
from hydra_edge.vqa.images import ImageFormat


def test_images(tmp_path: Path) -> None:
    split = VqaFiles.load(*write_split(tmp_path))
    assert [entry.question_id for entry in split] == [9000, 9001, 25000]
    assert [entry.image_id for entry in split] == [9, 9, 25]
    assert split[1].question == "How many?"
    assert len(split) == len(split[0].answers) - 7 == 3
    vocabulary = Vocabulary.of([entry.answers for entry in split], minimum_count=1)
    assert vocabulary.answers == ("2", "red", "yes")
    scores = vocabulary.scores([entry.answers for entry in split])
    np.testing.assert_allclose(scores, [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    form = ImageFormat(3, 4, mean=(0.5, 0.2, 0), std=(0.5, 1, 1))
    picture = split.picture(2, form)
    assert picture.shape == (3, 3, 4)
    assert picture.dtype == np.float32
    np.testing.assert_allclose(picture[:, 0, 0], [1, 0, 0], atol=1e-6)
    with pytest.raises(InputError, match="no size was given"):
        split.picture(0)


def test_features(tmp_path: Path) -> None:
    split = VqaFiles.load(*write_split(tmp_path, features=True))
    features = split.picture(2)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, np.full((2, 5), 25))
    np.save(split.pictures[25].with_suffix(".npy"), np.ones(3))
    split.pictures[25].unlink()
    again = VqaFiles.load(*sorted_paths(tmp_path))
    np.testing.assert_array_equal(again.picture(2), np.ones(3))
    np.savez(again.pictures[9], a=np.ones(3), b=np.ones(3))
    with pytest.raises(ArtifactError, match="holds a, b"):
        again.picture(0)


def sorted_paths(folder: Path) -> tuple[Path, Path, Path]:
    (questions,), (annotations,) = folder.glob("*questions.json"), folder.glob("*annotations.json")
    return questions, annotations, folder / "pictures"


def test_a_test_set_has_no_annotations(tmp_path: Path) -> None:
    questions, _, pictures = write_split(tmp_path)
    split = VqaFiles.load(questions, None, pictures)
    assert all(entry.answers == () for entry in split)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    questions, annotations, pictures = write_split(tmp_path)
    said = json.loads(annotations.read_text())
    (pictures / "COCO_train2014_000000000025.png").unlink()
    (pictures / "readme.txt").write_text("25")
    with pytest.raises(InputError, match=r"1 images are not in .*, the first is 25"):
        VqaFiles.load(questions, annotations, pictures)
    annotations.write_text(json.dumps({"annotations": said["annotations"][1:]}))
    with pytest.raises(InputError, match="Question 25000 has no annotation"):
        VqaFiles.load(questions, annotations, pictures)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "TypeError"),
        ("{", "JSONDecodeError"),
        ('{"questions": 3}', "is no list"),
        ('{"questions": [{"question": "x"}]}', "KeyError"),
        ('{"annotations": []}', "KeyError"),
    ],
)
def test_other_json(tmp_path: Path, text: str, reason: str) -> None:
    questions, annotations, pictures = write_split(tmp_path)
    questions.write_text(text)
    with pytest.raises(ArtifactError, match="holds no VQA questions") as caught:
        VqaFiles.load(questions, annotations, pictures)
    assert reason in caught.value.why


def test_annotations_without_answers_and_missing_files(tmp_path: Path) -> None:
    questions, annotations, pictures = write_split(tmp_path)
    annotations.write_text('{"annotations": [{"question_id": 1, "image_id": 2}]}')
    with pytest.raises(ArtifactError, match="annotations without answers"):
        VqaFiles.load(questions, annotations, pictures)
    with pytest.raises(ArtifactError, match="is no folder"):
        VqaFiles.load(questions, None, tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="does not exist"):
        VqaFiles.load(tmp_path / "nothing.json", None, pictures)
