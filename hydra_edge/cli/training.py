"""The verbs that train: `distill` from a recipe, and `teach`, which runs the members beforehand.

Under torchrun each process runs the same verb; ``--processes`` starts them on this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hydra_edge import terminal
from hydra_edge.cli.app import JsonFlag, verb

if TYPE_CHECKING:
    from hydra_edge.recipes import Recipe
    from hydra_edge.teaching import Predictions

RecipeFile = Annotated[Path, typer.Argument(help="What to train on what (.toml).")]
ProcessCount = Annotated[
    int, typer.Option("--processes", min=1, help="Start so many on this machine, as torchrun does.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


@verb
def distill(
    recipe: RecipeFile,
    processes: ProcessCount = 1,
    quiet: Quiet = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a Hydra student to imitate an ensemble, on one process or many; resumes by itself."""
    from hydra_edge.errors import require

    require("torch", "train")
    if _launched("distill", recipe, processes, quiet, as_json):
        return
    from hydra_edge import checkpoints, distillation, ensembles
    from hydra_edge import processes as running
    from hydra_edge.recipes import Recipe

    plan = Recipe.load(recipe)
    running.stop_when_told()
    teacher = _predictions(plan, quiet) if plan.predictions is not None else None
    with running.joined(plan.config.timeout_s) as group:
        main = group.is_main
        share = plan.ensemble(group) if teacher is None else None
    student = distillation.distill(
        teacher or share,  # type: ignore[arg-type]
        plan.student(),
        plan.data(),
        plan.config,
        augment=plan.augment(),
        workdir=plan.workdir,
        progress=not quiet,
    )
    if main:
        ensembles.save_weights(student, plan.output)
        rows = {"student": str(plan.output), "heads": len(student.heads)}
        rows |= {
            f"loss of phase {phase + 1}": float(values[-1])
            for phase, values in enumerate(checkpoints.loss_curve(plan.workdir))
            if len(values)
        }
        terminal.show(rows, as_json, title=f"wrote {plan.output}")
    running.leave()


@verb
def teach(
    recipe: RecipeFile,
    processes: ProcessCount = 1,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only compare the checksums of all files.")
    ] = False,
    quiet: Quiet = False,
    as_json: JsonFlag = False,
) -> None:
    """Run the members over the data once and keep what they say, in files that can be resumed."""
    from hydra_edge.errors import UsageError, require

    require("torch", "train")
    from hydra_edge import processes as running
    from hydra_edge.recipes import Recipe
    from hydra_edge.teaching import Predictions

    plan = Recipe.load(recipe)
    if plan.predictions is None:
        raise UsageError(
            f"'{recipe}' has no [predictions].",
            "It says where predictions are kept and how.",
            "Add [predictions] with folder = 'NAME'.",
        )
    if verify:
        found = Predictions.open(plan.predictions, verify=True)
    elif _launched("teach", recipe, processes, quiet, as_json):
        return
    else:
        running.stop_when_told()
        found = _predictions(plan, quiet)
    with running.joined(plan.config.timeout_s) as group:
        main = group.is_main
    if main:
        rows: dict[str, object] = {
            "shape": " × ".join(map(str, found.shape)),
            "format": found.format.name,
            "bytes": found.size_bytes,
        }
        for name, error in found.errors.items():
            rows[name] = f"mean {error['mean']:.3g}, max {error['max']:.3g}"
        terminal.show(rows, as_json, title=f"{plan.predictions}")
    running.leave()


def _launched(name: str, recipe: Path, count: int, quiet: bool, as_json: bool) -> bool:
    """Start the processes that were asked for and wait for them; False if this is one of them."""
    if count == 1:
        return False
    from hydra_edge import processes as running

    flags = [flag for flag, given in (("--quiet", quiet), ("--json", as_json)) if given]
    running.launch([name, str(recipe), *flags], count)
    return True


def _predictions(plan: Recipe, quiet: bool) -> Predictions:
    """What the members say, computed where it is not there yet."""
    from hydra_edge import processes as running
    from hydra_edge.teaching import teach as keep

    assert plan.predictions is not None
    with running.joined(plan.config.timeout_s) as group:
        members = plan.ensemble(group, teaching=True)
    return keep(
        members,
        plan.data(),
        plan.predictions,
        plan.storage,
        batch_size=plan.teaching_batch,
        progress=not quiet,
    )
