"""Inputs of `medseg segment`: every way to name volumes gives the cases meant, each once, under a name of its own."""

import io
import os
from pathlib import Path

import pytest

from pipeline.data.manifest import Case, ImageFile, Manifest, save_manifest
from pipeline.errors import ManifestError, PipelineError
from pipeline.stages.segmenting.inputs import SegmentInput, find_inputs

ONE = ("T1",)
TWO = ("T1", "T2")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def find(
    *inputs: str | Path, channels: tuple[str, ...] = ONE, lines: str | None = None, out: str = "/nowhere"
) -> list[SegmentInput]:
    return find_inputs(inputs, channels, Path(out), io.StringIO(lines) if lines is not None else None)


def shown(cases: list[SegmentInput], root: Path) -> dict[str, str | dict[str, str]]:
    """Return case -> its file below the root with its index, or channel -> file where there are several channels."""
    names = {}
    for case in cases:
        files = {
            channel: os.path.relpath(file.path, root) + ("" if file.index is None else f"#{file.index}")
            for channel, file in case.files.items()
        }
        names[case.name] = files if len(files) > 1 or "T2" in files else next(iter(files.values()))
    assert len(names) == len(cases)
    return names


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "scans/b.nrrd", "scans/c.nii", "scans/notes.txt", "scans/.d.nii", "scans/deep/e.mha")
    assert shown(find(tmp_path / "a.nii.gz", str(tmp_path / "scans")), tmp_path) == {
        "a": "a.nii.gz",
        "b": "scans/b.nrrd",
        "c": "scans/c.nii",
    }
    assert shown(find(f"{tmp_path}/scans/*.n*"), tmp_path) == {"b": "scans/b.nrrd", "c": "scans/c.nii"}
    assert shown(find(f"{tmp_path}/**"), tmp_path) == {
        "a": "a.nii.gz",
        "scans_b": "scans/b.nrrd",
        "scans_c": "scans/c.nii",
        "scans_deep_e": "scans/deep/e.mha",
    }


def test_a_pattern_is_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "p1/image.nii", "p2/image.nii")
    monkeypatch.chdir(tmp_path)
    assert shown(find("*/image.nii"), Path()) == {"p1_image": "p1/image.nii", "p2_image": "p2/image.nii"}


def test_a_file_whose_name_looks_like_a_pattern_or_an_index_is_that_file(tmp_path: Path) -> None:
    touch(tmp_path, "scan[1].nii", "scan1.nii", "odd.nii#2")
    assert shown(find(tmp_path / "scan[1].nii"), tmp_path) == {"scan[1]": "scan[1].nii"}
    assert [case.files["T1"].index for case in find(tmp_path / "odd.nii#2")] == [None]


def test_an_index_chooses_a_volume_of_a_4d_file(tmp_path: Path) -> None:
    touch(tmp_path, "scans/f.nii", "p_T1.nii", "p_T2.nii")
    file = tmp_path / "scans" / "f.nii"
    assert shown(find(f"{file}#0", f"{file}#12", f"{file}#12"), tmp_path) == {
        "f_0": "scans/f.nii#0",
        "f_12": "scans/f.nii#12",
    }
    assert shown(find(f"{file.parent}#1"), tmp_path) == {"f_1": "scans/f.nii#1"}
    assert shown(find(f"{tmp_path}/*.nii#1", channels=TWO), tmp_path) == {"p": {"T1": "p_T1.nii#1", "T2": "p_T2.nii#1"}}


def test_a_list_on_standard_input(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "with blank.nii", "scans/b.nii", "more/c.nii")
    lines = f"{tmp_path}/a.nii\n\n{tmp_path}/with blank.nii\r\n{tmp_path}/scans\n{tmp_path}/more/*\n"
    assert list(shown(find("-", lines=lines), tmp_path)) == ["a", "with blank", "b", "c"]
    with pytest.raises(PipelineError, match="nothing to segment"):
        find("-", lines="\n")
    with pytest.raises(PipelineError, match="standard input, and there is none"):
        find("-")
    with pytest.raises(PipelineError, match="null byte"):
        find("-", lines="a\0b.nii\n")
    with pytest.raises(PipelineError, match="it is empty"):
        find("")  # Not the working folder: a variable of a script was empty.
    binary = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x80"), encoding="utf-8")
    with pytest.raises(PipelineError, match="no list of paths"):
        find_inputs(["-"], ONE, tmp_path / "out", binary)


