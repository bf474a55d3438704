"""Processes: one needs nothing, lost ones say what to do; tests/test_training.py has several."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from hydra_edge.errors import DistillationError, InputError
from hydra_edge.processes import Processes, joined, launch, leave


def test_one_process_talks_to_itself() -> None:
    with joined(1) as alone:
        assert (alone.rank, alone.size, alone.is_main) == (0, 1, True)
        alone.wait()
        assert alone.gather("x") == ["x"]
        assert alone.from_main(3) == 3
        assert alone.on_main(lambda: 4) == 4
        x = torch.ones(2)
        assert alone.total(x) is x
        assert alone.concatenate(x, [2]) is x
    leave()


def test_a_lost_process_is_named_with_what_to_do() -> None:
    gloo = (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:1431. This is typically caused by a remote worker crashing."
    )
    with (
        pytest.raises(
            DistillationError,
            match=r"^Process 1 of 4 lost another one in phase 2: Connection closed by peer "
            r"\[127\.0\.0\.1\]:1431\. .*Start the same command again, with any number",
        ),
        Processes(1, 4).guarded("in phase 2"),
    ):
        raise RuntimeError(gloo)


@pytest.mark.parametrize(
    ("size", "error"),
    [
        (1, RuntimeError("Connection closed by peer")),
        (4, RuntimeError("shape '[2]' is invalid")),
        (4, torch.OutOfMemoryError("NCCL has no memory")),
        (4, InputError("A connection.", "Why.", "Fix.")),
    ],
)
def test_other_errors_stay_what_they_are(size: int, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, Processes(0, size).guarded("here"):
        raise error
    assert caught.value is error


def test_a_process_that_is_told_to_stop_says_so() -> None:
    code = (
        "import os, signal, time\n"
        "from hydra_edge.processes import stop_when_told\n"
        "from hydra_edge.errors import DistillationError\n"
        "stop_when_told()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)\n"
        "except DistillationError as exc:\n"
        "    print(exc.what, exc.fix)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "This process was told to stop." in done.stdout
    assert "goes on from the latest checkpoint" in done.stdout


@pytest.mark.filterwarnings("default")
def test_the_launcher_names_the_process_that_failed() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(DistillationError, match=r"Process 0 of 1 ended with exit code 2"):
            launch(["nonsense"], 1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
