"""Finding the kernels' library, and the shapes that its C interface expects."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_edge import kernels
from hydra_edge.errors import InputError, MissingDependencyError
from hydra_edge.ops import packing

HEADERS = Path(__file__).parents[1] / "kernels"
STRUCTURES = {
    "hydra_device": kernels.Device,
    "hydra_linear_shape": kernels.LinearShape,
    "hydra_linear_config": kernels.LinearConfig,
    "hydra_summary_outputs": kernels.SummaryOutputs,
    "hydra_linear_arguments": kernels.LinearArguments,
    "hydra_chain_shape": kernels.ChainShape,
    "hydra_chain_config": kernels.ChainConfig,
    "hydra_chain_layer": kernels.ChainLayer,
    "hydra_chain_arguments": kernels.ChainArguments,
    "hydra_summary_shape": kernels.SummaryShape,
    "hydra_summary_config": kernels.SummaryConfig,
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    lines = ['#include <stdio.h>\n#include "hydra_kernels.h"', "int main(void) {"]
    for name, structure in STRUCTURES.items():
        lines.append(f'printf("{name} %zu", sizeof({name}));')
        lines += [
            f'printf(" {field[0]}:%zu", offsetof({name}, {field[0]}));'
            for field in structure._fields_
        ]
        lines.append('puts("");')
    source = tmp_path / "main.c"
    source.write_text("\n".join([*lines, "}"]))
    subprocess.run(
        ["gcc", "-std=c99", "-Wall", "-Werror", f"-I{HEADERS}", source, "-o", tmp_path / "main"],
        check=True,
    )
    found = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout
    expected = "".join(
        f"{name} {ctypes.sizeof(structure)}"
        + "".join(
            f" {field[0]}:{getattr(structure, field[0]).offset}" for field in structure._fields_
        )
        + "\n"
        for name, structure in STRUCTURES.items()
    )
    assert found == expected


def test_the_layout_is_that_of_the_kernels() -> None:
    assert f'"{packing.LAYOUT}"' in (HEADERS / "launchers.cu").read_text()


def test_without_a_library(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="is not there") as caught:
        kernels.load(tmp_path / "libhydra_kernels.so")
    assert "kernels/README.md" in caught.value.fix
    broken = tmp_path / "libhydra_kernels.so"
    broken.write_text("not a library")
    with pytest.raises(MissingDependencyError, match="cannot be loaded"):
        kernels.load(broken)


class DeviceArray:
    def __init__(self, strides: tuple[int, ...] | None = None) -> None:
        self.__cuda_array_interface__ = {"data": (4096, False), "strides": strides}


class Tensor:
    """As torch's on a GPU, of a type that `__cuda_array_interface__` refuses."""

    is_cuda = True

    def __init__(self, contiguous: bool) -> None:
        self.contiguous = contiguous

    def is_contiguous(self) -> bool:
        return self.contiguous

    def data_ptr(self) -> int:
        return 8192

    @property
    def __cuda_array_interface__(self) -> None:
        raise TypeError("bfloat16")


def test_configurations_can_be_printed() -> None:
    config = kernels.LinearConfig(batch_tiles=2, row_tiles=1, row_warps=4, k_warps=2)
    assert repr(config).startswith(
        "LinearConfig(batch_tiles=2, row_tiles=1, row_warps=4, k_warps=2"
    )


def test_addresses() -> None:
    assert kernels.address(None) is None
    assert kernels.address(4096) == 4096
    assert kernels.address(DeviceArray()) == 4096
    assert kernels.address(Tensor(True)) == 8192
    with pytest.raises(InputError, match="with strides"):
        kernels.address(Tensor(False))
    with pytest.raises(InputError, match=r"torch\.Tensor was given"):
        kernels.address(torch.zeros(3))
    with pytest.raises(InputError, match=r"numpy\.ndarray was given to a CUDA kernel"):
        kernels.address(np.zeros(3))
    with pytest.raises(InputError, match="with strides"):
        kernels.address(DeviceArray((8, 4)))
