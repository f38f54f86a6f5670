"""The `medseg` command: one function a command, logging, and where a PipelineError becomes an exit code.

Commands import their stage when called, so that help and a wrong YAML answer at once. Exit codes: 0 done; 1 some cases
of a batch failed, the rest is done; 2 nothing could be done, or errors were found; 130 a batch was stopped and can be
gone on with.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import options as options
from pipeline.cli.aids import aids
from pipeline.cli.datasets import datasets
from pipeline.cli.dicom import dicom as dicom_commands
from pipeline.cli.export import exports
from pipeline.cli.loading import load
from pipeline.cli.segmenting import segment
from pipeline.cli.serving import serving
from pipeline.cli.sharing import cluster_of, shard_of
from pipeline.errors import PipelineError
from pipeline.progress import lines_only

app = typer.Typer(
    name="medseg",
    help="3D medical image segmentation on CT and MRI: manifest, preprocess, train, evaluate, segment.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
) -> None:
    """Set the log up, and output that can show any file's name."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if "RANK" in os.environ:
        # Torch is not there yet. It would warn each process of what is wanted: see training/distributed.py.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if int(os.environ.get("RANK", "0")) > 0:  # Of processes that train together the first one speaks.
        level = max(level, logging.WARNING)
        lines_only()
    logging.getLogger("pipeline").setLevel(level)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@app.command()
def manifest(
    source: Annotated[Path, typer.Argument(help="Folder of the data set, a CSV with a line per case, or a datalist.")],
    out: Annotated[Path, typer.Option("--out", help="The manifest to write, data_manifests/NAME.json.")],
    layout: options.Layout = None,
    root: options.Root = None,
    images: options.ImagePatterns = None,
    labels: options.LabelPattern = None,
    patient: options.PatientPattern = None,
    label: options.LabelValues = None,
    folds: options.Folds = None,
    splits: options.Splits = None,
    test_fraction: Annotated[
        float, typer.Option("--test-fraction", min=0.0, max=0.9, help="Share of the patients held out.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the split.")] = 0,
    group_by: options.GroupBy = None,
    stratify_by: options.StratifyBy = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a manifest that is there.")] = False,
) -> None:
    """Find the cases of a data set, split them by patient, and write the manifest."""
    from pipeline.data.formats import Reading
    from pipeline.data.label_options import parse_label
    from pipeline.stages import manifest as stage

    stage.run(
        source,
        out,
        layout=layout,
        reading=Reading(root=root, images=tuple(images or ()), labels=labels, patient=patient, splits=splits),
        labels=[parse_label(text) for text in label or ()],
        folds=folds,
        test_fraction=test_fraction,
        seed=seed,
        group_by=group_by,
        stratify_by=stratify_by,
        force=force,
    )


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The data set's manifest.")],
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder of the images, in place of the manifest's.")
    ] = None,
    workspace: Annotated[Path, typer.Option("--workspace", help="What is learned is kept here.")] = Path("work"),
    jobs: options.Jobs = None,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", help="Write an overlay of image and label per case here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    shard: options.ShardOf = None,
) -> None:
    """Read each case once and report every problem of every case together."""
    from pipeline.stages import check as stage

    part = shard_of(shard)
    report = stage.run(manifest, root=root, workspace=workspace, jobs=jobs, pictures=pictures, shard=part)
    typer.echo(json.dumps(report.as_json(), indent=2) if as_json else report.as_text())
    if report.errors:
        raise typer.Exit(2)


@app.command()
def preprocess(
    config: options.ConfigPath,
    overrides: options.Overrides = None,
    workspace: options.Workspace = None,
    jobs: options.Jobs = None,
    gpu_memory: options.GpuMemory = None,
    replan: options.Replan = False,
    engine: options.EngineChoice = "local",
    address: options.Address = None,
    workers: options.Workers = None,
    cpus_per_worker: options.WorkerCpus = None,
    wait_minutes: options.WaitMinutes = options.DEFAULT_WAIT_MINUTES,
    shard: options.ShardOf = None,
) -> None:
    """Measure the development cases, plan, and fill the store; fresh cases are skipped."""
    ray = cluster_of(engine, address, workers, cpus_per_worker, wait_minutes)
    part = shard_of(shard, ray, jobs=jobs)
    loaded = load(config, options.with_memory(overrides, gpu_memory), workspace)
    from pipeline.stages import preprocess as stage

    stage.run(loaded, jobs=jobs, replan=replan, ray=ray, shard=part)


@app.command()
def plan(
    config: options.ConfigPath,
    gpu_memory: options.GpuMemory = None,
    device: options.Device = "auto",
    replan: options.Replan = False,
    overrides: options.Overrides = None,
    workspace: options.Workspace = None,
    jobs: options.Jobs = None,
) -> None:
    """Plan, and say what training will take: memory, disk, hours."""
    loaded = load(config, options.with_memory(overrides, gpu_memory), workspace)
    from pipeline.stages import plan as stage

    typer.echo(stage.run(loaded, device=device, jobs=jobs, replan=replan).as_text())


