"""RTSTRUCT against masks: a patient's own contours filled on their series, beside the mask of another converter.

    python benchmarks/rtstruct.py ../shared/data/STS

For each modality of STS_030: Dice of the filled contours and the mask NIfTI, the distance of their centroids, and the
seconds of reading; then the mask written as RTSTRUCT and read again: Dice, seconds, points of the contours.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom

from pipeline.volumes.dicom.annotations.reading import read_annotations
from pipeline.volumes.dicom.annotations.rtstruct.writing import write_rtstruct
from pipeline.volumes.dicom.annotations.structures import Author, structures_of
from pipeline.volumes.dicom.series import find_series
from pipeline.volumes.volume import Volume, read_label

PATIENT = "STS_030"


def dice(one: Volume, other: Volume) -> float:
    """Return the Dice of two masks on one grid."""
    a, b = one.array > 0, other.array > 0
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def centroid_mm(mask: Volume) -> np.ndarray:
    """Return the mean place of a mask's voxels."""
    return mask.geometry.to_mm(np.argwhere(mask.array > 0)).mean(axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sts", type=Path)
    root = parser.parse_args().sts
    for modality in ("CT", "MR_T1", "PET"):
        folder = root / "dicom" / PATIENT / modality
        series = next(one for one in find_series(folder) if not one.refusal())
        mask = read_label(root / PATIENT / f"{modality}_mask.nii.gz")
        start = time.process_time()
        drawn = read_annotations(next((folder / "mask").iterdir()), series).label
        reading = time.process_time() - start
        apart = float(np.linalg.norm(centroid_mm(drawn) - centroid_mm(mask)))
        print(f"{modality:6} {series}: own contours against the mask: Dice {dice(drawn, mask):.4f},", end=" ")
        print(f"centroids {apart:.3f} mm apart, read in {reading:.2f} s")
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "x.dcm"
            start = time.process_time()
            write_rtstruct(path, mask, series, structures_of({"background": 0, "GTV": 1}), Author(kind="MANUAL"))
            writing = time.process_time() - start
            again = read_annotations(path, series).label
            contours = pydicom.dcmread(path).ROIContourSequence[0].ContourSequence
            points = sum(int(contour.NumberOfContourPoints) for contour in contours)
            print(
                f"       mask to RTSTRUCT and back: Dice {dice(again, mask):.4f}, written in {writing:.2f} s,", end=" "
            )
            print(f"{len(contours)} contours of {points} points, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