def test_each_file_once_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "scans/p1/image.nii", "scans/p1/image.img", "scans/p1/image.hdr")
    (tmp_path / "scans/again").symlink_to(tmp_path / "scans")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans/p1/image.img").unlink()
    (tmp_path / "scans/p1/image.hdr").unlink()
    inputs = ["scans/p1/image.nii", tmp_path / "scans/p1/image.nii", "scans/../scans/p1/image.nii", "scans/p1"]
    assert shown(find(*inputs, "scans/**"), tmp_path) == {"image": "scans/p1/image.nii"}


def test_the_two_files_of_a_pair_are_one_volume(tmp_path: Path) -> None:
    touch(tmp_path, "a.hdr", "a.img", "b.img.gz", "b.hdr.gz", "alone.img")
    assert list(shown(find(f"{tmp_path}/*"), tmp_path)) == ["a", "alone", "b"]


def test_a_missing_file_or_broken_link_is_a_case(tmp_path: Path) -> None:
    touch(tmp_path, "scans/a.nii")
    (tmp_path / "scans/b.nii").symlink_to(tmp_path / "gone.nii")
    assert list(shown(find(tmp_path / "scans", tmp_path / "missing.nii"), tmp_path)) == ["a", "b", "missing"]


def test_names_that_no_file_can_have_are_refused() -> None:
    for name in ("x" * 201, ".nii", "a\nb", "ü" * 101):
        with pytest.raises(PipelineError, match="cannot name a label map"):
            find(f"{name}.nii")
    assert [case.name for case in find("x" * 200 + ".nii", "ü" * 100 + ".nii")] == ["x" * 200, "ü" * 100]


def test_channels_may_stand_in_a_folder_a_case(tmp_path: Path) -> None:
    touch(tmp_path, "p1/T1.nii", "p1/T2.nii", "p2/x_0000.nii", "p2/x_T2.nii")
    assert shown(find(f"{tmp_path}/*/*.nii", channels=TWO), tmp_path) == {
        "p1": {"T1": "p1/T1.nii", "T2": "p1/T2.nii"},
        "p2_x": {"T1": "p2/x_0000.nii", "T2": "p2/x_T2.nii"},
    }


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_csv_names_cases_and_channels(tmp_path: Path, mark: str) -> None:
    touch(tmp_path / "elsewhere", "x.nii")
    rows = [
        ["case", "age", "T2", "T1"],
        ["p1", "70", "four.nii#2", "../up.nii"],
        ["p2", "", "", f"{tmp_path}/elsewhere/x.nii"],
        [" p3 ", "", " b.nii ", ""],
    ]
    table = tmp_path / "lists" / "cases.csv"
    table.parent.mkdir()
    table.write_text("\ufeff" + "".join(mark.join(row) + "\r\n" for row in rows) + "\n", encoding="utf-8")
    assert shown(find(table, channels=TWO), tmp_path) == {
        "p1": {"T1": "up.nii", "T2": "lists/four.nii#2"},
        "p2": "elsewhere/x.nii",
        "p3": {"T2": "lists/b.nii"},
    }


def test_a_csv_of_one_channel_may_say_image_and_leave_the_cases_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image\np1/scan.nii.gz\nfour.nii#3\n")
    assert shown(find(tmp_path / "a.csv"), tmp_path) == {"scan": "p1/scan.nii.gz", "four_3": "four.nii#3"}
    (tmp_path / "b.csv").write_text("case,image\np1,p1/scan.nii\np2,p2/scan.nii\n")
    assert list(shown(find(tmp_path / "b.csv"), tmp_path)) == ["p1", "p2"]
    assert list(shown(find(tmp_path / "a.csv", tmp_path / "b.csv"), tmp_path)) == ["scan", "four_3", "p1", "p2"]


