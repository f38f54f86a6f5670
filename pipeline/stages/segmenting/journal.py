"""The journal of a folder of label maps: what became of each case, a line each, so that a batch can be gone on with.

Every process that works in the folder appends to one file, and learns from it what the others have done. A line is
written at once, under a lock, and flushed to the disk; one that a killed process left half written is passed over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from pipeline.records import Record
from pipeline.stages.segmenting.inputs import BOOKKEEPING
from pipeline.stages.segmenting.report import CaseResult

JOURNAL = Path(BOOKKEEPING, "journal.jsonl")
# Of a case whose files are being replaced: nothing has become of it yet, in whatever run.
_NO_RUN = ""


class Entry(Record):
    """A line: a case's result, and the run that it belongs to."""

    run: str
    result: CaseResult


class Journal:
    """A folder's journal, as far as it has been read.

    Attributes:
        done: case -> how it was last done, in whatever run; without those that have failed since.
        of_run: case -> what became of it in this run, in any of its processes.
        last: case -> what last became of it, in whatever run.
    """

    def __init__(self, out: Path, run: str) -> None:
        self.done: dict[str, CaseResult] = {}
        self.of_run: dict[str, CaseResult] = {}
        self.last: dict[str, CaseResult] = {}
        self._path = out / JOURNAL
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._read_to = 0
        self._mutex = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read what has been added, by whomever; half a line is left for later."""
        with self._mutex:
            if not self._path.exists():
                return
            with self._path.open("rb") as file:
                file.seek(self._read_to)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read_to += len(whole)
            for line in whole.splitlines():
                self._take_in(line)

    def add(self, result: CaseResult) -> None:
        """Append a case's result; of one done before only that is written, in few words.

        Raises:
            OSError: it cannot be written; the journal is as it was.
        """
        self._append(Entry(run=self._run, result=result if result.status != "skipped" else _outline(result)))

    def revoke(self, name: str) -> None:
        """Say that a case's files are about to be replaced: should the process die, they are not what they were.

        Raises:
            OSError: it cannot be written; the journal is as it was.
        """
        self._append(Entry(run=_NO_RUN, result=CaseResult(name=name, status="failed", inputs=())))

    def _append(self, entry: Entry) -> None:
        """Append a line, at once and whole."""
        said = entry.model_dump(mode="json", exclude_defaults=True)
        # The first line break ends what a killed process left of a line.
        line = f"\n{json.dumps(said, ensure_ascii=False)}\n".encode(errors="backslashreplace")
        with self._path.open("ab", buffering=0) as file:
            _lock(file.fileno())
            size = os.fstat(file.fileno()).st_size
            try:
                # A full disk takes a part of it without a word.
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError as error:
                with suppress(OSError):
                    file.truncate(size)
                raise OSError(error.errno, error.strerror, str(self._path)) from None

    def _take_in(self, line: bytes) -> None:
        """Note what a line says; what is no whole entry is passed over."""
        try:
            entry = Entry.model_validate(json.loads(line))
        except (ValueError, ValidationError):
            return
        result = entry.result
        if entry.run == _NO_RUN:
            for known in (self.done, self.last):
                known.pop(result.name, None)
            return
        done = self.done.get(result.name)
        if result.status == "skipped" and done is not None and done.key == result.key:
            result = done.changed(status="skipped")
        if result.status == "done":
            self.done[result.name] = result
        if result.status == "failed":
            self.done.pop(result.name, None)
        self.last[result.name] = result
        if entry.run == self._run:
            self.of_run[result.name] = result


@contextmanager
def one_report_at_a_time(out: Path) -> Iterator[None]:
    """Let one process alone report what the journal says: the last to do so has then seen all that was written."""
    with ExitStack() as stack:
        with suppress(OSError):  # A full disk: the report matters, its order is a nicety.
            _lock(stack.enter_context((out / BOOKKEEPING / "report.lock").open("ab")).fileno())
        yield


def _outline(result: CaseResult) -> CaseResult:
    """Return of a skipped case what finds its entry again."""
    kept = result.model_dump(include={"name", "status", "inputs", "output", "key"})
    return CaseResult.model_validate(kept)


def _lock(descriptor: int) -> None:
    """Wait for the others' lines; where the file system knows no locks, appending at once must do."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
