"""Teachers: shares of an ensemble, and their identity."""

from __future__ import annotations

import pytest
import torch
from students import make_ensemble

from hydra_edge.ensembles import Ensemble, linear_heads
from hydra_edge.errors import InputError
from hydra_edge.processes import Processes
from hydra_edge.teachers import (
    EnsembleShare,
    KeptTeacher,
    LiveTeacher,
    evaluating,
    identity,
    share,
    taught,
)

ALONE = Processes()


def test_processes_share_the_members() -> None:
    assert [list(share(5, Processes(rank, 3))) for rank in range(3)] == [[0, 3], [1, 4], [2]]
    assert [list(share(2, Processes(rank, 3))) for rank in range(3)] == [[0], [1], []]
    assert [list(taught(2, Processes(rank, 5))) for rank in range(5)] == [[0], [1], [0], [1], [0]]
    assert list(taught(5, Processes(1, 2))) == [1, 3]


def test_a_share_answers_for_its_members() -> None:
    ensemble, x = make_ensemble().eval(), torch.randn(3, 4)
    part = EnsembleShare.of(ensemble, [3, 1])
    assert part.indices == (1, 3)
    assert part.heads == 4
    torch.testing.assert_close(torch.stack(part(x)), ensemble(x)[[1, 3]])
    with pytest.raises(InputError, match="Member 4 was given for an ensemble of 4"):
        EnsembleShare({4: torch.nn.Identity()}, 4)


def test_all_members_in_one_share_teach_like_the_ensemble() -> None:
    ensemble, x = make_ensemble().eval(), torch.randn(3, 4)
    whole = EnsembleShare.of(ensemble, range(4))
    target = LiveTeacher(whole, ALONE).targets((x,), [[0, 1, 2]], ALONE)
    torch.testing.assert_close(target, ensemble(x).detach())
    assert not target.requires_grad
    with pytest.raises(InputError, match=r"hold the members \[1, 3\] of 4"):
        LiveTeacher(EnsembleShare.of(ensemble, [1, 3]), ALONE)


def test_kept_outputs_are_found_by_number() -> None:
    outputs = torch.arange(24.0).view(2, 4, 3).numpy()
    target = KeptTeacher(outputs, torch.device("cpu")).targets((), [[2, 0]], ALONE)
    torch.testing.assert_close(target, torch.from_numpy(outputs)[:, [2, 0]])


def test_identity_is_of_weights_and_order_not_of_the_split() -> None:
    heads = linear_heads(3, 4, 2)
    whole = identity(Ensemble(heads), ALONE)
    assert whole == identity(EnsembleShare.of(Ensemble(heads), range(3)), ALONE)
    assert whole != identity(Ensemble(heads[::-1]), ALONE)
    assert whole != identity(Ensemble(heads, "regression"), ALONE)
    with torch.no_grad():
        heads[1].bias += 1  # type: ignore[operator]
    assert whole != identity(Ensemble(heads), ALONE)


def test_members_are_put_back_as_they_were() -> None:
    ensemble = make_ensemble()
    ensemble.members[0].eval()
    with evaluating(ensemble, torch.device("cpu")):
        assert not any(module.training for module in ensemble.modules())
    assert ensemble.members[1].training
    assert not ensemble.members[0].training
