"""What the compiler made of the kernels: registers, spills, and the instructions that matter.

kernels/budgets.json also says how much shared memory a block of `group_linear` may take, which
test_configuration.py checks: at 96 KB two blocks share an SM of every architecture but Turing.

python tests/kernels/static_gates.py 75 87 ...     measures, and rewrites kernels/budgets.json
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
BUDGETS = KERNELS / "budgets.json"
ARCHITECTURES = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
_FORMATS = {
    "Float16Format<hydra::Half>": "fp16",
    "Float16Format<hydra::Bfloat>": "bf16",
    "Int8Format": "w8a8",
    "Int8WeightFormat<hydra::Half>": "w8a16",
    "Int8WeightFormat<hydra::Bfloat>": "w8a16-bf16",
    "Int4WeightFormat<hydra::Half>": "w4a16",
    "Int4WeightFormat<hydra::Bfloat>": "w4a16-bf16",
}


def label(mangled: str) -> str:
    """A short name, such as ``group_linear fp16 4x2``: batch tiles by row tiles."""
    name = subprocess.run(
        ["c++filt", mangled], capture_output=True, text=True, check=True
    ).stdout.strip()
    kernel = re.search(r"hydra::(\w+)", name)
    assert kernel, name
    template = re.search(r"<(hydra::.*)>\(", name)
    if not template:
        return kernel[1]
    kind = next(
        short for long, short in _FORMATS.items() if template[1].startswith(f"hydra::{long}")
    )
    if "QuantizingRead" in name:
        kind += "-quantizing"
    sizes = re.findall(r", (?:\(int\))?(\d+)", template[1])
    return f"{kernel[1]} {kind} {'x'.join(sizes)}"


def measure(architecture: int) -> dict[str, dict[str, int]]:
    """Registers, stack and spilled bytes per kernel; instructions, where nvdisasm is at hand."""
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in ("launchers", "tables"):
            cubin = Path(folder) / f"{source}.cubin"
            result = subprocess.run(
                [
                    "nvcc",
                    "-std=c++17",
                    f"-arch=sm_{architecture}",
                    "-Xptxas=-v",
                    "-cubin",
                    f"-I{KERNELS}",
                    KERNELS / f"{source}.cu",
                    "-o",
                    cubin,
                ],
                capture_output=True,
                text=True,
                check=True,
            )
            for block in result.stderr.split("Compiling entry function ")[1:]:
                name = label(block.split("'")[1])
                numbers = {
                    "registers": r"Used (\d+) registers",
                    "stack": r"(\d+) bytes stack frame",
                    "spill_stores": r"(\d+) bytes spill stores",
                    "spill_loads": r"(\d+) bytes spill loads",
                }
                found[name] = {
                    key: int(match[1]) if (match := re.search(pattern, block)) else 0
                    for key, pattern in numbers.items()
                }
            for name, counts in instructions(cubin, architecture).items():
                found[name] |= counts
    return found


def instructions(cubin: Path, architecture: int) -> dict[str, dict[str, int]]:
    """What a kernel consists of; {} without nvdisasm.

    Tensor core, 16-byte load and local-memory instructions of the whole, and ``loop``: all
    instructions per KB of weights in the loop over K.
    """
    tool = disassembler()
    if tool is None:
        return {}
    listing = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]:
        lines: list[str] = []
        labels: dict[str, int] = {}
        for line in section.splitlines():
            if label_here := re.match(r"(\.L_x_\d+):", line):
                labels[label_here[1]] = len(lines)
            elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*)", line):
                lines.append(code[1])
        name = label(re.split(r"[,\s]", section, maxsplit=1)[0])
        found[name] = _counts(lines)
        loops = [
            _counts(lines[labels[jump[1]] : i + 1]) | {"length": i + 1 - labels[jump[1]]}
            for i, line in enumerate(lines)
            if (jump := re.match(r"BRA.*`\((\.L_x_\d+)\)", line)) and labels[jump[1]] <= i
        ]
        loops = [loop for loop in loops if loop["HMMA"] + loop["IMMA"] > 0 and loop["LDG.128"] >= 8]
        if loops:
            loop = min(loops, key=lambda loop: loop["length"])
            # Turing makes two of a multiplication of halves, and four of one of int8.
            count = loop["HMMA"] + loop["IMMA"]
            if architecture < 80:
                count = loop["HMMA"] // 2 + loop["IMMA"] // 4
            found[name]["loop"] = loop["length"] // (count // multiplications(name))
    return found


def multiplications(name: str) -> int:
    """MMAs per KB of weights."""
    _, kind, tiles = name.split()
    units = 4 if kind.startswith("w4") else 2 if kind.startswith("w8a16") else 1
    return 2 * units * int(tiles.split("x")[0])


def _counts(lines: list[str]) -> dict[str, int]:
    ops = Counter(line.split(maxsplit=1)[0] for line in lines)
    return {
        "HMMA": sum(n for op, n in ops.items() if op.startswith("HMMA")),
        "IMMA": sum(n for op, n in ops.items() if op.startswith("IMMA")),
        "LDG.128": sum(n for op, n in ops.items() if op.startswith("LDG") and ".128" in op),
        "local": sum(n for op, n in ops.items() if op.startswith(("LDL", "STL"))),
    }


def disassembler() -> str | None:
    """nvdisasm of the toolkit, or of the wheel nvidia-cuda-nvdisasm."""
    on_path = shutil.which("nvdisasm")
    if on_path:
        return on_path
    wheels = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/**/bin/nvdisasm")
    return next((str(path) for path in wheels), None)


def _on_a_line(found: re.Match[str]) -> str:
    return "{" + re.sub(r"\s+", " ", found[1]) + "}"


def main() -> None:
    table = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    for architecture in map(int, sys.argv[1:] or ARCHITECTURES):
        table[f"sm_{architecture}"] = {
            name: {key: numbers[key] for key in ("registers", "loop") if key in numbers}
            for name, numbers in sorted(measure(architecture).items())
        }
        table = dict(sorted(table.items(), key=lambda item: (len(item[0]), item[0])))
        text = json.dumps(table, indent=1)
        BUDGETS.write_text(re.sub(r"\{\s+(\"registers[^}]*?)\s+\}", _on_a_line, text) + "\n")


if __name__ == "__main__":
    main()
