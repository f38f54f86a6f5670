"""What is written: gzip that any reader takes, the same content each time, no part of a file, tables for viewers."""

import errno
import gzip
import io
import re
import resource
import shlex
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from pipeline.geometry import Geometry
from pipeline.volumes.formats import layout
from pipeline.volumes.formats.layout import copy_into, in_c_order, in_file_order, plane_slices
from pipeline.volumes.formats.streams import write_gzip
from pipeline.volumes.label_tables import colour_of, itksnap_table, label_colours, slicer_table, write_label_tables
from pipeline.volumes.volume import Volume, read_image, read_label
from pipeline.volumes.writing import write_image, write_label

LABELS = {"background": 0, "liver left": 7, 'the "odd" #1': 300, "below": -2, "beyond": 40000, "far beyond": 70000}


def organs(shape: tuple[int, int, int] = (40, 30, 50)) -> Volume:
    """Blocks of the values 0 to 3."""
    blocks = np.random.default_rng(3).integers(0, 4, [-(-n // 10) for n in shape])
    array = np.kron(blocks, np.ones((10, 10, 10), int))[tuple(slice(n) for n in shape)]
    return Volume(np.ascontiguousarray(array), Geometry(shape, np.diag([0.7, 0.8, 2.5, 1])))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into pieces what is small, as large volumes are."""
    monkeypatch.setattr(layout, "_PIECE_BYTES", 5000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_reader_finds_the_same_voxels(tmp_path: Path, name: str) -> None:
    label = organs()
    assert len(list(plane_slices(label.array.shape, 1))) == 13
    write_label(tmp_path / name, label)
    assert np.array_equal(read_label(tmp_path / name).array, label.array)
    assert np.array_equal(read_image(tmp_path / name).array[0], label.array)
    assert np.array_equal(nib.load(tmp_path / name).dataobj, label.array)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / name)).T, label.array)


@pytest.mark.usefixtures("small_pieces")
def test_channels_of_any_order_in_memory_are_written_in_the_files_order(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((3, 9, 8, 70), np.float32)
    for stored in (array, np.asfortranarray(array), array[:, ::-1]):
        write_image(tmp_path / "a.nii.gz", Volume(stored, Geometry((9, 8, 70), np.eye(4))))
        for index, channel in enumerate(stored):
            assert np.array_equal(read_image(tmp_path / "a.nii.gz", index).array[0], channel)


def test_an_axis_beyond_nifti_1_makes_a_nifti_2(tmp_path: Path) -> None:
    for length, kind in ((2**15 - 1, nib.Nifti1Image), (2**15, nib.Nifti2Image)):
        label = Volume(np.ones((1, 2, length), np.uint8), Geometry((1, 2, length), np.eye(4)))
        write_label(tmp_path / "a.nii.gz", label)
        assert type(nib.load(tmp_path / "a.nii.gz")) is kind
        assert read_label(tmp_path / "a.nii.gz").array.shape == (1, 2, length)


class WritesApart(io.BytesIO):
    """A file that keeps each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, content: Any) -> int:
        self.writes.append(bytes(content))
        return super().write(content)


def test_gzip_says_neither_time_nor_name_and_pieces_do_not_depend_on_threads() -> None:
    pieces = [np.random.default_rng(n).integers(0, 3, 10000 * n, dtype=np.uint8) for n in range(1, 9)]
    for threads in (1, 2, 7):
        file = WritesApart()
        write_gzip(file, (piece.tobytes for piece in pieces), threads)  # type: ignore[misc]
        header, *packed, _ = file.writes
        assert header == b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
        assert [zlib.decompressobj(-15).decompress(piece) for piece in packed] == [piece.tobytes() for piece in pieces]
        assert gzip.decompress(file.getvalue()) == b"".join(piece.tobytes() for piece in pieces)


def test_an_error_in_a_piece_comes_through() -> None:
    def broken() -> memoryview:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_gzip(io.BytesIO(), [broken] * 5)


def test_the_same_voxels_are_the_same_content_at_another_time_under_another_name(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_label(tmp_path / name, organs(), names=LABELS)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.nii.gz", "b.nii.gz"))
    assert first[:10] == second[:10]
    assert gzip.decompress(first) == gzip.decompress(second)


def test_zlib_stands_in_for_isal(tmp_path: Path) -> None:
    write_label(tmp_path / "isal.nii.gz", organs())
    code = """
import sys
sys.modules["isal"] = None
from pathlib import Path
from typing import Any
from pipeline.volumes.formats import streams
from pipeline.volumes.volume import read_label
from pipeline.volumes.writing import write_label
assert streams.codec.__name__ == "zlib"
write_label(Path(sys.argv[2]), read_label(Path(sys.argv[1])))
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "isal.nii.gz", tmp_path / "zlib.nii.gz"], check=True)
    contents = [gzip.decompress((tmp_path / name).read_bytes()) for name in ("isal.nii.gz", "zlib.nii.gz")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 7), (1, 300, 2), (17, 5, 9)])
def test_orders_of_voxels(shape: tuple[int, int, int]) -> None:
    array = np.arange(np.prod(shape), dtype=">i2").reshape(shape)
    for source in (array, np.asfortranarray(array), array[::-1, :, ::-1]):
        assert bytes(in_file_order(source)) == source.tobytes(order="F")
        copied = in_c_order(source, np.dtype(np.float32))
        assert copied.flags.c_contiguous
        assert np.array_equal(copied, source)
        target = np.zeros(shape, np.int32, order="F")
        copy_into(target, source)
        assert np.array_equal(target, source)


def test_pieces_cover_each_plane_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (1, 100, 10**9):
        monkeypatch.setattr(layout, "_PIECE_BYTES", limit)
        planes = [plane for piece in plane_slices((4, 5, 23), 2) for plane in range(piece.start, piece.stop)]
        assert planes == list(range(23))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands in for the disk's end: the system call fails in the same place."""
    noise = Volume(np.random.default_rng(0).integers(0, 2**15, (64, 64, 64)), Geometry((64,) * 3, np.eye(4)))
    (tmp_path / name).write_bytes(b"the last run's")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"{name}: could not be written: File too large") as error:
            write_label(tmp_path / name, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"the last run's"


@pytest.mark.parametrize("path", ["/dev/full/a.nii.gz", "/proc/a.nii.gz"])
def test_a_folder_that_cannot_be_written_is_named(path: str) -> None:
    with pytest.raises(OSError, match=f"{path}: could not be written"):
        write_label(Path(path), organs((2, 2, 2)))


def test_colours_are_fixed_and_told_apart() -> None:
    colours = [colour_of(index) for index in range(1, 118)]
    assert colours[:9] == [
        *("#E69F00", "#56B4E9", "#F0E442", "#009E73", "#D55E00", "#CC79A7", "#0072B2"),
        *("#780FFF", "#00FF00"),
    ]
    assert len({colour_of(index) for index in range(1, 301)}) == 300
    assert colour_of(10**6) == colour_of(10**6)
    rgb = np.array([list(bytes.fromhex(colour[1:])) for colour in colours])
    apart = np.abs(rgb[:, None] - rgb).sum(axis=2) + 1000 * np.eye(len(rgb))
    assert apart.min() > 25
    assert label_colours({"a": 5, "b": 0, "c": 9}) == {"b": "#E69F00", "c": "#56B4E9"}
    with pytest.raises(ValueError, match="no colour"):
        colour_of(0)


def test_itksnap_reads_its_table() -> None:
    """By the grammar at the head of ITK-SNAP's own files: IDX R G B A VIS MSH "LABEL"."""
    text = itksnap_table(LABELS)
    assert text.splitlines()[1] == "# ITK-SnAP Label Description File"
    rows = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    assert rows[0] == ["0", "0", "0", "0", "0", "0", "0", "Clear Label"]
    assert {int(row[0]): row[7] for row in rows[1:]} == {7: "liver left", 300: "the 'odd' #1", 40000: "beyond"}
    assert all(row[4:7] == ["1", "1", "1"] and len(row) == 8 for row in rows[1:])
    assert ["#{:02X}{:02X}{:02X}".format(*map(int, row[1:4])) for row in rows[1:]] == [
        colour_of(index) for index in (1, 2, 4)
    ]
    assert "# below: ITK-SNAP cannot hold its value, -2" in text
    assert "# far beyond: ITK-SNAP cannot hold its value, 70000" in text


def test_slicer_reads_its_table() -> None:
    """By 3D Slicer's guide: index name red green blue opacity, names without blanks."""
    text = slicer_table(LABELS)
    assert text.startswith("# Color table file")
    rows = [line.split(" ") for line in text.splitlines() if not line.startswith("#")]
    assert rows[0] == ["0", "background", "0", "0", "0", "0"]
    assert {int(row[0]): row[1] for row in rows[1:]} == {7: "liver_left", 300: 'the_"odd"_#1'}
    assert all(len(row) == 6 and row[5] == "255" for row in rows[1:])
    assert ["#{:02X}{:02X}{:02X}".format(*map(int, row[2:5])) for row in rows[1:]] == [colour_of(1), colour_of(2)]
    assert len(re.findall("3D Slicer cannot hold its value", text)) == 3


def test_tables_stand_beside_the_label_maps_and_names_stay_within_their_line(tmp_path: Path) -> None:
    labels = {"nothing": 4, "a\n9 b 1 2 3 255\n": 1, "zero": 0}
    write_label_tables(tmp_path, labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.ctbl", "labels.itksnap.txt"]
    assert (tmp_path / "labels.ctbl").read_text() == slicer_table(labels)
    rows = [line for line in (tmp_path / "labels.ctbl").read_text().splitlines() if line[0] != "#"]
    assert rows == ["0 background 0 0 0 0", "1 a_9_b_1_2_3_255 230 159 0 255"]
    assert (tmp_path / "labels.itksnap.txt").read_text() == itksnap_table(labels)
