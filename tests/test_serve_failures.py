"""What goes wrong around `medseg serve`: crowds, killed processes, clients that go away, hostile requests. Nothing is
lost, and nobody gets another's label map.
"""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import psutil
import pytest
from serving_program import DEADLINE_S, Served, ended, is_file_of, make_scan, serving, stopped, wait_until
from tiny_models import make_model, make_plan

from pipeline.data.plan import Normalisation
from pipeline.model import save_model
from pipeline.records import write_json
from pipeline.stages import segment
from pipeline.stages.segmenting.case import SegmentSettings
from pipeline.stages.serving.messages import WorkerTask
from pipeline.stages.serving.pool import Worker, WorkerDied

CROWD = 50
LONG = (72, 72, 64)
RAW = {"Content-Type": "application/octet-stream"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, make_model())
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of different voxels, grids and sizes, and one that takes a while."""
    folder = tmp_path_factory.mktemp("scans")
    for index in range(CROWD):
        make_scan(folder / f"{index}.nii.gz", index, (16 + index % 5, 17, 9 + index % 3))
    make_scan(folder / "long.nii.gz", 1000, LONG)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `medseg segment` makes of them."""
    out = tmp_path_factory.mktemp("expected") / "out"
    report = segment.run(str(model), [scans], out, device="cpu")
    assert not report.failures and len(report.results) == CROWD + 1
    labels = {(out / f"{index}.nii.gz").read_bytes() for index in range(CROWD)}
    assert len(labels) == CROWD
    return out


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    spool = tmp_path_factory.mktemp("serve") / "spool"
    with serving(model, spool, upload_idle_s=1.5, queue=64) as running:
        yield running
        assert running.end() == 0
        assert not spool.exists()  # Every test removes its jobs.


def send(client: httpx.Client, scan: Path) -> str:
    response = client.post("/v1/jobs", files={"image": scan.read_bytes()})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def run_long(client: httpx.Client, scans: Path) -> str:
    """Send the long case and wait until it is at work."""
    job = send(client, scans / "long.nii.gz")
    wait_until(lambda: client.get(f"/v1/jobs/{job}").json()["state"] == "running")
    return job


def fetched(client: httpx.Client, job: str) -> bytes:
    """Wait for a job, fetch its label map, and remove it."""
    assert ended(client, job)["state"] == "done"
    label = client.get(f"/v1/jobs/{job}/label").raise_for_status().content
    assert client.delete(f"/v1/jobs/{job}").status_code == 204
    return label


def test_a_crowd_of_clients_gets_each_its_own_label_map(
    served: Served, scans: Path, expected: Path, tmp_path: Path
) -> None:
    async def one(client: httpx.AsyncClient, index: int) -> bytes:
        content = (scans / f"{index}.nii.gz").read_bytes()
        if index % 2:
            return (await client.post("/v1/segment", content=content, headers=RAW)).raise_for_status().content
        sent = (await client.post("/v1/jobs", files={"T1": content})).raise_for_status().json()
        while (await client.get(f"/v1/jobs/{sent['id']}")).json()["state"] != "done":
            await asyncio.sleep(0.2)
        label = (await client.get(f"/v1/jobs/{sent['id']}/label")).raise_for_status().content
        (await client.delete(f"/v1/jobs/{sent['id']}")).raise_for_status()
        return label

    async def all_at_once() -> list[bytes]:
        limits = httpx.Limits(max_connections=CROWD)
        async with httpx.AsyncClient(base_url=served.url, timeout=DEADLINE_S, limits=limits) as client:
            return await asyncio.gather(*(one(client, index) for index in range(CROWD)))

    for index, label in enumerate(asyncio.run(all_at_once())):
        (tmp_path / "label.nii.gz").write_bytes(label)
        got, wanted = nib.load(tmp_path / "label.nii.gz"), nib.load(expected / f"{index}.nii.gz")
        assert (got.affine == wanted.affine).all()
        np.testing.assert_array_equal(np.asanyarray(got.dataobj), np.asanyarray(wanted.dataobj))
        assert is_file_of(label, expected / f"{index}.nii.gz")


