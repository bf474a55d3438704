"""What only a fresh process or the system can tell: load time, memory, the machine.

``python -m hydra_edge.probe ENGINE... --batch B --threads T`` loads engines in one process, runs
them and prints what that took as one line of JSON. Several engines are the members of one ensemble.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import hydra_edge
from hydra_edge import backends, equivalence, runtime
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.report import Figure, Machine, NotMeasured

_TIMEOUT_S = 300.0
_STATUS = Path("/proc/self/status")
_RUNS = 3  # memory keeps growing until every buffer of a run exists


@dataclass(frozen=True)
class Startup:
    """What starting cost in a fresh process.

    Attributes:
        load_ms: From files to live sessions, libraries already imported.
        first_run_ms: The first run after that.
        base_memory_mb: Peak resident memory before loading.
        peak_memory_mb: Peak resident memory in the end.
    """

    load_ms: Figure
    first_run_ms: Figure
    base_memory_mb: Figure
    peak_memory_mb: Figure


def measure_startup(engines: Sequence[Engine], batch: int, threads: int) -> Startup:
    """Load and run ``engines`` together in a process of their own.

    Args:
        engines: One engine, or the members of an ensemble.
        batch: Samples of one run; an engine of several programs runs each on its recorded batch.
        threads: CPU threads of one run.
    """
    with tempfile.TemporaryDirectory(prefix="hydra-edge-") as folder:
        paths = [
            engine.save(Path(folder) / f"{index}.hydra") for index, engine in enumerate(engines)
        ]
        command = [sys.executable, "-m", "hydra_edge.probe", *map(str, paths)]
        command += ["--batch", str(batch), "--threads", str(threads)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            return Startup(**{name: _figure(value) for name, value in found.items()})
        except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError) as exc:
            words = exc.stderr if isinstance(exc, subprocess.CalledProcessError) else str(exc)
            last = ([line for line in str(words).splitlines() if line.strip()] or ["nothing"])[-1]
            reason = NotMeasured(f"the fresh process failed and said: {last.replace(folder, '')}")
            return Startup(reason, reason, reason, reason)


def describe_machine(backend_names: Sequence[str]) -> Machine:
    """The machine this process runs on, without its name or its user's.

    Args:
        backend_names: Backends whose libraries belong into ``versions``.
    """
    versions = {"hydra-edge": hydra_edge.__version__, "numpy": np.__version__}
    for name in sorted(set(backend_names)):
        versions.update(backends.find(name).versions())
    return Machine(
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        cache_bytes=_last_level_cache_bytes(),
        python=platform.python_version(),
        versions=versions,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the fresh process."""
    parser = argparse.ArgumentParser(prog="python -m hydra_edge.probe", description=__doc__)
    parser.add_argument("engines", nargs="+", metavar="ENGINE")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    base = _peak_memory_mb()
    start = time.perf_counter()
    sessions = [runtime.load(path, threads=options.threads) for path in options.engines]
    load_ms = (time.perf_counter() - start) * 1e3
    calls = _calls(sessions, options.batch)
    run_ms = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        for call in calls:
            call()
        run_ms.append((time.perf_counter() - start) * 1e3)
    found: dict[str, Figure] = {
        "load_ms": load_ms,
        "first_run_ms": run_ms[0],
        "base_memory_mb": base,
        "peak_memory_mb": _peak_memory_mb(),
    }
    for session in sessions:
        session.close()
    plain = {name: v if isinstance(v, float) else v.reason for name, v in found.items()}
    sys.stdout.write(json.dumps(plain) + "\n")


def _calls(sessions: Sequence[runtime.Session], batch: int) -> list[Callable[[], object]]:
    """What one run is: of several programs, each on the batch that was recorded of it.

    Those feed each other, and what one gives the next may not be random, e.g. numbers of rows.
    """
    if len(sessions[0].engine.programs) == 1:
        feeds = equivalence.random_inputs(sessions[0].inputs, batch=batch)
        return [partial(session.run, feeds) for session in sessions]
    return [
        partial(session.run, dict(program.golden.inputs), program=name)
        for session in sessions
        for name, program in session.engine.programs.items()
    ]


def _figure(value: object) -> Figure:
    return float(value) if isinstance(value, (int, float)) else NotMeasured(str(value))


def _peak_memory_mb() -> Figure:
    """Peak resident memory of this process, in 10^6 bytes.

    ``ru_maxrss`` would not do: a child inherits it from its parent across exec.
    """
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text("utf-8"))
    except OSError:
        match = None
    if match is None:
        return NotMeasured("this system has no /proc/self/status with VmHWM")
    return int(match[1]) * 1024 / 1e6


def _cpu_name() -> str:
    for path, pattern in (
        ("/proc/device-tree/model", r"([^\0]+)"),  # a board: Jetson, Raspberry Pi
        ("/proc/cpuinfo", r"model name\s*:\s*(.+)"),
    ):
        try:
            match = re.search(pattern, Path(path).read_text("utf-8", "replace"))
        except OSError:
            continue
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def _last_level_cache_bytes() -> int | None:
    """Size of the largest cache of core 0, or None when the system does not tell."""
    units: Mapping[str, int] = {"": 1, "K": 1 << 10, "M": 1 << 20}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM]?)\s*", path.read_text("ascii"))
        if match:
            sizes.append(int(match[1]) * units[match[2]])
    return max(sizes, default=None)


if __name__ == "__main__":
    main()
