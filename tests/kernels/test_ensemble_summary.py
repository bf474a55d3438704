"""`ensemble_summary` on the emulated device against numpy in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from hydra_edge.errors import CompilationError, HydraError, InputError
from hydra_edge.kernels import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    SummaryConfig,
    SummaryOutputs,
    SummaryShape,
)
from hydra_edge.ops.ensemble_summary import (
    CLASSIFICATION_OUTPUTS,
    GAUSSIAN_OUTPUTS,
    reference_classification,
    reference_gaussian,
    reference_sigmoid,
)
from kernels.emulation import INPUT, OUTPUT, Array, Machine

SOFTMAX, SIGMOID, GAUSSIAN = 1, 2, 3
DTYPES = {FLOAT32: np.float32, FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}


REFERENCES = {
    SOFTMAX: (CLASSIFICATION_OUTPUTS, reference_classification),
    SIGMOID: (CLASSIFICATION_OUTPUTS, reference_sigmoid),
    GAUSSIAN: (GAUSSIAN_OUTPUTS, reference_gaussian),
}


def check(
    machine: Machine, kind: int, logits: Array, type_: int = FLOAT32, *configs: SummaryConfig
) -> None:
    m, b, c = logits.shape
    names, reference = REFERENCES[kind]
    shape = SummaryShape(kind, m, b, c, type_)
    for config in configs or [machine.library.choose_summary(shape, machine.library.device())]:
        with machine:
            outputs = {}
            for name in names:
                dims = (b, c // 2) if kind == GAUSSIAN else (b, c) if name == "mean_prob" else (b,)
                outputs[name] = machine.output(dims, np.float32, name)
            room = machine.library.summary_workspace(shape, config)
            workspace = machine.array(np.zeros(room, np.uint8), "workspace", OUTPUT) if room else 0
            address = machine.array(logits, "logits", INPUT)
            assert address is not None
            for _ in range(2):  # the counters are ready again without a memset
                try:
                    machine.library.ensemble_summary(
                        shape,
                        address,
                        SummaryOutputs(*(address for address, _ in outputs.values())),
                        config,
                        workspace,
                    )
                except HydraError as error:
                    raise AssertionError(f"{error}\n{machine.fault}") from error
                expected = reference(logits.astype(np.float64))
                for name, (_, found) in outputs.items():
                    np.testing.assert_allclose(
                        found, expected[name], rtol=3e-5, atol=3e-6, err_msg=f"{name}"
                    )


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID, GAUSSIAN])
@pytest.mark.parametrize("shape", [(1, 1, 2), (20, 3, 10), (3, 1, 700), (70, 40, 4)], ids=str)
def test_against_float64(
    machine: Machine, kind: int, shape: tuple[int, int, int], reverse: bool
) -> None:
    machine.reverse(reverse)
    logits = np.random.default_rng(shape).standard_normal(shape) * 3
    check(machine, kind, logits.astype(np.float32))


@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID])
def test_every_way_to_share_out_the_work(machine: Machine, kind: int) -> None:
    logits = np.random.default_rng(1).standard_normal((5, 6, 333)).astype(np.float32) * 4
    configs = [
        SummaryConfig(rows, heads, classes, 1)
        for rows, heads, classes in [
            (1, 1, 1),
            (1, 32, 256),
            (2, 256, 64),
            (4, 32, 32),
            (6, 1, 16),
            (64, 32, 4),
        ]
    ]
    configs += [SummaryConfig(1, 256, 256, slices) for slices in (2, 3, 8)]
    check(machine, kind, logits, FLOAT32, *configs)


def test_a_row_of_many_logits_is_sliced(machine: Machine) -> None:
    logits = np.random.default_rng(2).standard_normal((40, 1, 1000)).astype(np.float32)
    shape = SummaryShape(SOFTMAX, *logits.shape, FLOAT32)
    assert machine.library.choose_summary(shape, machine.library.device()).slices > 1
    check(machine, SOFTMAX, logits)


@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID, GAUSSIAN])
@pytest.mark.parametrize("type_", [FLOAT16, BFLOAT16])
def test_logits_of_16_bits(machine: Machine, kind: int, type_: int) -> None:
    logits = np.random.default_rng(3).standard_normal((4, 5, 12)).astype(DTYPES[type_])
    check(machine, kind, logits, type_)


def test_extreme_logits(machine: Machine) -> None:
    logits = np.zeros((3, 5, 6), np.float32)
    logits[:, 0, 2] = 1e4  # certain
    logits[0, 1, 0] = logits[1, 1, 1] = logits[2, 1, 2] = 300  # certain, each of something else
    logits[:, 2] = -1e30  # all alike, far below
    logits[:, 3, :5] = -np.inf  # ruled out
    check(machine, SOFTMAX, logits)
    check(machine, SIGMOID, np.clip(logits[:, :2], -80, 80))


def test_refusals(machine: Machine) -> None:
    library = machine.library
    device = library.device()
    with pytest.raises(InputError, match="Gaussian parameters of width 5"):
        library.choose_summary(SummaryShape(GAUSSIAN, 2, 2, 5, FLOAT32), device)
    with pytest.raises(InputError, match="M=0 heads"):
        library.choose_summary(SummaryShape(SOFTMAX, 0, 2, 5, FLOAT32), device)
    with pytest.raises(CompilationError, match="5000 heads"):
        library.choose_summary(SummaryShape(SOFTMAX, 5000, 2, 5, FLOAT32), device)
    with pytest.raises(InputError, match="logits is NULL"):
        library.ensemble_summary(SummaryShape(SOFTMAX, 2, 2, 5, FLOAT32), 0, SummaryOutputs())
