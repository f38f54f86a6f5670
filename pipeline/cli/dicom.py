"""Commands about DICOM: what a folder holds, and series as NIfTI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import options as options
from pipeline.errors import PipelineError

dicom = typer.Typer(name="dicom", help="DICOM series: list them, convert them to NIfTI.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Looked through with the folders within.")]


@dicom.command("list")
def list_series(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with the UIDs.")] = False,
    show_patient: Annotated[bool, typer.Option("--show-patient", help="Name each series' patient and date.")] = False,
) -> None:
    """List the DICOM series of a folder: what they are, and whether they can be read."""
    from pipeline.stages import dicom_series as stage

    found = stage.list_series(folder, show_patient=show_patient)
    typer.echo(json.dumps(found.as_json(), indent=2) if as_json else found.as_text())


@dicom.command()
def convert(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="Folder of the volumes, MODALITY_KEY.nii.gz.")],
    series: options.SeriesUid = None,
    modality: options.SeriesModality = None,
    description: options.SeriesDescription = None,
    every: Annotated[bool, typer.Option("--all", help="Every image series.")] = False,
    untilt: options.Untilt = False,
    force: Annotated[bool, typer.Option("--force", help="Write volumes anew that are there.")] = False,
) -> None:
    """Write DICOM series as NIfTI."""
    from pipeline.stages import dicom_series as stage
    from pipeline.volumes.dicom.choosing import SeriesChoice

    choice = SeriesChoice(uid=series, modality=modality, description=description)
    try:
        done = stage.convert(folder, out, choice=choice, every=every, untilt=untilt, force=force)
    except OSError as error:
        raise PipelineError(str(error)) from error
    typer.echo(done.as_text())
    if done.failures:
        raise typer.Exit(1)
