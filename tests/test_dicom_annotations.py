"""SEG and RTSTRUCT: labels at the millimetres of NIfTI, valid, the same when read back, and nobody's if wanted."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, grid, write_series
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from pipeline.errors import GeometryError, PipelineError, VolumeError
from pipeline.geometry import FloatArray, Geometry
from pipeline.volumes.dicom.annotations.identity import source_header
from pipeline.volumes.dicom.annotations.reading import read_annotations, read_object, referenced_series
from pipeline.volumes.dicom.annotations.rtstruct.writing import write_rtstruct
from pipeline.volumes.dicom.annotations.seg.writing import write_seg
from pipeline.volumes.dicom.annotations.structures import Author, structures_of
from pipeline.volumes.dicom.series import Series, find_series
from pipeline.volumes.volume import Volume, read_label
from pipeline.volumes.writing import write_label

ORIENTATIONS = [
    "".join(letters[sign] for letters, sign in zip(axes, signs, strict=True))
    for axes in itertools.permutations(["RL", "AP", "SI"])
    for signs in itertools.product([0, 1], repeat=3)
]
LABELS = {"background": 0, "liver": 5, "Kidney_L": 2, "odd, ä": 9}
WRITERS: dict[str, Callable[..., None]] = {"seg": write_seg, "rtstruct": write_rtstruct}
MODEL = Author(kind="AUTOMATIC", name="work/runs/demo/fold_0", version="0123abcd")
SHAPE = (9, 8, 6)


def only(folder: Path) -> Series:
    (series,) = [one for one in find_series(folder) if one.kind == "image"]
    return series


def blocks(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.uint8]:
    """Two boxes that touch, each within the volume; of the third label there is none."""
    array = np.zeros(shape, np.uint8)
    array[1:4, 2:4, 1:3] = 5
    array[4:8, 2:7, 2:5] = 2
    return array


def oblique(shape: tuple[int, int, int] = SHAPE, spacing_mm: Sequence[float] = (0.8, 1.3, 2.7)) -> Geometry:
    a, b = np.radians([20, 12])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = about_z @ about_x * np.array(spacing_mm), [5.0, -7.0, 11.0]
    return Geometry(shape, affine)


def written(
    kind: str, folder: Path, label: Volume, series: Series, labels: dict[str, int] = LABELS, **more: Any
) -> Path:
    path = folder / f"{kind}.dcm"
    WRITERS[kind](path, label, series, structures_of(labels), MODEL, **more)
    return path


def centroid(label: Volume, value: int) -> FloatArray:
    return label.geometry.to_mm(np.argwhere(label.array == value)).mean(axis=0)


def seg_centroid(dataset: Dataset, number: int) -> FloatArray:
    """By hand: each frame's own position, in RAS."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    turn = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    points = []
    for groups, frame in zip(dataset.PerFrameFunctionalGroupsSequence, dataset.pixel_array, strict=True):
        if groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number:
            at = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
            for row, column in np.argwhere(frame):
                points.append(at + column * between_columns * turn[0] + row * between_rows * turn[1])
    return np.mean(points, axis=0) * [-1, -1, 1]


