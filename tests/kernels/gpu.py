"""A real GPU behind the interface of `Emulator`: every kernel test runs on both.

Device memory comes from torch. Each array lies between two guards; a kernel that writes outside of
it, or into an input, is found out after the launch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hydra_edge import kernels
from kernels.emulation import CONSTANT, INPUT, UNINITIALISED, Array, poison

# Under compute-sanitizer 0, and an allocation for each array: it then sees each byte out of bounds.
GUARD = int(os.environ.get("HYDRA_GUARD_BYTES", "1040"))
GUARD_BYTE = 0xFF  # NaN in every float: what is read out of bounds shows
ROOT = Path(__file__).parents[2]


def missing() -> str | None:
    """Why there is no GPU to test on, if so."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if library_path() is None:
        return "libhydra_kernels.so is not built: cmake --preset dev && cmake --build --preset dev"
    return None


def library_path() -> Path | None:
    """HYDRA_KERNELS_LIBRARY, or what was built for this GPU or for all, or the installed one."""
    given = os.environ.get("HYDRA_KERNELS_LIBRARY")
    built = [ROOT / "build" / preset / "libhydra_kernels.so" for preset in ("dev", "all")]
    installed = Path(kernels.__file__).with_name("libhydra_kernels.so")
    candidates = [Path(given)] if given else [*built, installed]
    return next((path for path in candidates if path.exists()), None)


@dataclass
class _Region:
    name: str
    kind: int
    room: torch.Tensor  # with the guards
    host: Array

    @property
    def bytes(self) -> torch.Tensor:
        return self.room[GUARD : GUARD + self.host.nbytes]


class _Library(kernels.Library):
    """Waits after each launch, and brings back what was written."""

    finished: Callable[[], None] = staticmethod(lambda: None)

    def _launch(self, *arguments: Any) -> None:
        super()._launch(*arguments)
        self.finished()

    def ensemble_summary(self, *arguments: Any, **keywords: Any) -> None:
        super().ensemble_summary(*arguments, **keywords)
        self.finished()


class Gpu:
    """The current CUDA device; ``where="cpu"`` is for tests of this file."""

    fault = ""

    def __init__(self, path: Path, where: str = "cuda") -> None:
        self.where = where
        self.library = _Library(path)
        self.library.finished = self.bring_back
        self.regions: list[_Region] = []

    @property
    def arrays(self) -> list[Array]:
        return [region.host for region in self.regions]

    def __enter__(self) -> Gpu:
        self.regions = []
        return self

    def __exit__(self, *error: object) -> None:
        self.regions = []

    def array(self, values: npt.ArrayLike | None, name: str, kind: int = CONSTANT) -> int | None:
        """A copy on the device; 16-byte aligned, and no more than that."""
        if values is None:
            return None
        host = np.array(values, order="C")
        room = torch.full(
            (host.nbytes + 2 * GUARD,), GUARD_BYTE, dtype=torch.uint8, device=self.where
        )
        region = _Region(name, kind, room, host)
        region.bytes.copy_(torch.from_numpy(host.reshape(-1).view(np.uint8).copy()))
        self.regions.append(region)
        return room.data_ptr() + GUARD

    def output(self, shape: tuple[int, ...], dtype: npt.DTypeLike, name: str) -> tuple[int, Array]:
        """Memory that holds `poison` until a kernel writes it."""
        address = self.array(poison(shape, dtype), name, UNINITIALISED)
        assert address is not None
        return address, self.regions[-1].host

    def reverse(self, on: bool) -> None:
        """A GPU has a schedule of its own."""

    def device(self, compute_capability: int, sm_count: int, shared_bytes: int) -> None:
        """A GPU is what it is."""

    def bring_back(self) -> None:
        """Wait, look at the guards, and copy what kernels wrote to `arrays`."""
        if self.where == "cuda":
            torch.cuda.synchronize()
        for region in self.regions:
            guards = torch.cat([region.room[:GUARD], region.room[GUARD + region.host.nbytes :]])
            assert bool((guards == GUARD_BYTE).all()), f"written outside of {region.name}"
            found = region.bytes.cpu().numpy()
            if region.kind in (CONSTANT, INPUT):
                expected = region.host.reshape(-1).view(np.uint8)
                assert np.array_equal(found, expected), f"{region.name} was written"
                continue
            ctypes.memmove(region.host.ctypes.data, found.ctypes.data, found.nbytes)
