"""A tiny engine for questions about 4 x 4 images, made by hand."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
from onnx import TensorProto
from onnx_models import Net, join, linear

from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.graph import Graph, Metadata
from hydra_edge.compilation import CompileOptions, compile
from hydra_edge.exporting import summarize
from hydra_edge.vqa import Tokenizer

ANSWERS = ("yes", "no", "red", "2", "circle")
TEXTS = ("what color is the circle?", "how many are there?", "is it red?")
LENGTH = 6
SIZE = 4


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, LENGTH)


def graph(
    task: str = "vqa", labels: tuple[str, ...] = ANSWERS, heads: int = 3, features: bool = False
) -> Graph:
    """Embedded words times pixels, and linear heads: no answer without both."""
    net = Net(seed=4)
    shape: tuple[int | str, ...] = ("batch", 5) if features else ("batch", 3, SIZE, SIZE)
    image = net.input("image", shape)
    tokens = net.input("question", ("batch", LENGTH), TensorProto.INT64)
    width = 5 if features else 3 * SIZE * SIZE
    pixels = linear(net, net.op("Flatten", image, axis=1), width, 8)
    words = net.op("Gather", net.random(tokenizer().size, 4), tokens, axis=0)
    text = linear(net, net.op("Flatten", words, axis=1), 4 * LENGTH, 8)
    fused = net.op("Tanh", net.op("Mul", pixels, text))
    logits = [linear(net, fused, 8, len(ANSWERS)) for _ in range(heads)]
    made = net.graph(join(net, logits, len(ANSWERS)), Metadata(kind="student"))
    return summarize(made, task, labels=labels)


@cache
def engine(task: str = "vqa", features: bool = False) -> Engine:
    return compile(
        graph(task, features=features), options=CompileOptions(threads=1, lowering="grouped")
    )


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (3, SIZE, SIZE)).astype(np.float32)


def write_split(folder: Path, *, features: bool = False) -> tuple[Path, Path, Path]:
    """Two images with three questions, in the format of VQA v2."""
    from PIL import Image

    pictures = folder / "pictures"
    pictures.mkdir()
    for number in (9, 25):
        if features:
            np.savez(pictures / f"{number}.npz", features=np.full((2, 5), number, np.float64))
        else:
            pixels = np.full((6, 8, 3), (255, 51, 0), np.uint8)
            Image.fromarray(pixels).save(pictures / f"COCO_train2014_{number:012d}.png")
    asked = [
        (9000, 9, "What color is it?", ["red"] * 6 + ["The crimson"] * 3 + ["blue"]),
        (9001, 9, "How many?", ["two"] * 9 + ["2"]),
        (25000, 25, "Is it?", ["yes"] * 10),
    ]
    questions = folder / "v2_OpenEnded_mscoco_train2014_questions.json"
    questions.write_text(
        json.dumps(
            {
                "info": {"version": "2.0"},
                "task_type": "Open-Ended",
                "data_type": "mscoco",
                "data_subtype": "train2014",
                "questions": [
                    {"image_id": image_id, "question": text, "question_id": number}
                    for number, image_id, text, _ in asked
                ],
            }
        )
    )
    annotations = folder / "v2_mscoco_train2014_annotations.json"
    annotations.write_text(
        json.dumps(
            {
                "annotations": [
                    {
                        "question_type": "what",
                        "multiple_choice_answer": said[0],
                        "answers": [
                            {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                            for i, answer in enumerate(said)
                        ],
                        "image_id": image_id,
                        "answer_type": "other",
                        "question_id": number,
                    }
                    for number, image_id, _, said in reversed(asked)
                ]
            }
        )
    )
    return questions, annotations, pictures