def rtstruct_centroid(dataset: Dataset, number: int) -> FloatArray:
    """By hand: of boxes, whose contours are symmetric, the mean of the points of each slice; in RAS."""
    (item,) = [one for one in dataset.ROIContourSequence if one.ReferencedROINumber == number]
    means = [np.array(one.ContourData, float).reshape(-1, 3).mean(axis=0) for one in item.ContourSequence]
    return np.mean(means, axis=0) * [-1, -1, 1]


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_labels_are_at_the_same_millimetres_in_every_format(code: str, tmp_path: Path) -> None:
    """The series' axes run every way, left-handed ones with slices from the other end; the label map's do not."""
    upright = oblique()
    ordered = upright.reoriented(code)
    write_series(tmp_path / "series", np.zeros(ordered.shape, np.int16), ordered.affine)
    series, label = only(tmp_path / "series"), Volume(blocks(), upright)
    write_label(tmp_path / "label.nii.gz", label)
    nifti = read_label(tmp_path / "label.nii.gz")
    objects = {kind: written(kind, tmp_path, label, series) for kind in WRITERS}
    seg, rtstruct = (pydicom.dcmread(objects[kind]) for kind in WRITERS)
    for number, value in ((1, 5), (2, 2)):
        np.testing.assert_allclose(centroid(nifti, value), centroid(label, value), atol=1e-5)
        np.testing.assert_allclose(seg_centroid(seg, number), centroid(label, value), atol=1e-4)
        np.testing.assert_allclose(rtstruct_centroid(rtstruct, number), centroid(label, value), atol=1e-3)
        for path in objects.values():
            read = read_annotations(path, series)
            np.testing.assert_allclose(centroid(read.label, number), centroid(label, value), atol=1e-4)
            assert (read.label.array == number).sum() == (label.array == value).sum()


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written_is_read_again(kind: str, tmp_path: Path) -> None:
    """Holes, islands in them, parts that touch at corners, single voxels, labels at the border: all by chance."""
    geometry = oblique((17, 13, 7))
    write_series(tmp_path / "series", np.zeros(geometry.shape, np.int16), geometry.affine)
    series = only(tmp_path / "series")
    array = np.random.default_rng(3).choice([0, 5, 2, 9], geometry.shape, p=[0.4, 0.3, 0.2, 0.1]).astype(np.uint8)
    path = written(kind, tmp_path, Volume(array, geometry), series)
    read = read_annotations(path, series)
    assert read.labels == {"background": 0, "liver": 1, "Kidney_L": 2, "odd, ä": 3}
    assert read.remarks == ()
    np.testing.assert_array_equal(np.array([0, 5, 2, 9])[read.label.array], array)
    assert referenced_series(read_object(path)) == {series.uid}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_label_without_voxels_is_listed(kind: str, tmp_path: Path) -> None:
    write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), grid(SHAPE).affine)
    series = only(tmp_path / "series")
    read = read_annotations(written(kind, tmp_path, Volume(blocks(), grid(SHAPE)), series), series)
    assert read.labels["odd, ä"] == 3 and read.remarks == ("odd, ä: empty",)
    nothing = read_annotations(written(kind, tmp_path, Volume(blocks() * 0, grid(SHAPE)), series), series)
    assert len(nothing.labels) == 4 and not nothing.label.array.any()


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("empty", [False, True])
def test_dciodvfy_finds_no_error(kind: str, empty: bool, tmp_path: Path) -> None:
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy (Debian's dicom3tools) is not installed")
    write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), grid(SHAPE).affine, StudyTime="101500", StudyID="1")
    label = Volume(blocks() * (not empty), grid(SHAPE))
    for pseudonym in (None, "CT_0123456789"):
        path = written(kind, tmp_path, label, only(tmp_path / "series"), pseudonym=pseudonym)
        said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        assert [line for line in said.stderr.splitlines() if line.startswith("Error")] == []
        assert "Segmentation" in said.stderr or "RTStructureSet" in said.stderr


def test_highdicom_reads_names_codes_colours_and_references(tmp_path: Path) -> None:
    write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), grid(SHAPE).affine)
    series = only(tmp_path / "series")
    seg = highdicom.seg.segread(written("seg", tmp_path, Volume(blocks(), grid(SHAPE)), series))
    first, second, third = (seg.get_segment_description(number) for number in (1, 2, 3))
    assert [one.segment_label for one in (first, second, third)] == ["liver", "Kidney_L", "odd, ä"]
    assert [one.segmented_property_type.value for one in (first, second)] == ["10200004", "64033007"]
    assert third.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99MEDSEG"
    modifier = second.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert modifier.CodeMeaning == "Left"
    colour = highdicom.color.CIELabColor.from_dicom_value(first.RecommendedDisplayCIELabValue).to_rgb()
    assert np.abs(np.subtract(colour, (0xE6, 0x9F, 0x00))).max() <= 1
    assert (first.SegmentAlgorithmType, first.SegmentAlgorithmName) == ("AUTOMATIC", MODEL.name)
    assert first.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "0123abcd"
    named = {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert named == {one.sop_uid for one in series.slices}
    volume = seg.get_volume(combine_segments=True)
    assert {int(n) for n in np.unique(volume.array)} == {0, 1, 2}


def test_what_a_structure_set_says(tmp_path: Path) -> None:
    write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), grid(SHAPE).affine)
    series = only(tmp_path / "series")
    data = pydicom.dcmread(written("rtstruct", tmp_path, Volume(blocks(), grid(SHAPE)), series))
    assert [roi.ROIName for roi in data.StructureSetROISequence] == ["liver", "Kidney_L", "odd, ä"]
    assert next(list(item.ROIDisplayColor) for item in data.ROIContourSequence) == [0xE6, 0x9F, 0x00]
    assert [one.RTROIInterpretedType for one in data.RTROIObservationsSequence] == ["ORGAN", "ORGAN", ""]
    assert data.StructureSetROISequence[0].ROIGenerationDescription == f"{MODEL.name} 0123abcd"
    frame = data.ReferencedFrameOfReferenceSequence[0]
    assert frame.FrameOfReferenceUID == series.frame_of_reference_uid
    study = frame.RTReferencedStudySequence[0]
    assert study.ReferencedSOPInstanceUID == series.study_uid == data.StudyInstanceUID
    named = [item.ReferencedSOPInstanceUID for item in study.RTReferencedSeriesSequence[0].ContourImageSequence]
    assert named == [one.sop_uid for one in series.slices]
    heights = {one.sop_uid: one.position_mm[2] for one in series.slices}
    for item in data.ROIContourSequence:
        for contour in item.get("ContourSequence", []):
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints
            np.testing.assert_allclose(points[:, 2], heights[contour.ContourImageSequence[0].ReferencedSOPInstanceUID])


