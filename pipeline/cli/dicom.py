"""Commands about DICOM: what a folder holds, series as NIfTI, label maps from SEG and RTSTRUCT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli import options as options
from pipeline.errors import PipelineError

dicom = typer.Typer(
    name="dicom", help="DICOM series: list them, convert them to NIfTI, with their labels.", no_args_is_help=True
)

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


@dicom.command()
def labels(
    source: Annotated[Path, typer.Argument(metavar="SEG|RTSTRUCT", help="The DICOM object.")],
    series: Annotated[
        str, typer.Option("--series", metavar="FOLDER", help="Of the images it was drawn on; or FOLDER#KEY.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The label map, .nii.gz; a .csv beside it names the labels.")],
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="NAME", help="A structure to take; repeatable: values 1, 2, ... in this order."
        ),
    ] = None,
    overlap: Annotated[
        Literal["refuse", "first", "last"], typer.Option("--overlap", help="Whose a voxel of two structures is.")
    ] = "refuse",
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.0, max=1.0, help="Of fractional segments: what counts as inside.")
    ] = 0.5,
    force: Annotated[bool, typer.Option("--force", help="Replace a label map that is there.")] = False,
) -> None:
    """Write what was drawn in a DICOM SEG or RTSTRUCT as a label map on its series' grid."""
    from pipeline.stages import dicom_labels as stage

    try:
        done = stage.import_labels(
            source, series, out, wanted=label or (), overlap=overlap, threshold=threshold, force=force
        )
    except OSError as error:
        raise PipelineError(str(error)) from error
    typer.echo(done.as_text())
