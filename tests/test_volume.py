"""Volumes: read rightly or refused by name, written where they came from."""

import gzip
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.data.cases import read_case_images, read_case_label
from pipeline.data.manifest import Case, ImageFile, Manifest
from pipeline.errors import GeometryError, VolumeError
from pipeline.geometry import Geometry
from pipeline.records import file_digest
from pipeline.volumes.stored import content_digest, files_of, is_volume, read_header, stem_of
from pipeline.volumes.volume import Volume, count_values, read_image, read_label
from pipeline.volumes.writing import write_image, write_label

AFFINE = np.array([[-2.0, 0, 0, 40], [0, 1.5, 0, -30], [0, 0, 3, 10], [0, 0, 0, 1]])
AXIS_ORDERS = [
    "".join(pair[side] for pair, side in zip(order, sides, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for sides in itertools.product((0, 1), repeat=3)
]


def numbered(shape: tuple[int, ...] = (5, 6, 7), dtype: str = "int16") -> np.ndarray:
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, kind: type = nib.Nifti1Image) -> Path:
    nib.save(kind(array, affine), path)
    return path


def oblique() -> Geometry:
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn * [0.7, 0.8, 2.5]
    affine[:3, 3] = [11, -7, 23]
    return Geometry((5, 6, 7), affine)


def centroid_mm(volume: Volume) -> np.ndarray:
    weights = volume.array[0].astype(np.float64)
    points = volume.geometry.to_mm(np.stack(np.indices(weights.shape), axis=-1))
    return np.tensordot(weights, points, 3) / weights.sum()


# What becomes of each file: its orientation and shape, or the error.
NASTY = {
    "big_endian_int16.nii": ("LAS", (33, 41, 25)),
    "minimal_no_codes.nii.gz": ("LAS", (64, 64, 10)),
    "ras.hdr": ("RAS", (62, 41, 34)),
    "ras.img": ("RAS", (62, 41, 34)),
    "mha.mha": ("LAS", (64, 64, 37)),
    "FLAIR.nrrd": ("RAS", (124, 160, 140)),
    "example4d.nii.gz": "holds 2 volumes",
    "functional.nii": "holds 20 volumes",
    "header_without_img.hdr": r"header_without_img\.img: cannot be read \(No such file",
}


@pytest.mark.parametrize("name", NASTY)
def test_each_nasty_nifti_is_read_rightly_or_refused(shared_data: Path, name: str) -> None:
    path, expected = shared_data / "nasty" / "nifti" / name, NASTY[name]
    if isinstance(expected, str):
        with pytest.raises(VolumeError, match=expected):
            read_image(path)
    else:
        image = read_image(path)
        assert (image.geometry.orientation, image.geometry.shape) == expected
        assert image.array.dtype == np.float32
        assert np.isfinite(image.array).all()
        assert image.array.std() > 0


def test_no_nasty_nifti_is_left_out(shared_data: Path) -> None:
    assert {path.name for path in (shared_data / "nasty" / "nifti").iterdir()} == set(NASTY)


def test_big_endian_voxels_are_nibabels(shared_data: Path) -> None:
    path = shared_data / "nasty" / "nifti" / "big_endian_int16.nii"
    assert np.array_equal(read_image(path).array[0], nib.load(path).get_fdata())


def test_a_volume_of_a_4d_file_is_the_one_asked_for(shared_data: Path) -> None:
    path = shared_data / "nasty" / "nifti" / "functional.nii"
    assert np.array_equal(read_image(path, 3).array[0], np.float32(nib.load(path).dataobj[..., 3]))
    with pytest.raises(VolumeError, match=r"index 20 is beyond its 20 volumes \(0 to 19\)"):
        read_image(path, 20)


MASKS = {"empty": 0, "full": 512, "one_voxel": 1, "disconnected": 3}
SLICE_MASKS = {"empty": 0, "full": 64, "one_voxel": 1, "disconnected": 3}


@pytest.mark.parametrize(("folder", "depth", "counts"), [("", 8, MASKS), ("_slice", 1, SLICE_MASKS)])
def test_each_nasty_mask_is_read(shared_data: Path, folder: str, depth: int, counts: dict[str, int]) -> None:
    root = shared_data / "nasty" / "masks" / f"uninformative{folder}"
    image = read_image(root / "image" / f"uninformative{folder}.nii.gz")
    assert image.array.shape == (1, 8, 8, depth)
    assert (image.array == 1).all()
    masks = {path.name.removesuffix("_mask.nii.gz"): read_label(path) for path in (root / "mask").iterdir()}
    assert {name: count_values(mask.array).get(1, 0) for name, mask in masks.items()} == counts
    assert all(mask.geometry == image.geometry for mask in masks.values())


def test_the_same_brain_in_twelve_axis_orders_lies_at_the_same_millimetres(shared_data: Path) -> None:
    paths = sorted((shared_data / "nasty" / "orientations").iterdir())
    images = [read_image(path) for path in paths]
    assert [image.geometry.orientation for image in images] == [stem_of(path) for path in paths]
    centroids = np.array([centroid_mm(image) for image in images])
    assert np.ptp(centroids, axis=0).max() < 0.01


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_all_axis_orders_come_back_at_their_millimetres(tmp_path: Path, suffix: str) -> None:
    for orientation in AXIS_ORDERS:
        grid = oblique().reoriented(orientation)
        image = Volume(np.random.default_rng(1).random((1, *grid.shape), np.float32), grid)
        write_image(tmp_path / f"image{suffix}", image)
        back = read_image(tmp_path / f"image{suffix}")
        assert np.array_equal(back.array, image.array)
        assert np.abs(centroid_mm(back) - centroid_mm(image)).max() < 1e-4


def test_itks_lps_becomes_ras(tmp_path: Path) -> None:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(numbered((7, 6, 5)))
    image.SetOrigin((10, 20, 30))
    image.SetSpacing((2, 3, 4))
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    read = read_image(tmp_path / "a.mha")
    assert read.geometry.shape == (5, 6, 7)
    assert np.array_equal(read.geometry.to_mm(np.array([1, 1, 1])), [-12, -23, 34])
    assert read.array[0, 4, 3, 2] == numbered((7, 6, 5))[2, 3, 4]


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_channels_of_one_file_come_back_one_by_one(tmp_path: Path, suffix: str) -> None:
    array = np.random.default_rng(0).random((3, 5, 6, 7), np.float32)
    write_image(tmp_path / f"a{suffix}", Volume(array, oblique()))
    assert read_header(tmp_path / f"a{suffix}").shape == (5, 6, 7, 3)
    for index in range(3):
        assert np.array_equal(read_image(tmp_path / f"a{suffix}", index).array[0], array[index])


def test_scaled_voxels_are_in_real_units(tmp_path: Path) -> None:
    image = nib.Nifti1Image(numbered(), AFFINE)
    image.header.set_slope_inter(0.5, -1000)
    nib.save(image, tmp_path / "a.nii")
    stored = bytearray((tmp_path / "a.nii").read_bytes())
    stored[112:120] = np.array([0.5, -1000], "<f4").tobytes()  # nibabel resets the scale when it saves
    stored[352:] = numbered().tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(stored)
    assert np.array_equal(read_image(tmp_path / "a.nii").array[0], numbered() * 0.5 - 1000)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_both_niftis_are_read(tmp_path: Path, kind: type, name: str) -> None:
    image = read_image(save(tmp_path / name, numbered(), kind=kind))
    assert np.array_equal(image.array[0], numbered())
    assert np.array_equal(image.geometry.affine, AFFINE)


def test_a_gzipped_file_is_known_by_its_content(tmp_path: Path) -> None:
    save(tmp_path / "a.nii", numbered())
    (tmp_path / "a.nii.gz").write_bytes((tmp_path / "a.nii").read_bytes())
    (tmp_path / "b.nii").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    assert np.array_equal(read_image(tmp_path / "a.nii.gz").array, read_image(tmp_path / "b.nii").array)


def coded(path: Path, *, qform: int, sform: int) -> Path:
    image = nib.Nifti1Image(numbered(), AFFINE)
    image.set_qform(np.diag([2, 1.5, 3, 1]), qform)
    image.set_sform(AFFINE, sform)
    nib.save(image, path)
    return path


def test_the_codes_choose_the_affine(tmp_path: Path) -> None:
    by_sform, by_qform, by_none = (
        read_header(coded(tmp_path / f"{q}{s}.nii", qform=q, sform=s)) for q, s in ((1, 2), (1, 0), (0, 0))
    )
    assert np.array_equal(by_sform.affine, AFFINE)
    assert np.allclose(by_qform.affine, np.diag([2, 1.5, 3, 1]))
    assert (by_qform.qform_code, by_qform.sform_code) == (1, 0)
    assert by_none.geometry.spacing_mm == (2, 1.5, 3)
    assert by_sform.notes == by_qform.notes == ()
    assert "neither qform nor sform" in by_none.notes[0]


def sheared(cosine: float) -> np.ndarray:
    affine = np.diag([2.0, 1.5, 3, 1])
    affine[0, 1] = 1.5 * cosine
    return affine


def test_a_slight_shear_is_rounding_and_more_is_refused(tmp_path: Path) -> None:
    assert read_image(save(tmp_path / "a.nii", numbered(), sheared(5e-4))).geometry.shear > 1e-4
    with pytest.raises(GeometryError, match=r"b\.nii: the grid is sheared"):
        read_image(save(tmp_path / "b.nii", numbered(), sheared(0.05)))


def with_bytes(path: Path, offset: int, values: np.ndarray) -> Path:
    save(path, numbered())
    stored = bytearray(path.read_bytes())
    stored[offset : offset + values.nbytes] = values.tobytes()
    path.write_bytes(stored)
    return path


PIXDIM, SROW_X, DIM = 76, 280, 40


@pytest.mark.parametrize(
    ("offset", "values", "reason"),
    [
        (PIXDIM + 8, np.array([0], "<f4"), "spacing must be above 0"),
        (PIXDIM + 12, np.array([-3], "<f4"), "spacing must be above 0"),
        (SROW_X, np.array([np.nan], "<f4"), "finite"),
        (SROW_X, np.array([np.inf], "<f4"), "finite"),
        (SROW_X, np.zeros(12, "<f4"), "spacing must be above 0"),
        (SROW_X, np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "<f4"), "singular"),
    ],
    ids=["zero", "negative", "nan", "inf", "zero affine", "parallel axes"],
)
def test_an_affine_that_makes_no_sense_is_refused(tmp_path: Path, offset: int, values: np.ndarray, reason: str) -> None:
    path = with_bytes(tmp_path / "a.nii", offset, values)
    with pytest.raises(GeometryError, match=rf"a\.nii.*{reason}"):
        read_image(path)


