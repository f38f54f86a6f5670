"""Which files of a folder are one case."""

from __future__ import annotations

from pathlib import Path

SUFFIXES = (".nii.gz", ".nii")


def find_cases(dataset_dir: str, channels: int) -> list[dict[str, str | list[str]]]:
    """Return the cases of a folder for MONAI's LoadImaged.

    Args:
        dataset_dir: folder of NIfTI files. With one channel each is a case; with several, a case is CASE_0000.nii.gz,
            CASE_0001.nii.gz, ... in the order of the channels, all on one grid, or one 4-D file.
        channels: of the image.

    Raises:
        ValueError: a case lacks a channel, or there is none.
    """
    files = sorted(path for path in Path(dataset_dir).iterdir() if path.name.endswith(SUFFIXES))
    found: dict[str, list[str]] = {}
    for path in files:
        stem = path.name.removesuffix(".gz").removesuffix(".nii")
        case, _, number = stem.rpartition("_")
        in_parts = channels > 1 and case and len(number) == 4 and number.isdecimal()
        found.setdefault(case if in_parts else stem, []).append(str(path))
    wrong = [case for case, own in found.items() if len(own) not in (1, channels)]
    if wrong or not found:
        raise ValueError(f"{dataset_dir}: expected cases of {channels} channels, {len(wrong)} are of another number")
    return [{"image": own[0] if len(own) == 1 else own} for own in found.values()]
