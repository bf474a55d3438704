"""A Hydra student against its ensemble on a GPU, from the image to the summary, in CUDA graphs.

Usage: python benchmarks/student_gpu.py [-o results/student-gpu.json] [--library FILE]

Real architectures (torchvision's and timm's) with random weights: this is about time alone. Body
and members run in fp16, channels last, as torch calls cuDNN and cuBLAS; no TensorRT is involved.
Every side is one CUDA graph, all are replayed in turn, and all end in the same summary.

The ensemble runs in the ways an engineer would try: member after member, all members in streams of
their own, and stacked by torch.vmap into grouped convolutions and batched matmuls. Each is compared
with the fastest of them. The student runs its heads as torch does (one wide GEMM, then bmm) and by
our kernels, in fp16 and with int8 weights.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from head_shapes import Shape
from kernel_model import FORMATS
from kernel_work import Heads, Ours, Torch, paths
from torch import nn

from hydra_edge import torch_kernels
from hydra_edge.kernels import Library, load
from hydra_edge.probe import describe_machine
from kernels import Timer, describe_device

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 8, 32)
Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A student: its body by name, its heads, and the size of its images."""

    name: str
    body: str
    heads: Shape
    image: int


CASES = (
    Case("ResNet-18, 20 MLP heads", "resnet18", Shape("", 20, 512, (128, 128), 10), 64),
    Case("ResNet-50, 4 linear heads", "resnet50", Shape("", 4, 2048, (), 1000), 224),
    Case("ViT-S/16, 8 MLP heads", "vit_small_patch16_224", Shape("", 8, 384, (768,), 1000), 224),
)


def body(case: Case) -> nn.Module:
    """The features of a network, without its classifier."""
    if case.body.startswith("resnet"):
        import torchvision

        made = getattr(torchvision.models, case.body)(weights=None)
        made.fc = nn.Identity()
    else:
        import timm

        made = timm.create_model(case.body, pretrained=False, num_classes=0)
    made = made.eval().requires_grad_(False).half().cuda()
    return made.to(memory_format=torch.channels_last)


class Member(nn.Module):
    """One network of the ensemble: a body of its own, and one head."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.body = body(case)
        sizes = (case.heads.features, *case.heads.hidden, case.heads.outputs)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.head = nn.Sequential(*layers[:-1]).half().cuda().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]``."""
        return self.head(self.body(x))


def ensemble(case: Case, x: torch.Tensor) -> dict[str, Run]:
    """The ways to run all members."""
    members = [Member(case) for _ in range(case.heads.heads)]
    streams = [torch.cuda.Stream() for _ in members]

    def in_turn() -> Any:
        return torch_kernels.summarize(torch.stack([member(x) for member in members]))

    def in_streams() -> Any:
        current, logits = torch.cuda.current_stream(), []
        for member, stream in zip(members, streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                logits.append(member(x))
        for stream in streams:
            current.wait_stream(stream)
        return torch_kernels.summarize(torch.stack(logits))

    parameters, buffers = torch.func.stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")

    def one(parameters: Any, buffers: Any) -> torch.Tensor:
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))

    stacked = torch.vmap(one)

    def in_stacks() -> Any:
        return torch_kernels.summarize(stacked(parameters, buffers))

    return {
        "ensemble, in turn": in_turn,
        "ensemble, streams": in_streams,
        "ensemble, stacked": in_stacks,
    }


def student(case: Case, x: torch.Tensor, library: Library) -> dict[str, Run]:
    """One body, and the ways to run the heads."""
    shared, batch = body(case), len(x)
    shape = dataclasses.replace(case.heads, name=case.name)
    heads = Heads.random(shape, "cuda")
    baseline = Torch(heads, batch, "bmm", 1)

    def with_torch() -> Any:
        baseline.x = shared(x)
        return baseline.run(0)

    runs: dict[str, Run] = {"body alone": lambda: shared(x), "student, torch heads": with_torch}
    for format in FORMATS:
        if format.name not in ("fp16", "w8a16"):
            continue
        path = paths(library, shape, batch, format)[0]
        ours = Ours(library, heads, batch, format, path, 1)

        def with_kernels(ours: Ours = ours) -> Any:
            ours.x.copy_(shared(x))  # the kernels' x stays where it is: one copy more than need be
            return ours.run(0)

        runs[f"student, our {format.name} heads"] = with_kernels
    return runs


def captured(timer: Timer, name: str, run: Run) -> str:
    """Why it cannot be captured, if so: torch.vmap does not know every op."""
    try:
        timer.capture(name, lambda _: run(), 4)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return ""


def measure(case: Case, batch: int, library: Library, replays: int) -> dict[str, Any]:
    """One row: all sides."""
    x = torch.randn((batch, 3, case.image, case.image), device="cuda").half()
    x = x.to(memory_format=torch.channels_last)
    timer = Timer(replays)
    with torch.no_grad():
        sides = student(case, x, library) | ensemble(case, x)
        refused = {name: why for name, run in sides.items() if (why := captured(timer, name, run))}
    times = timer.measure()
    ensembles = {name: time for name, time in times.items() if name.startswith("ensemble")}
    strongest = min(ensembles, key=lambda name: ensembles[name]["median_us"])
    return {
        "case": case.name,
        "heads": case.heads.heads,
        "batch": batch,
        "times": times,
        "refused": refused,
        "strongest_ensemble": strongest,
        "speedup": {
            name: round(times[strongest]["median_us"] / time["median_us"], 2)
            for name, time in times.items()
            if name.startswith("student")
        },
    }


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "student-gpu.json")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--library", type=Path, help="libhydra_kernels.so")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: no CUDA device on this machine")
        return 6
    library = load(arguments.library)
    record: dict[str, Any] = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": dataclasses.asdict(describe_machine([])),
        "machine": describe_device(),
        "weights": "random: times only",
        "rows": [],
    }
    for case in CASES:
        for batch in BATCHES:
            row = measure(case, batch, library, arguments.replays)
            record["rows"].append(row)
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{case.name}, B={batch}", *row["refused"].items(), flush=True)
            for name, time in row["times"].items():
                print(
                    f"    {name:<28} {time['median_us']:9.1f} us "
                    f"({time['p10_us']:.1f} to {time['p90_us']:.1f})"
                    + (f"  x {row['speedup'][name]}" if name in row["speedup"] else "")
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
