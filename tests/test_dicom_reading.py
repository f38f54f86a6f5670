"""DICOM series become volumes: every value as stored and scaled, every voxel at its millimetres, or a clear refusal."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import MR, SECRET, grid, reread, stored, write_series
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.volumes.dicom.reading import read_series, series_digest, series_geometry, series_header
from pipeline.volumes.dicom.series import Series, find_series
from pipeline.volumes.dicom.untilting import untilted_geometry
from pipeline.volumes.resampling import resample_image
from pipeline.volumes.volume import Volume, read_image

ORIENTATIONS = [
    "".join(letters[sign] for letters, sign in zip(axes, signs, strict=True))
    for axes in itertools.permutations(["RL", "AP", "SI"])
    for signs in itertools.product([0, 1], repeat=3)
]


def only(folder: Path) -> Series:
    (series,) = find_series(folder)
    return series


def read(folder: Path) -> Volume:
    return read_series(only(folder))


def test_values_and_place(tmp_path: Path) -> None:
    write_series(tmp_path)
    volume = read(tmp_path)
    assert volume.array.dtype == np.float32 and volume.array.shape == (1, 7, 6, 5)
    np.testing.assert_array_equal(volume.array[0], stored())
    np.testing.assert_allclose(volume.geometry.affine, grid().affine, atol=1e-6)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_every_axis_order_of_an_oblique_grid(code: str, tmp_path: Path) -> None:
    a, b = np.radians([20, 10])
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * [1.1, 1.2, 2.5], [5.0, -7.0, 11.0]
    upright = Geometry((4, 3, 3), affine)
    ordered = upright.reoriented(code)
    axes = upright.axes_for(code)
    voxels = stored(upright.shape).transpose([axis for axis, _ in axes])
    voxels = voxels[tuple(slice(None, None, sign) for _, sign in axes)]
    write_series(tmp_path, np.ascontiguousarray(voxels), ordered.affine)
    volume = read(tmp_path)
    # Where the grid is left-handed the slices come in the other order: the same voxels at the same millimetres.
    back = resample_image(volume, upright)
    np.testing.assert_array_equal(back.array[0], stored(upright.shape))
    weights = volume.array[0].astype(float) + 30
    voxel = np.stack(np.meshgrid(*map(np.arange, volume.geometry.shape), indexing="ij"), -1)
    centroid = (volume.geometry.to_mm(voxel) * weights[..., None]).sum((0, 1, 2)) / weights.sum()
    wanted = np.stack(np.meshgrid(*map(np.arange, upright.shape), indexing="ij"), -1)
    own = stored(upright.shape).astype(float) + 30
    np.testing.assert_allclose(centroid, (upright.to_mm(wanted) * own[..., None]).sum((0, 1, 2)) / own.sum(), atol=1e-5)


def test_each_slice_has_its_own_slope(tmp_path: Path) -> None:
    def scaled(data: Dataset, z: int) -> None:
        data.RescaleSlope, data.RescaleIntercept = f"{0.001 * (z + 1):.4f}", z

    write_series(tmp_path, change=scaled, Modality="PT")
    wanted = stored() * (0.001 * np.arange(1, 6)) + np.arange(5)
    np.testing.assert_allclose(read(tmp_path).array[0], wanted, rtol=1e-6)


def test_slopes_of_mr_count_too(tmp_path: Path) -> None:
    write_series(tmp_path, SOPClassUID=MR, Modality="MR", RescaleSlope=2, RescaleIntercept=-7)
    np.testing.assert_array_equal(read(tmp_path).array[0], stored() * 2 - 7)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
def test_types(dtype: type, tmp_path: Path) -> None:
    low, high = np.iinfo(dtype).min // 2, np.iinfo(dtype).max // 2
    voxels = np.linspace(low, high, 60).astype(dtype).reshape(5, 4, 3)
    write_series(tmp_path, voxels)
    np.testing.assert_array_equal(read(tmp_path).array[0], voxels.astype(np.float32))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("high", [11, 13])
def test_twelve_of_sixteen_bits(signed: bool, high: int, tmp_path: Path) -> None:
    """The other bits hold an overlay, or anything."""
    values = np.linspace(-2048 if signed else 0, 2047 if signed else 4095, 60).astype(np.int64).reshape(5, 4, 3)
    junk = np.random.default_rng(0).integers(0, 2**16, values.shape)
    kept = 0xFFF << (high - 11)
    voxels = ((values & 0xFFF) << (high - 11)) | (junk & ~kept)
    write_series(tmp_path, voxels.astype(np.uint16), BitsStored=12, HighBit=high, PixelRepresentation=int(signed))
    np.testing.assert_array_equal(read(tmp_path).array[0], values)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_uncompressed_syntaxes(syntax: str, tmp_path: Path) -> None:
    def rewritten(data: Dataset, z: int) -> None:
        data.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            data.PixelData = np.frombuffer(data.PixelData, "<i2").astype(">i2").tobytes()

    write_series(tmp_path, change=rewritten)
    np.testing.assert_array_equal(read(tmp_path).array[0], stored())


@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
def test_compressed_by_rle(dtype: type, tmp_path: Path) -> None:
    voxels = (np.arange(16 * 12 * 3).reshape(16, 12, 3) % 200 - (90 if dtype is np.int16 else 0)).astype(dtype)
    for file in write_series(tmp_path, voxels, RescaleSlope="0.5", RescaleIntercept="-3"):
        data = reread(file)
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(file)
    np.testing.assert_array_equal(read(tmp_path).array[0], voxels * np.float32(0.5) - 3)


def test_what_gdcm_cannot_decompress_is_said(tmp_path: Path) -> None:
    files = write_series(tmp_path)
    data = reread(files[2])
    data.compress(RLELossless, generate_instance_uid=False)
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"  # HTJ2K
    data.save_as(files[2])
    with pytest.raises(VolumeError, match=rf"{files[2].name}: cannot be decompressed from High-Throughput JPEG 2000"):
        read(tmp_path)


def test_a_file_that_is_cut_short_or_has_changed(tmp_path: Path) -> None:
    files = write_series(tmp_path)
    series = only(tmp_path)
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-10])
    with pytest.raises(VolumeError, match=rf"{files[1].name}: (is cut short|is damaged)"):
        read_series(series)
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(VolumeError, match=rf"{files[1].name}: has changed since it was found"):
        read_series(series)
    files[1].unlink()
    with pytest.raises(VolumeError, match=rf"{files[1].name}: cannot be read"):
        read_series(series)
    files[1].write_bytes(content)
    np.testing.assert_array_equal(read_series(series).array[0], stored())


def test_the_digest_is_of_contents_and_order(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a")
    digest = series_digest(only(tmp_path / "a"))
    for number, file in enumerate(files):
        file.rename(file.with_name(f"renamed{number}"))
    assert series_digest(only(tmp_path / "a")) == digest
    assert series_digest(only(tmp_path / "a"), untilt=True) == digest  # It has no tilt.
    write_series(tmp_path / "b", stored() + np.int16(1))
    assert series_digest(only(tmp_path / "b")) != digest


def test_the_header_is_that_of_the_volume(tmp_path: Path) -> None:
    write_series(tmp_path)
    header = series_header(only(tmp_path))
    assert header.geometry == read(tmp_path).geometry and header.shape == (7, 6, 5)


def multi_frame(folder: Path, change: Callable[[Dataset, int], None] | None = None) -> Path:
    """Write an enhanced CT: one file, a frame a slice, in no order."""
    files = write_series(folder / "slices")
    slices = [reread(file) for file in files]
    whole = reread(files[0])
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        del whole[tag]
    whole.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    order = [3, 0, 4, 2, 1]
    whole.NumberOfFrames, whole.PixelData = 5, b"".join(slices[z].PixelData for z in order)
    shared, plane, pixel = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient, pixel.PixelSpacing = slices[0].ImageOrientationPatient, slices[0].PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Items([plane]), Items([pixel])
    whole.SharedFunctionalGroupsSequence = Items([shared])
    frames = []
    for z in order:
        frame, place, scale = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = slices[z].ImagePositionPatient
        scale.RescaleSlope, scale.RescaleIntercept = 1 + z, -1024
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Items([place]), Items([scale])
        if change:
            change(frame, z)
        frames.append(frame)
    whole.PerFrameFunctionalGroupsSequence = Items(frames)
    for file in files:
        file.unlink()
    whole.save_as(folder / "enhanced.dcm")
    return folder / "enhanced.dcm"


def test_a_multi_frame_file_is_read_by_the_place_of_its_frames(tmp_path: Path) -> None:
    file = multi_frame(tmp_path)
    series = only(tmp_path)
    assert series.files == (file,) and [one.frame for one in series.slices] == [1, 4, 3, 0, 2]
    volume = read_series(series)
    assert volume.geometry.matches(grid(), 1e-5)
    np.testing.assert_array_equal(volume.array[0], stored() * np.arange(1, 6) - 1024)


def test_frames_of_two_echoes_are_two_volumes_or_refused(tmp_path: Path) -> None:
    def flat(frame: Dataset, z: int) -> None:
        frame.PlanePositionSequence[0].ImagePositionPatient[2] = 2.5 * (z // 2)

    multi_frame(tmp_path, flat)
    assert "frame 1 of enhanced.dcm" in only(tmp_path).refusal()


def test_a_multi_frame_file_that_says_no_places(tmp_path: Path) -> None:
    write_series(tmp_path, stored((3, 3, 2)), NumberOfFrames=2)
    assert "several frames that say not where they lie" in only(tmp_path).refusal()


def tilted(degrees: float) -> Geometry:
    """Return a grid whose slices follow one another along z while they lean."""
    lean = np.radians(degrees)
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    affine[:3, 1] = [0, -np.cos(lean), -np.sin(lean)]
    return Geometry((20, 24, 6), affine)


def blob(geometry: Geometry) -> np.ndarray:
    """Return a smooth blob at a known place."""
    voxel = np.stack(np.meshgrid(*map(np.arange, geometry.shape), indexing="ij"), -1)
    away = geometry.to_mm(voxel) - np.array([-9.0, -11.0, 5.0])
    return 1000 * np.exp(-(away**2).sum(-1) / (2 * 3.0**2))


@pytest.mark.parametrize("degrees", [-18.5, 12.0])
def test_a_tilt_is_refused_or_resampled(degrees: float, tmp_path: Path) -> None:
    sheared = tilted(degrees)
    write_series(tmp_path, np.rint(blob(sheared)).astype(np.int16), sheared.affine)
    series = only(tmp_path)
    assert series.tilt_degrees == pytest.approx(abs(degrees), abs=1e-3)
    with pytest.raises(VolumeError, match=rf"the gantry was tilted by {abs(degrees):.1f} degrees; --untilt"):
        read_series(series)
    volume = read_series(series, untilt=True)
    assert volume.geometry == series_geometry(series, untilt=True)
    assert volume.geometry.matches(untilted_geometry(sheared), 1e-4)
    assert volume.geometry.shear < 1e-6
    # The blob is where it was, though no two slices of the scan lie above one another.
    assert np.abs(volume.array[0] - blob(volume.geometry)).max() < 12
    assert series_digest(series) != series_digest(series, untilt=True)
    # Nothing of the scan is cut off: each of its corners lies in the new grid.
    corners = volume.geometry.to_index(sheared.corners_mm)
    assert (corners > -0.51).all() and (corners < np.array(volume.geometry.shape) - 0.49).all()


NASTY = ["anatomical/001", "anatomical/001_implicit", "anatomical/002_non_isotropic"]
NASTY += [f"compressed_{kind}/001" for kind in ("j2k", "jpeg", "jpegls", "rle")]


@pytest.mark.parametrize("name", NASTY)
def test_the_shared_series_are_their_ground_truth(name: str, shared_data: Path) -> None:
    folder = shared_data / "nasty" / "dicom" / name
    volume = read(folder)
    truth = read_image(folder.with_name(f"{folder.name}_ground_truth.nii.gz"))
    back = resample_image(volume, truth.geometry)
    assert back.array is not volume.array or volume.geometry.matches(truth.geometry, 1e-4)
    np.testing.assert_allclose(back.array, truth.array, rtol=1e-6)
    corners = np.sort(volume.geometry.corners_mm.round(3), axis=0), np.sort(truth.geometry.corners_mm.round(3), axis=0)
    np.testing.assert_allclose(*corners, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("slice_increment/001", r"10\.00 mm between IM-0001-0009-0001\.dcm and IM-0001-0010-0001\.dcm \(1 missing\)"),
        ("slice_increment/002", r"1\.50 mm between IM-0001-0003\.dcm and IM-0001-0005\.dcm \(1 missing\)"),
        ("slice_orientation/001", r"more than one orientation: IM-0001-0001-0001\.dcm, IM-0001-0002-0001\.dcm differ"),
        ("gantry_tilt_philips", r"the gantry was tilted by 18\.5 degrees"),
    ],
)
def test_the_shared_series_that_are_no_volume(name: str, reason: str, shared_data: Path) -> None:
    with pytest.raises(VolumeError, match=reason):
        read(shared_data / "nasty" / "dicom" / name)


@pytest.mark.slow
def test_the_shared_tilt_is_resampled(shared_data: Path) -> None:
    series = only(shared_data / "nasty" / "dicom" / "gantry_tilt_philips")
    volume = read_series(series, untilt=True)
    assert volume.geometry.shear < 1e-6 and len(series.slices) == 20
    # At the middle of the fourth slice the value is that of the file, within what interpolation does to edges.
    data = reread(series.files[3])
    pixels = data.pixel_array.astype(float) - 1024
    spot = series.geometry.to_mm(np.array([[256, row, 3] for row in range(200, 300)]))
    index = volume.geometry.to_index(spot)
    assert np.allclose(index[:, 2], 3) and np.allclose(index[:, 0], 256)
    column = np.interp(index[:, 1], np.arange(volume.geometry.shape[1]), volume.array[0, 256, :, 3])
    assert np.median(np.abs(column - pixels[200:300, 256])) < 8


@pytest.mark.parametrize("kind", ["MR_T1", "PET"])
def test_a_patients_series_are_its_nifti(kind: str, shared_data: Path) -> None:
    volume = read(shared_data / "STS" / "dicom" / "STS_030" / kind / "image")
    (file,) = [
        path
        for path in sorted((shared_data / "STS" / "STS_030").glob("*.nii.gz"))
        if kind in path.name and "mask" not in path.name
    ]
    wanted = read_image(file)
    assert volume.geometry.reoriented("RAS").matches(wanted.geometry.reoriented("RAS"), 1e-3)
    back = resample_image(volume, wanted.geometry)
    np.testing.assert_allclose(back.array, wanted.array, atol=1e-4 * float(wanted.array.max()))


@pytest.mark.slow
def test_a_full_ct_is_what_simpleitk_reads(shared_data: Path) -> None:
    """By an order of files that is ours; ITK's own geometry is asked too, as the slices are even and upright."""
    series = only(shared_data / "CT_CRLM")
    volume = read_series(series)
    image = sitk.ReadImage([str(file) for file in series.files])
    np.testing.assert_array_equal(volume.array[0], sitk.GetArrayViewFromImage(image).transpose())
    affine = np.diag([-1.0, -1, 1, 1]) @ np.vstack(
        [
            np.column_stack(
                [np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing(), np.array(image.GetOrigin())]
            ),
            [0, 0, 0, 1],
        ]
    )
    np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_file_is_read_or_refused_in_one_line(seed: int, tmp_path: Path) -> None:
    """Whatever bytes are other than they should be: never another error, and never a word of the patient."""
    files = write_series(tmp_path, RescaleSlope=1, RescaleIntercept=0)
    if seed:
        for file in files:
            data = reread(file)
            data.compress(RLELossless, generate_instance_uid=False)
            data.save_as(file)
    content, random = [file.read_bytes() for file in files], np.random.default_rng(seed)
    read_anyway = 0
    for _ in range(15):
        for file, intact in zip(files, content, strict=True):
            damaged = np.frombuffer(intact, np.uint8).copy()
            damaged[random.integers(128, len(damaged), 2)] = random.integers(0, 256, 2)
            file.write_bytes(damaged[: random.integers(300, 2 * len(damaged))].tobytes())
        for series in find_series(tmp_path):
            try:
                read_anyway += read_series(series, untilt=True).array.ndim == 4
            except VolumeError as error:
                assert "\n" not in str(error) and SECRET not in str(error) and "4711" not in str(error)
    assert read_anyway < 45


def test_what_pydicom_finds_wrong_with_values_is_not_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write_series(tmp_path, SpecificCharacterSet="ISO_IR 999")
    recwarn.clear()  # What writing it has said.
    assert read(tmp_path).array.any()
    assert not recwarn.list
