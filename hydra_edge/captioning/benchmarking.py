"""`benchmark_captioners`: whole images, from pixels to captions, under one protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial

import numpy as np

from hydra_edge import probe, timing
from hydra_edge.artifacts.engine import Engine
from hydra_edge.artifacts.report import (
    IN_DISTRIBUTION,
    NotMeasured,
    Protocol,
    Report,
    SessionRow,
)
from hydra_edge.captioning.captioner import CaptionOptions, Describer, Region
from hydra_edge.captioning.evaluation import METEOR_NAME, judge, mutual_rank_correlation
from hydra_edge.captioning.models import EngineModel, MembersModel
from hydra_edge.captioning.scenes import Scene, images_of
from hydra_edge.costs import cost
from hydra_edge.errors import InputError
from hydra_edge.runtime import Session

_BATCH = 16  # images that quality is judged in
_SLICES = 8  # parts of the images that a captioner is timed on in turn
_NO_SENSOR = NotMeasured("hydra-edge reads no power sensor on this target")


@dataclass(frozen=True)
class Contender:
    """A captioner: one session, or those of M members.

    Attributes:
        sessions: Open sessions.
    """

    sessions: tuple[Session, ...]

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Their engines."""
        return tuple(session.engine for session in self.sessions)

    def describer(self, options: CaptionOptions) -> Describer:
        """What describes images with them."""
        models = [EngineModel(session) for session in self.sessions]
        return Describer(models[0] if len(models) == 1 else MembersModel(models), options)


Answers = list[list[Region]]


def benchmark_captioners(
    contenders: Mapping[str, Contender],
    scenes: Sequence[Scene],
    *,
    reference: str,
    shifted: Mapping[str, Sequence[Scene]] | None = None,
    options: CaptionOptions | None = None,
    protocol: Protocol | None = None,
) -> tuple[Report, Mapping[str, Answers]]:
    """Measure captioners side by side.

    Args:
        contenders: By the name they have in the report.
        scenes: The truth in distribution.
        reference: The contender whose uncertainty the others should have, usually the ensemble.
        shifted: Scenes out of distribution, by name: they count for the uncertainty alone.
        options: Which boxes are described, and how captions are searched.
        protocol: How latency is measured; a sample is an image.

    Returns:
        The report, and what each contender said of all images, shifted ones after the others.
        Latency is that of ``describe``: encoder, suppression of boxes, and all words.

    Raises:
        InputError: The reference is no contender, or there is no scene.
        MissingDependencyError: NLTK is not installed.
    """
    options, protocol = options or CaptionOptions(), protocol or Protocol()
    if reference not in contenders or not scenes:
        raise InputError(
            f"{len(scenes)} scenes were given, and the reference '{reference}'.",
            f"The contenders are {', '.join(contenders)}.",
            "Name one of those, and give scenes.",
        )
    images = images_of(scenes)
    others = [scene for each in (shifted or {}).values() for scene in each]
    every = np.concatenate([images, images_of(others)]) if others else images
    describers = {label: one.describer(options) for label, one in contenders.items()}
    answers = {
        label: [
            regions
            for start in range(0, len(every), _BATCH)
            for regions in describer.describe(every[start : start + _BATCH])
        ]
        for label, describer in describers.items()
    }
    rows = [
        _row(
            label,
            contender,
            answers[label],
            scenes,
            None if label == reference else answers[reference],
            probe.measure_startup(
                contender.engines, max(protocol.batches), contender.sessions[0].threads
            ),
        )
        for label, contender in contenders.items()
    ]
    backends = [engine.backend for one in contenders.values() for engine in one.engines]
    machine = probe.describe_machine(backends)
    latencies = []
    for batch in protocol.batches:
        parts = [images[i * batch : (i + 1) * batch] for i in range(_SLICES)]
        full = [part for part in parts if len(part) == batch]
        if not full:
            raise InputError(
                f"A batch of {batch} images is to be timed.",
                f"There are {len(images)} scenes.",
                "Give more scenes, or time smaller batches.",
            )
        calls = {
            label: [partial(describer.describe, part) for part in full]
            for label, describer in describers.items()
        }
        latencies += timing.measure(calls, batch, protocol, machine.cache_bytes)
    report = Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine,
        protocol=protocol,
        datasets={IN_DISTRIBUTION: len(scenes), **{n: len(s) for n, s in (shifted or {}).items()}},
        reference=reference,
        sessions=tuple(rows),
        latencies=tuple(latencies),
        notes=(
            f"meteor is {METEOR_NAME}; map is over boxes and METEOR, detection_map over boxes.",
            "Latency is of whole images: encoder, suppression of boxes, and all words. FLOP per "
            "sample counts as many regions and words as were found on the scenes.",
            "First runs and memory are of every program on its recorded batch, without the loop "
            "that greedy search makes of 'step'.",
            "mi_rank_correlation is of the captions' summed mutual information, over the regions "
            "that both found on all images.",
        ),
    )
    return report, answers


def _row(
    label: str,
    contender: Contender,
    found: Answers,
    scenes: Sequence[Scene],
    reference: Answers | None,
    startup: probe.Startup,
) -> SessionRow:
    engines, first = contender.engines, contender.engines[0]
    regions = [region for each in found[: len(scenes)] for region in each]
    said = sum(len(region.caption.words) for region in regions) / len(scenes)
    costs = {
        name: [cost(engine.programs[name].graph) for engine in engines] for name in first.programs
    }
    flops = {name: sum(one.flops_per_sample for one in each) for name, each in costs.items()}
    every = [one for each in costs.values() for one in each]
    quality = {
        key: value
        for key, value in dataclasses.asdict(judge(found[: len(scenes)], scenes)).items()
        if key != "table"
    }
    count = max(1, len(regions))
    quality |= {
        "regions_per_image": len(regions) / len(scenes),
        "mutual_information": sum(region.mutual for region in regions) / count,
        "predictive_entropy": sum(region.total for region in regions) / count,
    }
    if reference is not None:
        correlation, matched = mutual_rank_correlation(found, reference)
        per_box, _ = mutual_rank_correlation(found, reference, "score_mi")
        quality |= {"matched_regions": float(matched)}
        for name, value in (
            ("mi_rank_correlation", correlation),
            ("box_mi_rank_correlation", per_box),
        ):
            if np.isfinite(value):
                quality[name] = value
    return SessionRow(
        label=label,
        kind=first.kind if len(engines) == 1 else "ensemble",
        task=first.task,
        precision=first.precision,
        backend=first.backend,
        target=first.target,
        threads=contender.sessions[0].threads,
        heads=first.heads if len(engines) == 1 else len(engines),
        engines=len(engines),
        size_bytes=sum(engine.size_bytes for engine in engines),
        weight_bytes=sum(one.weight_bytes for one in every),
        parameters=sum(one.parameters for one in every),
        flops_per_sample=flops["encode"] + flops["step"] * said,
        load_ms=startup.load_ms,
        first_run_ms=startup.first_run_ms,
        base_memory_mb=startup.base_memory_mb,
        peak_memory_mb=startup.peak_memory_mb,
        energy_mj=_NO_SENSOR,
        quality=quality,
    )
