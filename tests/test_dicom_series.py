"""DICOM series in a folder: found whatever their files are called, in order by position, or refused with the files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_files import SECRET, grid, reread, stored, write_series
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from pipeline.errors import VolumeError
from pipeline.volumes.dicom.choosing import SeriesChoice, choose, choose_one
from pipeline.volumes.dicom.reading import read_series
from pipeline.volumes.dicom.series import Series, find_series


def only(folder: Path) -> Series:
    (series,) = find_series(folder)
    return series


def test_slices_are_in_order_of_their_positions(tmp_path: Path) -> None:
    files = write_series(tmp_path)
    series = only(tmp_path)
    assert [file.name for file in files] != sorted(file.name for file in files)
    assert series.files == tuple(files)
    assert series.refusal() == "" and series.geometry.matches(grid(), 1e-5)
    assert (series.modality, series.description, series.number, series.kind) == ("CT", "Thorax", 1, "image")


def test_files_without_extension_nested_and_among_others(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a" / "b", name="I{}0")
    write_series(tmp_path / "c", seed=1, name="{}", Modality="MR")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "a" / "empty").touch()
    (tmp_path / "a" / "DICM").write_bytes(bytes(128) + b"DICM" + b"\xff" * 50)
    (tmp_path / ".hidden").mkdir()
    shutil.copy(files[0], tmp_path / ".hidden" / "left.dcm")
    (tmp_path / "again").symlink_to(tmp_path)  # A circle.
    first, second = find_series(tmp_path)
    assert first.files == tuple(files)
    assert second.modality == "MR" and len(second.slices) == 5


def test_files_without_a_preamble_are_found(tmp_path: Path) -> None:
    for file in write_series(tmp_path):
        data = reread(file)
        with file.open("wb") as raw:  # Explicit VR without the 132 bytes and the group 2 that say so.
            data.save_as(raw, implicit_vr=False, little_endian=True, enforce_file_format=False)
        content = file.read_bytes()
        file.write_bytes(
            content[
                content.index(b"\x08\x00\x05\x00")
                if b"\x08\x00\x05\x00" in content[:200]
                else content.index(b"\x08\x00\x08\x00") :
            ]
        )
        assert file.read_bytes()[128:132] != b"DICM"
    assert only(tmp_path).refusal() == ""


def test_a_text_that_begins_like_dicom_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"\x08\x00\x05\x00 and then none of it")
    assert find_series(tmp_path) == []


def gap(data: Dataset, z: int) -> None:
    data.ImagePositionPatient[2] += 1.5 * (z > 2)


def sideways(data: Dataset, z: int) -> None:
    data.ImagePositionPatient[0] += 2.0 * (z == 2)


def turned(data: Dataset, z: int) -> None:
    if z == 3:
        data.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def larger(data: Dataset, z: int) -> None:
    data.Rows, data.Columns = (data.Columns, data.Rows) if z == 1 else (data.Rows, data.Columns)


def finer(data: Dataset, z: int) -> None:
    data.PixelSpacing = [1.2, 0.8] if z else [1.0, 0.8]


def without_place(data: Dataset, z: int) -> None:
    if z == 4:
        del data.ImagePositionPatient


def doubled(data: Dataset, z: int) -> None:
    data.ImagePositionPatient[2] -= 2.5 * (z == 3)
    data.SOPInstanceUID += f".{z}"


def colours(data: Dataset, z: int) -> None:
    data.SamplesPerPixel, data.PhotometricInterpretation = 3, "RGB"


def inverted(data: Dataset, z: int) -> None:
    data.PhotometricInterpretation = "MONOCHROME1"


def by_table(data: Dataset, z: int) -> None:
    data.ModalityLUTSequence = Items([Dataset()])


def skewed(data: Dataset, z: int) -> None:
    data.ImageOrientationPatient = [1, 0, 0, 0.5, 0.8, 0]


def flat(data: Dataset, z: int) -> None:
    data.RescaleSlope = int(z != 1)


def elsewhere(data: Dataset, z: int) -> None:
    data.FrameOfReferenceUID = "1.2.3" if z == 2 else "1.2.4"


@pytest.mark.parametrize(
    ("change", "reason", "offending"),
    [
        (gap, r"1 of 4 distances between slices are not 2\.50 mm: 4\.00 mm between", (2, 3)),
        (sideways, r"slices up to 2\.00 mm away from an even stack", (2,)),
        (turned, r"slices of more than one orientation: .* differ from the other 4", (3,)),
        (larger, r"slices of more than one size", (1,)),
        (finer, r"slices of more than one pixel spacing", (0,)),
        (without_place, r"no position in space", (4,)),
        (doubled, r"several slices in one place: .*no attribute tells them apart", (2, 3)),
        (colours, r"colours, 3 values a pixel", (0, 1, 2, 3, 4)),
        (inverted, r"MONOCHROME1", (0, 1, 2, 3, 4)),
        (by_table, r"Modality LUT", (0, 1, 2, 3, 4)),
        (skewed, r"rows and columns are not at right angles", ()),
        (flat, r"a slope of 0\.0 and an intercept of 0\.0", (1,)),
        (elsewhere, r"slices of more than one frame of reference", (2,)),
    ],
)
def test_what_makes_no_volume_is_refused_with_its_files(
    change: Callable[[Dataset, int], None], reason: str, offending: tuple[int, ...], tmp_path: Path
) -> None:
    files = write_series(tmp_path, change=change)
    series = only(tmp_path)
    with pytest.raises(VolumeError, match=reason):
        read_series(series, untilt=True)
    assert {file.name for file in files if file.name in series.problem} == {files[z].name for z in offending}
    assert SECRET not in series.problem and "4711" not in series.problem


def test_a_missing_slice_is_told_from_a_wider_gap(tmp_path: Path) -> None:
    files = write_series(tmp_path, stored((3, 4, 9)))
    files[4].unlink()
    reason = only(tmp_path).refusal()
    assert f"5.00 mm between {files[3].name} and {files[5].name} (1 missing)" in reason
    files[5].unlink()
    assert f"7.50 mm between {files[3].name} and {files[6].name} (2 missing)" in only(tmp_path).refusal()


def test_positions_that_a_scanner_has_rounded_are_even(tmp_path: Path) -> None:
    def to_tenths(data: Dataset, z: int) -> None:
        data.ImagePositionPatient = [round(float(mm), 1) for mm in data.ImagePositionPatient]

    affine = grid(spacing_mm=(0.8, 1.2, 1.25)).affine
    write_series(tmp_path, stored((3, 3, 40)), affine, change=to_tenths)
    assert only(tmp_path).geometry.spacing_mm[2] == pytest.approx(1.25, abs=0.005)


def test_one_slice_alone_has_no_distance(tmp_path: Path) -> None:
    write_series(tmp_path, stored((3, 4, 1)))
    assert "one slice alone" in only(tmp_path).refusal()


def test_a_copy_of_the_same_bytes_is_no_second_slice(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert only(tmp_path).files == tuple(files)


def test_a_changed_copy_in_another_folder_is_a_volume_of_its_own(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        data = reread(file)
        data.PixelData = bytes(len(data.PixelData))
        data.save_as(file)
    one, two = find_series(tmp_path)
    assert [one.part, two.part] == ["copy 1", "copy 2"] and one.key != two.key
    assert read_series(one).array.any() and not read_series(two).array.any()


def test_echoes_of_one_series_are_volumes_of_their_own(tmp_path: Path) -> None:
    for echo, time in enumerate((2.46, 7.38)):
        write_series(tmp_path, name=f"{echo}_{{}}", seed=0, EchoTime=time, Modality="MR", change=renamed(echo))
    parts = find_series(tmp_path)
    assert [one.part for one in parts] == ["EchoTime 2.46", "EchoTime 7.38"]
    assert [len(one.slices) for one in parts] == [5, 5] and not any(one.refusal() for one in parts)
    parts[0].files[2].unlink()  # The stacks are still told apart, and the slice is missed in its own.
    assert ["missing" in one.refusal() for one in find_series(tmp_path)] == [True, False]


def test_stacks_that_overlap_are_not_two_volumes(tmp_path: Path) -> None:
    lower, upper = grid(), grid()
    upper = upper.cropped((0, 0, 4), (*upper.shape[:2], 9))  # It begins where the other ends.
    for number, stack in enumerate((lower, upper)):
        write_series(
            tmp_path, affine=stack.affine, name=f"{number}_{{}}", change=renamed(number), AcquisitionNumber=number
        )
    reason = only(tmp_path).refusal()
    assert "several slices in one place" in reason and "they differ in AcquisitionNumber" in reason


def renamed(number: int) -> Callable[[Dataset, int], None]:
    def change(data: Dataset, z: int) -> None:
        data.SOPInstanceUID += f".{number}"

    return change


def test_a_localiser_in_the_same_series_is_set_apart(tmp_path: Path) -> None:
    write_series(tmp_path)
    write_series(
        tmp_path / "scout", stored((9, 9, 1)), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1], change=renamed(9),
    )  # fmt: skip
    image, localiser = find_series(tmp_path)
    assert image.uid == localiser.uid
    assert (image.kind, image.refusal(), localiser.kind) == ("image", "", "localiser")


def test_other_objects_are_listed_and_are_no_images(tmp_path: Path) -> None:
    write_series(tmp_path / "dose", SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2", Modality="RTDOSE")
    write_series(tmp_path / "shot", stored((3, 3, 1)), seed=1, SOPClassUID="1.2.840.10008.5.1.4.1.1.7",
                 change=lambda data, z: data.__delattr__("ImagePositionPatient"))  # fmt: skip
    assert [one.kind for one in find_series(tmp_path)] == ["other", "other"]
    with pytest.raises(VolumeError, match="no DICOM series fits"):
        choose(find_series(tmp_path), SeriesChoice(), tmp_path)


def test_a_damaged_header_costs_its_own_file_alone_and_tells_no_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_series(tmp_path)
    (tmp_path / "cut.dcm").write_bytes(files[0].read_bytes()[:420])
    files[0].write_bytes(files[0].read_bytes()[:132] + b"\x02\x00\x00\x00UL\x04\x00\xff\xff" + b"\x00" * 9)
    assert len(only(tmp_path).slices) == 4
    assert SECRET not in caplog.text


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="is no folder"):
        find_series(tmp_path / "nowhere")


def test_series_are_chosen_by_uid_key_modality_and_description(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", SeriesDescription="Thorax  1.0 B31f")
    write_series(tmp_path / "lung", seed=1, SeriesDescription="THORAX 1.0 B70f")
    write_series(tmp_path / "pet", seed=2, Modality="PT", SeriesDescription="")
    found = find_series(tmp_path)
    soft, lung, pet = found

    def chosen(**asked: str) -> list[Series]:
        return choose(found, SeriesChoice(**asked), tmp_path)

    assert chosen() == found
    assert chosen(uid=lung.uid) == chosen(uid=lung.key) == [lung]
    assert chosen(modality="pet") == chosen(modality="PT") == [pet]
    assert chosen(description="thorax 1.0") == [soft, lung]
    assert chosen(description="*b70F") == [lung] and chosen(modality="CT", description="b31") == [soft]
    with pytest.raises(VolumeError, match=r"no DICOM series fits modality 'MR'; there are: .*Thorax 1\.0 B31f"):
        chosen(modality="MR")
    with pytest.raises(VolumeError, match=f"2 DICOM series fit description 'thorax'.*{soft.key} CT.*{lung.key} CT"):
        choose_one(found, SeriesChoice(description="thorax"), tmp_path)
    assert choose_one(found, SeriesChoice(modality="PET"), tmp_path) == pet


def test_a_key_depends_on_the_series_alone(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    key = only(tmp_path / "a").key
    (tmp_path / "a").rename(tmp_path / "b")
    assert only(tmp_path / "b").key == key
    write_series(tmp_path / "c", seed=1)
    assert only(tmp_path / "c").key != key


def test_a_series_as_json_and_back(tmp_path: Path) -> None:
    write_series(tmp_path, np.zeros((2, 3, 2), np.uint8))
    series = only(tmp_path)
    assert Series.model_validate_json(series.model_dump_json()) == series
    assert SECRET not in series.model_dump_json() and "19700102" not in series.model_dump_json()
