"""The store of preprocessed cases: what is written comes back, damage is named, killed writers leave no half a case."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.store import STORE_FORMAT_VERSION, CaseStore, PreparedCase
from pipeline.errors import StoreError
from pipeline.geometry import Geometry
from pipeline.records import digest_of
from pipeline.volumes.body import Body


def make_case(shape: tuple[int, int, int] = (20, 24, 18), *, channels: int = 2, seed: int = 0) -> PreparedCase:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, shape).astype(np.uint8)
    affine = np.diag([1.1, -0.9, 3.3, 1.0])
    affine[:3, 3] = [0.1, 1 / 3, -7e-9]
    return PreparedCase(
        image=rng.normal(size=(channels, *shape)).astype(np.float16),
        label=label,
        reference=rng.integers(0, 3, (5, 6, 7)).astype(np.uint8),
        geometry=Geometry(shape, affine),
        native=Geometry((5, 6, 7), np.diag([4.0, 4.0, 8.0, 1.0])),
        class_voxels={index: np.argwhere(label == index).astype(np.int32) for index in (1, 2)},
        channels_present=("T1", "T2")[:channels],
        body=Body(rng.random(tuple(-(-n // 4) for n in shape)) < 0.5),
    )


def assert_same(one: PreparedCase, other: PreparedCase) -> None:
    for name in ("image", "label", "reference"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert (one.geometry, one.native, one.channels_present) == (other.geometry, other.native, other.channels_present)
    assert (one.body is None) == (other.body is None)
    if one.body is not None and other.body is not None:
        np.testing.assert_array_equal(one.body.occupied, other.body.occupied)
        assert one.body.occupied.dtype == other.body.occupied.dtype
    assert one.class_voxels.keys() == other.class_voxels.keys()
    for index, voxels in one.class_voxels.items():
        np.testing.assert_array_equal(voxels, other.class_voxels[index])


def same(one: PreparedCase, other: PreparedCase) -> bool:
    try:
        assert_same(one, other)
    except AssertionError:
        return False
    return True


def test_a_case_that_is_prepared_anew_while_it_is_in_use_is_refused(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    before, after = make_case(seed=1), make_case(seed=2)
    store.write("a", before, "by one plan")
    store.write("b", before, "by one plan")
    in_use = CaseStore(tmp_path, {"a": "by one plan"})
    held = in_use.open("a")
    held.hold()
    assert same(in_use.read("a"), before)
    for name in ("a", "b"):
        store.write(name, after, "by another")
    for action in (in_use.read, in_use.open, in_use.verify):
        with pytest.raises(StoreError, match="a: was prepared anew while it was in use"):
            action("a")
    assert in_use.key_of("a") is None
    assert same(in_use.read("b"), after)
    # What was opened before is what it was.
    np.testing.assert_array_equal(held.read_image((0, 0, 0), (20, 24, 18)), before.image)
    np.testing.assert_array_equal(held.read_label((0, 0, 0), (20, 24, 18)), before.label)
    np.testing.assert_array_equal(held.class_voxels[1], before.class_voxels[1])


# The second is larger than one block and is cut into uneven parts; the third holds one voxel a plane.
@pytest.mark.parametrize("shape", [(20, 24, 18), (70, 65, 131), (1, 1, 4)])
def test_a_case_comes_back_as_it_was_written(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    store, case = CaseStore(tmp_path / "cases"), make_case(shape)
    store.write("a", case, "key-1")
    assert_same(store.read("a"), case)
    assert not same(store.read("a"), replace(case, channels_present=("T1",)))
    assert not same(store.read("a"), replace(case, body=Body(~case.body.occupied)))
    store.write("b", replace(case, body=None), "key")
    assert_same(store.read("b"), replace(case, body=None))
    assert not same(store.read("b"), case)
    assert store.key_of("a") == "key-1"
    assert store.case_ids() == ("a", "b")


def test_an_unlabelled_case_comes_back_without_label(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.write("a", replace(make_case(), label=None, reference=None, class_voxels={}), "key")
    case = store.read("a")
    assert case.label is None
    assert case.reference is None
    assert case.class_voxels == {}
    with pytest.raises(ValueError, match="no label"):
        store.open("a").read_label((0, 0, 0), (1, 1, 1))


def test_an_empty_label_is_not_a_missing_one(tmp_path: Path) -> None:
    store, case = CaseStore(tmp_path), make_case()
    store.write("a", replace(case, label=np.zeros_like(case.label), class_voxels={}), "key")
    assert not store.read("a").label.any()
    assert store.open("a").class_voxels == {}
    assert store.open("a").record.class_counts == (20 * 24 * 18,)


def test_a_flipped_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    store, case = CaseStore(tmp_path), make_case()
    flipped = replace(case, label=case.label[::-1, :, ::-1])
    store.write("a", flipped, "key")
    np.testing.assert_array_equal(store.read("a").label, case.label[::-1, :, ::-1])
    assert (case.label[::-1, :, ::-1] != case.label).any()


def test_partial_reads_equal_slices(tmp_path: Path) -> None:
    store, case = CaseStore(tmp_path), make_case((70, 65, 131))
    store.write("a", case, "key")
    opened = store.open("a")
    assert opened.shape == case.image.shape
    assert (opened.geometry, opened.native) == (case.geometry, case.native)
    for start, stop in [((0, 0, 0), (70, 65, 131)), ((30, 7, 64), (41, 40, 67)), ((69, 64, 130), (70, 65, 131))]:
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        np.testing.assert_array_equal(opened.read_image(start, stop), case.image[(slice(None), *box)])
        np.testing.assert_array_equal(opened.read_label(start, stop), case.label[box])
    np.testing.assert_array_equal(opened.class_voxels[2], case.class_voxels[2])
    assert opened.record.class_counts == tuple(np.bincount(case.label.ravel()))


@pytest.mark.parametrize(("start", "stop"), [((-1, 0, 0), (3, 3, 3)), ((0, 0, 0), (3, 3, 19)), ((2, 0, 0), (2, 3, 3))])
def test_a_box_outside_the_grid_is_refused(
    tmp_path: Path, start: tuple[int, int, int], stop: tuple[int, int, int]
) -> None:
    store = CaseStore(tmp_path)
    store.write("a", make_case(), "key")
    with pytest.raises(ValueError, match="leaves the grid"):
        store.open("a").read_image(start, stop)


@pytest.mark.parametrize(
    "name", ["image.b2nd", "label.b2nd", "reference.b2nd", "class_voxels.b2nd", "body.b2nd", "case.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    store = CaseStore(tmp_path)
    store.write("a", make_case(), "key")
    store.verify("a")
    path = tmp_path / "a" / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = content.index(b"3.3") if name == "case.json" else len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    for look in (store.read, store.verify):
        with pytest.raises(StoreError, match=f"a/{name}: cannot be used .*medseg preprocess"):
            look("a")


def test_a_case_of_another_format_is_stale(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.write("a", make_case(), "key")
    path = tmp_path / "a" / "case.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    content["format_version"] = STORE_FORMAT_VERSION - 1
    path.write_text(json.dumps({**content, "sha256": digest_of(content)}))
    assert store.key_of("a") is None
    with pytest.raises(StoreError, match=f"format version {STORE_FORMAT_VERSION - 1}, not {STORE_FORMAT_VERSION}"):
        store.read("a")


def test_a_missing_case_is_an_error_and_has_no_key(tmp_path: Path) -> None:
    store = CaseStore(tmp_path / "nowhere")
    assert store.case_ids() == ()
    assert store.leftovers() == ()
    assert store.key_of("a") is None
    with pytest.raises(StoreError, match="medseg preprocess"):
        store.read("a")


def test_a_stale_case_is_replaced(tmp_path: Path) -> None:
    store, old, new = CaseStore(tmp_path), make_case(seed=0), make_case((6, 7, 8), seed=1)
    store.write("a", old, "old")
    store.write("a", replace(new, label=None, reference=None, class_voxels={}), "new")
    assert store.key_of("a") == "new"
    assert store.read("a").label is None
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failing_write_keeps_the_old_case(tmp_path: Path) -> None:
    store, case = CaseStore(tmp_path), make_case()
    store.write("a", case, "old")
    with pytest.raises(ValueError, match="concatenat"):
        store.write(
            "a", replace(case, class_voxels={1: np.zeros((2, 3), np.int32), 2: np.zeros((2, 2), np.int32)}), "n"
        )
    assert store.key_of("a") == "old"
    assert store.leftovers() == ()


def test_two_writers_exclude_each_other_and_a_dead_one_does_not(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from pipeline.data.store import CaseStore\n"
            "with CaseStore(Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(60)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match="another medseg"), store.lock():
            pass
    finally:
        holder.kill()
        holder.communicate()
    with store.lock():
        assert store.case_ids() == ()
