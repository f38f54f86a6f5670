"""Records and atomic writes: what is interrupted leaves what was there."""

import json
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import PipelineError
from pipeline.records import (
    Record,
    atomic_folder,
    atomic_path,
    digest_of,
    exclusively,
    file_digest,
    write_json,
    write_text,
)


class Box(Record):
    width: int
    names: tuple[str, ...] = ()


def test_a_record_is_frozen_and_strict_about_its_keys() -> None:
    box = Box(width=3)
    with pytest.raises(ValidationError, match="frozen"):
        box.width = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="height"):
        Box(width=3, height=4)  # type: ignore[call-arg]


def test_changed_is_a_validated_copy() -> None:
    box = Box(width=3, names=("a",))
    assert box.changed(width=4) == Box(width=4, names=("a",))
    assert box == Box(width=3, names=("a",))
    with pytest.raises(ValidationError):
        box.changed(width="wide")
    with pytest.raises(ValidationError, match="height"):
        box.changed(height=4)


def test_a_digest_depends_on_values_not_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of({"a": [1, 2]}) != digest_of({"a": [2, 1]})
    assert Box(width=3).digest() == Box(width=3, names=()).digest() != Box(width=4).digest()


def test_the_digest_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_writing_makes_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    write_json(path, {"ä": [1]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1]}
    assert "ä" in path.read_text(encoding="utf-8")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_the_temporary_path_keeps_the_suffixes_that_writers_look_at(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "label.nii.gz") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith("label.nii.gz")
        temporary.write_text("x")


def test_a_written_file_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    code = "import sys, pathlib; from pipeline.records import write_text; write_text(pathlib.Path(sys.argv[1]), 'x')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], umask=0o027, check=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_lock_is_held_by_one_and_freed_at_the_end(tmp_path: Path) -> None:
    busy = PipelineError("busy")
    with (
        exclusively(tmp_path / ".lock", busy),
        pytest.raises(PipelineError, match="busy"),
        exclusively(tmp_path / ".lock", busy),
    ):
        pass
    with exclusively(tmp_path / ".lock", busy):
        pass


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), atomic_path(path) as temporary:
        temporary.write_text("hal")
        raise RuntimeError("half")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_folder(folder) as temporary:
            (temporary / "weights").write_text(content)
        assert (folder / "weights").read_text() == content
    with pytest.raises(RuntimeError, match="half"), atomic_folder(folder) as temporary:
        (temporary / "weights").write_text("hal")
        raise RuntimeError("half")
    assert (folder / "weights").read_text() == "second"
    assert list(tmp_path.iterdir()) == [folder]


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.records import {manager}
with {manager}(Path(sys.argv[1])) as temporary:
    ({target}).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("manager", "target"), [("atomic_path", "temporary"), ("atomic_folder", "temporary / 'weights'")]
)
def test_a_kill_leaves_the_old_one(tmp_path: Path, manager: str, target: str) -> None:
    path = tmp_path / "kept"
    inside = path / "weights" if manager == "atomic_folder" else path
    inside.parent.mkdir(exist_ok=True)
    inside.write_text("old")
    script = KILLED.format(manager=manager, target=target)
    killed = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=Path(__file__).parents[1], check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert inside.read_text() == "old"
    # What the killed one left is easy to tell: `medseg clean` removes it.
    assert all(left.name.startswith(".tmp-") for left in tmp_path.iterdir() if left != path)
