"""Codes of labels: what a label's name means in a terminology, so that other software need not know our words.

Three sources, the first that knows a name: the user's table; the standard's own lists of what segments can be (DICOM
PS3.16, CID 7191 tissues, 7192 anatomical structures, 7193 physical objects, 7194 morphologically abnormal structures),
as pydicom carries them, SNOMED CT for the most part; and for any other name a code of our own, scheme 99MEDSEG, which
is valid and says no more than the name does.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import PipelineError
from pipeline.records import Record
from pipeline.volumes.dicom.headers import pydicom_quiet

PRIVATE_SCHEME = "99MEDSEG"  # PS3.16 section 8: private schemes begin with 99.
Category = Literal["tissue", "anatomical structure", "abnormal structure", "physical object"]
Side = Literal["", "left", "right"]
# PS3.3 C.8.8.8.1, defined terms of RT ROI Interpreted Type that a table may ask for.
ROI_TYPES = (
    *("ORGAN", "GTV", "CTV", "PTV", "EXTERNAL", "AVOIDANCE", "CAVITY", "CONTRAST_AGENT", "IRRAD_VOLUME"),
    *("TREATED_VOLUME", "BOLUS", "SUPPORT", "FIXATION", "CONTROL", "MARKER", "REGISTRATION", "DOSE_REGION"),
)

# Category -> its name in CID 7150, and its list of types; an earlier list wins.
_LISTS: dict[Category, tuple[str, int]] = {
    "abnormal structure": ("MorphologicallyAbnormalStructure", 7194),
    "tissue": ("Tissue", 7191),
    "anatomical structure": ("AnatomicalStructure", 7192),
    "physical object": ("PhysicalObject", 7193),
}
_NO_LABELS = {"background", "normal"}  # Of CID 7194.
# Words of data sets -> words of the lists.
_ALSO = {
    "oesophagus": "esophagus",
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "gtv": "neoplasm",
    "gross tumor volume": "neoplasm",
    "oedema": "edema",
    "haemorrhage": "hemorrhage",
    "ivc": "inferior vena cava",
    "postcava": "inferior vena cava",
    "csf": "cerebrospinal fluid",
    "gm": "gray matter",
    "grey matter": "gray matter",
    "wm": "white matter",
    "cord": "spinal cord",
    "brainstem": "brain stem",
    "urinary bladder": "bladder",
    "gall bladder": "gallbladder",
    "adrenal": "adrenal gland",
    "parotid": "parotid gland",
    "thyroid gland": "thyroid",
    "small bowel": "small intestine",
    "large bowel": "large intestine",
    "caudate": "caudate nucleus",
    "bone": "bone tissue",
    "muscle": "muscle tissue",
    "fat": "adipose tissue",
    "subcutaneous fat": "subcutaneous tissue",
}
_SIDES: dict[str, Side] = {"left": "left", "l": "left", "lt": "left", "right": "right", "r": "right", "rt": "right"}
_LONGEST_VALUE, _LONGEST_MEANING = 16, 64  # Characters of SH and LO, PS3.5 table 6.2-1.
_COLUMNS = ("label", "scheme", "value", "meaning", "category", "side", "roi_type")


class Concept(Record):
    """A code of a terminology.

    Attributes:
        value: at most 16 characters.
        scheme: its designator: SCT, DCM, FMA, 99...
        meaning: for people, at most 64 characters.
    """

    value: str
    scheme: str
    meaning: str


class Coding(Record):
    """What a label is.

    Attributes:
        category, type: DICOM's Segmented Property Category and Type.
        side: of a paired structure; None where the name says none.
        roi_type: RT ROI Interpreted Type; empty where it is not known, as the standard allows.
    """

    category: Concept
    type: Concept
    side: Concept | None = None
    roi_type: str = ""


Codings = Mapping[str, Coding]


def coding_of(name: str, table: Codings | None = None) -> Coding:
    """Return what a label is by its name.

    Args:
        name: such as `liver`, `Kidney_L`, `left lung` or `inferiorVenaCava`; case, plurals and what parts the words do
            not matter.
        table: the user's, by name.

    Returns:
        The table's; else the standard's; else one of the scheme 99MEDSEG, in the category of tissues.
    """
    if table and name in table:
        return table[name]
    side, words = _side_and_words(name)
    words = _ALSO.get(words, words)
    known = _standard()
    # English plurals; the lists are in the singular.
    found = next(
        (known[word] for word in (words, words.removesuffix("s"), words.removesuffix("es")) if word in known), None
    )
    roi_type = next((kind for kind in ("GTV", "CTV", "PTV") if re.match(rf"{kind}(?![a-z])", name, re.IGNORECASE)), "")
    if found is None and roi_type == "GTV":  # GTV_1, GTV_nodes: a gross tumour volume, whatever follows.
        found = known["neoplasm"]
    if found is None:
        return Coding(category=_category("tissue"), type=_private(name), roi_type=roi_type)
    category, concept = found
    is_organ = category in ("anatomical structure", "tissue")
    return Coding(
        category=_category(category),
        type=concept,
        side=_side(side),
        roi_type=roi_type or ("ORGAN" if is_organ else ""),
    )


def read_codes(path: Path) -> dict[str, Coding]:
    """Read a user's table.

    Args:
        path: a CSV with the columns label, scheme, value, meaning, and if wanted category (tissue, anatomical
            structure, abnormal structure, physical object), side (left, right) and roi_type (ORGAN, GTV, ...).

    Returns:
        Label name -> what it is.

    Raises:
        PipelineError: it cannot be used; every line that is wrong is named.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [*(reader.fieldnames or ())]
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"{path}: cannot be read as a table of codes: {error}") from error
    if not set(_COLUMNS[:4]) <= set(columns) <= set(_COLUMNS):
        raise PipelineError(
            f"{path}: expected the columns {','.join(_COLUMNS)}, the first four at least; got {columns}"
        )
    table: dict[str, Coding] = {}
    problems = []
    for line, row in rows:
        cells = {column: (row.get(column) or "").strip() for column in _COLUMNS}
        problem = "; ".join(_problems(cells, table, complete=None not in row))
        if problem:
            problems.append(f"{path}:{line}: {problem}")
        else:
            table[cells["label"]] = _coding_of_cells(cells)
    if problems:
        raise PipelineError("\n".join(problems))
    return table


