"""`medseg export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import options as options

exports = typer.Typer()


@exports.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a model or run, runs:/ID, models:/NAME@ALIAS.")
    ],
    kind: Annotated[
        str, typer.Option("--format", metavar="bundle|onnx|pt2", help="A MONAI bundle, ONNX, torch.export.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Compare on this image; repeatable. Default: the run's validation cases."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    workspace: options.ModelWorkspace = options.DEFAULT_WORKSPACE,
    tracking_uri: options.TrackingUri = None,
) -> None:
    """Write a model for other software, and say how near what was written comes to it."""
    from pipeline.stages import export as stage

    report = stage.run(
        model, kind, out, images=image or (), overwrite=overwrite, workspace=workspace, tracking_uri=tracking_uri
    )
    typer.echo(report.as_text())
