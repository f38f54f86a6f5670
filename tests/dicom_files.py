"""DICOM files made for a test: a series of any grid, with whatever is wrong with it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from pipeline.geometry import FloatArray, Geometry

CT, MR, PET = (f"1.2.840.10008.5.1.4.1.1.{ending}" for ending in ("2", "4", "128"))
SHAPE = (7, 6, 5)
SECRET = "Doe^Jane"

Change = Callable[[Dataset, int], None]


def stored(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.int16]:
    """Return voxels of which no two are alike."""
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape) - 30


def grid(shape: tuple[int, int, int] = SHAPE, spacing_mm: tuple[float, float, float] = (0.8, 1.2, 2.5)) -> Geometry:
    """Return an axial grid: columns to the left, rows to the back, slices to the head; as a table is scanned."""
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
    affine[:3, 3] = [31.0, 22.0, -13.0]
    return Geometry(shape, affine)


def write_series(
    folder: Path,
    voxels: NDArray[np.generic] | None = None,
    affine: FloatArray | None = None,
    *,
    change: Change | None = None,
    name: str = "{}.dcm",
    seed: int = 0,
    **attributes: object,
) -> list[Path]:
    """Write a CT series, its files named in an order that is not that of the slices.

    Args:
        folder: where.
        voxels: (X, Y, Z) integers as they are stored; default: `stored()`.
        affine: of RAS+ mm; default: that of `grid()`.
        change: what else is done to each slice's data set, by its number along Z.
        name: of the files; {} stands for a number.
        seed: of UIDs and of the files' order.
        attributes: of every slice.

    Returns:
        The files, in the order of Z.
    """
    voxels = stored() if voxels is None else voxels
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ (grid().affine if affine is None else affine)  # LPS
    folder.mkdir(parents=True, exist_ok=True)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    numbers = np.random.default_rng(seed).permutation(voxels.shape[2])
    files = []
    for z in range(voxels.shape[2]):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.PatientName, data.PatientID, data.PatientBirthDate, data.StudyDate = SECRET, "4711", "19700102", "20200304"
        data.SOPClassUID, data.Modality = CT, "CT"
        data.SOPInstanceUID = generate_uid(entropy_srcs=[str(folder), str(seed), str(z)])
        data.SeriesInstanceUID = generate_uid(entropy_srcs=["series", str(seed)])
        data.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
        data.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame"])
        data.SeriesDescription, data.SeriesNumber, data.ImageType = "Thorax", seed + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.Rows, data.Columns = voxels.shape[1], voxels.shape[0]
        data.ImagePositionPatient = rounded(affine[:3] @ [0, 0, z, 1])
        data.ImageOrientationPatient = rounded((affine[:3, :2] / steps[:2]).T.ravel())
        data.PixelSpacing = rounded(steps[1::-1])  # between rows, between columns
        data.SliceThickness = 1  # Never what lies between the slices.
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = voxels.itemsize * 8
        data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(voxels.dtype.kind == "i")
        data.PixelData = np.ascontiguousarray(voxels[:, :, z].T).tobytes()
        for attribute, value in attributes.items():
            setattr(data, attribute, value)
        if change:
            change(data, z)
        files.append(folder / name.format(int(numbers[z])))
        data.save_as(files[-1], enforce_file_format=True)
    return files


def rounded(numbers: FloatArray) -> list[float]:
    """Return numbers as DICOM has room for: 16 characters each."""
    return [float(f"{number:.9f}") for number in numbers]


def reread(path: Path) -> Dataset:
    """Read a whole file."""
    return pydicom.dcmread(path)
