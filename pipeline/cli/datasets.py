"""Commands about whole data sets: from the internet, and to other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import PipelineError

datasets = typer.Typer()


@datasets.command()
def fetch(
    source: Annotated[
        list[str],
        typer.Argument(metavar="msd TASK | URL", help="A task of the Decathlon, by number or name; or an archive."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder in which the data set's folder is made.")] = Path("data"),
    sha256: Annotated[str | None, typer.Option("--sha256", help="What the archive must be.")] = None,
    md5: Annotated[str | None, typer.Option("--md5", help="The same, where nothing better is known.")] = None,
    keep_archive: Annotated[bool, typer.Option("--keep-archive", help="Do not remove it when it is unpacked.")] = False,
) -> None:
    """Fetch a data set from the internet, checked and unpacked; goes on after anything that stopped it."""
    from pipeline.stages import fetch as stage

    typer.echo(stage.run(source, out, sha256=sha256, md5=md5, keep_archive=keep_archive).as_text())


@datasets.command("export-dataset")
def export_dataset(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The data set's manifest.")],
    layout: Annotated[str, typer.Option("--format", help="nnunet, decathlon or bids.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make; for nnU-Net DatasetNNN_NAME.")],
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder of the images, in place of the manifest's.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy files; default: symbolic links.")] = False,
    hard_links: Annotated[bool, typer.Option("--hard-links", help="Make hard links.")] = False,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring channels onto their case's grid, in place of refusing them.")
    ] = False,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out cases that cannot be written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that this command has written.")] = False,
) -> None:
    """Write a data set as nnU-Net, the Decathlon or BIDS have it, with the manifest's folds."""
    from pipeline.stages import export_dataset as stage

    if copy and hard_links:
        raise PipelineError("--copy and --hard-links: name one of them")
    report = stage.run(
        manifest,
        out,
        layout=layout,
        root=root,
        links="copy" if copy else "hard" if hard_links else "symbolic",
        resample=resample,
        skip=skip,
        force=force,
    )
    typer.echo(report.as_text())
    if report.left_out:
        raise typer.Exit(1)
