"""The tasks of the Medical Segmentation Decathlon: where MONAI says they lie, and their checksums."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.downloads.download import Checksum
from pipeline.errors import DownloadError


@dataclass(frozen=True)
class DecathlonTask:
    """One task.

    Attributes:
        name: such as Task04_Hippocampus, also of the folder in its archive.
        url: of the archive, in the Decathlon's public bucket.
        checksum: of the archive.
    """

    name: str
    url: str
    checksum: Checksum


def decathlon_task(text: str) -> DecathlonTask:
    """Return the task that is meant: by its number, its name or a part of it, in small or capital letters.

    Raises:
        DownloadError: there is none such, or there are several; names all.
    """
    tasks = decathlon_tasks()
    number = re.fullmatch(r"(?:task)?0*(\d+)", text.strip(), re.IGNORECASE)
    wanted = f"Task{int(number[1]):02d}_" if number else text.strip()
    found = [name for name in tasks if wanted.lower() in name.lower()]
    if len(found) != 1 or not wanted:
        what = f"names {len(found)} tasks" if found else "no such task"
        raise DownloadError(f"msd {text}: {what}; they are {', '.join(tasks)}")
    return tasks[found[0]]


def decathlon_tasks() -> dict[str, DecathlonTask]:
    """Return name -> task, as the installed MONAI lists them."""
    # Imported here: monai costs seconds, and nothing else in this room needs it.
    from monai.apps.datasets import DecathlonDataset

    return {
        name: DecathlonTask(name, url, Checksum("md5", DecathlonDataset.md5[name]))
        for name, url in DecathlonDataset.resource.items()
    }