@pytest.mark.parametrize("kind", WRITERS)
def test_patient_and_study_are_the_series_own(kind: str, tmp_path: Path) -> None:
    write_series(
        tmp_path / "series",
        np.zeros(SHAPE, np.int16),
        grid(SHAPE).affine,
        SpecificCharacterSet="ISO_IR 100",
        PatientName="Müller^Jörg",
        PatientComments="lives in Rome",
        InstitutionName="St. Elsewhere",
        OperatorsName="Hill^Benny",
    )
    path = written(kind, tmp_path, Volume(blocks(), grid(SHAPE)), only(tmp_path / "series"))
    data = pydicom.dcmread(path)
    assert (data.PatientName, data.PatientID, data.PatientBirthDate) == ("Müller^Jörg", "4711", "19700102")
    assert data.StudyDate == "20200304"
    content = path.read_bytes()
    assert all(word not in content for word in (b"Rome", b"Elsewhere", b"Benny"))


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # When the series is made.
@pytest.mark.parametrize("kind", WRITERS)
def test_values_that_are_not_valid_are_left_out(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """As anonymisers leave them."""
    odd = {"PatientBirthDate": "00000000", "StudyDate": "20171819", "StudyTime": "noon", "PatientSex": "FEMALE"}
    long = {"PatientName": "Doe Jane " * 9, "PatientID": "4711" * 17}
    write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), grid(SHAPE).affine, **odd, **long)
    series = only(tmp_path / "series")
    caplog.clear()
    recwarn.clear()
    path = written(kind, tmp_path, Volume(blocks(), grid(SHAPE)), series)
    data = pydicom.dcmread(path)
    assert [data[keyword].value or "" for keyword in odd] == ["", "", "", ""]
    assert data.PatientID == long["PatientID"]
    assert caplog.text == "" and len(recwarn) == 0  # They would quote the values.


@pytest.mark.parametrize("kind", WRITERS)
def test_a_pseudonym_takes_the_patients_place(kind: str, tmp_path: Path) -> None:
    change = {"AccessionNumber": "A-99", "ReferringPhysicianName": "House^Greg", "IssuerOfPatientID": "Princeton"}
    write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), grid(SHAPE).affine, PatientID="ID-4711-X", **change)
    series = only(tmp_path / "series")
    path = written(kind, tmp_path, Volume(blocks(), grid(SHAPE)), series, pseudonym="CT_0123456789")
    data = pydicom.dcmread(path)
    assert (data.PatientName, data.PatientID, data.PatientIdentityRemoved) == ("CT_0123456789", "CT_0123456789", "YES")
    assert data.StudyInstanceUID == series.study_uid
    content = path.read_bytes()
    secrets = [SECRET, "Doe", "Jane", "ID-4711-X", "19700102", "20200304", "A-99", "House", "Princeton"]
    assert [word for word in secrets if word.encode() in content] == []


