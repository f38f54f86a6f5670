"""The command that serves a model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import options as options

serving = typer.Typer()


@serving.command()
def serve(
    model: options.Models,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; another needs tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    allowed_host: Annotated[
        list[str] | None, typer.Option("--allowed-host", help="A name by which clients may call it; repeatable.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="A token a line; requests must carry one of them.")
    ] = None,
    spool: Annotated[
        Path | None, typer.Option("--spool", help="Folder of uploads and results; default: the workspace's spool/.")
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Jobs that may wait; more are put off.")] = 64,
    keep_minutes: Annotated[float, typer.Option("--keep-minutes", help="How long a result waits.")] = 60.0,
    max_upload: Annotated[str, typer.Option("--max-upload", metavar="SIZE", help="Of one request.")] = "1GB",
    job_minutes: Annotated[float, typer.Option("--job-minutes", help="How long one may take.")] = 60.0,
    device: options.Devices = "auto",
    jobs: options.SegmentJobs = None,
    max_memory: options.MaxMemory = None,
    precision: options.PrecisionChoice = None,
    compile_networks: options.CompileNetworks = False,
    workspace: options.ModelWorkspace = options.DEFAULT_WORKSPACE,
    tracking_uri: options.TrackingUri = None,
) -> None:
    """Segment volumes that come over HTTP: one queue, models loaded once; on 127.0.0.1."""
    from pipeline.stages import serve as stage
    from pipeline.stages.segmenting.plan import bytes_of, memory_share
    from pipeline.stages.serving.settings import ServiceSettings
    from pipeline.stages.worker_processes import shared_out

    devices = shared_out(device, jobs)
    settings = ServiceSettings(
        host=host,
        port=port,
        allowed_hosts=tuple(allowed_host or ()),
        token_file=token_file,
        spool=spool or workspace / "spool",
        queue=queue,
        keep_minutes=keep_minutes,
        max_upload_bytes=bytes_of(max_upload, "--max-upload"),
        job_minutes=job_minutes,
        devices=tuple(devices),
        max_memory_bytes=memory_share(max_memory, len(devices)),
        precision=precision,
        compile=compile_networks,
    )
    stage.run(model, settings, workspace=workspace, tracking_uri=tracking_uri)
