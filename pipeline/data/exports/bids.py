"""Writing BIDS: sub-*/[ses-*/]anat/..., the labels as derivatives, participants.tsv with folds and groups.

Source: the Brain Imaging Data Structure's specification 1.10.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline import __version__
from pipeline.data.exports.bringing import ENDING, CaseFiles
from pipeline.data.exports.layout import RECORD, Export, is_training, partly_annotated
from pipeline.data.manifest import Case, Manifest, Modality
from pipeline.records import write_json, write_text

VERSION = "1.10.0"
LABELS = Path("derivatives") / "labels"

# BIDS's own suffixes of channels that people name otherwise.
_SUFFIXES = {"t1": "T1w", "t2": "T2w", "pd": "PDw", "flair": "FLAIR", "ct": "ct", "pet": "pet"}
_FOLDERS: dict[Modality, str] = {"MR": "anat", "CT": "ct", "PET": "pet", "US": "us", "other": "anat"}
_NOT_SAID = "n/a"


def _problems(manifest: Manifest, out: Path) -> Iterator[str]:
    """Yield cases, patients and channels that BIDS's letters and digits cannot tell apart, and torn patients."""
    del out
    yield from _collisions("channel", {name: "_".join(_channel_words(name)) for name in manifest.channels})
    yield from _collisions("patient", {case.patient: _subject(case) for case in manifest.cases})
    yield from _collisions("case", {case.id: "_".join(_place(case).parts) for case in manifest.cases})
    for patient, cases in _by_patient(manifest.cases).items():
        if len({(case.fold, case.group) for case in cases if case.label}) > 1:
            yield f"patient {patient!r}: stands in several folds or groups; participants.tsv has one line a patient"


def _collisions(what: str, names: dict[str, str]) -> Iterator[str]:
    """Yield what would have the same name."""
    owners: dict[str, str] = {}
    for name, written in names.items():
        if (first := owners.setdefault(written, name)) != name:
            yield f"{what} {name!r}: would be {written}, as {first!r} is; BIDS has letters and digits only"


def _case_problems(manifest: Manifest, files: CaseFiles) -> Iterator[str]:
    """Yield what keeps a case from being said; channels may be missing, and have grids of their own."""
    yield from partly_annotated(manifest, files.case)
    yield from files.problems(one_grid=False)


def _write_case(folder: Path, manifest: Manifest, files: CaseFiles) -> str:
    """Write a case's channels and, among the derivatives, its label."""
    case, place = files.case, _place(files.case)
    stem = "_".join(place.parts)
    for channel in case.images:
        kind = _FOLDERS[manifest.channels[channel]]
        name = "_".join([stem, *_channel_words(channel)])
        files.bring_image(channel, folder / place / kind / f"{name}{ENDING}", one_grid=False)
    if case.label:
        files.bring_label(folder / LABELS / place / "anat" / f"{stem}_dseg{ENDING}", manifest.value_table)
    return stem


def _write_tables(folder: Path, manifest: Manifest, cases: Sequence[Case]) -> None:
    """Write the descriptions, the participants with their folds and groups, and the labels' names."""
    source = {"ReferencesAndLinks": [manifest.source]} if manifest.source else {}
    common = {"BIDSVersion": VERSION, **({"License": manifest.licence} if manifest.licence else {})}
    description = {"Name": manifest.description or manifest.name, "DatasetType": "raw", **common, **source}
    write_json(folder / "dataset_description.json", description)
    made_by = [{"Name": "medseg", "Version": __version__}]
    derived = {"Name": f"Labels of {manifest.name}", "DatasetType": "derivative", **common, "GeneratedBy": made_by}
    write_json(folder / LABELS / "dataset_description.json", derived)
    names = [(str(value), name) for name, value in manifest.own_values.items()]
    _write_tsv(folder / LABELS / "dseg.tsv", [("index", "name"), *names])
    write_text(folder / "README", f"{manifest.description or manifest.name}\n\nWritten by medseg {__version__}.\n")
    ignored = [RECORD, *(f"**/*_{'_'.join(_channel_words(name))}{ENDING}" for name in _unknown(manifest))]
    write_text(folder / ".bidsignore", "".join(f"{line}\n" for line in ignored))
    _write_participants(folder, manifest, cases)


def _write_participants(folder: Path, manifest: Manifest, cases: Sequence[Case]) -> None:
    """Write a line a patient: the fold in which it is validated, n/a where it is held out, and its group."""
    has_groups = any(case.group for case in cases)
    lines = [("participant_id", "fold", *(["group"] if has_groups else []))]
    for own in _by_patient(cases).values():
        labelled = next((case for case in own if case.label), own[0])
        fold = str(labelled.fold) if is_training(labelled) else _NOT_SAID
        lines.append((f"sub-{_subject(own[0])}", fold, *([labelled.group or _NOT_SAID] if has_groups else [])))
    _write_tsv(folder / "participants.tsv", lines)
    columns = {"fold": {"Description": "Fold of the cross-validation that validates on the participant"}}
    write_json(folder / "participants.json", columns)


def _write_tsv(path: Path, lines: Sequence[tuple[str, ...]]) -> None:
    """Write a table."""
    write_text(path, "".join("\t".join(" ".join(cell.split()) for cell in line) + "\n" for line in lines))


def _by_patient(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Return the cases of each patient."""
    found: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        found[case.patient].append(case)
    return found


def _place(case: Case) -> Path:
    """Return sub-PATIENT, and ses-VISIT where a case's id says more than its patient."""
    rest = re.sub(r"^[_-]?(?:ses-)?", "", case.id.removeprefix(case.patient))
    visit = "" if case.id == case.patient else _letters(rest)
    return Path(f"sub-{_subject(case)}", *([f"ses-{visit}"] if visit else []))


def _subject(case: Case) -> str:
    """Return a patient's name as BIDS's subjects have it."""
    return _letters(case.patient.removeprefix("sub-"))


def _channel_words(channel: str) -> list[str]:
    """Return the entities and the suffix that stand for a channel."""
    *words, last = channel.split("_")
    if all(re.fullmatch(r"[a-z]+-[A-Za-z0-9]+", word) for word in words) and re.fullmatch(r"[A-Za-z0-9]+", last):
        return [*words, _SUFFIXES.get(last.lower(), last)]
    return [_SUFFIXES.get(channel.lower(), _letters(channel))]


def _letters(name: str) -> str:
    """Return what BIDS takes of a name: letters and digits."""
    return re.sub(r"[^A-Za-z0-9]+", "", name)


def _notes(manifest: Manifest) -> Iterator[str]:
    """Yield what BIDS cannot say."""
    if manifest.regions:
        yield f"BIDS has no regions: {', '.join(manifest.regions)} are left out"
    if unknown := _unknown(manifest):
        yield f"channels {', '.join(unknown)} are none that BIDS knows: they stand in .bidsignore"
    if "PET" in manifest.channels.values():
        yield "BIDS wants a JSON beside each PET image that says how it was taken, which the manifest does not know"


def _unknown(manifest: Manifest) -> list[str]:
    """Return the channels whose suffix is none of BIDS's own; CT is none yet."""
    return [name for name in manifest.channels if _channel_words(name)[-1] not in _KNOWN]


_KNOWN = ("T1w", "T2w", "PDw", "FLAIR", "pet", "T2starw", "UNIT1", "MTw", "inplaneT1", "inplaneT2", "angio")

EXPORT = Export(_case_problems, _write_case, _write_tables, _problems, _notes)