@pytest.mark.parametrize("kind", WRITERS)
def test_a_label_map_on_another_grid_is_refused(kind: str, tmp_path: Path) -> None:
    write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), grid(SHAPE).affine)
    shifted = Geometry(SHAPE, grid(SHAPE).affine + np.eye(4, k=3) * 0.4)
    with pytest.raises(GeometryError, match="resample"):
        written(kind, tmp_path, Volume(blocks(), shifted), only(tmp_path / "series"))
    assert not (tmp_path / f"{kind}.dcm").exists() and not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_series_without_frame_of_reference_is_refused(kind: str, tmp_path: Path) -> None:
    write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), grid(SHAPE).affine, FrameOfReferenceUID="")
    with pytest.raises(VolumeError, match="FrameOfReferenceUID"):
        written(kind, tmp_path, Volume(blocks(), grid(SHAPE)), only(tmp_path / "series"))


def test_without_highdicom_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)  # As the import system marks what is not there.
    write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), grid(SHAPE).affine)
    with pytest.raises(PipelineError, match=r"pip install '\.\[dicom\]' in medseg's checkout"):
        written("seg", tmp_path, Volume(blocks(), grid(SHAPE)), only(tmp_path / "series"))


# What others have drawn.


def structure_set(series: Series, rois: dict[str, list[tuple[str, FloatArray]]]) -> Dataset:
    """Return an RTSTRUCT of the least that is read: ROI name -> (geometric type, points (n, 3) in RAS)."""
    data = Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.3.4"
    data.StructureSetROISequence, data.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(rois.items(), start=1):
        roi, item = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, series.frame_of_reference_uid
        item.ReferencedROINumber, item.ContourSequence = number, []
        for kind, points in contours:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            contour.ContourData = [f"{n:.3f}" for n in (np.array(points) * [-1, -1, 1]).ravel()]
            item.ContourSequence.append(contour)
        data.StructureSetROISequence.append(roi)
        data.ROIContourSequence.append(item)
    return data


def saved(data: Dataset, path: Path) -> Path:
    data.save_as(path, enforce_file_format=True)
    return path


def square(low: float, high: float, slice_number: float, geometry: Geometry) -> FloatArray:
    """A square around the voxels from `low` to `high`, in indices, as RAS mm."""
    corners = [[low, low], [high, low], [high, high], [low, high]]
    return geometry.to_mm(np.array([[x, y, slice_number] for x, y in corners]))


@pytest.fixture
def plain(tmp_path: Path) -> Series:
    write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), grid(SHAPE).affine)
    return only(tmp_path / "series")


def test_separate_contours_around_a_hole(plain: Series, tmp_path: Path) -> None:
    for kind in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
        contours = [(kind, square(0.5, 6.5, 2, plain.geometry)), (kind, square(2.5, 4.5, 2, plain.geometry))]
        read = read_annotations(saved(structure_set(plain, {"ring": contours}), tmp_path / "x.dcm"), plain)
        assert read.label.array.sum() == 36 - 4 and read.label.array[:, :, 2].sum() == 32


def test_contours_beside_the_slices_go_to_the_nearest(plain: Series, tmp_path: Path) -> None:
    contours = [("CLOSED_PLANAR", square(0.5, 2.5, number + 0.3, plain.geometry)) for number in (1, 2, 3, 9)]
    read = read_annotations(saved(structure_set(plain, {"a": contours}), tmp_path / "x.dcm"), plain)
    assert read.label.array.any(axis=(0, 1)).tolist() == [False, True, True, True, False, False]
    assert "1 of 4 planes left out" in read.remarks[0] and "0.75 mm beside" in read.remarks[1]


def test_contours_half_way_between_slices_go_to_one_of_them(plain: Series, tmp_path: Path) -> None:
    contours = [("CLOSED_PLANAR", square(0.5, 2.5, number + 0.5, plain.geometry)) for number in (1, 2, 3)]
    read = read_annotations(saved(structure_set(plain, {"a": contours}), tmp_path / "x.dcm"), plain)
    assert read.label.array.any(axis=(0, 1)).sum() == 3


def test_points_and_open_contours_enclose_nothing(plain: Series, tmp_path: Path) -> None:
    contours = [
        ("POINT", square(1, 2, 2, plain.geometry)[:1]),
        ("OPEN_PLANAR", square(1, 5, 2, plain.geometry)),
        ("CLOSED_PLANAR", square(0.5, 2.5, 2, plain.geometry)),
    ]
    read = read_annotations(saved(structure_set(plain, {"a": contours}), tmp_path / "x.dcm"), plain)
    assert read.label.array.sum() == 4 and "2 points, open or broken contours" in read.remarks[0]


