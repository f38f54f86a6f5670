"""A job: one case that a client has sent, from its acceptance until its result is gone."""

from __future__ import annotations

import hashlib
import secrets
from typing import Literal

from pipeline.records import Record
from pipeline.stages.segmenting.report import CaseResult

JobState = Literal["queued", "running", "done", "failed"]
# Whose fault a failure is: the volume's, its size's, the disk's, a bug's, or unknown: a worker died over it.
Failure = Literal["volume", "memory", "disk", "bug", "death"]

_ID_BYTES = 24
_TAG_LETTERS = 32  # 128 bits: nobody finds a job by its tag, and no two jobs share one.
TAG_SHOWN = 8  # Letters of it in the log.


class Job(Record):
    """A job as it stands on disk.

    Attributes:
        tag: names it in the spool and the log. The id, with which its client asks for it, is a secret that stands
            neither there nor here: the tag is its digest.
        owner: digest of its client's token; empty where there are no tokens.
        model: digest of the models that it was sent to.
        files: channel -> file in its folder.
        received_s: when it was accepted, in seconds since 1970.
        state: queued, running, done or failed.
        attempts: how often a worker has begun it and come to no end.
        ended_s: when it was done or had failed.
        failure, reason: why it failed.
        result: what became of the case; None before that.
    """

    tag: str
    owner: str = ""
    model: str
    files: dict[str, str]
    received_s: float
    state: JobState = "queued"
    attempts: int = 0
    ended_s: float | None = None
    failure: Failure | None = None
    reason: str | None = None
    result: CaseResult | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self.ended_s is not None


def new_id() -> str:
    """Return an id that nobody can guess."""
    return secrets.token_urlsafe(_ID_BYTES)


def digest_of_secret(secret: str) -> str:
    """Return by what a secret is known where it must not stand; a job's tag is that of its id."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()[:_TAG_LETTERS]
