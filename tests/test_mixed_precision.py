"""The mix inside a budget: it fits, and nothing in it could have fewer bits."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import SAMPLES, labels_for, logits_of, loud_head, student

from hydra_edge import sensitivity
from hydra_edge.errors import InputError, QuantizationError
from hydra_edge.fusion import fuse
from hydra_edge.mixed_precision import Budget, fit
from hydra_edge.quantization import Precision, prepare
from hydra_edge.sensitivity import Study
from hydra_edge.tasks import find

LOW = "int4-weight-only"


def study_of(graph: object, labels: np.ndarray | None = None) -> Study:
    return Study(graph, SAMPLES, labels, prepare(graph, SAMPLES))  # type: ignore[arg-type]


def test_the_sensitive_head_is_kept_and_the_rest_is_not() -> None:
    graph = loud_head()
    labels = labels_for(graph)
    study = study_of(graph, labels)
    alone = {part.name: part.losses["mi"] for part in study.analyze(LOW).parts}
    mix = fit(study, LOW, Budget({"mi": 0.6 * alone["head.2"]}))
    assert "head.2" in mix.kept
    assert len(mix.kept) < 5
    assert mix.precision.head_overrides[2] == "fp16"
    # What it says of itself is what is measured on the graph it returns.
    task = find("classification")
    expected = sensitivity.losses(task, logits_of(mix.graph), logits_of(graph), labels)
    assert mix.losses == pytest.approx(expected, abs=1e-6)
    assert mix.losses["mi"] <= 0.6 * alone["head.2"]
    assert mix.graph.metadata.precision == str(mix.precision)


def test_no_kept_part_could_be_given_up() -> None:
    study = study_of(loud_head())
    budget = Budget({"mi": 0.01})
    mix = fit(study, LOW, budget)
    assert mix.kept
    for name in mix.kept:
        rest = [other for other in mix.kept if other != name]
        heads = {int(other[5:]): "fp16" for other in rest if other.startswith("head.")}
        layers = {other[6:]: "fp16" for other in rest if other.startswith("layer.")}
        lower = Precision(LOW, LOW, heads, layers)
        assert budget.excess(study.losses(study.logits(lower))), name


def test_a_loose_budget_keeps_nothing_and_a_fused_mix_has_a_group_per_precision() -> None:
    graph = loud_head()
    mix = fit(study_of(graph), LOW, Budget({"mi": 10.0}))
    assert mix.kept == ()
    assert mix.precision == Precision(LOW, LOW)
    some = study_of(graph).prepared.apply(Precision(LOW, LOW, {2: "fp16", 0: "fp16"}))
    members = [group.members for group in fuse(some).fusion if group.fused]
    assert sorted(members) == [(0, 2), (1, 3)]


def test_a_budget_nobody_can_keep() -> None:
    with pytest.raises(QuantizationError, match="in fp16 the losses are too large: mi"):
        fit(study_of(student()), "int8", Budget({"mi": 0.0}))


def test_fp32_keeps_any_budget() -> None:
    mix = fit(study_of(student()), "int8", Budget({"mi": 0.0}), "fp32")
    assert mix.losses["mi"] == 0
    assert set(mix.kept) == {"head.0", "head.1", "head.2", "layer.n0"}
    assert mix.precision == Precision()


def test_unknown_figures_are_named_before_the_work() -> None:
    steps: list[str] = []
    graph = student()
    study = Study(graph, SAMPLES, None, prepare(graph, SAMPLES), on_step=steps.append)
    with pytest.raises(InputError, match="There is no figure 'accuracy' to keep inside a budget"):
        fit(study, "int8", Budget({"accuracy": 0.1}))
    with pytest.raises(InputError, match="Unknown precision 'fp17'"):
        fit(study, "int8", Budget({"mi": 0.1}), "fp17")
    assert not steps


def test_parse() -> None:
    assert Budget.parse("accuracy=0.005, mi=0.1") == Budget({"accuracy": 0.005, "mi": 0.1})
    for text in ("accuracy", "mi=much", "", "mi=0.1,"):
        with pytest.raises(InputError, match="is not NAME=NUMBER"):
            Budget.parse(text)
    for value in ("-1", "nan", "inf"):
        with pytest.raises(InputError, match="The budget allows mi"):
            Budget.parse(f"mi={value}")
    with pytest.raises(InputError, match="The budget is empty"):
        Budget({})


def test_nan_is_over_budget() -> None:
    assert Budget({"mi": 1.0}).excess({"mi": float("nan")})
    assert not Budget({"mi": 1.0}).excess({"mi": 1.0, "other": 5.0})