def test_a_quaternion_that_is_no_rotation_is_refused_where_it_counts(tmp_path: Path) -> None:
    path = coded(tmp_path / "a.nii", qform=1, sform=0)
    stored = bytearray(path.read_bytes())
    stored[256:268] = np.array([0.9, 0.9, 0.9], "<f4").tobytes()
    path.write_bytes(stored)
    with pytest.raises(GeometryError, match="finite"):
        read_image(path)


def test_files_that_are_cut_short_missing_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.nii.gz", numbered((20, 20, 20))).read_bytes()
    plain = save(tmp_path / "a.nii", numbered()).read_bytes()
    contents = {
        "half.nii.gz": (whole[: len(whole) // 2], "cut short"),
        "half.nii": (plain[:400], "cut short: 48 bytes of voxels, its header promises 420"),
        "start.nii": (plain[:100], "not NIfTI"),
        "none.nii": (b"", "not NIfTI"),
        "text.nii": (b"hello " * 100, "not NIfTI"),
        "text.nrrd": (b"hello", "cannot be read"),
        "text.mha": (b"hello", "cannot be read"),
        "analyze.hdr": (plain[:344] + bytes(4), "Analyze 7.5"),
        "flat.nii": (plain[:DIM] + np.array([2, 5, 6], "<i2").tobytes() + plain[DIM + 6 :], "three axes"),
        "type.nii": (plain[:70] + np.array([77], "<i2").tobytes() + plain[72:], "makes no sense"),
    }
    for name, (content, reason) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VolumeError, match=reason) as error:
            read_image(tmp_path / name)
        assert name in str(error.value)
    for name in ("missing.nii.gz", "missing.nrrd"):
        with pytest.raises(VolumeError, match=rf"{name}: cannot be read \(No such file"):
            read_image(tmp_path / name)


def test_colours_and_complex_numbers_are_refused(tmp_path: Path) -> None:
    import SimpleITK as sitk

    colour = np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    cases = {"colour": save(tmp_path / "rgb.nii", colour), "complex": save(tmp_path / "c.nii", numbered(dtype="c8"))}
    for kind, path in cases.items():
        with pytest.raises(VolumeError, match=f"holds {kind} voxels"):
            read_image(path)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((7, 6, 5, 3), np.uint8), isVector=True), str(tmp_path / "rgb.nrrd"))
    with pytest.raises(VolumeError, match="holds colour voxels"):
        read_image(tmp_path / "rgb.nrrd")


