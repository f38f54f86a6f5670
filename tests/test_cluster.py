"""A Ray cluster of two nodes on this machine: what it makes is what one machine makes, whoever is killed meanwhile."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
from label_maps import label_files
from loopback_cluster import LoopbackCluster, loopback_cluster
from tiny_models import make_model

from pipeline.data.phantoms import write_phantom_dataset
from pipeline.model import save_model
from pipeline.records import write_text
from pipeline.stages import manifest as manifest_stage
from pipeline.stages import segment
from pipeline.stages.segmenting.claims import CLAIMS, Claims
from pipeline.stages.segmenting.journal import Journal

pytestmark = pytest.mark.slow

CASES, HELD = 8, 3
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[LoopbackCluster]:
    # Sockets lie in it, whose paths may have 107 characters.
    folder = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
    with folder as short, loopback_cluster(Path(short), nodes=2) as two_nodes:
        yield two_nodes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, make_model())
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes, and among them a file that is none."""
    folder = tmp_path_factory.mktemp("scans")
    for index in range(CASES):
        noise = np.random.default_rng(index).normal(100, 30, (34, 36, 40)).astype(np.float32)
        nib.save(nib.Nifti1Image(noise, np.eye(4)), folder / f"case_{index}.nii.gz")
    (folder / "bad.nii.gz").write_bytes(b"no volume")
    return folder