def _problems(cells: Mapping[str, str], table: Codings, complete: bool) -> Iterator[str]:
    """Yield what is wrong with a line of a table."""
    if not complete:
        yield "more cells than columns"
    missing = [column for column in _COLUMNS[:4] if not cells[column]]
    if missing:
        yield f"{', '.join(missing)} missing"
    if cells["label"] in table:
        yield f"the label {cells['label']!r} has a line already"
    for column, longest in (("value", _LONGEST_VALUE), ("scheme", _LONGEST_VALUE), ("meaning", _LONGEST_MEANING)):
        if len(cells[column]) > longest or "\\" in cells[column]:
            yield f"{column} {cells[column]!r}: at most {longest} characters, no backslash (DICOM)"
    allowed: dict[str, Sequence[str]] = {"category": [*_LISTS], "side": ["left", "right"], "roi_type": ROI_TYPES}
    for column, words in allowed.items():
        if cells[column] and cells[column] not in words:
            yield f"{column} {cells[column]!r}: expected {', '.join(words)}"


def _coding_of_cells(cells: Mapping[str, str]) -> Coding:
    """Return the coding that a checked line says."""
    return Coding(
        category=_category(cells["category"] or "anatomical structure"),
        type=Concept(value=cells["value"], scheme=cells["scheme"], meaning=cells["meaning"]),
        side=_side(cells["side"]),
        roi_type=cells["roi_type"],
    )


def _side_and_words(name: str) -> tuple[str, str]:
    """Split a name into side and the other words: Kidney_L is ("left", "kidney"); the side stands first or last."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [word for word in re.split(r"[\W_]+", parted.lower()) if word]
    for at in (0, -1):
        if len(words) > 1 and words[at] in _SIDES:
            # Left ventricle and left atrium are names of their own, not sides of a ventricle.
            if " ".join(words) in _standard():
                break
            return _SIDES[words.pop(at)], " ".join(words)
    return "", " ".join(words)


@cache
def _standard() -> dict[str, tuple[Category, Concept]]:
    """Return words -> category and code, of the standard's lists."""
    from pydicom.sr.codedict import codes

    known: dict[str, tuple[Category, Concept]] = {}
    for category, (_, number) in _LISTS.items():
        for keyword, code in getattr(codes, f"CID{number}").concepts.items():
            concept = _concept(code)
            for words in (
                " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*|\d+", keyword)).lower(),
                concept.meaning.lower(),
            ):
                if words not in _NO_LABELS:
                    known.setdefault(words, (category, concept))
    return known


@cache
def _category(category: str) -> Concept:
    """Return the code of a category."""
    from pydicom.sr.codedict import codes

    return _concept(getattr(codes.CID7150, _LISTS[category][0]))  # type: ignore[index]


@cache
def _side(side: str) -> Concept | None:
    """Return the code of a side; None for none."""
    from pydicom.sr.codedict import codes

    return _concept(getattr(codes.SCT, side.capitalize())) if side else None


def _concept(code: Any) -> Concept:
    """Return one of pydicom's codes as ours."""
    return Concept(value=code.value, scheme=code.scheme_designator, meaning=code.meaning)


def _private(name: str) -> Concept:
    """Return a code of our own for a name: the name where it is short and plain, else digits of its hash."""
    value = name if re.fullmatch(rf"[A-Za-z0-9_-]{{1,{_LONGEST_VALUE}}}", name) else _hashed(name)
    return Concept(value=value, scheme=PRIVATE_SCHEME, meaning=dicom_text(name))


def _hashed(name: str) -> str:
    """Return digits that stand for a name."""
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:_LONGEST_VALUE].upper()


def dicom_text(text: str, longest: int = _LONGEST_MEANING) -> str:
    """Return a text as one value of DICOM holds it: no backslash, which parts values, no line breaks, cut to length."""
    return " ".join(text.replace("\\", "/").split())[:longest].strip() or "unnamed"


def code_item(concept: Concept) -> Any:
    """Return a code as the item of a code sequence."""
    item = pydicom_quiet().Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = concept.value, concept.scheme, concept.meaning
    return item


def coding_schemes(codings: Iterable[Coding]) -> list[Any]:
    """Return what an object says of the schemes of its codes that are our own, if there are such codes."""
    if all(coding.type.scheme != PRIVATE_SCHEME for coding in codings):
        return []
    item = pydicom_quiet().Dataset()
    item.CodingSchemeDesignator, item.CodingSchemeName = PRIVATE_SCHEME, "Names of labels that medseg has no code for"
    item.CodingSchemeResponsibleOrganization = "medseg"
    return [item]
