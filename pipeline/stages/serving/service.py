"""The service itself, whatever protocol it is reached by: who may ask, what it can take now, how it examines a case."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.stages.segmenting.batch import DEATHS_ALLOWED
from pipeline.stages.serving.job import digest_of_secret
from pipeline.stages.serving.messages import Answer
from pipeline.stages.serving.pool import Pool, Worker, WorkerDied
from pipeline.stages.serving.queueing import JobQueue
from pipeline.stages.serving.settings import ModelInfo, ServiceSettings

log = logging.getLogger(__name__)

# Left on the disk beside what is being uploaded: for label maps, and for the system.
RESERVE_BYTES = 2**28
# A worker that takes another's place loads its models first; headers are read in milliseconds.
_WAIT_FOR_WORKER_S = 60.0
_LOOK_EVERY_S = 0.1
_EXAMINE_S = 60.0
_SHORTEST_TOKEN = 16


class NoWorker(Exception):
    """No worker is ready, and none became so in time."""


class Service:
    """What requests are answered from.

    Args:
        settings: how it is set up.
        info: what is said of the model.
        jobs: the queue.
        pool: of workers.

    Attributes:
        stopping: nothing is accepted any more.
    """

    def __init__(self, settings: ServiceSettings, info: ModelInfo, jobs: JobQueue, pool: Pool) -> None:
        self.settings, self.info, self.jobs, self.pool = settings, info, jobs, pool
        self.stopping = False
        self._owners = owners_of(settings.token_file)

    @property
    def needs_token(self) -> bool:
        """Whether requests must carry a token."""
        return bool(self._owners)

    def owner_of(self, token: str | None) -> str | None:
        """Return by what a client's jobs are known to be its own; None where its token is none of ours."""
        if not self._owners:
            return ""
        given = digest_of_secret(token or "")
        return next((owner for owner in self._owners if hmac.compare_digest(owner, given)), None)

    def has_room(self, upload_bytes: int) -> bool:
        """Tell whether the disk can take an upload."""
        return self.jobs.spool.free_bytes() >= upload_bytes + RESERVE_BYTES

    def obstacles(self) -> list[str]:
        """Return why no job can be taken now; nothing where one can."""
        reasons = {
            "the service is stopping": self.stopping,
            "no worker has its models loaded": self.pool.ready() is None,
            "the disk is full": not self.has_room(0),
        }
        return [reason for reason, holds in reasons.items() if holds]

    async def examine(self, tag: str, files: Mapping[str, Path], folder: Path) -> Answer:
        """Let a worker tell by the headers whether a case can be segmented.

        Raises:
            NoWorker: none is ready.
        """
        deaths = 0
        while deaths < DEATHS_ALLOWED:
            worker = await self._worker()
            asked = await asyncio.to_thread(worker.examine, tag, files, folder)
            try:
                return await asyncio.wait_for(asyncio.wrap_future(asked), _EXAMINE_S)
            except TimeoutError:
                raise NoWorker from None
            except WorkerDied as death:
                deaths += death.blamed
        return Answer(number=0, failure="volume", reason="the process that read its header was killed, twice")

    async def _worker(self) -> Worker:
        """Wait for a worker that is ready."""
        for _ in range(int(_WAIT_FOR_WORKER_S / _LOOK_EVERY_S)):
            if (worker := self.pool.ready()) is not None:
                return worker
            if self.stopping:
                break
            await asyncio.sleep(_LOOK_EVERY_S)
        raise NoWorker


def owners_of(token_file: Path | None) -> tuple[str, ...]:
    """Read the tokens of a file, a line each, and return their digests.

    Raises:
        ConfigError: it cannot be read, holds none, or one that could be guessed.
    """
    if token_file is None:
        return ()
    try:
        lines = token_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {token_file}: cannot be read: {error}") from error
    tokens = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    short = [number for number, token in enumerate(tokens, 1) if len(token) < _SHORTEST_TOKEN or not token.isascii()]
    if not tokens or short:
        got = f"token {short[0]} is shorter, or not ASCII" if short else "there is none"
        raise ConfigError(
            f"--token-file {token_file}: expected a token a line, of {_SHORTEST_TOKEN} characters or more; {got};"
            " make one by: openssl rand -hex 32"
        )
    return tuple(map(digest_of_secret, tokens))