def test_contours_across_the_slices_are_refused(plain: Series, tmp_path: Path) -> None:
    upright = plain.geometry.to_mm(np.array([[1, 1, 0], [1, 4, 0], [1, 4, 3], [1, 1, 3]]))
    data = structure_set(plain, {"a": [("CLOSED_PLANAR", upright)]})
    with pytest.raises(GeometryError, match="across the slices"):
        read_annotations(saved(data, tmp_path / "x.dcm"), plain)


def test_another_frame_of_reference_is_refused(plain: Series, tmp_path: Path) -> None:
    data = structure_set(plain, {"a": [("CLOSED_PLANAR", square(0.5, 2.5, 2, plain.geometry))]})
    data.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.3.4.5"
    with pytest.raises(VolumeError, match="another frame of reference"):
        read_annotations(saved(data, tmp_path / "x.dcm"), plain)


def test_overlaps_are_refused_or_told(plain: Series, tmp_path: Path) -> None:
    rois = {
        "organ": [("CLOSED_PLANAR", square(0.5, 4.5, 2, plain.geometry))],
        "lesion": [("CLOSED_PLANAR", square(3.5, 6.5, 2, plain.geometry))],
    }
    path = saved(structure_set(plain, rois), tmp_path / "x.dcm")
    with pytest.raises(VolumeError, match=r"organ and lesion share 1 voxels.*--overlap"):
        read_annotations(path, plain)
    last, first = (read_annotations(path, plain, overlap=way) for way in ("last", "first"))
    assert [int(one.label.array[4, 4, 2]) for one in (last, first)] == [2, 1]
    assert last.remarks == ("organ and lesion share 1 voxels, which the last of them keeps",)
    alone = read_annotations(path, plain, wanted=["lesion"])
    assert alone.labels == {"background": 0, "lesion": 1} and alone.label.array.sum() == 9
    with pytest.raises(VolumeError, match="has no liver; it holds organ, lesion"):
        read_annotations(path, plain, wanted=["liver"])


def test_namesakes_are_told_apart(plain: Series, tmp_path: Path) -> None:
    data = structure_set(
        plain, {name: [("CLOSED_PLANAR", square(0.5, 2.5, z, plain.geometry))] for z, name in enumerate("abc")}
    )
    for roi in data.StructureSetROISequence[:2]:
        roi.ROIName = "lesion"
    read = read_annotations(saved(data, tmp_path / "x.dcm"), plain)
    assert list(read.labels) == ["background", "lesion #1", "lesion #2", "c"]


@pytest.mark.parametrize("kind", ["FRACTIONAL", "LABELMAP"])
def test_other_types_of_seg(kind: str, plain: Series, tmp_path: Path) -> None:
    """Frames in the order of the slices, of odd size: no frame begins on a whole byte."""
    sources = [source_header(one.path) for one in plain.slices]
    planes = blocks().transpose(2, 1, 0) == 5
    values = (
        planes * np.linspace(0.3, 1.0, len(planes))[:, None, None] if kind == "FRACTIONAL" else planes.astype(np.uint8)
    )
    structure = structures_of({"background": 0, "liver": 5})[0]
    code = highdicom.sr.CodedConcept(*[structure.coding.type.value, "SCT", "Liver"])
    described = highdicom.seg.SegmentDescription(1, "liver", code, code, "MANUAL")
    names: dict[str, Any] = {"manufacturer": "x", "manufacturer_model_name": "x", "software_versions": "1"}
    uids: dict[str, Any] = {"series_instance_uid": "1.2.3", "series_number": 1, "sop_instance_uid": "1.2.4"}
    seg = highdicom.seg.Segmentation(
        sources, values, kind, [described], instance_number=1, device_serial_number="1", **names, **uids
    )
    seg.save_as(tmp_path / "x.dcm")
    read = read_annotations(tmp_path / "x.dcm", plain)
    wanted = blocks() == 5 if kind == "LABELMAP" else (blocks() == 5) & (np.linspace(0.3, 1.0, 6) >= 0.5)
    np.testing.assert_array_equal(read.label.array == 1, wanted)