def test_jobs_survive_a_worker_that_is_killed(served: Served, scans: Path, expected: Path) -> None:
    with served.client() as client:
        jobs = {"long": run_long(client, scans)} | {str(i): send(client, scans / f"{i}.nii.gz") for i in range(4)}
        first = served.worker()
        os.kill(first.pid, signal.SIGKILL)
        for name, job in jobs.items():
            assert is_file_of(fetched(client, job), expected / f"{name}.nii.gz")
        assert served.worker().pid != first.pid
        assert re.search(r"^medseg_worker_deaths_total [1-9]", client.get("/metrics").text, re.MULTILINE)
    assert f"a worker ({first.pid}) ended by signal 9 (out of memory?)" in served.log.read_text()


def test_a_case_over_which_two_workers_die_is_given_up_and_the_next_is_done(
    served: Served, scans: Path, expected: Path
) -> None:
    with served.client() as client:
        job = run_long(client, scans)
        other = send(client, scans / "0.nii.gz")
        killed: set[int] = set()

        def is_begun_anew() -> bool:
            alive = {worker.pid for worker in served.workers()} - killed
            return bool(alive) and client.get(f"/v1/jobs/{job}").json()["state"] == "running"

        for _ in range(2):
            wait_until(is_begun_anew)
            worker = served.worker()
            killed.add(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        status = ended(client, job)
        assert (status["state"], status["failure"]) == ("failed", "death")
        assert status["reason"] == "the process that worked on it was killed, 2 times: out of memory?"
        assert is_file_of(fetched(client, other), expected / "0.nii.gz")
        assert client.delete(f"/v1/jobs/{job}").status_code == 204


def test_a_worker_that_dies_idle_is_replaced_and_nobody_notices(served: Served, scans: Path, expected: Path) -> None:
    with served.client() as client:
        for index in range(2):
            first = served.worker()
            os.kill(first.pid, signal.SIGKILL)
            job = send(client, scans / f"{index}.nii.gz")
            assert is_file_of(fetched(client, job), expected / f"{index}.nii.gz")
            assert served.worker().pid != first.pid


def test_the_first_header_that_is_examined_is_blamed_for_a_death_and_nothing_else(
    model: Path, scans: Path, tmp_path: Path
) -> None:
    settings = SegmentSettings(models=(model,), out=tmp_path, run="x", device="cpu", pictures=False)
    task = WorkerTask(settings=settings, threads=1, log_level=logging.WARNING)
    write_json(tmp_path / "task.json", task.model_dump(mode="json"))
    files = {"T1": scans / "0.nii.gz"}
    for asked, blamed in ((("segment",), [True]), (("segment", "examine", "examine"), [False, True, False])):
        died: list[None] = []
        worker = Worker(tmp_path / "task.json", "cpu", 1, lambda died=died: died.append(None))  # type: ignore[misc]
        assert worker.ready.result(DEADLINE_S).failure is None
        with stopped(psutil.Process(worker.pid)):
            promises = [getattr(worker, kind)(f"case{n}", files, tmp_path) for n, kind in enumerate(asked)]
            os.kill(worker.pid, signal.SIGKILL)
        deaths = [promise.exception(DEADLINE_S) for promise in promises]
        assert [(death.code, death.blamed) for death in deaths] == [(-signal.SIGKILL, one) for one in blamed]
        late = worker.examine("late", files, tmp_path).exception(DEADLINE_S)
        assert isinstance(late, WorkerDied) and not late.blamed
        wait_until(lambda died=died: len(died) == 1)  # type: ignore[misc]
        assert not worker.is_ready
        worker.kill()


def test_a_client_that_hangs_up_while_it_waits_leaves_nothing(served: Served, scans: Path) -> None:
    content = (scans / "long.nii.gz").read_bytes()
    head = "POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    def counts() -> dict[str, int]:
        with served.client() as client:
            return {k: int(v) for k, v in re.findall(r'medseg_jobs{state="(\w+)"} (\d+)', client.get("/metrics").text)}

    with socket.create_connection(served.address) as running, socket.create_connection(served.address) as waiting:
        running.sendall(request)
        wait_until(lambda: counts()["running"] == 1)
        waiting.sendall(request)
        wait_until(lambda: counts()["queued"] == 1)
    wait_until(lambda: not any(counts().values()))
    assert list((served.spool / "jobs").iterdir()) == []
    assert served.log.read_text().count("POST /v1/segment 400") >= 2


def test_who_sends_too_slowly_is_not_waited_for(served: Served) -> None:
    start = time.monotonic()
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    with (
        socket.create_connection(served.address) as silent,
        socket.create_connection(served.address) as half,
        socket.create_connection(served.address) as upload,
    ):
        half.sendall(head)
        upload.sendall(head + b"Content-Length: 100000\r\n\r\nsome")
        upload.settimeout(DEADLINE_S)
        assert b" 408 " in upload.recv(4096)
        for connection in (silent, half):
            connection.settimeout(DEADLINE_S)
            assert connection.recv(4096) == b""  # Closed.
    assert time.monotonic() - start >= 9
    assert served.incoming() == []


def test_schemathesis_finds_no_server_error_and_nothing_that_the_openapi_document_does_not_say(served: Served) -> None:
    # Bytes that fit the schema are no volume as a rule, and are refused.
    options = ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]
    options += ["--max-time", "45", "--max-examples", "10", "--generation-deterministic", "--no-color"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=served.spool.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found and int(found[2]) >= 100, done.stdout
    assert " 500 in " not in served.log.read_text()


def test_a_full_queue_puts_off_and_a_service_that_is_killed_or_stopped_goes_on(
    model: Path, scans: Path, expected: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path / "spool", queue=2) as served, served.client() as client:
        jobs = {"long": run_long(client, scans)}
        jobs |= {str(index): send(client, scans / f"{index}.nii.gz") for index in range(2)}
        with stopped(served.worker()):
            full = client.post("/v1/jobs", content=(scans / "long.nii.gz").read_bytes(), headers=RAW)
            assert (full.status_code, full.headers["retry-after"]) == (429, "5")
            assert client.delete(f"/v1/jobs/{jobs.pop('1')}").status_code == 204
            worker = served.worker()
            served.end(signal.SIGKILL)
        wait_until(lambda: not worker.is_running())  # It ends with its parent.
    with serving(model, tmp_path / "spool", queue=2) as served, served.client() as client:
        assert "2 jobs wait from before" in served.log.read_text()
        for name, job in jobs.items():
            assert is_file_of(fetched(client, job), expected / f"{name}.nii.gz")
        # A stop in good order: the job in hand is finished, one that waits stays, who waits for it is told.
        running, waiting = run_long(client, scans), send(client, scans / "2.nii.gz")
        answers: list[httpx.Response] = []
        content = (scans / "3.nii.gz").read_bytes()
        asking = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{served.url}/v1/segment", content=content, headers=RAW, timeout=DEADLINE_S)
            )
        )
        asking.start()
        wait_until(lambda: 'medseg_jobs{state="queued"} 2' in client.get("/metrics").text)
        assert served.end() == 0
        asking.join()
        assert answers[0].status_code == 503 and "stopping" in answers[0].json()["detail"]
        assert "1 jobs wait and 1 results were not fetched" in served.log.read_text()
    with serving(model, tmp_path / "spool") as served, served.client() as client:
        assert is_file_of(fetched(client, running), expected / "long.nii.gz")
        assert is_file_of(fetched(client, waiting), expected / "2.nii.gz")
        assert served.end() == 0
    assert not (tmp_path / "spool").exists()


