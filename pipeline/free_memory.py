"""How much memory this process holds and may still take; without torch, for stages that do without it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

# Control groups, and those that the process is in; by version the files of a group's limit and of what it uses, and the
# entry in memory.stat of cached files.
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def resident_bytes() -> int:
    """Return the memory that the process holds now."""
    return int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    """Return the memory that the process may still take: what the machine has free, or its control group allows."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups(mount: Path = _GROUPS, own: Path = _OWN_GROUPS) -> Iterator[int]:
    """Yield what each control group around the process leaves it, as containers and batch systems make them."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            version = 1 if "memory" in kinds.split(",") else 2 if kinds == "" else None
            if version is None:
                continue
            root = mount / "memory" if version == 1 else mount
            group = root / path.lstrip("/")
            for folder in [root, *(one for one in (group, *group.parents) if root in one.parents)]:
                yield from _left_in_group(folder, *_GROUP_FILES[version])


def _left_in_group(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    """Yield what a control group's limit leaves, if it has one; the files that it caches give way."""
    with suppress(OSError, ValueError):  # no limit is "max", no number
        gives_way = re.search(rf"^{cached} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
        yield left + (int(gives_way[1]) if gives_way else 0)