@pytest.fixture(scope="module")
def undisturbed(model: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    segment.run(str(model), [scans], out, device="cpu")
    return label_files(out)


def start(cluster: LoopbackCluster, *words: str, log: Path) -> subprocess.Popen[bytes]:
    """Start medseg on the cluster's network, all that it says in a file."""
    medseg = [sys.executable, "-m", "pipeline", *words, "--engine", "ray", "--address", cluster.address]
    with log.open("wb") as file:
        return subprocess.Popen(cluster.command(*medseg), stdout=file, stderr=subprocess.STDOUT)


def start_segment(
    cluster: LoopbackCluster, model: Path, scans: Path, out: Path, *more: str
) -> tuple[subprocess.Popen[bytes], Path]:
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.parent / "said.txt"
    words = ("segment", str(scans), "--model", str(model), "--out", str(out), "--device", "cpu", *more)
    return start(cluster, *words, log=log), log


def wait_until(reached: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + DEADLINE_S
    while not reached():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.02)


@contextmanager
def unfinished(out: Path) -> Iterator[None]:
    """Hold a batch's last cases, so that the batch cannot end and has work for a third worker."""
    claims = Claims(out, "test")
    assert all(claims.take(f"case_{number}") for number in range(CASES - HELD, CASES))
    yield
    claims.give_all_back()


def in_mid_case(cluster: LoopbackCluster, out: Path) -> list[psutil.Process]:
    """Return the workers that have begun a case."""
    begun = {str(file) for file in (out / CLAIMS).glob("*") if file.read_bytes()}
    return [
        worker
        for worker in cluster.processes("ray::SegmentActor")
        if any(opened.path in begun for opened in worker.open_files())
    ]


def test_two_nodes_segment_as_one_machine_does_though_a_worker_is_killed(
    cluster: LoopbackCluster, model: Path, scans: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    killed: list[int] = []

    def kill_one() -> bool:
        for worker in in_mid_case(cluster, out)[:1]:
            worker.kill()
            killed.append(worker.pid)
        return bool(killed)

    with unfinished(out):
        process, log = start_segment(cluster, model, scans, out)
        wait_until(lambda: len(cluster.processes("ray::SegmentActor")) == 2, process, log)
        wait_until(kill_one, process, log)
        wait_until(lambda: len(Journal(out, "any").last) > CASES - HELD, process, log)
    assert process.wait(DEADLINE_S) == 1, log.read_text()
    assert f"process {killed[0]} died (out of memory?); it had in hand: case_" in log.read_text()
    assert label_files(out) == undisturbed
    report = json.loads((out / "report.json").read_text())
    assert [case["name"] for case in report["cases"]] == ["bad", *(f"case_{n}" for n in range(CASES))]
    assert [case["status"] for case in report["cases"]] == ["failed", *["done"] * CASES]
    assert not list(out.rglob(".tmp-*"))
    assert not list((out / ".medseg").glob("task-*"))
    assert segment.run(str(model), [scans], out, device="cpu").counts() == f"{CASES} skipped, 1 failed"


def test_a_node_that_joins_later_is_looked_at_and_ctrl_c_leaves_all_valid(
    cluster: LoopbackCluster, model: Path, scans: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """The node that joins does not see the folder, and is not used."""
    out = tmp_path / "seen" / "out"
    with unfinished(out):
        process, log = start_segment(cluster, model, scans, out)
        wait_until(lambda: len(label_files(out)) >= 2, process, log)
        cluster.add(hidden=out.parent)
        wait_until(lambda: "not used: " in log.read_text(), process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130, log.read_text()
    cluster.kill_node(-1)
    assert f"does not see {out}" in log.read_text()
    done = label_files(out)
    assert done == {name: undisturbed[name] for name in done}
    report = json.loads((out / "report.json").read_text())
    assert report["not_reached"] == 1 + CASES - len(report["cases"]) >= HELD
    assert {file.read_text() for file in (out / CLAIMS).iterdir()} == {""}


def test_what_no_node_has_room_for_is_waited_for_and_given_up(
    cluster: LoopbackCluster, model: Path, scans: Path, tmp_path: Path
) -> None:
    more = ("--cpus-per-worker", "64", "--wait-minutes", "0.05")
    process, log = start_segment(cluster, model, scans, tmp_path / "out", *more)
    assert process.wait(DEADLINE_S) == 2, log.read_text()
    assert "error: no worker could be started within 3 s: 64 CPUs wanted for each" in log.read_text()


def test_preprocess_makes_the_same_store_though_a_worker_is_killed(cluster: LoopbackCluster, tmp_path: Path) -> None:
    source = write_phantom_dataset(tmp_path / "set", cases=CASES, channels=2, layout="folder")
    manifest_stage.run(source, tmp_path / "phantoms.json", folds=2)
    yaml = tmp_path / "experiment.yaml"
    write_text(yaml, f"name: experiment\ndata:\n  manifest: {tmp_path / 'phantoms.json'}\n")
    alone, together = tmp_path / "alone", tmp_path / "together"
    preprocess = [sys.executable, "-m", "pipeline", "preprocess", str(yaml), "--workspace"]
    subprocess.run([*preprocess, str(alone)], check=True, capture_output=True)

    log = tmp_path / "said.txt"
    process = start(cluster, "preprocess", str(yaml), "--workspace", str(together), log=log)
    killed: list[int] = []

    def kill_one() -> bool:
        if any(together.glob("stores/*/cases/phantom*")):
            for worker in cluster.processes("ray::do")[:1]:
                worker.kill()
                killed.append(worker.pid)
        return bool(killed)

    wait_until(kill_one, process, log)
    assert process.wait(DEADLINE_S) == 0, log.read_text()
    assert "the process that worked on it died" in log.read_text()
    assert files_of(together) == files_of(alone)
    checks = [sorted((folder / "checks" / "phantoms.jsonl").read_text().splitlines()) for folder in (alone, together)]
    assert checks[0] == checks[1]


def files_of(workspace: Path) -> dict[str, bytes]:
    """Every file of the stores, locks aside."""
    files = [path for path in (workspace / "stores").rglob("*") if path.is_file() and "lock" not in path.name]
    assert len(files) > CASES
    return {path.relative_to(workspace).as_posix(): path.read_bytes() for path in files}


def test_a_cluster_that_ends_is_said_and_what_is_done_is_valid(
    cluster: LoopbackCluster, model: Path, scans: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """The last one: the cluster is gone after it."""
    out = tmp_path / "out"
    with unfinished(out):
        process, log = start_segment(cluster, model, scans, out)
        wait_until(lambda: len(label_files(out)) >= 2, process, log)
        cluster.kill_node(0)
        assert process.wait(DEADLINE_S) == 2, log.read_text()
    assert f"error: the Ray cluster at {cluster.address} is gone" in log.read_text()
    done = [case for case in json.loads((out / "report.json").read_text())["cases"] if case["status"] == "done"]
    assert len(done) >= 2
    cluster.end()
    assert segment.run(str(model), [scans], out, device="cpu").counts().endswith("1 failed")
    assert label_files(out) == undisturbed
