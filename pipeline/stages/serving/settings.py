"""How a service is set up, and what it says of its model."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pipeline.data.plan import Plan, read_plan
from pipeline.hardware import Precision
from pipeline.inference.postprocessing import common_rules
from pipeline.model import DESCRIPTION, PLAN, model_digest, read_description, refuse_other_task
from pipeline.records import Record, digest_of
from pipeline.stages.model_card import card_of

# Longer than any scan of a day's work takes to be fetched; patients' data should not lie about for longer.
KEEP_MINUTES = 60.0


class ServiceSettings(Record):
    """How a service is set up.

    Attributes:
        host: address that it listens on; another than the machine's own only with tokens.
        port: TCP port; 0: any that is free.
        allowed_hosts: names by which clients may call it, beside `host` and the machine's own.
        token_file: a token a line; requests carry one of them. None: anybody who reaches the port may ask.
        spool: folder of uploads, jobs and label maps.
        queue: jobs that may wait, uploads under way among them.
        keep_minutes: how long a result waits to be fetched.
        max_upload_bytes: of one request.
        upload_idle_s: an upload may pause for so long.
        upload_s: an upload may take so long in all.
        job_minutes: a job may take so long before its worker is ended.
        devices: of the workers, one each.
        max_memory_bytes: what each worker may take; None: what is free.
        precision: auto, fp32, bf16 or fp16; None: as the models were trained.
        compile: the networks, by torch.compile.
        skip_empty: leave windows out that hold no body.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    token_file: Path | None = None
    spool: Path
    queue: int = Field(default=64, ge=1)
    keep_minutes: float = Field(default=KEEP_MINUTES, gt=0)
    max_upload_bytes: int = Field(default=10**9, gt=0)
    upload_idle_s: float = 30.0
    upload_s: float = 900.0
    job_minutes: float = 60.0
    devices: tuple[str, ...] = ("auto",)
    max_memory_bytes: int | None = None
    precision: Precision | None = None
    compile: bool = False
    skip_empty: bool = True


class ModelInfo(Record):
    """What clients are told of the model.

    Attributes:
        name: of the experiment.
        members: how many models; several are an ensemble.
        channels: name of each upload -> its modality.
        labels: label -> its value in label maps.
        spacing_mm: of the grid on which the networks see an image.
        scores: of the first member on its validation cases.
        created: date and time of the training, ISO 8601.
        versions: package -> version at training.
        card: the first member's card, as Markdown.
        models_digest: of all that label maps depend on.
    """

    name: str
    members: int
    channels: dict[str, str]
    labels: dict[str, int]
    spacing_mm: tuple[float, ...]
    scores: dict[str, float]
    created: str
    versions: dict[str, str]
    card: str
    models_digest: str


def info_of(folders: list[Path]) -> ModelInfo:
    """Read what is said of models, without their weights.

    Raises:
        ModelError: a folder holds no model, a damaged one, or one that does not segment.
        ConfigError: a plan is damaged.
    """
    descriptions = [read_description(folder / DESCRIPTION) for folder in folders]
    for folder, description in zip(folders, descriptions, strict=True):
        refuse_other_task(folder, description)
    plan, first = read_plan(folders[0] / PLAN), descriptions[0]
    return ModelInfo(
        name=first.name,
        members=len(folders),
        channels=dict(plan.channels),
        labels=dict(plan.labels),
        spacing_mm=plan.spacing_mm,
        scores=first.scores,
        created=first.created,
        versions=first.versions,
        card=card_of(folders[0]),
        models_digest=_digest(folders, plan),
    )


def _digest(folders: list[Path], plan: Plan) -> str:
    """Return a digest of all that label maps depend on."""
    return digest_of([plan.digest(), common_rules(folders).digest(), *map(model_digest, folders)])
