"""What a machine must have in common with the one that gave the command: versions, models, the shared file system."""

from __future__ import annotations

import fcntl
import json
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from pipeline import __version__
from pipeline.model import model_digest
from pipeline.records import Record

# So many of the files to be read are looked for, evenly spread: a missing mount shows in any.
MOST_FILES = 100
# What was just written may take this long to be seen through a network file system.
SEEN_WITHIN_S = 10.0


class Common(Record):
    """What machines that work together have in common.

    Attributes:
        versions: of medseg and of what results depend on.
        files: path of a file that is read or written by all -> its size in bytes.
        models: folder -> digest.
        locked: a file that the giver of the command holds a lock on; None where locks do not matter.
    """

    versions: dict[str, str]
    files: dict[Path, int]
    models: dict[Path, str] = {}
    locked: Path | None = None

    @classmethod
    def of(
        cls, written: Sequence[Path], read: Iterable[Path], models: Sequence[Path] = (), locked: Path | None = None
    ) -> Common:
        """Take down what this machine has; of the files to be read a sample, and none that is not there."""
        return cls(
            versions=versions(),
            files=dict(_sizes([*written, *_sample(list(read))])),
            models={folder: model_digest(folder) for folder in models},
            locked=locked,
        )


def versions() -> dict[str, str]:
    """Return the versions here of what results depend on."""
    return {"medseg": __version__, "torch": torch.__version__, "NumPy": np.__version__}


def misfits(common: Common) -> tuple[str, ...]:
    """Return in what this machine differs, each with what to do; empty where it can take part."""
    return tuple(f"{socket.gethostname()}: {what}" for what in (*_other_versions(common), *_unseen(common)))


@lru_cache(maxsize=1)
def misfits_once(common: str) -> tuple[str, ...]:
    """Return the misfits, looked for once by each process.

    Args:
        common: as JSON.
    """
    # Not by pydantic's own reader, which refuses the escapes of paths that are no UTF-8.
    return misfits(Common.model_validate(json.loads(common)))


def _other_versions(common: Common) -> Iterator[str]:
    """Yield the versions that differ."""
    here = versions()
    for name, wanted in common.versions.items():
        if here.get(name) != wanted:
            yield f"{name} is {here.get(name, 'missing')} there and {wanted} here; install the same on all nodes"


def _unseen(common: Common) -> Iterator[str]:
    """Yield the files and models that are missing or others, and a lock that is not felt."""
    for path, size_bytes in common.files.items():
        if not is_seen(path, size_bytes):
            yield f"does not see {path}, or another file of that name; all nodes must share its file system"
            return  # Where one is missing, most are.
    for folder, digest in common.models.items():
        try:
            is_same = model_digest(folder) == digest
        except OSError:
            is_same = False
        if not is_same:
            yield f"does not see the model {folder}, or another one; models must lie where all nodes see them"
    if common.locked is not None and not _is_locked(common.locked):
        yield (
            f"does not feel locks on {common.locked.parent}: mount it with locks of all nodes (NFS 4; Lustre with "
            "-o flock), or use --shard, which needs none"
        )


def is_seen(path: Path, size_bytes: int | None = None, within_s: float | None = None) -> bool:
    """Tell whether a file, of that size where one is named, is there or will be in a moment."""
    until = time.monotonic() + (SEEN_WITHIN_S if within_s is None else within_s)
    while True:
        with suppress(OSError):
            if path.stat().st_size == size_bytes or (size_bytes is None and path.exists()):
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.5)


def _is_locked(path: Path) -> bool:
    """Tell whether another holds a lock on a file."""
    try:
        with path.open("ab") as file:  # NFS wants a file open for writing.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _sample(paths: Sequence[Path]) -> Sequence[Path]:
    """Return at most MOST_FILES of the paths, evenly spread."""
    return paths[:: max(1, -(-len(paths) // MOST_FILES))]


def _sizes(paths: Iterable[Path]) -> Mapping[Path, int]:
    """Return the size of each file that is there; the others are reported case by case."""
    sizes = {}
    for path in paths:
        with suppress(OSError):
            sizes[path] = path.stat().st_size
    return sizes
