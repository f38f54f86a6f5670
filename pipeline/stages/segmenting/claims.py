"""Who works on which case of a folder: what lets several processes, and several jobs, share one batch.

A case belongs to whoever holds the lock on its file in OUT/.medseg/claims. The kernel frees a lock when its holder
dies, however it dies, so that no case is lost and none has to be waited for in vain. The file's lines are beginnings
that came to no end: normally one, the holder's; those of earlier runs and workers were left by processes that died over
the case.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.stages.segmenting.inputs import BOOKKEEPING

log = logging.getLogger(__name__)

CLAIMS = Path(BOOKKEEPING, "claims")


@dataclass
class Claim:
    """A case that is this process's until it is given back.

    Attributes:
        name: of the case.
        left_before: run of each process that died over the case, in order.
    """

    name: str
    left_before: tuple[str, ...]
    _file: BinaryIO
    _before: bytes
    _line: bytes

    def begin(self) -> None:
        """Write down who works on the case: if this process dies from now on, it is known over what."""
        with suppress(OSError):  # A full disk: the lock matters, the line is a hint.
            self._file.write(self._line)

    def give_back(self, *, ended: bool) -> None:
        """Let others have the case.

        Args:
            ended: something became of it; otherwise nothing had been begun, and nobody is to be blamed.
        """
        if self._file.closed:
            return
        with self._file, suppress(OSError):
            self._file.truncate(0)
            self._file.write(b"" if ended else self._before)


class Claims:
    """The claims of one run in one folder.

    Args:
        out: the batch's folder.
        run: the run that this process works for; the workers of one batch share it.
        worker: names this process; None: its number on this machine.
    """

    def __init__(self, out: Path, run: str, worker: str | None = None) -> None:
        self._folder = out / CLAIMS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run, self._worker = run, worker or str(os.getpid())
        self._held: dict[str, Claim] = {}
        self._can_lock = True

    def take(self, name: str) -> Claim | None:
        """Take a case; None where another process holds it."""
        # Unbuffered: what a full disk does not take would come up again when the file is closed.
        file = cast(BinaryIO, (self._folder / name).open("ab+", buffering=0))
        if not self._lock(file):
            file.close()
            return None
        file.seek(0)
        before = file.read()
        # Without locks they may be those of the living.
        runs = [line.split()[0].decode() for line in before.splitlines() if line.strip()] if self._can_lock else []
        self._held[name] = Claim(name, tuple(runs), file, before, f"{self._run} {self._worker}\n".encode())
        return self._held[name]

    def give_all_back(self) -> None:
        """Give back what has not been given back, as not begun."""
        for claim in self._held.values():
            claim.give_back(ended=False)

    def _lock(self, file: BinaryIO) -> bool:
        """Lock a file if nobody holds it; where the file system knows no locks, say so once and go on without."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if self._can_lock:
                log.warning("%s: its file system knows no locks (%s); let one job alone work here", self._folder, error)
            self._can_lock = False
        return True


def left_by(out: Path, worker: str | int, names: Sequence[str]) -> Iterator[str]:
    """Yield the cases that a worker, or a process of this machine, had begun when it died."""
    for name in names:
        with suppress(OSError):
            lines = (out / CLAIMS / name).read_text(encoding="utf-8").splitlines()
            if any(line.endswith(f" {worker}") for line in lines):
                yield name
