"""The command that segments new volumes: its inputs may be files or DICOM, its workers here or on a cluster."""

from __future__ import annotations

import sys

import typer

from pipeline.cli import options as options
from pipeline.cli.sharing import cluster_of, shard_of

# As shells report Ctrl-C.
INTERRUPTED = 130


def segment(
    inputs: options.SegmentInputs,
    model: options.Models,
    out: options.LabelFolder,
    plan: options.PlanOnly = False,
    overwrite: options.Overwrite = False,
    device: options.Devices = "auto",
    jobs: options.SegmentJobs = None,
    max_memory: options.MaxMemory = None,
    precision: options.PrecisionChoice = None,
    compile_networks: options.CompileNetworks = False,
    probabilities: options.Probabilities = None,
    probabilities_type: options.ProbabilitiesType = "uint8",
    instances: options.Instances = None,
    viewer: options.Viewer = False,
    no_skip: options.NoSkip = False,
    series: options.SeriesUid = None,
    modality: options.SeriesModality = None,
    description: options.SeriesDescription = None,
    untilt: options.Untilt = False,
    dicom_formats: options.DicomFormats = None,
    codes: options.Codes = None,
    deidentify: options.Deidentify = False,
    engine: options.EngineChoice = "local",
    address: options.Address = None,
    workers: options.Workers = None,
    cpus_per_worker: options.WorkerCpus = None,
    wait_minutes: options.WaitMinutes = options.DEFAULT_WAIT_MINUTES,
    shard: options.ShardOf = None,
    workspace: options.ModelWorkspace = options.DEFAULT_WORKSPACE,
    tracking_uri: options.TrackingUri = None,
) -> None:
    """Segment new volumes: one label map each, in its input's own geometry."""
    ray = cluster_of(engine, address, workers, cpus_per_worker, wait_minutes)
    part = shard_of(shard, ray, jobs=jobs, device=device)
    from pipeline.stages import segment as stage
    from pipeline.stages.segmenting.dicom_inputs import DicomOptions, SeriesChoice
    from pipeline.stages.segmenting.dicom_objects import dicom_output

    dicom = DicomOptions(SeriesChoice(uid=series, modality=modality, description=description), untilt)
    if plan:
        text = stage.plan(
            model,
            inputs,
            out,
            device=device,
            jobs=jobs,
            workspace=workspace,
            precision=precision,
            tracking_uri=tracking_uri,
            max_memory=max_memory,
            stdin=sys.stdin,
            dicom=dicom,
        )
        typer.echo(text)
        return
    report = stage.run(
        model,
        inputs,
        out,
        overwrite=overwrite,
        device=device,
        jobs=jobs,
        max_memory=max_memory,
        precision=precision,
        compile_networks=compile_networks,
        skip_empty=not no_skip,
        probabilities=options.names(probabilities),
        probabilities_type=probabilities_type,
        instances=options.names(instances),
        viewer=viewer,
        workspace=workspace,
        tracking_uri=tracking_uri,
        stdin=sys.stdin,
        dicom=dicom,
        objects=dicom_output(options.names(dicom_formats), codes, deidentify),
        ray=ray,
        shard=part,
    )
    typer.echo(report.as_text())
    if report.not_reached:
        raise typer.Exit(INTERRUPTED)
    if report.failures:
        raise typer.Exit(1)
