"""Commands beside the way from data to label maps: what there is to choose from, what is tracked, what can go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline import cli_options as options
from pipeline.cli_loading import load

aids = typer.Typer()


@aids.command()
def ui(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="The experiment's YAML; without one, ./work.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 5000,
    overrides: options.Overrides = None,
    workspace: options.Workspace = None,
) -> None:
    """Open the MLflow UI on 127.0.0.1."""
    loaded = load(config, overrides, workspace) if config else None
    from pipeline.stages import ui as stage

    stage.run(loaded, workspace=workspace, port=port)


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