def test_channels_are_told_apart_by_the_names_of_their_parts(tmp_path: Path) -> None:
    none = Normalisation(scheme="none")
    plan = make_plan(channels={"T1": "MR", "T2": "MR"}, normalisation={"T1": none, "T2": none})
    save_model(tmp_path / "model", make_model(plan=plan))
    (tmp_path / "scans").mkdir()
    files = {
        c: make_scan(tmp_path / "scans" / f"case_{c}.nii.gz", 7, (18, 17, 10 + n)) for n, c in enumerate(("T1", "T2"))
    }
    segment.run(str(tmp_path / "model"), [tmp_path / "scans"], tmp_path / "out", device="cpu")
    with serving(tmp_path / "model", tmp_path / "spool") as served, served.client() as client:
        parts = [(channel, files[channel].read_bytes()) for channel in ("T2", "T1")]
        answer = client.post("/v1/segment", files=parts).raise_for_status()
        assert is_file_of(answer.content, tmp_path / "out" / "case.nii.gz")
        lacking = client.post("/v1/segment", files=parts[1:])
        warnings = json.loads(lacking.headers["medseg-result"])["warnings"]
        assert "channel T2 is missing: zeros stand in for it" in warnings
        unnamed = client.post("/v1/segment", content=parts[0][1], headers=RAW)
        assert unnamed.status_code == 415 and "a part a channel: T1, T2" in unnamed.json()["detail"]
        assert served.end() == 0
