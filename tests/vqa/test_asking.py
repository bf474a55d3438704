"""Questions to a live engine: what comes out is what the engine said, and when it defers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx_models import tiny_engine
from PIL import Image
from questions import ANSWERS, SIZE, TEXTS, engine, graph, image, tokenizer

from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.prediction import Prediction
from hydra_edge.errors import ArtifactError, InputError
from hydra_edge.ops.ensemble_summary import sigmoid, softmax
from hydra_edge.pipeline import rebuild
from hydra_edge.runtime import load
from hydra_edge.tasks.vqa import reliability
from hydra_edge.vqa import Answerer, DeferRule, equip
from hydra_edge.vqa.asking import SETTINGS, TOKENIZER

QUESTION = "what color is the dog?"


@pytest.mark.parametrize("task", ["vqa", "vqa_sigmoid"])
def test_a_question_through_the_engine_file(task: str, tmp_path: Path) -> None:
    path = equip(engine(task), tokenizer()).save(tmp_path / "e.hydra")
    with load(path, threads=1) as session:
        reply = Answerer(session).ask(image(), QUESTION, top=3)
        tokens = tokenizer().encode([QUESTION])
        logits = session.run(
            {"image": image()[None], "question": tokens}, head_logits=True
        ).head_logits
    prob = (sigmoid if task == "vqa_sigmoid" else softmax)(logits).mean(0)[0]
    order = np.argsort(-prob)[:3]
    assert [answer.text for answer in reply.answers] == [ANSWERS[i] for i in order]
    np.testing.assert_allclose([a.probability for a in reply.answers], prob[order], rtol=1e-5)
    assert reply.question == QUESTION
    assert reply.unknown_words == ("dog",)
    assert reply.defer is None
    assert reply.mutual_information > 0
    total = reply.expected_entropy + reply.mutual_information
    assert reply.predictive_entropy == pytest.approx(total, rel=1e-5)


def test_answers_depend_on_image_and_question() -> None:
    with load(equip(engine(), tokenizer()), threads=1) as session:
        answerer = Answerer(session)
        first = answerer.ask(image(0), TEXTS[0])
        assert answerer.ask(image(1), TEXTS[0]).answers != first.answers
        assert answerer.ask(image(0), TEXTS[1]).answers != first.answers
        replies = answerer.ask_all(np.stack([image(1), image(0)]), [TEXTS[1], TEXTS[0]])
        assert replies[1].predictive_entropy == pytest.approx(first.predictive_entropy, rel=1e-5)


def test_image_files_are_read_as_the_engine_wants_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    equipped = equip(engine(), tokenizer(), mean=mean, std=std)
    array = ((pixels / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", image=array, other=array)
    np.savez(tmp_path / "odd.npz", a=array, b=array)
    with load(equipped, threads=1) as session:
        answerer = Answerer(session)
        expected = answerer.ask(array, TEXTS[0])
        for name in ("x.png", "x.npy", "x.npz"):
            found = answerer.ask(tmp_path / name, TEXTS[0])
            assert found.predictive_entropy == pytest.approx(expected.predictive_entropy, rel=1e-4)
        with pytest.raises(InputError, match=r"odd.npz' holds a, b"):
            answerer.ask(tmp_path / "odd.npz", TEXTS[0])
        with pytest.raises(InputError, match=r"has shape \[1, 3, 2, 2\]"):
            answerer.ask(array[:, :2, :2], TEXTS[0])
        with pytest.raises(InputError, match="0 answers were asked for"):
            answerer.ask(array, TEXTS[0], top=0)


def test_engines_of_features(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones(5, np.float32))
    with load(equip(engine(features=True), tokenizer()), threads=1) as session:
        answerer = Answerer(session)
        assert answerer.form is None
        assert answerer.ask(tmp_path / "x.npy", TEXTS[0]).answers
        with pytest.raises(InputError, match=r"x.png' cannot be shown to the engine"):
            answerer.ask(tmp_path / "x.png", TEXTS[0])


def test_rules_defer_by_their_quantity() -> None:
    prediction = Prediction(
        {
            "mean_prob": np.float32([[0.9, 0.1], [0.6, 0.4]]),
            "predictive_entropy": np.float32([0.3, 0.7]),
            "mutual_information": np.float32([0.2, 0.1]),
        }
    )
    assert DeferRule("probability", 0.7).defers(prediction).tolist() == [False, True]
    assert DeferRule("predictive_entropy", 0.5).defers(prediction).tolist() == [False, True]
    assert DeferRule.parse("mutual_information=0.15").defers(prediction).tolist() == [True, False]


@pytest.mark.parametrize("text", ["", "probability", "probability=x", "luck=3", "probability=nan"])
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(InputError):
        DeferRule.parse(text)


@pytest.mark.parametrize("by", ["probability", "predictive_entropy", "mutual_information"])
def test_a_fitted_rule_is_the_best_there_is(by: str) -> None:
    rng = np.random.default_rng(0)
    prob = rng.dirichlet(np.ones(3), 60)
    doubt = rng.uniform(0, 1, 60)
    scores = rng.choice([0, 0.3, 1], (60, 3))
    arrays = {"mean_prob": prob, "predictive_entropy": doubt, "mutual_information": doubt[::-1]}
    prediction = Prediction(arrays)
    right = scores[np.arange(60), prob.argmax(1)]
    rule = DeferRule.fit(prediction, scores, by)  # type: ignore[arg-type]
    found = reliability(~rule.defers(prediction), right)
    values = prob.max(1) if by == "probability" else arrays[by]
    others = [DeferRule(by, float(v)) for v in [*values, -1.0, 2.0]]  # type: ignore[arg-type]
    assert found == pytest.approx(
        max(reliability(~other.defers(prediction), right) for other in others)
    )
    never = DeferRule.fit(prediction, np.zeros((60, 3)), by)  # type: ignore[arg-type]
    assert never.defers(prediction).all()


def test_the_engines_rule_and_the_callers() -> None:
    always = DeferRule("probability", 2.0)
    with load(equip(engine(), tokenizer(), defer=always), threads=1) as session:
        assert Answerer(session).defer == always
        assert Answerer(session).ask(image(), TEXTS[0]).defer is True
        never = Answerer(session, DeferRule("probability", 0.0))
        assert never.ask(image(), TEXTS[0]).defer is False


def test_assets_survive_a_rebuild() -> None:
    equipped = equip(engine(), tokenizer(), defer=DeferRule("probability", 0.5))
    assert rebuild(equipped).assets == equipped.assets


def test_engines_that_cannot_be_asked() -> None:
    with pytest.raises(InputError, match="holds no tokenizer"), load(engine()) as session:
        Answerer(session)
    with pytest.raises(InputError, match="The engine takes x"):
        equip(tiny_engine(), tokenizer())
    with pytest.raises(InputError, match="does not name its answers"):
        equip(replace(engine(), labels=()), tokenizer())


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"defer": {"by": "probability"}}', '{"mean": [1]}', '{"std": 3}']
)
def test_settings_that_are_none(text: str) -> None:
    assets = {TOKENIZER: tokenizer().to_bytes(), SETTINGS: text.encode()}
    with (
        load(replace(engine(), assets=assets), threads=1) as session,
        pytest.raises(ArtifactError, match=r"'asking.json' cannot be read"),
    ):
        Answerer(session)


def test_settings_are_plain_json() -> None:
    equipped = equip(engine(), tokenizer(), defer=DeferRule("mutual_information", 0.25))
    assert json.loads(equipped.assets[SETTINGS]) == {
        "defer": {"by": "mutual_information", "limit": 0.25},
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    }
    assert isinstance(equipped, Engine)
    assert graph().metadata.labels == ANSWERS
