"""The demo's data."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from hydra_edge.demo import digits


def test_split_is_fixed_and_disjoint() -> None:
    data, again = digits.load(), digits.load()
    assert data.train.shape == (1257, 1, 8, 8)
    assert data.test.shape == (540, 1, 8, 8)
    assert np.array_equal(data.test, again.test)
    assert data.train.min() == 0
    assert data.train.max() == 1


def test_shifted_sets_are_fixed_and_in_range() -> None:
    test = digits.load().test
    sets = digits.shifted(test)
    assert set(sets) == {"rotated", "noise"}
    for name, images in sets.items():
        assert images.shape == test.shape
        assert images.dtype == np.float32
        assert 0 <= images.min() <= images.max() <= 1
        assert np.array_equal(images, digits.shifted(test)[name])
        assert np.abs(images - test).mean() > 0.05


def test_transfer_set_holds_no_evaluation_image() -> None:
    data = digits.load()
    transfer = digits.transfer_set(data.train, count=600)
    assert np.array_equal(transfer, digits.transfer_set(data.train, count=600))
    assert not np.array_equal(transfer, digits.transfer_set(data.train, count=600, seed=1))
    assert np.array_equal(transfer[: len(data.train)], data.train)
    assert 0 <= transfer.min() <= transfer.max() <= 1
    seen = {image.tobytes() for image in transfer[len(data.train) :]}
    unseen = np.concatenate([data.test, *digits.shifted(data.test).values()])
    assert not any(image.tobytes() in seen for image in unseen)


def test_jitter_without_amount_changes_nothing() -> None:
    import torch

    images = torch.from_numpy(digits.load().test[:5])
    still = digits.Painter(0).jitter(images, digits.Jitter(0))
    assert torch.allclose(still, images, atol=1e-5)
