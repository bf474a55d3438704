"""Predictions on disk: computed once, resumed, checked, and imitated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from students import SAMPLES, SHORT, Samples, assert_equal, make_ensemble, make_student
from torch import nn

from hydra_edge.distillation import distill
from hydra_edge.ensembles import Ensemble
from hydra_edge.errors import ArtifactError, DistillationError, InputError
from hydra_edge.teacher_formats import Format
from hydra_edge.teachers import EnsembleShare
from hydra_edge.teaching import Predictions, Storage, teach

EXACT = Storage(Format("fp32"), block=10)
HALF = Storage(Format("fp16"), block=10, temperatures=(1.0, 4.0))


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(3))


def keep(
    data: object, folder: Path, storage: Storage = EXACT, ensemble: object = None
) -> Predictions:
    teacher = ensemble or make_ensemble()
    return teach(teacher, data, folder, storage, batch_size=4, progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(("storage", "error"), [(EXACT, 0), (HALF, 2e-3)])
def test_what_is_read_is_what_the_members_say(
    data: torch.Tensor, tmp_path: Path, storage: Storage, error: float
) -> None:
    ensemble = make_ensemble()
    kept = keep(data, tmp_path, storage, ensemble)
    with torch.no_grad():
        expected = ensemble.eval()(data).numpy()
    order = np.random.default_rng(0).permutation(SAMPLES)
    # 4 samples at a time here, 25 there: matmuls round differently.
    np.testing.assert_allclose(kept[:, order], expected[:, order], atol=error + 1e-6)
    assert kept[:, [3]].dtype == np.float32
    assert (kept.shape, len(kept), kept.heads) == ((4, SAMPLES, 3), SAMPLES, 4)
    assert kept.errors.keys() == (
        set()
        if not error
        else {f"{n} at temperature {t}" for n in ("probability_error", "kl_nats") for t in (1, 4)}
    )
    per_sample = storage.format.bytes_per_sample([3])
    assert kept.size_bytes == 4 * (SAMPLES * per_sample + 3 * 128)  # 3 files with numpy's header
    assert len(list(tmp_path.rglob("*.npy"))) == 4 * 3
    assert ensemble.members[0].training is False


def test_top_k_goes_through_files(tmp_path: Path, data: torch.Tensor) -> None:
    ensemble = make_ensemble(2, classes=12)
    kept = keep(data, tmp_path, Storage(Format("top-k", 4)), ensemble)
    with torch.no_grad():
        expected = ensemble.eval()(data).softmax(-1)
    got = torch.from_numpy(kept[:, list(range(SAMPLES))]).softmax(-1)
    error = kept.errors["probability_error at temperature 1"]
    assert float((got - expected).abs().max()) == pytest.approx(error["max"], rel=1e-3)
    assert 0 < error["mean"] < error["max"] < 0.2
    assert Predictions.open(tmp_path, verify=True).format == Format("top-k", 4)


def test_a_student_learns_from_files_as_from_members(data: torch.Tensor, tmp_path: Path) -> None:
    kept = keep(data, tmp_path)
    same = teach(
        make_ensemble(),
        data,
        tmp_path / "same",
        Storage(Format("fp32")),
        batch_size=8,
        progress=False,
    )
    from_files = distill(same, make_student(), data, SHORT, progress=False)
    from_members = distill(make_ensemble(), make_student(), data, SHORT, progress=False)
    assert_equal(from_files, from_members)
    with pytest.raises(InputError, match=r"are of 25 other samples; the data holds 25"):
        distill(kept, make_student(), data + 1, SHORT, progress=False)
    online = SHORT.__class__(teacher="online")
    with pytest.raises(InputError, match=r"Predictions are given, but teacher is 'online'"):
        distill(kept, make_student(), data, online, progress=False)
    with pytest.raises(InputError, match="5 heads, the ensemble 4 members"):
        distill(kept, make_student(5), data, SHORT, progress=False)
    with pytest.raises(InputError, match=r"Members slice\(None, 2, None\) were asked for"):
        kept[:2, [0]]


def test_blocks_that_are_there_are_not_computed_again(data: torch.Tensor, tmp_path: Path) -> None:
    """Killed in the second block; then only what is missing or damaged is computed."""
    samples = Samples(data, interrupt=SAMPLES + 14)
    with pytest.raises(KeyboardInterrupt):
        keep(samples, tmp_path)
    files = {p.relative_to(tmp_path): p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")}
    assert len(files) == 4
    with pytest.raises(ArtifactError, match=r"manifest.*does not exist"):
        Predictions.open(tmp_path)
    samples = Samples(data)
    kept = keep(samples, tmp_path)
    assert samples.reads == SAMPLES + 15  # the fingerprint, then the second and third block
    assert (
        files.items()
        <= {p.relative_to(tmp_path): p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")}.items()
    )
    samples = Samples(data)
    keep(samples, tmp_path)
    assert samples.reads == SAMPLES
    expected = kept[:, [21]]
    damaged = tmp_path / "member-002/block-000002.npy"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    Predictions.open(tmp_path)
    with pytest.raises(ArtifactError, match=r"member-002.*is missing, cut off or changed"):
        Predictions.open(tmp_path, verify=True)
    np.testing.assert_array_equal(keep(data, tmp_path)[:, [21]], expected)
    damaged.unlink()
    with pytest.raises(ArtifactError, match=r"Run teach again: it computes this file anew"):
        Predictions.open(tmp_path)
    damaged.with_suffix(".json").write_text("{")
    keep(data, tmp_path)
    assert damaged.read_bytes() == content


def test_a_folder_holds_one_set(data: torch.Tensor, tmp_path: Path) -> None:
    keep(data, tmp_path)
    other = make_ensemble()
    other.members[1][0].bias.data += 1  # type: ignore[index]
    for arguments in ((data + 1,), (data, HALF), (data, EXACT, other)):
        with pytest.raises(ArtifactError, match="was made of other members or data, or in another"):
            keep(arguments[0], tmp_path, *arguments[1:])  # type: ignore[arg-type]


def test_shares_write_their_members_only(data: torch.Tensor, tmp_path: Path) -> None:
    """As processes do that run one after the other; the last one finds all files."""
    ensemble = make_ensemble()
    share = EnsembleShare.of(ensemble, [1, 3])
    with pytest.raises(ArtifactError, match=r"lacks member-000/block-000000\.npy and 5 more"):
        keep(data, tmp_path, EXACT, share)
    assert {path.name for path in tmp_path.iterdir()} == {"member-001", "member-003"}


def test_manifests_that_cannot_be_read_are_named(data: torch.Tensor, tmp_path: Path) -> None:
    keep(data, tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(ArtifactError, match=r"is of version 2.*Update hydra-edge"):
        Predictions.open(tmp_path)
    for text in ("{", json.dumps({"version": 1}), "[]"):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=r"cannot be read.*Run teach again"):
            Predictions.open(tmp_path)


def test_members_that_fail_are_named(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x[:, :1] != 7)

    ensemble = Ensemble([nn.Identity(), Broken()])
    data = torch.ones(12, 2)
    data[9] = 7
    with pytest.raises(DistillationError, match="Member 1 gives NaN or inf for sample 9"):
        keep(data, tmp_path, EXACT, ensemble)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"folder .* cannot be made"):
        keep(data[:3], tmp_path / "file" / "under", EXACT, ensemble)


def test_storage_is_checked() -> None:
    with pytest.raises(InputError, match="block is 0"):
        Storage(block=0)
    with pytest.raises(InputError, match=r"temperatures are \(0.0,\)"):
        Storage(temperatures=(0.0,))
