"""What a target has of what matters to heads in low precision, and what not."""

from __future__ import annotations

from dataclasses import dataclass

from hydra_edge.targets import Gpu, Target


@dataclass(frozen=True)
class Feature:
    """One ability.

    Attributes:
        name: What it is called.
        there: Whether the target has it.
        note: How much of it, or why not; may be empty.
    """

    name: str
    there: bool
    note: str


def of(target: Target) -> tuple[Feature, ...]:
    """The abilities of a target's device, and of what builds engines for it."""
    gpu = target.gpu
    if gpu is None:
        return (
            Feature("plugin", False, "heads are MatMuls of ONNX Runtime, in the fastest lowering"),
            Feature("CUDA graphs", False, "there is no GPU"),
        )
    return (
        _fp8(target, gpu),
        _int8(gpu),
        _dla(gpu),
        Feature("CUDA graphs", True, "all kernels of a run in one launch"),
        *(_of_rtx(gpu) if target.backend == "tensorrt_rtx" else _of_tensorrt(target, gpu)),
    )


def _fp8(target: Target, gpu: Gpu) -> Feature:
    there = "fp8" in target.precisions
    verb = "multiply" if there else "do not multiply"
    return Feature("fp8", there, f"tensor cores of sm_{gpu.compute_capability} {verb} it")


def _int8(gpu: Gpu) -> Feature:
    rate, half = gpu.operations_per_s("int8"), gpu.operations_per_s("fp16")
    if not rate:
        return Feature("int8 tensor rate", False, "none is published")
    return Feature(
        "int8 tensor rate", True, f"{rate / 1e12:.3g} TOPS dense, {rate / half:g} times fp16"
    )


def _dla(gpu: Gpu) -> Feature:
    note = f"{gpu.dla}, with --dla-core for layers of the body" if gpu.dla else ""
    return Feature("DLA", gpu.dla > 0, note)


def _of_tensorrt(target: Target, gpu: Gpu) -> tuple[Feature, ...]:
    compatible = gpu.compute_capability >= 80 and not target.is_jetson
    note = "with --hardware-compatible for every card from sm_80 on, somewhat slower"
    return (
        Feature("plugin", True, "layers of all heads and the summary in our own kernels"),
        Feature(
            "hardware-compatible engines",
            compatible,
            note if compatible else "an engine runs on this kind of device alone",
        ),
        Feature(
            "refit", True, "with --refittable `hydra-edge refit` changes weights without a build"
        ),
    )


def _of_rtx(gpu: Gpu) -> tuple[Feature, ...]:
    return (
        Feature("plugin", False, "TensorRT-RTX takes none: heads are MatMuls"),
        Feature(
            "hardware-compatible engines",
            True,
            f"for all cards of sm_{gpu.compute_capability}; name further targets for more",
        ),
        Feature("refit", False, "TensorRT-RTX makes such engines only on a GPU"),
    )
