"""Formats of a teacher's outputs: what is read back, how many bytes, and that the error is true."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hydra_edge.errors import DistillationError, InputError
from hydra_edge.teacher_formats import Errors, Format, is_softmax, merged


def logits(*shape: int) -> torch.Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("form", "size"), [(Format("fp32"), 400), (Format("fp16"), 200), (Format("top-k", 8), 34)]
)
def test_bytes_are_those_of_the_array(form: Format, size: int) -> None:
    assert form.bytes_per_sample([100]) == size
    encoded = form.encode(logits(7, 100))
    assert encoded.nbytes == 7 * size
    assert encoded.dtype == form.dtype([100])


def test_fp32_is_exact_and_fp16_nearly() -> None:
    x = logits(9, 2, 50)
    assert np.array_equal(Format("fp32").decode(Format("fp32").encode(x), 50), x.numpy())
    half = Format("fp16").decode(Format("fp16").encode(x), 50)
    np.testing.assert_allclose(half, x.numpy(), rtol=2**-11, atol=1e-6)
    with pytest.raises(DistillationError, match=r"A member gives 70000.*fp16 ends at 65504"):
        Format("fp16").encode(torch.tensor([[7e4]]))


@pytest.mark.parametrize("inner", [(), (3,)])
def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(inner: tuple[int, ...]) -> None:
    x, form = logits(6, *inner, 40), Format("top-k", 5)
    restored = torch.from_numpy(form.decode(form.encode(x), 40))
    expected, got = x.softmax(-1).double(), restored.softmax(-1).double()
    values, which = expected.topk(5, -1)
    # Log-probabilities down to -10 in fp16: half a unit is 2^-8.
    torch.testing.assert_close(got.gather(-1, which), values, rtol=6e-3, atol=0)
    rest = 1 - values.sum(-1)
    torch.testing.assert_close(1 - got.gather(-1, which).sum(-1), rest, rtol=2e-2, atol=1e-4)
    others = got.scatter(-1, which, torch.nan).numpy()
    spread = np.nanmax(others, -1) - np.nanmin(others, -1)
    assert (spread < 1e-7).all()


def test_a_certain_member_survives_top_k() -> None:
    x = torch.full((1, 20), -1e6)
    x[0, 3] = 1e6
    restored = Format("top-k", 2).decode(Format("top-k", 2).encode(x), 20)
    assert np.isfinite(restored).all()
    assert torch.from_numpy(restored).softmax(-1)[0, 3] == 1


def test_errors_are_what_was_lost() -> None:
    x, form = logits(10, 30), Format("top-k", 3)
    errors, twice = Errors(True, (1.0, 4.0)), Errors(True, (1.0,))
    y = torch.from_numpy(form.decode(form.encode(x), 30))
    errors.add(x, y)
    for part in (slice(0, 4), slice(4, 10)):
        twice.add(x[part], y[part])
    found = errors.summary()
    difference = (x.softmax(-1) - y.softmax(-1)).abs()
    name = "probability_error at temperature 1"
    assert found[name]["max"] == pytest.approx(float(difference.max()))
    assert found[name]["mean"] == pytest.approx(float(difference.mean()))
    divergence = torch.nn.functional.kl_div(y.log_softmax(-1), x.softmax(-1), reduction="batchmean")
    assert found["kl_nats at temperature 1"]["mean"] == pytest.approx(float(divergence), rel=1e-4)
    assert found["kl_nats at temperature 4"]["mean"] > 0
    assert twice.summary()[name] == pytest.approx(found[name])
    halves = [(4, Errors(True, (1.0,))), (6, Errors(True, (1.0,)))]
    halves[0][1].add(x[:4], y[:4])
    halves[1][1].add(x[4:], y[4:])
    joined = merged([(count, part.summary()) for count, part in halves])
    assert joined[name] == pytest.approx(found[name])
    assert merged([]) == {}


def test_outputs_that_are_no_logits_are_measured_themselves() -> None:
    errors = Errors(is_softmax("regression"), (1.0,))
    errors.add(torch.ones(2, 3), torch.ones(2, 3) + 0.5)
    assert errors.summary() == {"output_error": {"mean": 0.5, "max": 0.5}}
    assert is_softmax("classification")


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(InputError, match=r"Unknown format 'int8'.*fp32, fp16 and top-k"):
        Format("int8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top_k is 0"):
        Format("top-k", 0)
    with pytest.raises(InputError, match=r"format is top-k, the task regression.*Use fp16"):
        Format("top-k", 2).check("regression", [10])
    for classes in (8, 70000):
        with pytest.raises(InputError, match=f"top_k is 8 for {classes} classes"):
            Format("top-k", 8).check("classification", [classes])
    Format("top-k", 8).check("classification", [9])
    Format("fp16").check("regression", [2])
