"""Formats: how a data set lies on disk -> its cases. A new layout is a file here and its line in FORMATS.

A layout says where the files are; `medseg manifest` then hashes them, looks which labels occur, and splits. What a
layout cannot know (modalities, label names in a plain folder) is guessed, and stands in the manifest to be corrected.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from pipeline.data.formats import bids, csv_table, decathlon, folder, monai, nnunet, patterns
from pipeline.data.formats.found import Format, Found, Reading, modality_of, pairs_of, patient_of
from pipeline.data.formats.nnunet import with_splits
from pipeline.data.manifest import Case
from pipeline.errors import ManifestError

__all__ = ["FORMATS", "Format", "Found", "Reading", "find_cases", "modality_of", "pairs_of", "patient_of"]

# In the order in which they are tried: a folder is one of many kinds.
FORMATS: dict[str, Format] = {
    "nnunet": nnunet.FORMAT,
    "decathlon": decathlon.FORMAT,
    "csv": csv_table.FORMAT,
    "monai": monai.FORMAT,
    "bids": bids.FORMAT,
    "patterns": patterns.FORMAT,
    "folder": folder.FORMAT,
}


def find_cases(source: Path, layout: str | None = None, reading: Reading | None = None) -> Found:
    """Find the cases of a data set.

    Args:
        source: a folder, a CSV or a datalist.
        layout: a name of FORMATS; None takes the first that recognises the source, or patterns where those are given.
        reading: what is asked of the layout.

    Raises:
        ManifestError: the source is missing, of no known layout, does not know what is asked, or holds no case.
    """
    asked = reading or Reading()
    if not source.exists():
        raise ManifestError(f"{source}: does not exist")
    name = layout or _recognised(source, asked)
    if name not in FORMATS:
        raise ManifestError(f"format {name!r}: unknown; one of {', '.join(FORMATS)}")
    unknown = [option for option, given in asked.asked().items() if given and option not in FORMATS[name].takes]
    if unknown:
        takers = [other for other, known in FORMATS.items() if unknown[0] in known.takes]
        raise ManifestError(f"{source}: the format {name} knows no {unknown[0]}; {', '.join(takers)} do")
    absolute = replace(asked, root=asked.root and asked.root.absolute())
    found = FORMATS[name].find(source.absolute(), absolute)
    if not found.cases:
        raise ManifestError(
            f"{source}: no case found; expected {FORMATS[name].pattern}. DICOM is converted first: `medseg dicom "
            "convert`"
        )
    if asked.patient:
        found = replace(found, cases=tuple(_of_patient(case, asked.patient) for case in found.cases))
    if asked.splits and name != "nnunet":  # nnU-Net's own reader knows more places of it.
        ids = [case.id for case in found.cases]
        found = replace(found, cases=with_splits(found.cases, asked.splits, ids), split=str(asked.splits))
    return found


def _recognised(source: Path, asked: Reading) -> str:
    """Return the layout of a source.

    Raises:
        ManifestError: it is of none that is known.
    """
    if any("{" in pattern for pattern in asked.images):
        return "patterns"
    name = next((name for name, known in FORMATS.items() if known.recognise(source)), None)
    if name is None:
        listed = "\n".join(f"  {name}: {known.pattern}" for name, known in FORMATS.items())
        raise ManifestError(f"{source}: no known layout; known are\n{listed}")
    return name


def _of_patient(case: Case, pattern: str) -> Case:
    """Return a case with the patient that a regular expression finds in its id."""
    try:
        match = re.search(pattern, case.id)
    except re.error as error:
        raise ManifestError(f"--patient {pattern!r}: is no regular expression: {error}") from None
    if match is None:
        raise ManifestError(f"case {case.id!r}: --patient {pattern!r} finds no patient in it")
    return case.changed(patient=match[1] if match.re.groups and match[1] else match[0])
