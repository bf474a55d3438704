"""A prediction is a mapping with attributes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from hydra_edge.artifacts.prediction import Prediction

P = Prediction({"mean_prob": np.ones((2, 3)), "mutual_information": np.zeros(2)})


def test_mapping_and_attributes() -> None:
    assert P["mean_prob"] is P.mean_prob
    assert list(P) == ["mean_prob", "mutual_information"]
    assert len(P) == 2
    assert "mean" not in P
    assert {name: array.shape for name, array in P.items()} == {
        "mean_prob": (2, 3),
        "mutual_information": (2,),
    }
    assert {"mean_prob", "keys"} <= set(dir(P))


def test_repr_shows_shapes() -> None:
    assert repr(P) == "Prediction(mean_prob[2, 3], mutual_information[2])"


def test_missing_names_say_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no 'mean'; it has mean_prob, mutual_information\.$"):
        _ = P.mean
    with pytest.raises(AttributeError, match=r"Ask for it: run\(x, head_logits=True\)"):
        _ = P.head_logits
    with pytest.raises(KeyError):
        P["mean"]
    assert not hasattr(P, "_private")


def test_the_given_mapping_is_copied() -> None:
    arrays = {"a": np.ones(1)}
    prediction = Prediction(arrays)
    arrays["b"] = np.ones(1)
    assert list(prediction) == ["a"]


@pytest.mark.parametrize(
    "clone",
    [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))],  # noqa: S301
)
def test_copies(clone: object) -> None:
    again = clone(P)  # type: ignore[operator]
    np.testing.assert_array_equal(again.mean_prob, P.mean_prob)


def test_numpy_can_save_it(tmp_path: object) -> None:
    np.savez(f"{tmp_path}/p.npz", **P)
    assert sorted(np.load(f"{tmp_path}/p.npz")) == sorted(P)