@pytest.mark.parametrize(
    ("content", "channels", "reason"),
    [
        ("", ONE, "is empty"),
        ("case,t1\np,a.nii\n", ONE, "lacks the model's channels T1; it has case, t1; the first line names the columns"),
        ("T1,T2\na.nii,b.nii\n", TWO, "'case' is missing"),
        ("case,T1\np,a.nii,b.nii\nq\nr,\n,c.nii\n", ONE, r":2: expected 2 cells.*\n.*:3: .*\n.*:4: .*\n.*:5: "),
        ("case,T1\nMüller,a.nii,70\n", ONE, r"got 3, a case, 1 files$"),
        ('case,T1\n"p,a.nii\n', ONE, "cannot be read: unexpected end of data"),
        ("case,T1\n../p,a.nii\n", ONE, "cannot name a label map"),
        ("case,T1\n.p,a.nii\n", ONE, "cannot name a label map"),
        (f"case,T1\n{'p' * 201},a.nii\n", ONE, "cannot name a label map"),
        ("case,T1\np,a.nii\np,b.nii\n", ONE, "would both write p.nii.gz"),
        ("case,T1\np,a\0.nii\n", ONE, "null byte"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str, channels: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(PipelineError, match=f"(?s){reason}"):
        find(tmp_path / "a.csv", channels=channels)


def test_lists_that_are_missing_or_binary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"a\.csv: cannot be read"):
        find(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PipelineError, match=r"a\.csv: cannot be read"):
        find(tmp_path / "a.csv")
    with pytest.raises(ManifestError, match=r"a\.json: cannot be read"):
        find(tmp_path / "a.json")


def test_a_manifest_gives_its_cases_and_their_indices(tmp_path: Path) -> None:
    images = {"T1": ImageFile(path="p1.nii", index=1), "T2": ImageFile(path="p1.nii", index=0)}
    manifest = Manifest(
        name="new",
        root=tmp_path,
        channels={"T2": "MR", "T1": "MR"},
        labels={"background": 0, "x": 1},
        cases=(Case(id="p1", patient="p1", images=images),),
    )
    save_manifest(manifest, tmp_path / "new.json")
    assert shown(find(tmp_path / "new.json", channels=TWO), tmp_path) == {"p1": {"T1": "p1.nii#1", "T2": "p1.nii#0"}}
    with pytest.raises(PipelineError, match=r"lacks the model's channels CT; it has T2, T1"):
        find(tmp_path / "new.json", channels=("CT",))


def test_same_names_in_many_folders_are_refused_with_a_way_out_that_works(tmp_path: Path) -> None:
    files = [f"p{number}/image.nii.gz" for number in range(1000)]
    touch(tmp_path, *files)
    with pytest.raises(PipelineError, match=r"would both write image\.nii\.gz") as error:
        find(*(tmp_path / file for file in files))
    assert len(str(error.value).splitlines()) == 7
    assert "and 994 more" in str(error.value)
    pattern = str(error.value).split("'")[1]
    assert {case.name for case in find(pattern)} == {f"p{number}_image" for number in range(1000)}


def test_names_that_differ_in_their_format_only_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a.mha")
    with pytest.raises(PipelineError, match=r"a\.mha and .*a\.nii\.gz would both write.*\n.*CSV") as error:
        find(tmp_path)
    assert "pattern" not in str(error.value)


@pytest.mark.parametrize("given", ["out", "link", "out/../out"])
def test_label_maps_never_land_beside_an_input(tmp_path: Path, given: str) -> None:
    touch(tmp_path, "out/a.nii.gz", "scans/b.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "scans/linked.nii.gz").symlink_to(tmp_path / "out/a.nii.gz")
    for one in ("out", "scans/linked.nii.gz"):
        with pytest.raises(PipelineError, match="holds the input"):
            find(tmp_path / one, out=str(tmp_path / given))
    assert find(tmp_path / "scans/b.nii.gz", out=str(tmp_path / given))


@pytest.mark.parametrize("folder", ["probabilities", "instances"])
def test_what_is_written_beside_label_maps_never_lands_on_an_input(tmp_path: Path, folder: str) -> None:
    touch(tmp_path, f"out/{folder}/a.nii.gz")
    with pytest.raises(PipelineError, match="holds the input"):
        find(tmp_path / "out" / folder, out=str(tmp_path / "out"))


def test_what_holds_no_volume_is_said_with_what_may_be_meant(tmp_path: Path) -> None:
    touch(tmp_path, "p1/image.nii", "notes/notes.txt")
    with pytest.raises(PipelineError, match="holds no volume") as error:
        find(tmp_path)
    assert list(shown(find(str(error.value).split("'")[1]), tmp_path)) == ["p1_image"]
    with pytest.raises(PipelineError, match="matches no volume"):
        find(f"{tmp_path}/notes/*")
    with pytest.raises(PipelineError, match="nothing to segment"):
        find()
