"""From pixels to captions through compiled programs, against torch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from captioners import (
    GRID,
    HIDDEN,
    OPTIONS,
    SIZE,
    WORDS,
    engine,
    ensemble,
    graphs,
    images,
    network,
    painted,
)

import hydra_edge as he
from hydra_edge.captioning.benchmarking import Contender, benchmark_captioners
from hydra_edge.captioning.boxes import suppress
from hydra_edge.captioning.captioner import CaptionOptions, Describer, Region
from hydra_edge.captioning.exporting import export_captioner
from hydra_edge.captioning.models import EngineModel, MembersModel
from hydra_edge.captioning.networks import summarize_votes
from hydra_edge.captioning.recording import record
from hydra_edge.costs import cost
from hydra_edge.errors import InputError
from hydra_edge.verification import verify

ANY = CaptionOptions(score=0.05, overlap=0.5, most=4, words=6)


@torch.no_grad()
def expected(made: object, pixels: np.ndarray, options: CaptionOptions) -> list[list[list[int]]]:
    """Words of the kept regions, by plain torch, one region at a time."""
    votes, states = made.encode(torch.from_numpy(pixels))  # type: ignore[attr-defined]
    boxes, scores, *_ = summarize_votes(votes)
    found = []
    for index in range(len(pixels)):
        kept = suppress(
            boxes[index].numpy(),
            scores[index].numpy(),
            overlap=options.overlap,
            score=options.score,
            most=options.most,
        )
        rows = []
        for cell in kept:
            state, last, words = states[index, cell][None], torch.tensor([0]), []
            for _ in range(options.words + 1):
                logits, state = made.step(last, state)  # type: ignore[attr-defined]
                last = logits.softmax(-1).mean(0).argmax(-1)
                words.append(int(last))
                if words[-1] == 0:
                    break
            rows.append(words)
        found.append(rows)
    return found


def words_of(regions: list[list[Region]]) -> list[list[list[int]]]:
    return [[region.caption.words.tolist() for region in each] for each in regions]


@pytest.mark.parametrize(
    ("kind", "made"), [("student", lambda: network(3, 7, loud=3.0)), ("ensemble", ensemble)]
)
def test_compiled_captions_are_those_of_torch(kind: str, made: object) -> None:
    pixels = images(3, seed=4)
    with he.load(engine(kind), threads=1) as session:
        session.self_test()
        found = Describer(EngineModel(session), ANY).describe(pixels)
    assert words_of(found) == expected(made(), pixels, ANY)  # type: ignore[operator]
    assert any(found)


def test_the_heads_fuse_by_the_ordinary_pass() -> None:
    fused = he.fuse(graphs("student")["step"])
    heads = [group for group in fused.fusion if group.fused]
    assert [(group.heads, group.ops) for group in heads] == [(3, ("Gemm", "Relu", "Gemm"))]
    assert fused.metadata.labels == WORDS
    assert fused.metadata.task == "dense_captioning"


def test_members_one_after_another_are_the_merged_ensemble() -> None:
    made = ensemble()
    engines = [he.compile(export_captioner(m, images(1)), options=OPTIONS) for m in made.members]
    sessions = [he.load(one, threads=1) for one in engines]
    pixels = images(3, seed=4)
    with he.load(engine("ensemble"), threads=1) as merged:
        left = Describer(EngineModel(merged), ANY).describe(pixels)
        right = Describer(MembersModel([EngineModel(s) for s in sessions]), ANY).describe(pixels)
        wide = CaptionOptions(score=0.05, most=2, beam=3, words=4)
        beams = [
            words_of(Describer(model, wide).describe(pixels))
            for model in (EngineModel(merged), MembersModel([EngineModel(s) for s in sessions]))
        ]
    for session in sessions:
        session.close()
    assert words_of(left) == words_of(right)
    assert beams[0] == beams[1]
    for ours, theirs in zip(
        *([r for each in side for r in each] for side in (left, right)), strict=True
    ):
        # fp32, summed in another order; mutual information is a difference of two entropies
        np.testing.assert_allclose(ours.box, theirs.box, atol=1e-5)
        np.testing.assert_allclose(ours.caption.mutual, theirs.caption.mutual, atol=1e-4)
        np.testing.assert_allclose(ours.caption.total, theirs.caption.total, atol=1e-4)
        assert ours.score_mi == pytest.approx(theirs.score_mi, abs=1e-4)
        assert ours.box_spread == pytest.approx(theirs.box_spread, abs=1e-4)


def test_doubts_of_a_caption_are_sums() -> None:
    with he.load(engine(), threads=1) as session:
        (regions,) = Describer(EngineModel(session), ANY).describe(images(1, seed=4))
    region = regions[0]
    assert region.total == pytest.approx(region.expected + region.mutual, abs=1e-4)
    assert region.per_word["mutual"] == pytest.approx(region.mutual / len(region.words))
    assert region.mutual > 0.01
    data = json.loads(json.dumps(region.to_json()))
    assert data["caption"] == region.text
    assert sum(word["mutual"] for word in data["words"]) == pytest.approx(region.mutual)


def test_nothing_is_found() -> None:
    with he.load(engine(), threads=1) as session:
        options = CaptionOptions(score=0.999)
        assert Describer(EngineModel(session), options).describe(images(2)) == [[], []]
        with pytest.raises(InputError, match="Nothing was found on 2 images"):
            record(EngineModel(session), images(2), options)


def test_int8_of_recorded_inputs_is_verified_program_by_program() -> None:
    with he.load(engine(), threads=1) as session:
        fed = record(EngineModel(session), images(24, seed=1), ANY)
    stored = {
        name: he.quantize(graph, "int8", calibration=fed[name]) if name in fed else graph
        for name, graph in graphs("student").items()
    }
    int8 = he.compile({n: he.fuse(g) for n, g in stored.items()}, options=OPTIONS, unfused=stored)
    assert int8.precision == "encode: int8; step: int8; reorder: fp32"
    for name in ("encode", "step"):
        assert verify(he.only(int8, name), graphs("student")[name], fed[name]).passed, name
    other = network(3, 8, loud=3.0)
    wrong = export_captioner(other, images(1))["encode"]
    result = verify(he.only(int8, "encode"), wrong, fed["encode"])
    assert any("state differs" in failure for failure in result.failures)


def test_a_benchmark_of_whole_images() -> None:
    scenes = painted(6, seed=3)
    with (
        he.load(engine(), threads=1) as student,
        he.load(engine("ensemble"), threads=1) as merged,
    ):
        report, answers = benchmark_captioners(
            {"student": Contender((student,)), "ensemble": Contender((merged,))},
            scenes,
            reference="ensemble",
            shifted={"noise": painted(4, seed=4)},
            options=ANY,
            protocol=he.Protocol(
                batches=(1, 2), warmup_s=0.0, window_s=0.01, min_windows=2, max_windows=2,
                max_seconds=1.0, cold_samples=0,
            ),
        )  # fmt: skip
        with pytest.raises(InputError, match="A batch of 7 images is to be timed"):
            benchmark_captioners(
                {"student": Contender((student,))},
                scenes,
                reference="student",
                protocol=he.Protocol(batches=(7,)),
            )
        with pytest.raises(InputError, match="the reference 'other'"):
            benchmark_captioners({"student": Contender((student,))}, scenes, reference="other")
    assert {label: len(each) for label, each in answers.items()} == {"student": 10, "ensemble": 10}
    row = report.session("student")
    assert 0 <= row.quality["map"] <= row.quality["detection_map"] <= 1
    assert "mi_rank_correlation" not in report.session("ensemble").quality
    assert he.Report.from_json(report.to_json()) == report
    assert report.latency("ensemble", 2).p50_ms > 0
    said = [len(r.caption.words) for each in answers["student"][:6] for r in each]
    parts = {name: cost(p.graph).flops_per_sample for name, p in engine().programs.items()}
    assert row.flops_per_sample == pytest.approx(parts["encode"] + parts["step"] * sum(said) / 6)


def test_an_engine_of_other_programs() -> None:
    single = he.only(engine(), "step")
    with (
        he.load(single, threads=1) as session,
        pytest.raises(InputError, match="The engine has no program 'encode'"),
    ):
        EngineModel(session)
    with pytest.raises(InputError, match="0 members have no common vocabulary"):
        MembersModel([])
    with pytest.raises(InputError, match=r"Boxes above 1.0 were asked for"):
        CaptionOptions(score=1.0)


def test_reordering_in_the_engine_is_that_of_numpy() -> None:
    with he.load(engine(), threads=1) as session:
        width = session.programs["reorder"].inputs[0].shape[1]
        state = np.random.default_rng(0).normal(size=(6, int(width))).astype(np.float32)
        rows = np.asarray([3, 3, 0, 5, 1, 1])
        picked = session.programs["reorder"].run({"state": state, "row": rows})["picked"]
        np.testing.assert_array_equal(picked, state[rows])
        assert width == HIDDEN + 8
        assert session.programs["encode"].inputs[0].shape[1:] == (3, SIZE, SIZE)
        assert session.programs["encode"].outputs[0].shape[1:] == (GRID * GRID, 4)
