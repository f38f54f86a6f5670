"""Plain folders by patterns that the user gives, such as `scans/{case}_{channel}.nii.gz`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from pipeline.data.formats.found import (
    Format,
    Found,
    Reading,
    collected,
    make_case,
    modalities_of,
    patient_of,
    relative,
    slug,
    volumes_below,
)
from pipeline.data.manifest import Case
from pipeline.errors import ManifestError

_FIELDS = ("case", "channel", "patient")
_SYNTAX = (
    "{case}, {channel} and {patient} stand for part of a name, * for any part and ** for any folders; CHANNEL=PATTERN"
    " names the channel of a pattern without {channel}"
)

# case id -> channel -> file, and case id -> patient where a pattern says it.
Images = dict[str, dict[str, Path]]


def _find(source: Path, reading: Reading) -> Found:
    """Find the cases whose files match the patterns; files that match none are no part of the data set."""
    if not reading.images:
        raise ManifestError(f"{source}: the format patterns needs --images 'scans/{{case}}_{{channel}}.nii.gz'")
    files = [(path.relative_to(source).as_posix(), path) for path in volumes_below(source)]
    patients: dict[str, str] = {}
    labels: dict[str, Path] = {}
    for case_id, _, path in _matches(files, "label", reading.labels, patients, ()) if reading.labels else ():
        if (other := labels.setdefault(case_id, path)) != path:
            raise ManifestError(f"case {case_id!r}: two labels, {other} and {path}; narrow --labels")
    images: Images = {case_id: {} for case_id in labels}
    for given in reading.images:
        named = re.fullmatch(r"([A-Za-z0-9_.-]+)=(.+)", given)
        channel, pattern = (named[1], named[2]) if named else ("image", given)
        for case_id, name, path in _matches(files, channel, pattern, patients, labels):
            if (other := images.setdefault(case_id, {}).setdefault(name, path)) != path:
                raise ManifestError(
                    f"case {case_id!r}: two images of channel {name!r}, {other} and {path}; narrow --images"
                )
    root = reading.root or source
    cases = collected(
        partial(_case, name, own, labels.get(name), patients, root) for name, own in images.items() if own
    )
    lonely = sorted(name for name, own in images.items() if not own)
    notes = (f"{len(lonely)} labels have no image and are left out: {', '.join(lonely[:5])}",) if lonely else ()
    return Found(root, modalities_of(cases), cases, notes=notes)


def _matches(
    files: Sequence[tuple[str, Path]], channel: str, pattern: str, patients: dict[str, str], labelled: object
) -> Iterator[tuple[str, str, Path]]:
    """Yield case, channel and file of each file that a pattern matches; note the patients that it tells.

    Where {case} can be read in two ways, the longer one is taken, unless only the shorter one has a label.
    """
    greedy, lazy = _compiled(pattern, ".+"), _compiled(pattern, ".+?")
    for name, path in files:
        readings = [match for match in (greedy.fullmatch(name), lazy.fullmatch(name)) if match]
        if readings:
            known = (match for match in readings if slug(match["case"]) in labelled)  # type: ignore[operator]
            fields = next(known, readings[0]).groupdict()
            case_id = slug(fields["case"])
            if "patient" in fields:
                patients[case_id] = slug(fields["patient"])
            yield case_id, slug(fields["channel"]) if "channel" in fields else channel, path


def _compiled(pattern: str, part: str) -> re.Pattern[str]:
    """Return a pattern as a regular expression of which `part` is what a field stands for, within one name.

    Raises:
        ManifestError: it does not say where the case's name stands, or names another field.
    """
    seen: set[str] = set()

    def piece(token: str) -> str:
        field = token.strip("{}")
        if token in ("*", "**", "**/"):
            return {"*": "[^/]*", "**": ".*", "**/": "(?:.*/)?"}[token]
        if not token.startswith("{"):
            return re.escape(token)
        if field not in _FIELDS:
            raise ManifestError(f"{pattern}: {token} is unknown; {_SYNTAX}")
        if field in seen:
            return f"(?P={field})"
        seen.add(field)
        return f"(?P<{field}>{part.replace('.', '[^/]')})"

    text = "".join(map(piece, re.findall(r"\*\*/|\*\*|\*|\{[^{}]*\}|[^*{]+|\{", pattern.removeprefix("./"))))
    if "case" not in seen:
        raise ManifestError(f"{pattern}: {{case}} is missing; {_SYNTAX}")
    return re.compile(text)


def _case(name: str, images: dict[str, Path], label: Path | None, patients: dict[str, str], root: Path) -> Case:
    """Return a case, of the patient that the patterns tell, else of the one in its name."""
    files = {channel: relative(path, root) for channel, path in images.items()}
    return make_case(name, files, relative(label, root) if label else None, patients.get(name) or patient_of(name))


FORMAT = Format(
    lambda source: False,  # Only a user's patterns can tell it.
    _find,
    f"--images and --labels patterns below the folder: {_SYNTAX}",
    takes=("--images", "--labels"),
)
