"""What keeping a teacher's predictions costs: seconds and bytes as samples grow, and the error.

Usage: python benchmarks/teacher_predictions.py [-o results/teacher-predictions.json]

Random networks answer random inputs: what is measured is the work around them, `teaching.teach` and
reading for training, not theirs. Their logits are wide: 0.29 of the probability on the first
class and 0.83 on the first 16, in the mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hydra_edge.ensembles import Ensemble
from hydra_edge.probe import describe_machine
from hydra_edge.teacher_formats import Format
from hydra_edge.teaching import Predictions, Storage, teach

MEMBERS, CLASSES, FEATURES = 4, 100, 32
COUNTS = (12_500, 25_000, 50_000, 100_000)
FORMATS = (Format("fp32"), Format("fp16"), Format("top-k", 16))
BATCH = 256
READ_BATCHES = 100


class Scaled(nn.Module):
    """Random logits of a spread that a trained classifier's have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, CLASSES, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]``."""
        output: torch.Tensor = 8 * self.layers(x)
        return output


def read(kept: Predictions) -> float:
    """Samples per second in random order, all members of each."""
    rng = np.random.default_rng(0)
    batches = rng.integers(0, len(kept), (READ_BATCHES, BATCH))
    start = time.perf_counter()
    for batch in batches:
        kept[:, batch]
    return READ_BATCHES * BATCH / (time.perf_counter() - start)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ensemble = Ensemble([Scaled() for _ in range(MEMBERS)])
    x = torch.randn(max(COUNTS), FEATURES)
    teach(ensemble, x[:1000], tempfile.mkdtemp(), progress=False)  # warm-up
    rows = []
    for form in FORMATS:
        for count in COUNTS:
            with tempfile.TemporaryDirectory() as folder:
                storage = Storage(form, block=8192, temperatures=(1.0, 4.0))
                cpu, start = time.process_time(), time.perf_counter()
                kept = teach(ensemble, x[:count], folder, storage, progress=False)
                seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
                start = time.perf_counter()
                Predictions.open(folder, verify=True)
                verified = time.perf_counter() - start
                rows.append(
                    {
                        "format": form.name if form.name != "top-k" else f"top-{form.top_k}",
                        "samples": count,
                        "seconds": seconds,
                        "cpu_seconds": cpu,
                        "bytes": kept.size_bytes,
                        "bytes_per_sample_and_member": kept.size_bytes / count / MEMBERS,
                        "verify_seconds": verified,
                        "read_samples_per_second": read(kept),
                        "errors": kept.errors,
                    }
                )
            row = rows[-1]
            print(
                f"{row['format']:<8}{count:>8} samples {seconds:7.2f} s (CPU {cpu:6.2f}) "
                f"{row['bytes'] / 1e6:8.1f} MB, verified in {verified:.2f} s, "
                f"read {row['read_samples_per_second']:.0f} samples/s",
                flush=True,
            )
    machine = describe_machine([])
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(machine) | {"versions": {**machine.versions, "torch": torch.__version__}},
        "members": MEMBERS,
        "classes": CLASSES,
        "batch_size": BATCH,
        "note": "one process, one thread, CPU; the machine did other work at the same time",
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