def test_a_seg_of_other_pixels_is_refused(plain: Series, tmp_path: Path) -> None:
    path = written("seg", tmp_path, Volume(blocks(), grid(SHAPE)), plain)
    finer = Geometry((18, 16, 6), grid(SHAPE).affine @ np.diag([0.5, 0.5, 1, 1]))
    write_series(tmp_path / "finer", np.zeros(finer.shape, np.int16), finer.affine)
    with pytest.raises(GeometryError, match="its pixels are not those"):
        read_annotations(path, only(tmp_path / "finer"))


def test_what_is_no_object_is_refused(plain: Series, tmp_path: Path) -> None:
    (tmp_path / "x.dcm").write_text("no DICOM")
    for path in (tmp_path / "x.dcm", plain.slices[0].path):
        with pytest.raises(VolumeError, match="expected a DICOM SEG or RTSTRUCT"):
            read_annotations(path, plain)


def frames_of(seg: Any) -> list[tuple[int, FloatArray, NDArray[Any]]]:
    """Return segment, position (LPS) and pixels of each frame, by pydicom and highdicom alone."""
    groups = seg.PerFrameFunctionalGroupsSequence
    numbers = [int(one.SegmentIdentificationSequence[0].ReferencedSegmentNumber) for one in groups]
    places = [np.array(one.PlanePositionSequence[0].ImagePositionPatient, float) for one in groups]
    return list(zip(numbers, places, seg.pixel_array.reshape(-1, seg.Rows, seg.Columns), strict=True))


def series_for(seg: Any, folder: Path) -> Series:
    """Make a series of even slices on which the frames of a SEG lie."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    holder = shared if "PlaneOrientationSequence" in shared else seg.PerFrameFunctionalGroupsSequence[0]
    turn = np.array(holder.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    places = np.unique(np.array([place for _, place, _ in frames_of(seg)]).round(4), axis=0)
    normal = np.cross(*turn)
    places = places[np.argsort(places @ normal)]
    gaps = np.diff(places @ normal)
    step = float(gaps.min()) if len(gaps) else 2.0
    slices = round(float(gaps.sum()) / step) + 2
    affine = np.eye(4)
    affine[:3] = np.column_stack([turn[0] * between_columns, turn[1] * between_rows, normal * step, places[0]])
    shape = (seg.Columns, seg.Rows, slices)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    write_series(folder, np.zeros(shape, np.int8), affine, FrameOfReferenceUID=str(seg.FrameOfReferenceUID))
    return only(folder)


@pytest.mark.parametrize(
    "name", ["binary", "binary_fractional", "binary_overlap", "binary_single_frame", "true_fractional"]
)
def test_samples_of_others(name: str, shared_data: Path, tmp_path: Path) -> None:
    """Each voxel of highdicom's own test files, put in its place by hand; of 16 x 16 pixels, one of a series each."""
    path = shared_data / "nasty" / "dicom_seg" / f"seg_image_ct_{name}.dcm"
    seg = highdicom.seg.segread(path)
    series = series_for(seg, tmp_path / "series")
    read = read_annotations(path, series, overlap="last")
    limit = 0.5 * float(seg.get("MaximumFractionalValue", 1))
    wanted = np.zeros(series.geometry.shape, int)
    places = np.array([one.position_mm for one in series.slices])
    for number, place, pixels in sorted(frames_of(seg), key=lambda frame: frame[0]):
        wanted[:, :, np.abs(places - place).sum(axis=1).argmin()][limit <= pixels.T] = number
    assert wanted.any()
    np.testing.assert_array_equal(read.label.array, wanted)
    assert len(read.labels) == len(seg.SegmentSequence) + 1
    if name == "binary_overlap":
        with pytest.raises(VolumeError, match="share"):
            read_annotations(path, series)


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "dice"), [("CT", 1.0), ("MR_T1", 1.0), ("PET", 0.996)])
def test_contours_of_a_patient_against_their_mask(modality: str, dice: float, shared_data: Path) -> None:
    """The PET's contours run through some pixel centres, which count as inside here and were left to chance there."""
    folder = shared_data / "STS" / "dicom" / "STS_030" / modality
    series = only(folder)
    read = read_annotations(next((folder / "mask").iterdir()), series)
    mask = read_label(shared_data / "STS" / "STS_030" / f"{modality}_mask.nii.gz")
    assert read.label.geometry.matches(mask.geometry, 1e-2) and read.remarks == ()
    ours, theirs = read.label.array > 0, mask.array > 0
    assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) >= dice
    np.testing.assert_allclose(centroid(read.label, 1), centroid(mask, 1), atol=0.2)