def test_a_label_of_whole_numbers_is_read_whatever_its_type(tmp_path: Path) -> None:
    values = np.zeros((5, 6, 7))
    values[1, 2, 3], values[4, 5, 6] = 3, 300
    for dtype in ("f4", "f8", "i2", "i4", "u2"):
        label = read_label(save(tmp_path / "a.nii", values.astype(dtype)))
        assert label.array.dtype == np.uint16
        assert np.array_equal(label.array, values)
    assert read_label(save(tmp_path / "a.nii", -values.astype("f4"))).array.dtype == np.int16


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_a_label_with_another_value_is_refused_with_the_first(tmp_path: Path, value: float) -> None:
    values = np.zeros((5, 6, 7), "f4")
    values[1, 2, 3] = value
    with pytest.raises(
        VolumeError, match=rf"a\.nii: a label map holds whole numbers, got {value} at voxel \(1, 2, 3\)"
    ):
        read_label(save(tmp_path / "a.nii", values))


@pytest.mark.parametrize("label", [np.array([0, 0, 3]), np.array([-2, 5, 5]), np.array([0, 10**6])])
def test_values_are_counted(label: np.ndarray) -> None:
    values, counts = np.unique(label, return_counts=True)
    assert count_values(label) == dict(zip(values.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize(("qform", "sform"), [(1, 2), (4, 0), (0, 3), (0, 0)])
def test_a_label_map_gets_its_inputs_very_header(tmp_path: Path, qform: int, sform: int) -> None:
    source = coded(tmp_path / "image.nii", qform=qform, sform=sform)
    label = Volume((numbered() > 9).astype(np.int64) * 3, read_header(source).geometry)
    write_label(tmp_path / "out" / "label.nii.gz", label, header_of=source, names={"background": 0, "liver": 3})
    image, written = nib.load(source).header, nib.load(tmp_path / "out" / "label.nii.gz")
    for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        assert np.array_equal(written.header[field], image[field]), field
    assert np.array_equal(written.header["pixdim"][:4], image["pixdim"][:4])
    assert np.array_equal(written.affine, nib.load(source).affine)
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(written.dataobj, label.array)
    comment = json.loads(written.header.extensions[0].get_content())
    assert comment == {"labels": {"background": 0, "liver": 3}, "colours": {"liver": "#E69F00"}}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["label.nii.gz"]


def test_a_label_map_of_each_nasty_image_lies_on_it(shared_data: Path, tmp_path: Path) -> None:
    for name in (name for name, expected in NASTY.items() if not isinstance(expected, str)):
        source = shared_data / "nasty" / "nifti" / name
        grid = read_header(source).geometry
        write_label(tmp_path / "a.nii.gz", Volume(np.zeros(grid.shape, np.uint8), grid), header_of=source)
        header, original = read_header(tmp_path / "a.nii.gz"), read_header(source)
        assert np.allclose(header.affine, original.affine, atol=1e-4)
        if original.nifti is not None:
            assert (header.qform_code, header.sform_code) == (original.qform_code, original.sform_code)
            assert np.array_equal(header.affine, original.affine)


def test_a_label_map_on_another_grid_is_the_callers_mistake(tmp_path: Path) -> None:
    source = save(tmp_path / "image.nii", numbered())
    with pytest.raises(ValueError, match="is not that of"):
        write_label(tmp_path / "a.nii.gz", Volume(numbered(), oblique()), header_of=source)
    with pytest.raises(VolumeError, match="unknown format"):
        write_label(tmp_path / "a.png", Volume(numbered(), oblique()))
    assert list(tmp_path.iterdir()) == [source]


def case_of(root: Path, shift_mm: float) -> tuple[Manifest, Case]:
    moved = AFFINE.copy()
    moved[0, 3] += shift_mm
    save(root / "t1.nii", numbered())
    save(root / "t2.nii", numbered(), np.diag([4.0, 4, 4, 1]))
    save(root / "label.nii", numbered() % 2, moved)
    images = {"T2": ImageFile(path="t2.nii"), "T1": ImageFile(path="t1.nii")}
    case = Case(id="a", patient="a", images=images, label=ImageFile(path="label.nii"))
    channels = {"T1": "MR", "T2": "MR", "FLAIR": "MR"}
    labels = {"background": 0, "x": 1}
    return Manifest(name="m", root=root, channels=channels, labels=labels, cases=(case,)), case


def test_a_label_takes_over_the_grid_of_the_image_it_nearly_lies_on(tmp_path: Path) -> None:
    # A tenth of the smallest voxel side, 1.5 mm, is 0.15 mm.
    for shift_mm, adopted in ((0.1, True), (0.2, False)):
        manifest, case = case_of(tmp_path, shift_mm)
        images = read_case_images(manifest, case)
        assert list(images) == ["T1", "T2"]
        label = read_case_label(manifest, case, images)
        assert label is not None
        assert (label.geometry == images["T1"].geometry) is adopted
    assert read_case_label(manifest, case.changed(label=None), images) is None


def test_names() -> None:
    names = {"a.nii.gz": "a", "b.1.nii": "b.1", "c.NRRD": "c", "d.img.gz": "d"}
    assert {name: stem_of(Path(name)) for name in names} == names
    assert all(is_volume(Path(name)) for name in names)
    assert not is_volume(Path("a.txt"))


def detached(folder: Path, name: str = "scan.raw") -> Path:
    """Write a MetaImage header and its voxels, 2x2x2 bytes, in a file of their own."""
    (folder / "scan.raw").write_bytes(bytes(range(8)))
    header = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = "
    (folder / "scan.mhd").write_text(f"{header}{name}\n")
    return folder / "scan.mhd"


def test_a_header_with_voxels_of_its_own_stands_for_both_files(tmp_path: Path) -> None:
    path = detached(tmp_path)
    assert files_of(path) == (path, tmp_path / "scan.raw")
    assert read_image(path).array.ravel(order="F").tolist() == list(range(8))
    before = content_digest(path)
    (tmp_path / "scan.raw").write_bytes(bytes(8))
    assert content_digest(path) != before


@pytest.mark.parametrize("name", ["../scan.raw", "/etc/hostname", "LIST", "slice%03d.raw 0 3 1"])
def test_voxels_elsewhere_or_in_pieces_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(VolumeError, match=r"outside its own folder|in several files"):
        read_image(detached(tmp_path, name))


def test_the_digest_of_one_file_is_that_of_its_bytes(shared_data: Path) -> None:
    nrrd = shared_data / "nasty" / "nifti" / "FLAIR.nrrd"
    assert content_digest(nrrd) == file_digest(nrrd)
    pair = shared_data / "nasty" / "nifti" / "ras.hdr"
    assert content_digest(pair) not in (file_digest(pair), file_digest(pair.with_suffix(".img")))
    assert content_digest(pair) == content_digest(pair, pair.read_bytes())
