"""Gates on what nvcc makes of the kernels, per architecture; see static_gates.py.

Each takes minutes: `make nightly` runs them, and whoever changes a kernel.
"""

from __future__ import annotations

import json
import shutil

import pytest

from kernels import static_gates


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(number, marks=pytest.mark.nightly) for number in static_gates.ARCHITECTURES],
)
def test_what_the_compiler_made(architecture: int) -> None:
    budget = json.loads(static_gates.BUDGETS.read_text())[f"sm_{architecture}"]
    found = static_gates.measure(architecture)
    assert set(found) == set(budget), "run tests/kernels/static_gates.py"
    for name, numbers in found.items():
        assert numbers["spill_stores"] == numbers["spill_loads"] == 0, name
        assert numbers["stack"] == 0, name
        # Another compiler may need a few more; 8 keep the blocks per SM of the launch bounds.
        assert numbers["registers"] <= budget[name]["registers"] + 8, name
        if static_gates.disassembler() is None:
            continue
        assert numbers["local"] == 0, name
        if "loop" in budget[name]:
            assert numbers["loop"] <= 1.15 * budget[name]["loop"], name
        kernel, *rest = name.split()
        if kernel.startswith("summary"):
            continue
        integer = rest[0].startswith("w8a8")
        bfloat_on_turing = "bf16" in rest[0] and architecture < 80  # refused by the launcher
        assert (numbers["IMMA"] > 0) == integer, name
        assert (numbers["HMMA"] > 0) == (not integer and not bfloat_on_turing), name
        if not bfloat_on_turing:
            assert numbers["LDG.128"] >= 8, name  # 4 tiles ahead, two loads each
