"""Faults seeded into the kernels, one at a time: the suite must catch each.

What a fault does is left to the emulator (a race, a read of poison, an access out of bounds) or to
the comparison with float64; a fault that neither sees is a hole in one of them. Each needs kernels
of its own to be compiled: three in every run, all in the nightly one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.emulation import KERNELS, compile_emulated

# name: (file, what stands there, what stands there instead)
FAULTS = {
    "no barrier before the sums are read": (
        "group_linear.cuh",
        "stage(multiply.sum, staged, p.split);\n  sync_block();",
        "stage(multiply.sum, staged, p.split);",
    ),
    "no barrier before the sums are overwritten": (
        "head_chain.cuh",
        "sync_block();  // the sums have been read, and what became of them can be",
        "",
    ),
    "no barrier behind x": ("head_chain.cuh", "read_x(in);\n      sync_block();", "read_x(in);"),
    "no barrier behind the tail": (
        "head_chain.cuh",
        "clear_tail(input_of(l + 1), layer.epilogue.outputs);\n        sync_block();",
        "clear_tail(input_of(l + 1), layer.epilogue.outputs);",
    ),
    "no barrier behind the statistics of heads": (
        "ensemble_summary.cuh",
        "read_heads(row, count);\n        sync_block();",
        "read_heads(row, count);",
    ),
    "no barrier before the statistics are overwritten": (
        "ensemble_summary.cuh",
        "sync_block();  // before the statistics are overwritten",
        "",
    ),
    "no fence before the counter": (
        "ensemble_summary.cuh",
        "    fence();\n    sync_block();\n    if (thread_index() == 0) {",
        "    sync_block();\n    if (thread_index() == 0) {",
    ),
    "the counter is not ready again": (
        "ensemble_summary.cuh",
        "count_up(counter, blocks - 1) ==",
        "count_up(counter, 1000000) ==",
    ),
    "logits of other blocks past the cache": (
        "ensemble_summary.cuh",
        "i < count ? read_fresh(from + i * step) : 0.0f",
        "i < count ? read_input(from + i * step) : 0.0f",
    ),
    "x before the previous kernel is done": (
        "group_linear.cuh",
        "  wait_for_previous_kernel();\n",
        "",
    ),
    "chunks of x in another order": (
        "multiply.cuh",
        "const int chunk = (tile * 4 + t) * Format::kUnits + unit_chunk<Format>(u, t);",
        "const int chunk = (tile * 4 + t) * Format::kUnits + u;",
    ),
    "registers of A exchanged": (
        "formats.cuh",
        "unit.a[i / 2][i % 2 + 2] = pair[1];",
        "unit.a[i / 2][i % 2] = pair[1];",
    ),
    "nibbles in another order": (
        "formats.cuh",
        "const uint32_t low = ((word >> (8 * i))",
        "const uint32_t low = ((word >> (8 - 8 * i))",
    ),
    "rows of the batch that do not exist": (
        "multiply.cuh",
        "min(n * kColumns + g, batch - 1) * inputs",
        "(n * kColumns + g) * inputs",
    ),
    "K one element too long": (
        "multiply.cuh",
        "if (k + first + i < inputs_)",
        "if (k + first + i <= inputs_)",
    ),
    "the end of K is read as if it were whole": (
        "group_linear.cuh",
        "aligned ? p.inputs / Format::kDepth : 0",
        "aligned ? (p.inputs + Format::kDepth - 1) / Format::kDepth : 0",
    ),
    "the end of K is dropped": (
        "multiply.cuh",
        "for (int k = k_whole_; k < k_end_; ++k) {",
        "for (int k = k_whole_; k < k_end_ - 1; ++k) {",
    ),
    "x is taken for aligned": (
        "group_linear.cuh",
        "(reinterpret_cast<uintptr_t>(p.x) | row_bytes) % 16 == 0",
        "reinterpret_cast<uintptr_t>(p.x) % 16 == 0",
    ),
    "outputs one too many": (
        "group_linear.cuh",
        "if (n < outputs) {",
        "if (n <= outputs) {",
    ),
    "the tail of the hidden layer is left as it was": (
        "head_chain.cuh",
        "clear_tail(input_of(l + 1), layer.epilogue.outputs);",
        "",
    ),
    "no scale of x": (
        "epilogue.cuh",
        "weight_scale ? x_scale.of(head) * read_input",
        "weight_scale ? read_input",
    ),
    "the bias of the first output for all": (
        "epilogue.cuh",
        "bias ? read_input(bias + index)",
        "bias ? read_input(bias + int64_t(head) * outputs)",
    ),
    "logits that are there no longer": (
        "ensemble_summary.cuh",
        "if (p_.outputs > stride) read(logits, from + first, threads, count);",
        "",
    ),
    "the other slices are left out": (
        "ensemble_summary.cuh",
        "finish(row, 0, reduced(part, p_.class_threads), true);",
        "finish(row, 0, part, true);",
    ),
    "the scale of head 0 for all": ("epilogue.cuh", "values + head * per_head", "values"),
    "the scale of another group": (
        "multiply.cuh",
        "lane() % 4 * weights_.groups / 4;",
        "weights_.groups - 1;",
    ),
    "the last split of K is dropped": (
        "epilogue.cuh",
        "for (int k = 1; k < split.k_warps; ++k)",
        "for (int k = 1; k < split.k_warps - 1; ++k)",
    ),
    "a row tile of another warp": (
        "group_linear.cuh",
        "warp % p.split.row_warps * RT, k_begin",
        "warp % p.split.row_warps, k_begin",
    ),
    "prefetch one tile short": (
        "multiply.cuh",
        "ask(i, k + i + kAhead, k_whole_);",
        "ask(i, k + i + kAhead - 1, k_whole_);",
    ),
    "variance about 0": (
        "head_chain.cuh",
        "const float offset = read_shared(row + n) - mean;",
        "const float offset = read_shared(row + n);",
    ),
}
# One that the emulator sees, one that the comparison sees, one between blocks.
EVERY_RUN = ("no barrier before the sums are read", "no scale of x", "no fence before the counter")
TESTS = ("test_group_linear.py", "test_head_chain.py", "test_ensemble_summary.py")


def seeded(name: str, to: Path) -> Path:
    """A copy of the kernels with one fault."""
    file, before, after = FAULTS[name]
    shutil.copytree(KERNELS, to)
    path = to / "hydra" / file
    text = path.read_text()
    assert text.count(before) >= 1, f"{file} no longer says {before!r}"
    path.write_text(text.replace(before, after))
    return to


@pytest.mark.parametrize("name", FAULTS)
def test_stands_in_the_kernels(name: str) -> None:
    file, before, after = FAULTS[name]
    assert before in (KERNELS / "hydra" / file).read_text()
    assert before != after


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.nightly) for name in FAULTS],
)
def test_is_caught(name: str, tmp_path: Path) -> None:
    library = compile_emulated(
        tmp_path / "libseeded.so", seeded(name, tmp_path / "kernels"), ("-O1",)
    )
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]
        + [str(here / test) for test in TESTS],
        env={**os.environ, "HYDRA_KERNELS_UNDER_TEST": str(library)},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, f"nobody noticed: {name}\n{result.stdout[-500:]}"
