"""What clients are told of a job, and how the OpenAPI document describes bodies and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.confidence.judging import Confidence
from pipeline.stages.serving.job import Failure, Job, JobState
from pipeline.stages.serving.web.problems import MEDIA_TYPE, Problem
from pipeline.stages.serving.web.uploads import IMAGE, MULTIPART

LABEL_TYPE = "application/gzip"
RESULT_HEADER = "Medseg-Result"

_REASONS = {
    400: "The body is no whole multipart, or the client went away.",
    401: "A bearer token is needed, and this is none of ours.",
    403: "A web page of another host asks.",
    404: "There is no such job of yours.",
    408: "The upload pauses for too long, or takes too long in all.",
    409: "The job is not done.",
    413: "The upload is larger than is taken here, or its volume does not fit in a worker's memory.",
    415: "The body is of no type that is taken here.",
    421: "The Host header names another server.",
    422: "The volume cannot be segmented, or a parameter makes no sense; `detail` says why.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "A bug; the log has it by the request's id.",
    503: "The service is starting or stopping, or a worker died over the volume.",
    507: "The disk is full.",
}
_OF_EVERY_REQUEST = (403, 421)


class JobStatus(BaseModel):
    """A job as its client sees it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"id": "kWc3…", "state": "done", "volumes_ml": {"anterior": 1.62, "posterior": 1.51}}]
        }
    )

    id: str = Field(description="A secret: whoever has it gets the result.")
    state: JobState
    position: int | None = Field(None, description="How many jobs are before it; null unless it is queued.")
    failure: Failure | None = Field(None, description="Whose fault it is that it failed.")
    reason: str | None = Field(None, description="Why it failed.")
    volumes_ml: dict[str, float] = Field({}, description="Label -> its volume.")
    warnings: tuple[str, ...] = Field((), description="In what the volume is unlike the training cases.")
    confidence: Confidence | None = Field(None, description="How far the label map can be trusted.")
    seconds: dict[str, float] = Field({}, description="Step -> what it took.")
    received_s: float = Field(description="When it was accepted, in seconds since 1970.")
    expires_s: float | None = Field(None, description="When its result goes, in seconds since 1970.")

    @classmethod
    def of(cls, secret: str, job: Job, position: int | None, keep_s: float) -> JobStatus:
        """Return what is told of a job."""
        found = job.result
        return cls(
            id=secret,
            state=job.state,
            position=position,
            failure=job.failure,
            reason=job.reason,
            volumes_ml=found.volumes_ml if found else {},
            warnings=found.warnings if found else (),
            confidence=found.confidence if found else None,
            seconds=found.seconds if found else {},
            received_s=job.received_s,
            expires_s=None if job.ended_s is None else job.ended_s + keep_s,
        )


class Health(BaseModel):
    """The service answers."""

    status: str = Field("ok", examples=["ok"])


class Readiness(BaseModel):
    """The service can take a job."""

    ready: bool = True
    queued: int = Field(description="Jobs that wait.")
    running: int = Field(description="Jobs at work.")


def result_header(job: Job) -> dict[str, str]:
    """Return in a header what a client that waits for its label map should know beside it."""
    if job.result is None:
        return {}
    told: dict[str, Any] = {"warnings": list(job.result.warnings)}
    if sure := job.result.confidence:
        told |= {"low": sure.low, "predicted_dice": sure.predicted_dice, "doubtful": list(sure.doubtful)}
    return {RESULT_HEADER: json.dumps(told)}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe with which statuses an operation may refuse a request."""
    return {
        status: {"model": Problem, "description": _REASONS[status]}
        for status in sorted({*statuses, *_OF_EVERY_REQUEST})
    }


def upload_body(channels: Sequence[str]) -> dict[str, Any]:
    """Describe the body of an upload."""
    binary = {"type": "string", "format": "binary"}
    one = len(channels) == 1
    properties = dict.fromkeys((*channels, IMAGE) if one else channels, binary)
    parts = {"type": "object", "properties": properties, "minProperties": 1, "additionalProperties": False}
    if one:
        parts["maxProperties"] = 1
    content: dict[str, Any] = {MULTIPART: {"schema": parts}}
    if one:
        content["application/octet-stream"] = {"schema": binary}
    description = "A NIfTI (.nii, .nii.gz), .nrrd or .mha a channel; the content says the format, not a file's name."
    return {"requestBody": {"required": True, "description": description, "content": content}}


def as_it_is(document: dict[str, Any], *, needs_token: bool) -> dict[str, Any]:
    """Say in an OpenAPI document that refusals are problem+json, and nothing of tokens where none are needed."""
    if not needs_token:
        document.get("components", {}).pop("securitySchemes", None)
    for operations in document["paths"].values():
        for operation in operations.values():
            if not needs_token:
                operation.pop("security", None)
                operation["responses"].pop("401", None)
            for status, response in operation["responses"].items():
                if int(status) >= 400 and "application/json" in response.get("content", {}):
                    response["content"] = {MEDIA_TYPE: response["content"]["application/json"]}
    return document
