"""The spool: the service's folder of uploads, jobs and label maps, from which it goes on after any end.

SPOOL/incoming/TAG/       an upload under way; cleared at each start
      jobs/TAG/job.json   a job as it stands
              /0.nii ...  its channels; gone once it has ended
              /TAG.nii.gz its label map
      .medseg/            unfinished planes of a case that does not fit in memory otherwise

Only its owner may look into these. A job that is accepted moves from incoming/ to jobs/ as a whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import PipelineError
from pipeline.records import exclusively, write_json
from pipeline.stages.segmenting.inputs import BOOKKEEPING, SUFFIX
from pipeline.stages.serving.job import Job

log = logging.getLogger(__name__)

_INCOMING, _JOBS, _LOCK, _JOB = "incoming", "jobs", "lock", "job.json"


class Spool:
    """The folder of one service.

    Args:
        folder: is made where it is missing.

    Attributes:
        folder: its path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder against other services; at the end it is removed where no job is left in it.

        Raises:
            PipelineError: another service has it, or it cannot be written.
        """
        busy = PipelineError(f"{self.folder}: another `medseg serve` works here; give this one a --spool of its own")
        try:
            is_ours = not self.folder.exists() or (self.folder / _LOCK).exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusively(self.folder / _LOCK, busy):
                shutil.rmtree(self.folder / _INCOMING, ignore_errors=True)
                for name in (_INCOMING, _JOBS, BOOKKEEPING):
                    (self.folder / name).mkdir(exist_ok=True)
                    (self.folder / name).chmod(0o700)
                yield
                self._remove_if_empty()
            if is_ours:
                with suppress(OSError):  # Not empty.
                    self.folder.rmdir()
        except OSError as error:
            raise PipelineError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another --spool"
            ) from error

    @contextmanager
    def incoming(self, tag: str) -> Iterator[Path]:
        """Yield the folder of an upload; it vanishes at the end unless the job was accepted."""
        folder = self.folder / _INCOMING / tag
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def accept(self, job: Job) -> None:
        """Make an upload a job: from now on it survives any end of the service."""
        folder = self.folder / _INCOMING / job.tag
        for name in job.files.values():
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        write_json(folder / _JOB, job.model_dump(mode="json"))
        folder.rename(self.folder_of(job.tag))

    def write(self, job: Job) -> None:
        """Write a job down as it stands."""
        write_json(self.folder_of(job.tag) / _JOB, job.model_dump(mode="json"))

    def jobs(self) -> list[Job]:
        """Return the jobs that are there, by the time of their acceptance; what is none is removed."""
        found = []
        for folder in (self.folder / _JOBS).iterdir():
            try:
                found.append(Job.model_validate(json.loads((folder / _JOB).read_bytes())))
            except (OSError, ValueError, ValidationError):
                log.warning("spool: %s is no whole job, and is removed", folder.name)
                shutil.rmtree(folder, ignore_errors=True)
        return sorted(found, key=lambda job: job.received_s)

    def folder_of(self, tag: str) -> Path:
        """Return a job's folder."""
        return self.folder / _JOBS / tag

    def files_of(self, job: Job) -> dict[str, Path]:
        """Return channel -> file of a job."""
        return {channel: self.folder_of(job.tag) / name for channel, name in job.files.items()}

    def label_of(self, tag: str) -> Path:
        """Return where a job's label map lies."""
        return self.folder_of(tag) / (tag + SUFFIX)

    def clear(self, job: Job) -> None:
        """Remove all of a job that has ended but its record and its label map: patients' images first of all."""
        keep = {_JOB, self.label_of(job.tag).name} if job.state == "done" else {_JOB}
        for file in self.folder_of(job.tag).iterdir():
            if file.name not in keep:
                file.unlink(missing_ok=True)

    def remove(self, tag: str) -> None:
        """Remove all of a job."""
        shutil.rmtree(self.folder_of(tag), ignore_errors=True)

    def free_bytes(self) -> int:
        """Return what the disk has left."""
        return shutil.disk_usage(self.folder).free

    def _remove_if_empty(self) -> None:
        """Remove what we made in the folder where no job is left in it."""
        with suppress(OSError):  # Not empty.
            (self.folder / _JOBS).rmdir()
            for name in (_INCOMING, BOOKKEEPING):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / _LOCK).unlink()
