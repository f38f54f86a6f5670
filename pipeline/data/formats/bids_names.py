"""BIDS's file names: sub-01_ses-2_acq-fast_T1w.nii.gz is entities and a suffix.

Source: the Brain Imaging Data Structure's specification 1.10, "File name structure" and "Imaging derivatives".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.formats.found import modality_of
from pipeline.data.manifest import Modality
from pipeline.volumes.stored import stem_of

# Suffixes of what people or programs have drawn; probabilities are neither image nor label.
LABEL_SUFFIXES = ("dseg", "mask", "seg", "roi")
NO_IMAGE_SUFFIXES = (*LABEL_SUFFIXES, "probseg")
# Folders of series in time or direction, which hold no channel unless a pattern asks for one.
NO_IMAGE_FOLDERS = ("func", "fmap", "dwi", "perf")

_FOLDER_MODALITIES: dict[str, Modality] = {"anat": "MR", "pet": "PET", "ct": "CT", "dwi": "MR", "perf": "MR"}


@dataclass(frozen=True)
class BidsFile:
    """A file whose name is BIDS's.

    Attributes:
        path: relative to the data set's folder.
        entities: key -> value, sub and ses among them, in the name's order.
        suffix: what kind of file it is: T1w, FLAIR, dseg, ...
    """

    path: Path
    entities: Mapping[str, str]
    suffix: str

    @property
    def case_id(self) -> str:
        """Subject and session: one examination."""
        return "_".join(f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities)

    @property
    def subject(self) -> str:
        """The participant_id of participants.tsv."""
        return f"sub-{self.entities['sub']}"

    @property
    def pipeline(self) -> str:
        """Name of the derivatives that it stands in; empty for the data set's own files."""
        return self.path.parts[1] if self.path.parts[0] == "derivatives" else ""

    @property
    def label_kind(self) -> tuple[str, str, str, str]:
        """What tells labels of one kind from those of another: derivatives, label, description, suffix."""
        return self.pipeline, self.entities.get("label", ""), self.entities.get("desc", ""), self.suffix

    @property
    def modality(self) -> Modality:
        """By the suffix, else by the folder."""
        known = modality_of(self.suffix)
        return known if known != "other" else _FOLDER_MODALITIES.get(self.path.parent.name, "other")


def parse_name(path: Path) -> BidsFile | None:
    """Return what a file's name says; None where it is no name of BIDS.

    A label's name may hold the suffix of the image that it was drawn on, as spinal cord data sets do
    (sub-01_T2w_label-SC_seg): it is passed over.
    """
    *words, suffix = stem_of(path).split("_")
    if suffix in LABEL_SUFFIXES:
        words = [word for word in words if "-" in word]
    pairs = [re.fullmatch(r"([a-z]+)-([A-Za-z0-9+]+)", word) for word in words]
    if not re.fullmatch(r"[A-Za-z0-9]+", suffix) or not pairs or not all(pairs):
        return None
    entities = {pair[1]: pair[2] for pair in pairs if pair}
    return BidsFile(path, entities, suffix) if "sub" in entities and len(entities) == len(pairs) else None


def channel_names(images: Iterable[BidsFile]) -> dict[Path, str]:
    """Return path -> channel: the suffix, after those entities in which images of this suffix differ.

    What is the same for all, such as acq-highres everywhere, tells nothing apart and is left out.
    """
    by_suffix: dict[str, list[BidsFile]] = defaultdict(list)
    for image in images:
        by_suffix[image.suffix].append(image)
    names = {}
    for suffix, own in by_suffix.items():
        telling = _telling(own)
        for image in own:
            words = [f"{key}-{value}" for key, value in image.entities.items() if key in telling]
            names[image.path] = "_".join([*words, suffix])
    return names


def _telling(images: Sequence[BidsFile]) -> set[str]:
    """Return the entities in which images differ, beside subject and session."""
    keys = {key for image in images for key in image.entities} - {"sub", "ses"}
    return {key for key in keys if len({image.entities.get(key) for image in images}) > 1}
