"""`join` and `only`: engines of several programs from engines of one, and back.

Every program is built, proved and measured by itself, as the ``main`` program of an engine of its
own; a captioner's engine is two of those in one file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hydra_edge.artifacts.engine import MAIN, NAME, Engine, Program
from hydra_edge.artifacts.files import sha256
from hydra_edge.errors import InputError


def join(engines: Mapping[str, Engine]) -> Engine:
    """Put engines of one program each into one file.

    Args:
        engines: By the name their program gets; all are for one target. Task, kind, heads and
            labels are those of the first that has heads, or of the first.

    Returns:
        One engine with a program for each. Its metrics are theirs, named ``program.metric``; its
        precision is theirs where they agree, else ``program: precision`` of each.

    Raises:
        InputError: There is no engine, a name is no name of a program, an engine has several
            programs, or targets, backends or tasks differ.
    """
    if not engines:
        raise InputError(
            "There is no program.", "An engine has at least one.", "Name one graph at least."
        )
    programs = {_checked(name): _single(name, engine) for name, engine in engines.items()}
    if len({(engine.target, engine.backend) for engine in engines.values()}) > 1:
        found = ", ".join(f"{name} {engine.target}" for name, engine in engines.items())
        raise InputError(
            f"The programs are for different targets: {found}.",
            "One file is loaded on one device.",
            "Compile all of them for the same target.",
        )
    if len({engine.task for engine in engines.values() if engine.task}) > 1:
        found = ", ".join(f"{name} {engine.task}" for name, engine in engines.items())
        raise InputError(
            f"The programs are for different tasks: {found}.",
            "The programs of one engine serve one task together.",
            "Make an engine of each.",
        )
    first = next(iter(engines.values()))
    if set(engines) == {MAIN}:
        return first
    leading = next((engine for engine in engines.values() if engine.heads), first)
    precisions = {name: engine.precision for name, engine in engines.items()}
    same = len(set(precisions.values())) == 1
    calibrations = {n: e.calibration_sha256 for n, e in engines.items() if e.calibration_sha256}
    return replace(
        leading,
        precision=first.precision if same else _listed(precisions),
        source_sha256=_digest({name: engine.source_sha256 for name, engine in engines.items()}),
        calibration_sha256=_digest(calibrations) if calibrations else None,
        metrics={
            f"{n}.{key}": value for n, e in engines.items() for key, value in e.metrics.items()
        },
        tools={key: value for engine in engines.values() for key, value in engine.tools.items()},
        assets={key: data for engine in engines.values() for key, data in engine.assets.items()},
        programs=programs,
    )


def only(engine: Engine, name: str) -> Engine:
    """One program of an engine, as an engine of its own whose ``main`` program it is.

    Args:
        engine: Any engine.
        name: One of its programs.

    Returns:
        The engine that `join` was given, so that whatever works on one program works on it. What
        the file keeps for all programs together, the digests, is that of the program's graph.

    Raises:
        InputError: There is no such program.
    """
    program = find(engine, name)
    if set(engine.programs) == {MAIN}:
        return engine
    metadata = program.graph.metadata
    prefix = f"{name}."
    return replace(
        engine,
        task=metadata.task,
        kind=metadata.kind,
        heads=metadata.heads,
        labels=metadata.labels,
        precision=metadata.precision,
        source_sha256=program.graph.sha256,
        calibration_sha256=metadata.calibration_sha256,
        metrics={
            key.removeprefix(prefix): value
            for key, value in engine.metrics.items()
            if key.startswith(prefix)
        },
        programs={MAIN: program},
    )


def find(engine: Engine, name: str) -> Program:
    """A program by name.

    Raises:
        InputError: There is no such program.
    """
    if name not in engine.programs:
        raise InputError(
            f"The engine has no program '{name}'.",
            f"It has: {', '.join(engine.programs)}.",
            "Name one of those.",
        )
    return engine.programs[name]


def _single(name: str, engine: Engine) -> Program:
    if len(engine.programs) != 1:
        raise InputError(
            f"'{name}' is an engine of the programs {', '.join(engine.programs)}.",
            "Each becomes one program.",
            "Take one of its programs first.",
        )
    return next(iter(engine.programs.values()))


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise InputError(
            f"'{name}' is not a name of a program.",
            "It has up to 64 lower-case letters, digits and underscores, a letter first.",
            "Name it for example 'encode'.",
        )
    return name


def _listed(precisions: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {precision}" for name, precision in precisions.items())


def _digest(digests: Mapping[str, str]) -> str:
    return sha256("\n".join(f"{name} {digest}" for name, digest in digests.items()).encode())
