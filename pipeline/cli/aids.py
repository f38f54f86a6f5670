"""Commands beside the way from data to label maps: what there is to choose from, what is tracked, what can go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import options as options
from pipeline.cli.loading import load

aids = typer.Typer()


@aids.command()
def ui(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="The experiment's YAML; without one, ./work.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 5000,
    opens: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Open the page in your browser. Default: on a terminal of a desktop."),
    ] = None,
    overrides: options.Overrides = None,
    workspace: options.Workspace = None,
) -> None:
    """Serve MLflow's pages on 127.0.0.1; the first address compares all folds of an experiment."""
    loaded = load(config, overrides, workspace) if config else None
    from pipeline.stages import ui as stage

    stage.run(loaded, workspace=workspace, port=port, opens=opens)


@aids.command("install-viewer")
def install_viewer(
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="NiiVue's package (.tgz) or niivue.umd.js, brought along."),
    ] = None,
) -> None:
    """Fetch NiiVue by npm, for the viewer in reports: slices and 3-D in the browser, offline."""
    from pipeline.viewer import assets

    typer.echo(f"NiiVue {assets.VERSION}: {assets.install(source)}")


@aids.command()
def sync(
    workspace: Annotated[Path, typer.Option("--workspace", help="Its runs are looked at.")] = Path("work"),
) -> None:
    """Send to MLflow what could not be sent while it was out of reach."""
    from pipeline.stages import sync as stage

    if not stage.run(workspace):
        raise typer.Exit(1)


@aids.command()
def demo(
    workspace: Annotated[Path, typer.Option("--workspace", help="Everything lands here.")] = Path("work/demo"),
) -> None:
    """Go the whole way on phantoms that medseg generates: manifest to label maps of new volumes, in minutes."""
    from pipeline.stages import demo as stage

    stage.run(workspace)


@aids.command()
def networks(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One of them: its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the networks that a configuration can name, or the options of one."""
    from pipeline.stages import networks as stage

    if name is None:
        entries = stage.run()
        typer.echo(json.dumps(stage.as_json(entries), indent=2) if as_json else stage.entries_text(entries))
    else:
        documentation, options = stage.options_of(name)
        text = stage.options_text(name, documentation, options)
        typer.echo(json.dumps(stage.as_json(options), indent=2) if as_json else text)


@aids.command()
def describe(
    config: options.ConfigPath,
    overrides: options.Overrides = None,
    workspace: options.Workspace = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, every layer with it.")] = False,
) -> None:
    """Explain a configuration's network: levels, parameters, receptive field, legal sizes, memory."""
    loaded = load(config, overrides, workspace)
    from pipeline.stages import describe as stage

    explanation = stage.run(loaded)
    typer.echo(json.dumps(explanation.as_json(), indent=2) if as_json else explanation.as_text())


@aids.command("new-config")
def new_config(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The manifest of your data.")],
    out: Annotated[Path, typer.Option("--out", help="The YAML to write, configs/NAME.yaml.")],
    preset: options.Preset = None,
) -> None:
    """Write a commented YAML to start from for one's own data."""
    from pipeline.stages import new_config as stage

    stage.run(manifest, out, preset)


@aids.command()
def reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A fold's run: its folder, runs:/ID, or the ID in MLflow.")],
    workspace: Annotated[Path, typer.Option("--workspace", help="A fresh folder, in which it is made anew.")],
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="Your manifest, which must be the run's; default: the run's own.")
    ] = None,
    root: Annotated[Path | None, typer.Option("--root", help="Folder of the images; default: where they lay.")] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="How far a metric may be off and still match.")
    ] = 1e-6,
    device: options.Device = "auto",
    jobs: options.Jobs = None,
    tracking_uri: options.TrackingUri = None,
) -> None:
    """Make a run anew from what MLflow keeps of it, and say whether its weights or metrics match."""
    from pipeline.stages import reproduce as stage

    report = stage.run(
        run, workspace, manifest=manifest, root=root, tolerance=tolerance, device=device, jobs=jobs, uri=tracking_uri
    )
    typer.echo(report.as_text())
    if not report.matches:
        raise typer.Exit(1)


@aids.command()
def sweep(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The sweep's YAML.")],
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Trials at a time, each in a process.")] = 1,
    device: options.Devices = "auto",
    workspace: options.Workspace = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Search settings with Optuna: train trials, end hopeless ones, write the best; the same command goes on."""
    from pipeline.cli.loading import option_checks
    from pipeline.stages import sweep as stage

    if worker:
        stage.work(study, device=device, workspace=workspace)
        return
    report = stage.run(study, jobs=jobs, device=device, workspace=workspace, checks=option_checks)
    typer.echo(report.as_text())
    if report.best is None:
        raise typer.Exit(1)


@aids.command()
def schema(
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: standard output.")] = None,
) -> None:
    """Write the JSON Schema of the YAML, for editors."""
    from pipeline.stages import schema as stage

    text = stage.run(out)
    if out is None:
        typer.echo(text)


@aids.command()
def clean(
    workspace: Annotated[Path, typer.Option("--workspace", help="Its stores and runs are looked at.")] = Path("work"),
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only say what would go.")] = False,
) -> None:
    """Remove stale store entries, unfinished writes and old checkpoints; says what before it does it."""
    from pipeline.stages import clean as stage

    stage.run(workspace, confirmed=yes)
