"""Files as the world has them: each read rightly or refused in one clear line, and a batch of them goes to its end."""

import gzip
import os
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import NEAREST_MEAN, make_model, make_plan, nearest_mean

from pipeline.errors import VolumeError
from pipeline.model import save_model
from pipeline.networks import NETWORKS
from pipeline.stages import segment
from pipeline.volumes.stored import read_header
from pipeline.volumes.volume import read_image, read_label
from pipeline.volumes.writing import write_image

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
VALUES = (np.arange(5 * 6 * 7) % 100).reshape(5, 6, 7)
DIM, DATATYPE, PIXDIM, VOX_OFFSET, SLOPE, SROW_Y = 40, 70, 76, 108, 112, 296

# What becomes of each file of nasty/, by the name of its case: a label map, or the reason why there is none.
SHARED = {
    "big_endian_int16": "done",
    "minimal_no_codes": "done",
    "ras": "done",
    "mha": "done",
    "FLAIR": "done",
    "example4d": r"example4d\.nii\.gz: holds 2 volumes in shape .*#0 to #1 in a CSV",
    "example4d_1": "done",
    "functional": r"functional\.nii: holds 20 volumes",
    "functional_19": "done",
    "functional_20": r"functional\.nii: index 20 is beyond its 20 volumes",
    "header_without_img": r"header_without_img\.img: cannot be read \(No such file",
    "uninformative_image_uninformative": "done",
    "uninformative_slice_image_uninformative_slice": "done",
    **{
        f"uninformative{kind}_mask_{name}_mask": "done"
        for kind in ("", "_slice")
        for name in ("disconnected", "empty", "full", "one_voxel")
    },
}


def nifti(path: Path, values: np.ndarray = VALUES, dtype: str = "i2", affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(values.astype(dtype), affine, dtype=np.dtype(dtype)), path)
    return path


def patched(path: Path, offset: int, values: np.ndarray) -> Path:
    """Write a NIfTI file with some bytes of its header changed."""
    content = bytearray(nifti(path.with_suffix(".nii")).read_bytes())
    content[offset : offset + values.nbytes] = values.tobytes()
    path.write_bytes(content)
    return path


def big_endian(path: Path) -> Path:
    nib.save(nib.Nifti1Image(VALUES.astype(">i2"), AFFINE, nib.Nifti1Header(endianness=">")), path)
    return path


def truncated(path: Path) -> Path:
    content = nifti(path, np.random.default_rng(0).integers(0, 99, (20, 20, 20))).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def flipped(path: Path) -> Path:
    """Write gzip whose voxels unpack without an error, and are not those that its checksum is of."""
    content = bytearray(gzip.compress(nifti(path.with_suffix("")).read_bytes(), compresslevel=0))
    path.with_suffix("").unlink()
    content[-40] ^= 1
    path.write_bytes(content)
    return path