@app.command()
def train(
    config: options.ConfigPath,
    fold: options.Fold = "0",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    device: options.Devices = "auto",
    jobs: options.FoldJobs = None,
    processes: options.Processes = 1,
    dry_run: options.DryRun = False,
    overrides: options.Overrides = None,
    workspace: options.Workspace = None,
) -> None:
    """Train on all folds but one and validate on that one."""
    loaded = load(config, overrides, workspace)
    if dry_run:
        from pipeline.stages import dry_run as dry

        typer.echo(dry.run(loaded, fold=fold).as_text())
        return
    from pipeline.training.distributed import is_launched

    launched = is_launched()
    if processes > 1 and not launched:
        from pipeline.stages import launching

        launching.refuse(loaded, processes, fold=fold, resume=resume, device=device, jobs=jobs)
        raise typer.Exit(launching.run(processes, sys.argv[1:]))
    if fold == "all" and not launched:
        from pipeline.stages import cross_validation

        report = cross_validation.run(loaded, resume=resume, device=device, jobs=jobs)
        typer.echo(report.as_text())
        if report.failures:
            raise typer.Exit(1)
        return
    if jobs is not None:
        raise PipelineError(f"--jobs {jobs}: folds at a time, with --fold all; of one fold leave it out")
    from pipeline.stages import train as stage

    stage.run(loaded, fold=fold, resume=resume, device=device)


@app.command()
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|CONFIG", help="A model (folder, runs:/ID, models:/NAME@ALIAS) or a YAML.")
    ],
    cases: Annotated[
        str, typer.Option("--cases", metavar="fold|test|all", help="Which cases of the manifest.")
    ] = "fold",
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="Other cases: a manifest of the same labels.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results; default: in the run's folder.")
    ] = None,
    probabilities: options.KeepProbabilities = False,
    overwrite: options.PredictAnew = False,
    device: options.Device = "auto",
    overrides: options.Overrides = None,
    workspace: options.Workspace = None,
    tracking_uri: options.TrackingUri = None,
) -> None:
    """Segment labelled cases and score them on their native grids."""
    loaded = load(Path(target), overrides, workspace) if target.endswith((".yaml", ".yml")) else None
    from pipeline.stages import evaluate as stage

    report = stage.run(
        loaded or target,
        cases=cases,
        manifest=manifest,
        out=out,
        device=device,
        workspace=workspace,
        overrides=overrides or (),
        tracking_uri=tracking_uri,
        probabilities=probabilities,
        overwrite=overwrite,
    )
    typer.echo(report.as_text())
    if report.failures:
        raise typer.Exit(1)


app.command()(segment)


@app.command()
def run(
    config: options.ConfigPath,
    fold: Annotated[str, typer.Option("--fold", metavar="K|all")] = "0",
    device: options.Devices = "auto",
    overrides: options.Overrides = None,
    workspace: options.Workspace = None,
    jobs: options.Jobs = None,
) -> None:
    """Run every stage that is stale, in order: check, preprocess, train, evaluate."""
    loaded = load(config, overrides, workspace)
    from pipeline.stages import run as stage

    report = stage.run(loaded, fold=fold, device=device, jobs=jobs)
    if fold == "all":
        typer.echo(report.as_text())
    if report.failures:
        raise typer.Exit(1)


@app.command()
def compare(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="RUN...|STUDY", help="Runs, experiments or evaluations (folders, runs:/ID); or a YAML."),
    ],
    make: Annotated[bool, typer.Option("--run", help="Run what is missing of the study.")] = False,
    cases: Annotated[str, typer.Option("--cases", help="As the runs were evaluated: fold, test or all.")] = "fold",
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The member the others are drawn against; default: the first.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results; default: comparisons/NAME in the workspace.")
    ] = None,
    allow_different_budgets: Annotated[
        bool, typer.Option("--allow-different-budgets", help="Compare in spite of them; the report says so.")
    ] = False,
    device: options.Device = "auto",
    workspace: options.Workspace = None,
) -> None:
    """Compare trained and evaluated runs on the same cases: tests, intervals, rankings, costs."""
    from pipeline.stages import compare as stage

    report = stage.run(
        targets,
        make=make,
        cases=cases,
        baseline=baseline,
        out=out,
        allow_different_budgets=allow_different_budgets,
        device=device,
        workspace=workspace,
    )
    typer.echo(report.as_text())


@app.command("find-best")
def find_best(
    configs: options.Experiments,
    postprocessing: options.ChoosePostprocessing = True,
    device: options.Device = "auto",
    out: options.ComparisonFolder = None,
    workspace: options.Workspace = None,
) -> None:
    """Say which trained configuration to use, and which postprocessing helps it, by out-of-fold predictions."""
    loaded = [load(config, None, workspace) for config in configs]
    from pipeline.stages import find_best as stage

    typer.echo(stage.run(loaded, postprocessing=postprocessing, device=device, out=out).as_text())


app.add_typer(aids)
app.add_typer(datasets)
app.add_typer(dicom_commands)
app.add_typer(exports)
app.add_typer(serving)


def main() -> None:
    """Run the command line; each line of a PipelineError is an error of its own, and the exit code 2."""
    try:
        app()
    except PipelineError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
