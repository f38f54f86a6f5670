"""`medseg clean`: what a workspace no longer needs, said with sizes before it is removed."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.store import CaseStore
from pipeline.errors import PipelineError
from pipeline.stages.models import has_ended
from pipeline.stages.preprocess import CASES, KEYS
from pipeline.stages.workspace import EARLIER, Workspace
from pipeline.tracking.log import is_tracked, pending

log = logging.getLogger(__name__)

# A temporary file is being written while it is young; nothing takes this long to write.
ABANDONED_AFTER_S = 3600.0


@dataclass(frozen=True)
class Removable:
    """Something that a workspace no longer needs.

    Attributes:
        path: file or folder.
        why: in a few words.
        size_bytes: of all that is in it.
    """

    path: Path
    why: str
    size_bytes: int


def run(workspace: Path, *, confirmed: bool) -> list[Removable]:
    """Say what a workspace no longer needs, and remove it where that is confirmed.

    Args:
        workspace: its folder.
        confirmed: remove; otherwise only say.

    Returns:
        What was found.
    """
    with ExitStack() as held:
        found = [Removable(path, why, _size_bytes(path)) for path, why in _find(Workspace(workspace), held)]
        for item in found:
            log.info("%s  %s  (%s)", _human(item.size_bytes), item.path, item.why)
        total = _human(sum(item.size_bytes for item in found))
        log.info("%d items, %s%s", len(found), total, "" if confirmed or not found else "; --yes removes them")
        if confirmed:
            for item in found:
                _remove(item.path)
    return found


def _find(workspace: Workspace, held: ExitStack) -> Iterator[tuple[Path, str]]:
    """Yield what is not needed and why; stores stay locked until the stack is left."""
    for folder in sorted(workspace.stores.glob("*")):
        yield from _find_in_store(folder, held)
    for checkpoint in sorted(workspace.runs.rglob("checkpoint.safetensors")):
        if has_ended(checkpoint.parent):
            yield checkpoint, "checkpoint of a finished run; its models stay"
    for run in sorted(workspace.runs.glob(f"*/{EARLIER}*")):
        if is_tracked(run) and pending(run):
            log.info("%s: an earlier run that is not all in MLflow is kept; `medseg sync` sends it", run)
        else:
            yield run, "an earlier run, set aside when its fold was trained anew"
    for model in sorted(workspace.fetched.glob("*")):
        yield model, "fetched from MLflow, and can be again"
    for root in (workspace.checks, workspace.runs):
        for path in sorted(root.rglob(".tmp-*")):
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                yield path, "unfinished write"


def _find_in_store(folder: Path, held: ExitStack) -> Iterator[tuple[Path, str]]:
    """Yield a store's unfinished and stale cases; nothing of a store that is being written."""
    store = CaseStore(folder / CASES)
    if not store.folder.is_dir():
        return
    try:
        held.enter_context(store.lock())
    except PipelineError as error:  # it is being written, or its file system has no locks
        log.info("%s", error)
        return
    yield from ((path, "unfinished write") for path in store.leftovers())
    record = folder / KEYS
    if not record.exists():
        return
    keys = json.loads(record.read_text(encoding="utf-8"))["cases"]
    for case_id in store.case_ids():
        if case_id not in keys:
            yield store.folder / case_id, "no longer a case of the manifest with a fold"
        elif store.key_of(case_id) != keys[case_id]:
            yield store.folder / case_id, "stale or damaged; `medseg preprocess` would make it anew"


def _remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _human(size_bytes: int) -> str:
    """Return a size as people read it."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.2f} MB"