def colours(path: Path) -> Path:
    nib.save(nib.Nifti1Image(np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")]), AFFINE), path)
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def device(path: Path) -> Path:
    """Link to a device that is read at once; others, and pipes, may never end."""
    path.symlink_to(os.devnull)
    return path


def itk(path: Path, spacing: tuple[float, float, float] = (1, 2, 3)) -> Path:
    image = sitk.GetImageFromArray(VALUES.T.astype(np.int16))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, path)
    return path


def zero_spacing_mha(path: Path) -> Path:
    path.write_bytes(itk(path).read_bytes().replace(b"ElementSpacing = 1 2 3", b"ElementSpacing = 0 2 3"))
    return path


SHEARED = AFFINE + np.eye(4, k=1) * [[1.0], [0], [0], [0]]

READ: dict[str, Callable[[Path], Path]] = {
    **{
        f"{dtype}.nii.gz": lambda path, dtype=dtype: nifti(path, dtype=dtype)
        for dtype in ("i1", "u1", "u2", "u4", "f8")
    },
    "i8.nii": lambda path: nifti(path, dtype="i8"),
    "big_endian.nii.gz": big_endian,
    "nrrd.nrrd": itk,
    "mha.mha": itk,
    "detached.mhd": itk,
}
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated.nii.gz": (truncated, "is cut short or damaged"),
    "flipped.nii.gz": (flipped, "is cut short or damaged"),
    "zero_spacing.nii": (lambda path: patched(path, PIXDIM + 4, np.zeros(1, "f4")), "the spacing must be above 0 mm"),
    "zero_spacing.mha": (zero_spacing_mha, "[Ss]pacing"),
    "huge_spacing.nii": (lambda path: patched(path, SROW_Y, np.full(4, 3e38, "f4")), "within a kilometre"),
    "sheared.nii": (lambda path: nifti(path, affine=SHEARED), "the grid is sheared"),
    "colours.nii": (colours, "holds colour voxels"),
    "complex.nii": (lambda path: nifti(path, dtype="c8"), "holds complex voxels"),
    "four.nii": (lambda path: nifti(path, np.zeros((3, 3, 3, 2))), "holds 2 volumes"),
    "five.nii": (lambda path: nifti(path, np.zeros((3, 3, 3, 2, 2))), "three axes, or four"),
    "promises.nii": (
        lambda path: patched(path, DIM + 2, np.full(3, 32767, "i2")),
        "its header promises 70362|of 32767x32767x32767 voxels does not fit",
    ),
    "nowhere.nii": (lambda path: patched(path, VOX_OFFSET, np.array(np.nan, "f4")), "the voxels begin at byte nan"),
    "far.nii": (lambda path: patched(path, VOX_OFFSET, np.array(1e30, "f4")), "the voxels begin at byte 1"),
    "no_slope.nii": (lambda path: patched(path, SLOPE, np.array([2, np.nan], "f4")), "header makes no sense"),
    "no_type.nii": (lambda path: patched(path, DATATYPE, np.zeros(1, "i2")), "says no type of voxel"),
    "empty.nii.gz": (empty, "is not NIfTI, or cut short"),
    "missing.nii.gz": (lambda path: path, "No such file"),
    "device.nii.gz": (device, "is no regular file"),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_of_any_type_is_read(tmp_path: Path, name: str) -> None:
    path = READ[name](tmp_path / name)
    assert np.array_equal(read_image(path).array[0], VALUES)
    assert np.array_equal(read_label(path).array, VALUES)
    assert read_label(path).array.dtype == np.uint8
    assert read_image(path).geometry.spacing_mm == (1, 2, 3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, reason = REFUSED[name]
    path = make(tmp_path / name)
    for read in (read_image, read_label):
        with pytest.raises(VolumeError, match=reason) as error:
            read(path)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)


def test_a_path_that_would_end_the_process_in_itk_is_refused(tmp_path: Path) -> None:
    path = itk(tmp_path / "a.mha").rename(tmp_path / os.fsdecode(b"\xe4.mha"))
    with pytest.raises(VolumeError, match="no path that is not UTF-8; rename it"):
        read_image(path)
    with pytest.raises(VolumeError, match="no path that is not UTF-8; rename it"):
        write_image(path, read_image(nifti(tmp_path / "a.nii")))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("value", "dtype"), [(-128, "i1"), (2**53 - 1, "i8"), (65535, "u2"), (2**31, "u4")])
def test_the_extremes_of_label_types_come_back(tmp_path: Path, value: int, dtype: str) -> None:
    values = np.zeros((2, 3, 4), np.int64)
    values[1, 2, 3] = value
    assert np.array_equal(read_label(nifti(tmp_path / "a.nii.gz", values, dtype)).array, values)


def test_a_float_beyond_whole_numbers_is_no_label(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"a label map holds whole numbers, got 1e\+30 at voxel \(0, 0, 0\)"):
        read_label(nifti(tmp_path / "a.nii", np.full((2, 2, 2), 1e30), "f8"))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(NETWORKS, "nearest_mean", nearest_mean)
    plan = make_plan(spacing_mm=(4.0, 4.0, 4.0))
    save_model(tmp_path / "model", make_model(plan=plan, network=NEAREST_MEAN))
    return tmp_path / "model"


