"""`medseg clean`: says what a workspace no longer needs, and removes that and nothing else."""

import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.store import CaseStore, PreparedCase
from pipeline.geometry import Geometry
from pipeline.records import write_json, write_text
from pipeline.stages.clean import run
from pipeline.tracking import RunLog, send_pending

GRID = Geometry((2, 3, 4), np.eye(4))
CASE = PreparedCase(np.zeros((1, 2, 3, 4), np.float16), None, None, GRID, GRID, {}, ("T1",))


def add_run(workspace: Path, name: str, *, finished: bool) -> Path:
    """A run folder with a model and a checkpoint."""
    folder = workspace / "runs" / name / "fold_0"
    log = RunLog.create(folder, uri=None, workspace=workspace, experiment="set", name=name)
    if finished:
        log.finish("FINISHED")
    log.close()
    for file in ("models/best/weights.safetensors", "models/last/model.yaml", "checkpoint.safetensors"):
        write_text(folder / file, "weights")
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with one of each: needed and not."""
    store = CaseStore(tmp_path / "stores" / "set-12345678" / "cases")
    for case_id, key in (("fresh", "a"), ("stale", "old"), ("foreign", "c"), ("damaged", "d")):
        store.write(case_id, CASE, key)
    (store.folder / "damaged" / "case.json").write_text("{")
    keys = {"fresh": "a", "stale": "b", "damaged": "d"}
    write_json(store.folder.parent / "keys.json", {"sources": "", "cases": keys})
    (store.folder / ".tmp-fresh-x1").mkdir()
    write_text(store.folder / ".tmp-fresh-x1" / "image.b2nd", "half")
    add_run(tmp_path, "done", finished=True)
    add_run(tmp_path, "going_on", finished=False)
    write_text(tmp_path / "fetched" / "model_1" / "weights.safetensors", "12345")
    for name, age_s in ((".tmp-old-model", 7200), (".tmp-new-model", 0)):
        path = tmp_path / "runs" / "done" / "fold_0" / name
        write_text(path, "half")
        os.utime(path, (time.time() - age_s,) * 2)
    return tmp_path


NOT_NEEDED = {
    "stores/set-12345678/cases/stale",
    "stores/set-12345678/cases/foreign",
    "stores/set-12345678/cases/damaged",
    "stores/set-12345678/cases/.tmp-fresh-x1",
    "runs/done/fold_0/checkpoint.safetensors",
    "runs/done/fold_0/.tmp-old-model",
    "fetched/model_1",
}


def all_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != ".lock"}


def test_without_yes_it_only_says(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = all_in(workspace)
    found = run(workspace, confirmed=False)
    assert {item.path.relative_to(workspace).as_posix() for item in found} == NOT_NEEDED
    assert {item.path.name: item.size_bytes for item in found}["model_1"] == 5
    assert all_in(workspace) == before
    assert "--yes" in caplog.text
    assert all(str(workspace / name) in caplog.text for name in NOT_NEEDED)


def test_an_earlier_run_stays_until_mlflow_has_it(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = add_run(workspace, "again", finished=True)
    earlier = folder.rename(folder.with_name("earlier_1_fold_0"))
    assert earlier not in [item.path for item in run(workspace, confirmed=True)]
    assert "an earlier run that is not all in MLflow is kept; `medseg sync` sends it" in caplog.text
    assert send_pending(earlier)
    assert earlier in [item.path for item in run(workspace, confirmed=True)]
    assert not earlier.exists()


def test_with_yes_it_removes_that_and_nothing_else(workspace: Path) -> None:
    kept = {name for name in all_in(workspace) if not any(f"{name}/".startswith(f"{gone}/") for gone in NOT_NEEDED)}
    run(workspace, confirmed=True)
    assert all_in(workspace) == kept
    assert "stores/set-12345678/cases/fresh/image.b2nd" in kept
    assert "runs/going_on/fold_0/checkpoint.safetensors" in kept
    assert "runs/done/fold_0/models/best/weights.safetensors" in kept
    assert run(workspace, confirmed=True) == []


def test_a_store_that_is_being_written_is_left_alone(workspace: Path) -> None:
    store = CaseStore(workspace / "stores" / "set-12345678" / "cases")
    with store.lock():
        run(workspace, confirmed=True)
    assert set(store.case_ids()) == {"fresh", "stale", "foreign", "damaged"}
    assert len(store.leftovers()) == 1


def test_an_empty_workspace_has_nothing_to_clean(tmp_path: Path) -> None:
    assert run(tmp_path / "nowhere", confirmed=True) == []
    assert not (tmp_path / "nowhere").exists()
