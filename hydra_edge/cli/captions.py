"""`run` on an image file: describe its regions, and draw them."""

from __future__ import annotations

from pathlib import Path

from hydra_edge import terminal


def describe_picture(
    engine: Path,
    picture: Path,
    *,
    output: Path | None,
    draw: Path | None,
    beam: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find, describe and print the regions of an image file; write and draw them if asked."""
    import json

    from hydra_edge import inspection, runtime
    from hydra_edge.artifacts.files import write_atomic
    from hydra_edge.captioning import drawing, pictures
    from hydra_edge.captioning.captioner import CaptionOptions, Describer
    from hydra_edge.captioning.models import EngineModel

    with runtime.load(engine, threads=threads) as session:
        model = EngineModel(session)
        height, width = pictures.size_of(session.programs["encode"].inputs[0])
        image, _ = pictures.read_picture(picture, height, width)
        (regions,) = Describer(model, CaptionOptions(beam=beam)).describe(image[None])
    records = [region.to_json() for region in regions]
    if output is not None:
        write_atomic(output, json.dumps(records, indent=1).encode())
    if draw is not None:
        drawing.draw(pictures.open_picture(picture), regions, draw)
    if as_json:
        terminal.echo_json(records)
        return
    console = terminal.console_on(stderr=False)
    if not regions:
        console.print("nothing was found")
        return
    rows = [
        {
            "box": " ".join(f"{side:.2f}" for side in region.box),
            "object": f"{region.score:.0%}",
            "caption": region.text,
            "total": round(region.total, 3),
            "data": round(region.expected, 3),
            "model": round(region.mutual, 3),
        }
        for region in regions
    ]
    console.print(inspection.table(rows))
    console.print("[dim]total = data + model: nats of uncertainty in the whole caption[/]")
