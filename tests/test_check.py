"""Checks: each kind of problem is found where it was made, and nothing else; what was read once is not read again."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.data.manifest import Case, ImageFile, Manifest, load_manifest, save_manifest
from pipeline.geometry import Geometry
from pipeline.preparation.survey import known_examinations
from pipeline.records import file_digest
from pipeline.stages.check import run
from pipeline.volumes.volume import Volume
from pipeline.volumes.writing import write_image, write_label

REPOSITORY = Path(__file__).parents[1]
CASES = 6
SHAPE = (9, 8, 7)
AFFINE = np.array([[-2.0, 0, 0, 40], [0, 1.5, 0, -30], [0, 0, 3, 10], [0, 0, 0, 1]])

Found = set[tuple[str, str, str]]


def image_of(root: Path, number: int = 3) -> Path:
    return root / f"image_{number}.nii.gz"


def label_of(root: Path, number: int = 3) -> Path:
    return root / f"label_{number}.nii.gz"


def drawn() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[2:5, 3:6, 1:4] = 1
    label[6, 6, 6] = 5
    return label


def write_data(root: Path, modality: str = "MR") -> None:
    """Write clean cases with the labels 0, 1 and 5."""
    for number in range(CASES):
        values = np.random.default_rng(number).integers(1, 1000, SHAPE).astype(np.float32)
        write_image(image_of(root, number), Volume(values[None], Geometry(SHAPE, AFFINE)))
        write_label(label_of(root, number), Volume(drawn(), Geometry(SHAPE, AFFINE)))


def manifest_of(root: Path, modality: str = "MR", hashed: bool = False) -> Manifest:
    def file(path: Path) -> ImageFile:
        return ImageFile(path=path.name, sha256=file_digest(path) if hashed else None)

    cases = [
        Case(
            id=f"c{number}",
            patient=f"p{number}",
            images={"T1": file(image_of(root, number))},
            label=file(label_of(root, number)),
            fold=number % 2,
        )
        for number in range(CASES)
    ]
    labels = {"background": 0, "a": 1, "b": 5}
    fields = {"name": "set", "root": root, "channels": {"T1": modality}, "labels": labels, "cases": cases}
    return Manifest.model_validate(fields)


def check(manifest: Manifest, folder: Path, jobs: int | None = None) -> Found:
    save_manifest(manifest, folder / "set.json")
    report = run(folder / "set.json", workspace=folder / "work", jobs=jobs)
    return {(p.severity, p.kind, p.case_id) for p in (*report.errors, *report.warnings)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_data(tmp_path / "data")
    return tmp_path / "data"


def test_clean_cases_have_no_problem(root: Path, tmp_path: Path) -> None:
    assert check(manifest_of(root, hashed=True), tmp_path) == set()


def rewrite(path: Path, change: Callable[[nib.Nifti1Image], nib.Nifti1Image]) -> None:
    image = nib.load(path)
    loaded = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
    path.unlink()
    nib.save(change(loaded), path)


def with_voxels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[nib.Nifti1Image], nib.Nifti1Image]:
    def changed(image: nib.Nifti1Image) -> nib.Nifti1Image:
        array = change(np.asarray(image.dataobj).copy())
        header = image.header.copy()
        header.set_data_dtype(array.dtype)
        header.set_data_shape(array.shape)
        return nib.Nifti1Image(array, None, header)

    return changed


def with_affine(affine: np.ndarray, qform: np.ndarray | None = None) -> Callable[[nib.Nifti1Image], nib.Nifti1Image]:
    def changed(image: nib.Nifti1Image) -> nib.Nifti1Image:
        image.header.set_sform(affine, 1)
        if qform is not None:
            image.header.set_qform(qform, 1)
        else:
            image.header["qform_code"] = 0
        return image

    return changed


def put(value: float) -> Callable[[nib.Nifti1Image], nib.Nifti1Image]:
    def change(array: np.ndarray) -> np.ndarray:
        array[0, 0, 0] = value
        return array

    return with_voxels(change)


def moved(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


def sheared(cosine: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 1] = 1.5 * cosine
    return affine


def with_spacing(axis: int, value: float) -> Callable[[nib.Nifti1Image], nib.Nifti1Image]:
    def changed(image: nib.Nifti1Image) -> nib.Nifti1Image:
        image.header["pixdim"][axis + 1] = value
        return image

    return changed


def to_colour(image: nib.Nifti1Image) -> nib.Nifti1Image:
    image.header.set_data_dtype(np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    return nib.Nifti1Image(np.zeros(SHAPE, image.header.get_data_dtype()), None, image.header)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def both(root: Path, change: Callable[[nib.Nifti1Image], nib.Nifti1Image]) -> None:
    rewrite(image_of(root), change)
    rewrite(label_of(root), change)


# What is done to case c3, the problem it must cause, and a twin that is just inside what is taken.
PROVOKED: dict[str, tuple[Callable[[Path], object], tuple[str, str], Callable[[Path], object]]] = {
    "missing": (
        lambda r: image_of(r).unlink(),
        ("error", "file"),
        lambda r: os.utime(image_of(r)),
    ),
    "missing label": (lambda r: label_of(r).unlink(), ("error", "file"), lambda r: os.utime(label_of(r))),
    "truncated": (
        lambda r: truncated(image_of(r)),
        ("error", "file"),
        lambda r: image_of(r).write_bytes(image_of(r).read_bytes()),
    ),
    "grid shifted": (
        lambda r: rewrite(label_of(r), with_affine(moved(0.2))),
        ("error", "grid"),
        lambda r: rewrite(label_of(r), with_affine(moved(0.1))),
    ),
    "grid of another shape": (
        lambda r: rewrite(label_of(r), with_voxels(lambda a: a[:-1])),
        ("error", "grid"),
        lambda r: rewrite(label_of(r), with_voxels(lambda a: a[:])),
    ),
    "unknown label": (
        lambda r: rewrite(label_of(r), put(7)),
        ("error", "label_values"),
        lambda r: rewrite(label_of(r), put(5)),
    ),
    "label between whole numbers": (
        lambda r: rewrite(label_of(r), with_voxels(lambda a: np.where(a == 1, 0.5, a).astype("f4"))),
        ("error", "label_values"),
        lambda r: rewrite(label_of(r), with_voxels(lambda a: a.astype("f4"))),
    ),
    "NaN": (
        lambda r: rewrite(image_of(r), put(np.nan)),
        ("error", "not_finite"),
        lambda r: rewrite(image_of(r), put(0)),
    ),
    "infinite": (
        lambda r: rewrite(image_of(r), put(-np.inf)),
        ("error", "not_finite"),
        lambda r: rewrite(image_of(r), put(1)),
    ),
    "beyond float32": (
        lambda r: rewrite(image_of(r), with_voxels(lambda a: np.where(a == a.max(), 1e39, a.astype("f8")))),
        ("error", "not_finite"),
        lambda r: rewrite(image_of(r), with_voxels(lambda a: a.astype("f8"))),
    ),
    "zero spacing": (
        lambda r: rewrite(image_of(r), with_spacing(0, 0.0)),
        ("error", "affine"),
        lambda r: rewrite(image_of(r), with_spacing(0, 2.0)),
    ),
    "negative spacing": (
        lambda r: rewrite(image_of(r), with_spacing(2, -3.0)),
        ("error", "affine"),
        lambda r: rewrite(image_of(r), with_spacing(2, 3.0)),
    ),
    "sheared": (
        lambda r: rewrite(image_of(r), with_affine(sheared(0.1))),
        ("error", "affine"),
        lambda r: both(r, with_affine(sheared(5e-4))),
    ),
    "singular": (
        lambda r: rewrite(image_of(r), with_affine(np.diag([2.0, 0, 3, 1]))),
        ("error", "affine"),
        lambda r: both(r, with_affine(np.diag([2.0, 1.5, 3, 1]))),
    ),
    "qform against sform": (
        lambda r: rewrite(image_of(r), with_affine(AFFINE, moved(5))),
        ("warning", "qform_sform"),
        lambda r: rewrite(image_of(r), with_affine(AFFINE, moved(0.1))),
    ),
    "no orientation": (
        lambda r: both(r, lambda i: (i.header.set_sform(None, 0), i.header.set_qform(None, 0), i)[2]),
        ("warning", "orientation"),
        lambda r: both(r, with_affine(np.eye(4))),
    ),
    "RGB": (
        lambda r: rewrite(image_of(r), to_colour),
        ("error", "voxels"),
        lambda r: rewrite(image_of(r), with_voxels(lambda a: a.astype("i2"))),
    ),
    "complex": (
        lambda r: rewrite(image_of(r), with_voxels(lambda a: a.astype("c8"))),
        ("error", "voxels"),
        lambda r: rewrite(image_of(r), with_voxels(lambda a: a.astype("f8"))),
    ),
    "4-D without an index": (
        lambda r: rewrite(image_of(r), with_voxels(lambda a: np.stack([a, a], -1))),
        ("error", "voxels"),
        lambda r: rewrite(image_of(r), with_voxels(lambda a: a[..., None])),
    ),
    "empty label": (
        lambda r: rewrite(label_of(r), with_voxels(lambda a: a * 0)),
        ("warning", "empty_label"),
        lambda r: rewrite(label_of(r), with_voxels(lambda a: a * (a == 5))),
    ),
    "constant": (
        lambda r: rewrite(image_of(r), with_voxels(lambda a: a * 0)),
        ("warning", "constant"),
        lambda r: rewrite(image_of(r), put(2)),
    ),
    "duplicate across folds": (
        lambda r: rewrite(image_of(r), with_voxels(lambda a: np.asarray(nib.load(image_of(r, 2)).dataobj))),
        ("error", "duplicate"),
        lambda r: rewrite(image_of(r), with_voxels(lambda a: np.asarray(nib.load(image_of(r, 2)).dataobj) + 1)),
    ),
    "duplicate in one fold": (
        lambda r: rewrite(image_of(r), with_voxels(lambda a: np.asarray(nib.load(image_of(r, 1)).dataobj))),
        ("warning", "duplicate"),
        lambda r: rewrite(image_of(r), with_voxels(lambda a: np.asarray(nib.load(image_of(r, 1)).dataobj) + 1)),
    ),
    "intensities of another scale": (
        lambda r: rewrite(image_of(r), with_voxels(lambda a: a * 20)),
        ("warning", "intensity"),
        lambda r: rewrite(image_of(r), with_voxels(lambda a: a * 2)),
    ),
}


def test_zeros_in_the_place_of_a_missing_channel_are_no_duplicates(root: Path, tmp_path: Path) -> None:
    for number in (2, 3):
        rewrite(image_of(root, number), with_voxels(lambda a: a * 0))
    assert check(manifest_of(root), tmp_path) == {("warning", "constant", "c2"), ("warning", "constant", "c3")}


@pytest.mark.parametrize("name", PROVOKED)
def test_each_problem_is_found_and_its_harmless_twin_is_not(root: Path, tmp_path: Path, name: str) -> None:
    provoke, problem, twin = PROVOKED[name]
    provoke(root)
    found = check(manifest_of(root), tmp_path)
    assert found == {(*problem, "c3")}
    write_data(root)
    twin(root)
    assert check(manifest_of(root), tmp_path) == set()


def with_case(manifest: Manifest, number: int, **fields: object) -> Manifest:
    cases = list(manifest.cases)
    cases[number] = cases[number].changed(**fields)
    return manifest.changed(cases=tuple(cases))


def test_a_patient_in_two_folds_is_an_error_of_both_cases(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root)
    torn = with_case(manifest, 3, patient="p2")
    assert check(torn, tmp_path) == {("error", "split", "c2"), ("error", "split", "c3")}
    held_out = with_case(with_case(manifest, 3, patient="p1"), 3, fold=None)
    assert check(held_out, tmp_path) == {("error", "split", "c1"), ("error", "split", "c3")}
    assert check(with_case(manifest, 3, patient="p1"), tmp_path) == set()


def test_a_file_that_was_changed_since_the_manifest_is_an_error(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root, hashed=True)
    rewrite(label_of(root), put(1))
    assert check(manifest, tmp_path) == {("error", "hash", "c3")}
    assert check(manifest_of(root, hashed=True), tmp_path) == set()


def test_an_index_beyond_the_volumes_is_an_error(root: Path, tmp_path: Path) -> None:
    rewrite(image_of(root), with_voxels(lambda a: np.stack([a, a + 1], -1)))
    manifest = manifest_of(root)
    for index, expected in ((2, {("error", "voxels", "c3")}), (1, set())):
        images = {"T1": ImageFile(path=image_of(root).name, index=index)}
        assert check(with_case(manifest, 3, images=images), tmp_path) == expected


def test_a_link_out_of_the_root_is_an_error(root: Path, tmp_path: Path) -> None:
    image_of(root).rename(tmp_path / "outside.nii.gz")
    image_of(root).symlink_to(tmp_path / "outside.nii.gz")
    assert check(manifest_of(root), tmp_path) == {("error", "file", "c3")}


def test_hounsfield_units_without_their_offset_are_far_from_the_peers(root: Path, tmp_path: Path) -> None:
    rewrite(image_of(root), with_voxels(lambda a: a + 1000))
    assert check(manifest_of(root, "CT"), tmp_path) == {("warning", "intensity", "c3")}
    write_data(root)
    rewrite(image_of(root), with_voxels(lambda a: a + 300))
    assert check(manifest_of(root, "CT"), tmp_path) == set()


def test_a_group_of_another_scale_has_peers(root: Path, tmp_path: Path) -> None:
    for number in (1, 3, 4):
        rewrite(image_of(root, number), with_voxels(lambda a: a * 1000))
    assert check(manifest_of(root), tmp_path) == set()


def test_an_ignored_value_is_no_unknown_one(root: Path, tmp_path: Path) -> None:
    rewrite(label_of(root), put(9))
    assert check(manifest_of(root), tmp_path) == {("error", "label_values", "c3")}
    ignoring = manifest_of(root).changed(ignore_label=9)
    save_manifest(ignoring, tmp_path / "set.json")
    report = run(tmp_path / "set.json", workspace=tmp_path / "work")
    assert (report.errors, report.warnings) == ((), ())
    assert report.known == ("ignored (value 9): 1 voxels in 1 cases",)
    label = report.examinations[3].label
    assert label is not None
    assert (label.voxels["a"], label.ignored_voxels) == (27, 1)
    # What is ignored is no structure: neither in the intensities of the foreground nor where it is all there is.
    foreground = report.examinations[3].channels["T1"].foreground
    assert foreground is not None
    assert foreground.voxels == 28
    rewrite(label_of(root), with_voxels(lambda array: np.where(array, 9, array).astype(np.uint8)))
    assert check(ignoring, tmp_path) == {("warning", "empty_label", "c3")}


def test_a_structure_in_a_case_that_says_it_is_not_annotated_is_an_error(root: Path, tmp_path: Path) -> None:
    manifest = with_case(manifest_of(root), 3, annotated_classes=("a",))
    assert check(manifest, tmp_path) == {("error", "annotated", "c3")}
    rewrite(label_of(root), with_voxels(lambda array: np.where(array == 5, 0, array).astype(np.uint8)))
    assert check(manifest, tmp_path) == set()
    assert run(tmp_path / "set.json", workspace=tmp_path / "work").known == (
        "annotated, of 6 labelled cases: a in 6, b in 5",
    )


def test_every_problem_is_reported_together_in_the_manifests_order(root: Path, tmp_path: Path) -> None:
    image_of(root, 5).unlink()
    rewrite(label_of(root, 1), put(7))
    rewrite(image_of(root, 1), put(np.nan))
    rewrite(label_of(root, 2), with_voxels(lambda a: a * 0))
    save_manifest(manifest_of(root), tmp_path / "set.json")
    report = run(tmp_path / "set.json", workspace=tmp_path / "work")
    assert [(p.case_id, p.kind) for p in report.errors] == [
        ("c1", "label_values"),
        ("c1", "not_finite"),
        ("c5", "file"),
    ]
    assert [(p.case_id, p.kind) for p in report.warnings] == [("c2", "empty_label")]
    assert "holds 7 (1 voxels), but the labels are background = 0, a = 1, b = 5" in report.as_text()
    assert report.as_text().splitlines()[-1].startswith("set: 6 cases, 3 errors, 1 warnings")
    assert [error["kind"] for error in report.as_json()["errors"]] == ["label_values", "not_finite", "file"]


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_result_does_not_depend_on_the_number_of_jobs(root: Path, tmp_path: Path, jobs: int) -> None:
    image_of(root, 2).unlink()
    save_manifest(manifest_of(root), tmp_path / "set.json")
    reports = [run(tmp_path / "set.json", workspace=tmp_path / f"w{n}", jobs=n) for n in (1, jobs)]
    assert reports[0].examinations == reports[1].examinations
    assert reports[0].errors == reports[1].errors


def stale(manifest: Manifest, folder: Path) -> list[str]:
    """Return the cases that a check reads, and check."""
    known = known_examinations(manifest, folder / "work" / "checks")
    check(manifest, folder)
    return [case.id for case in manifest.cases if case.id not in known]


def test_only_what_has_changed_is_read_again(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root)
    everything = [case.id for case in manifest.cases]
    assert stale(manifest, tmp_path) == everything
    assert stale(manifest, tmp_path) == []
    os.utime(label_of(root, 4), ns=(1, 1))
    assert stale(manifest, tmp_path) == ["c4"]
    other_labels = manifest.changed(labels={"background": 0, "a": 1, "b": 5, "c": 7})
    assert stale(other_labels, tmp_path) == everything
    # A fold or a patient is not read from a file.
    assert stale(with_case(other_labels, 0, fold=1, patient="p9"), tmp_path) == []


def test_what_is_known_is_not_read(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root)
    check(manifest, tmp_path)
    state = label_of(root).stat()
    label_of(root).write_bytes(bytes(state.st_size))
    os.utime(label_of(root), ns=(state.st_atime_ns, state.st_mtime_ns))
    # Nothing but its content tells that the file was damaged, and that is what is not looked at.
    assert check(manifest, tmp_path) == set()
    os.utime(label_of(root))
    assert check(manifest, tmp_path) == {("error", "file", "c3")}


def test_a_killed_check_goes_on_where_it_was(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root)
    check(manifest, tmp_path)
    kept = tmp_path / "work" / "checks" / "set.jsonl"
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join(lines[:3]) + "\n" + lines[3][:100])
    assert stale(manifest, tmp_path) == ["c3", "c4", "c5"]
    assert kept.read_text().splitlines() == lines


def test_a_file_that_could_not_be_read_is_tried_again(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root)
    image_of(root).rename(tmp_path / "away")
    check(manifest, tmp_path)
    (tmp_path / "away").rename(image_of(root))
    assert stale(manifest, tmp_path) == ["c3"]
    assert check(manifest, tmp_path) == set()


def test_pictures_are_drawn_of_what_can_be_read(root: Path, tmp_path: Path) -> None:
    image_of(root, 2).unlink()
    label_of(root, 4).unlink()
    save_manifest(manifest_of(root), tmp_path / "set.json")
    run(tmp_path / "set.json", workspace=tmp_path / "work", pictures=tmp_path / "pictures")
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {f"c{number}.png" for number in range(CASES) if number not in (2, 4)}
    assert all((tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_the_command_answers_by_its_exit_code_and_starts_no_torch(root: Path, tmp_path: Path) -> None:
    save_manifest(manifest_of(root), tmp_path / "set.json")
    script = (
        "import sys; from pipeline.cli import app\n"
        "try: app(['check', sys.argv[1], '--workspace', sys.argv[2], '--json'])\n"
        "except SystemExit as end: assert not {'torch', 'monai'} & set(sys.modules); raise"
    )

    def command() -> tuple[int, dict[str, object]]:
        arguments = [sys.executable, "-c", script, str(tmp_path / "set.json"), str(tmp_path / "work")]
        ended = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True)
        return ended.returncode, json.loads(ended.stdout)

    code, report = command()
    assert (code, report["cases"], report["errors"]) == (0, CASES, [])
    image_of(root).unlink()
    code, report = command()
    assert (code, len(report["errors"])) == (2, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "folder", "cases"), [("hippocampus", "Task04_Hippocampus", 200), ("sts", "STS", 19)])
def test_the_committed_manifests_have_no_error(
    shared_data: Path, tmp_path: Path, name: str, folder: str, cases: int
) -> None:
    path = REPOSITORY / "data_manifests" / f"{name}.json"
    report = run(path, root=shared_data / folder, workspace=tmp_path)
    assert (report.cases, report.errors, report.warnings) == (cases, (), ())
    assert load_manifest(path).folds == (0, 1, 2, 3, 4)