def check(report: segment.SegmentReport, expected: dict[str, str], out: Path) -> None:
    """Compare a batch with what is expected of each case; label maps lie on their inputs."""
    assert {result.name for result in report.results} == set(expected)
    for result in report.results:
        reason = expected[result.name]
        assert (result.status == "done") == (reason == "done"), f"{result.name}: {result.reason}"
        if result.status == "done":
            grid = read_header(Path(result.inputs[0])).geometry
            assert read_label(out / f"{result.name}.nii.gz").geometry.matches(grid, 1e-3)
        else:
            assert re.search(reason, result.reason or "")
            assert "\n" not in (result.reason or "")
    assert len(list(out.glob("*.nii.gz"))) == list(expected.values()).count("done")


def test_a_batch_goes_on_to_its_end(model: Path, tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    sizes = {"one_slice": (9, 8, 1), "one_voxel": (1, 1, 1), "needle": (1, 1, 40)}
    cases = {name: nifti(scans / f"{name}.nii.gz", np.full(shape, 100)) for name, shape in sizes.items()}
    cases |= {name: READ[name](scans / name) for name in ("i8.nii", "nrrd.nrrd")}
    expected = dict.fromkeys(cases, "done") | {name: reason for name, (_, reason) in REFUSED.items()}
    cases |= {name: make(scans / name) for name, (make, _) in REFUSED.items()}
    (tmp_path / "cases.csv").write_text("case,image\n" + "".join(f"{name},{path}\n" for name, path in cases.items()))
    report = segment.run(str(model), [tmp_path / "cases.csv"], out, device="cpu", precision="fp32")
    check(report, expected, out)
    for name in sizes:
        assert (read_label(out / f"{name}.nii.gz").array == 1).all()


@pytest.mark.slow
def test_a_batch_of_the_shared_ones_goes_on_to_its_end(model: Path, tmp_path: Path, shared_data: Path) -> None:
    nasty, out = shared_data / "nasty", tmp_path / "out"
    chosen = [f"{nasty}/nifti/{name}" for name in ("example4d.nii.gz#1", "functional.nii#19", "functional.nii#20")]
    inputs = [nasty / "nifti", *chosen, f"{nasty}/masks/**"]
    check(segment.run(str(model), inputs, out, device="cpu", precision="fp32"), SHARED, out)


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """Both NIfTIs in both byte orders, and a folder to write them to."""
    folder = tmp_path_factory.mktemp("fuzz")
    written = []
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        for order in "<>":
            image = kind(VALUES.astype(f"{order}i2"), AFFINE, kind.header_class(endianness=order))
            image.to_filename(folder / "a.nii")
            written.append((folder / "a.nii").read_bytes())
    return folder, written


NUMBERS = [
    np.array(n, t).tobytes() for n in (0, -1, 77, np.nan, np.inf, 3e38, 32767) for t in ("<f4", ">f4", "<f8", ">f8")
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    which=st.integers(0, 3),
    changes=st.lists(
        st.tuples(st.integers(0, 540), st.sampled_from(NUMBERS) | st.binary(min_size=1, max_size=8)), max_size=4
    ),
    length=st.none() | st.integers(0, 900),
    packed=st.booleans(),
)
def test_any_header_is_read_or_refused(
    headers: tuple[Path, list[bytes]],
    which: int,
    changes: list[tuple[int, bytes]],
    length: int | None,
    packed: bool,
) -> None:
    folder, written = headers
    content = bytearray(written[which])
    for offset, new in changes:
        content[offset : offset + len(new)] = new
    path = folder / "fuzz.nii"
    path.write_bytes(gzip.compress(content[:length], 1) if packed else content[:length])
    for read in (read_image, read_label):
        try:
            volume = read(path)
        except VolumeError as error:
            assert "\n" not in str(error)
        else:
            assert volume.array.nbytes < 10**6
            assert np.isfinite(volume.geometry.affine).all()
