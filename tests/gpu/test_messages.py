"""What TensorRT says is kept."""

from __future__ import annotations

import gc

import pytest

from hydra_edge.gpu.messages import Messages

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
Severity = trt.ILogger.Severity


def test_errors_before_warnings_and_each_once() -> None:
    messages = Messages(trt)
    assert messages.words() == "It gave no reason."
    messages.logger.log(Severity.WARNING, "a warning\n")
    assert messages.words() == "a warning"
    for _ in range(2):
        messages.logger.log(Severity.ERROR, "[convolution] no kernel")
    messages.logger.log(Severity.INTERNAL_ERROR, "worse")
    messages.logger.log(Severity.INFO, "nothing to keep")
    assert messages.words() == "[convolution] no kernel worse"
    assert list(messages.warnings) == ["a warning"]


def test_of_a_long_story_the_end_is_kept() -> None:
    messages = Messages(trt)
    messages.logger.log(Severity.ERROR, "x" * 10_000)
    messages.logger.log(Severity.ERROR, "the last word")
    assert len(messages.words()) == 2000
    assert messages.words().endswith("x the last word")
    for index in range(1000):
        messages.logger.log(Severity.ERROR, f"error {index}")
    assert len(messages.errors) == 500


def test_one_logger_outlives_all_that_listen() -> None:
    """TensorRT keeps the first logger of a process, and calls it whoever made it."""
    first = Messages(trt)
    logger = first.logger
    del first
    gc.collect()
    second, third = Messages(trt), Messages(trt)
    assert second.logger is third.logger is logger
    logger.log(Severity.ERROR, "heard")
    assert list(second.errors) == list(third.errors) == ["heard"]


def test_skipped_tactics_are_counted() -> None:
    messages = Messages(trt)
    for text in (
        "UNSUPPORTED_STATE: Skipping tactic 0 due to insufficient memory on requested size of 9",
        "Skipping tactic 3 due to exception autotuning",
        "Using default for use_dla",
    ):
        messages.logger.log(Severity.WARNING, text)
    assert messages.skipped_tactics() == 2


def test_layers_that_a_dla_does_not_take() -> None:
    messages = Messages(trt)
    for text in (
        "Default DLA is enabled but layer body/Gather is not supported on DLA.",
        "DLA Layer head/Relu does not support dynamic shapes in any dimension.",
        "head/Gemm: DLA only supports FP16 and Int8. Switching head/Gemm device type to GPU.",
        "Default DLA is enabled but layer body/Gather is not supported on DLA.",
    ):
        messages.logger.log(Severity.WARNING, text)
    assert messages.left_to_the_gpu() == ("body/Gather", "head/Relu", "head/Gemm")
