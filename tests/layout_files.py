"""Data sets as empty files: what a layout finds is told by names alone."""

import json
from pathlib import Path

from pipeline.data.formats import Found, Reading, find_cases


def touch(root: Path, *names: str) -> Path:
    """Make empty files below a folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write_as_json(path: Path, content: object) -> Path:
    """Write a JSON file and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def files_of(
    source: Path, layout: str | None = None, reading: Reading | None = None
) -> dict[str, tuple[dict[str, str], str | None]]:
    """Return case id -> channel -> path, and the label's path."""
    return files_in(find_cases(source, layout, reading))


def files_in(found: Found) -> dict[str, tuple[dict[str, str], str | None]]:
    """Return case id -> channel -> path, and the label's path."""
    return {c.id: ({n: f.path for n, f in c.images.items()}, c.label.path if c.label else None) for c in found.cases}
