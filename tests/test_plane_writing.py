import itertools
import json
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.errors import VolumeError
from pipeline.geometry import Geometry
from pipeline.volumes.plane_writing import PlaneWriter
from pipeline.volumes.volume import Volume, read_image
from pipeline.volumes.writing import write_image

SHAPE = (5, 4, 7)
AFFINE = np.array([[0.0, -1.5, 0.0, 4.0], [0.7, 0.0, 0.0, -9.0], [0.0, 0.0, 3.0, 100.0], [0.0, 0.0, 0.0, 1.0]])
GRID = Geometry(SHAPE, AFFINE)


def put_all(writer: PlaneWriter, volumes: np.ndarray, axis: int) -> None:
    """Put (N, X, Y, Z) voxels plane by plane, the last first, in memory of their own."""
    for index in reversed(range(volumes.shape[axis + 1])):
        writer.put(axis, index, volumes.take(index, axis + 1))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("axis", "dtype"), list(itertools.product(range(3), ["uint8", "uint16"])))
def test_what_was_put_along_any_axis_is_read_by_all_readers(tmp_path, axis, dtype, suffix):
    sitk = pytest.importorskip("SimpleITK")
    largest = np.iinfo(dtype).max
    voxels = np.random.default_rng(axis).integers(0, largest, (3, *SHAPE), dtype, endpoint=True)
    path = tmp_path / f"probabilities{suffix}"
    with PlaneWriter(path, GRID, volumes=3, dtype=dtype, scale=1 / largest) as writer:
        put_all(writer, voxels, axis)
    expected = voxels / largest
    image = nib.load(path)
    np.testing.assert_array_equal(np.moveaxis(np.asanyarray(image.dataobj.get_unscaled()), 3, 0), voxels)
    np.testing.assert_allclose(np.moveaxis(image.get_fdata(), 3, 0), expected, atol=1e-7)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    by_itk = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_allclose(by_itk.transpose(0, 3, 2, 1), expected, atol=1e-7)
    for index in range(3):
        ours = read_image(path, index)
        np.testing.assert_allclose(ours.array[0], expected[index], atol=1e-7)
        assert ours.geometry.matches(GRID)
    assert list(tmp_path.iterdir()) == [path]


def test_one_volume_is_three_dimensional_and_planes_never_put_are_zero(tmp_path):
    path = tmp_path / "one.nii.gz"
    with PlaneWriter(path, GRID, volumes=1, dtype="uint8") as writer:
        writer.put(1, 2, np.full((1, 5, 7), 9, np.uint8))
    expected = np.zeros(SHAPE, np.uint8)
    expected[:, 2] = 9
    np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), expected)
    with PlaneWriter(path, GRID, volumes=1, dtype="uint8"):
        pass
    assert not np.asanyarray(nib.load(path).dataobj).any()


def test_the_place_is_the_images_own_and_the_comment_is_kept(tmp_path):
    image, path = tmp_path / "image.nii.gz", tmp_path / "out" / "probabilities.nii.gz"
    write_image(image, Volume(np.zeros((1, *SHAPE), np.float32), GRID))
    of = nib.load(image)
    of.header["qform_code"], of.header["sform_code"] = 2, 4
    nib.Nifti1Image(np.zeros(SHAPE, np.float32), None, of.header).to_filename(image)
    with PlaneWriter(
        path, GRID, volumes=2, dtype="uint8", header_of=image, comment={"probabilities": ["liver", "spleen"]}
    ) as writer:
        put_all(writer, np.ones((2, *SHAPE), np.uint8), 2)
    header = nib.load(path).header
    for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z"):
        np.testing.assert_array_equal(header[field], nib.load(image).header[field])
    assert (header["qform_code"], header["sform_code"]) == (2, 4)
    (extension,) = header.extensions
    assert json.loads(extension.get_content()) == {"probabilities": ["liver", "spleen"]}


def test_nothing_is_left_of_a_block_that_fails(tmp_path):
    writer = PlaneWriter(tmp_path / "a.nii.gz", GRID, volumes=1, dtype="uint8")
    with pytest.raises(RuntimeError, match="halfway"), writer:
        writer.put(0, 0, np.zeros((1, 4, 7), np.uint8))
        assert list(tmp_path.iterdir()) == []  # the planes lie in a file without a name
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("axis", "planes"),
    [
        (0, np.zeros((1, 4, 7), np.uint8)),  # another axis than before
        (2, np.zeros((1, 4, 5), np.uint8)),  # turned
        (2, np.zeros((2, 5, 4), np.uint8)),  # of two volumes
        (2, np.zeros((1, 5, 4), np.uint16)),
    ],
)
def test_planes_that_do_not_fit_are_refused(tmp_path, axis, planes):
    with PlaneWriter(tmp_path / "a.nii.gz", GRID, volumes=1, dtype="uint8") as writer:
        writer.put(2, 0, np.zeros((1, 5, 4), np.uint8))
        with pytest.raises(ValueError, match="across axis 2"):
            writer.put(axis, 1, planes)


def test_other_formats_and_other_grids_are_refused(tmp_path):
    with pytest.raises(VolumeError, match=r"a\.nrrd"):
        PlaneWriter(tmp_path / "a.nrrd", GRID, volumes=1, dtype="uint8")
    image = tmp_path / "image.nii.gz"
    write_image(image, Volume(np.zeros((1, 3, 3, 3), np.float32), Geometry((3, 3, 3), np.eye(4))))
    with pytest.raises(ValueError, match="is not that of"):
        PlaneWriter(tmp_path / "a.nii.gz", GRID, volumes=1, dtype="uint8", header_of=image)


@pytest.mark.parametrize("axis", [0, 2])
def test_the_volumes_are_never_in_memory(tmp_path: Path, axis: int, monkeypatch):
    monkeypatch.setattr("pipeline.volumes.formats.layout._PIECE_BYTES", 2**16)
    shape = (64, 64, 600)
    plane = np.zeros((8, *(n for own, n in enumerate(shape) if own != axis)), np.uint8)
    tracemalloc.start()
    with PlaneWriter(tmp_path / "a.nii.gz", Geometry(shape, np.eye(4)), volumes=8, dtype="uint8") as writer:
        for index in range(shape[axis]):
            writer.put(axis, index, plane)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * np.prod(shape) / 10
