"""The parts of a service by themselves: the queue and its spool, tokens, what may be uploaded, who sees what."""

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from serving_program import make_scan
from tiny_models import make_model

from pipeline.errors import ConfigError, ResourceError, VolumeError
from pipeline.model import save_model
from pipeline.stages.segmenting.case import SegmentSettings
from pipeline.stages.segmenting.report import CaseResult
from pipeline.stages.serving.job import Job, digest_of_secret, new_id
from pipeline.stages.serving.pool import Pool
from pipeline.stages.serving.queueing import Ended, JobQueue, QueueFull, Stopping
from pipeline.stages.serving.service import Service, owners_of
from pipeline.stages.serving.settings import ModelInfo, ServiceSettings, info_of
from pipeline.stages.serving.spool import Spool
from pipeline.stages.serving.web.app import create_app
from pipeline.stages.serving.web.guard import Guard
from pipeline.stages.serving.web.metrics import Metrics
from pipeline.stages.serving.web.problems import Refusal
from pipeline.stages.serving.web.uploads import Parts, suffix_of
from pipeline.stages.serving.worker import failure_of, without_paths
from pipeline.volumes.volume import read_image
from pipeline.volumes.writing import write_image

MODEL = "the models' digest"
TOKENS = ("the-first-ward-has-this-token", "the-second-ward-has-this-one")
DONE = Ended(CaseResult(name="x", status="done", inputs=(), output="x.nii.gz"))


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool")
    with spool.opened():
        yield spool


def queue_of(spool: Spool, capacity: int = 8, keep_s: float = 100) -> JobQueue:
    queue = JobQueue(spool, capacity, keep_s)
    queue.load(MODEL)
    return queue


def sent(queue: JobQueue, owner: str = "", model: str = MODEL) -> Job:
    """Upload a job of one file."""
    tag = digest_of_secret(new_id())
    with queue.place(), queue.spool.incoming(tag) as folder:
        (folder / "0.nii").write_bytes(b"voxels")
        known = len(queue.spool.jobs())
        job = Job(tag=tag, owner=owner, model=model, files={"T1": "0.nii"}, received_s=1000.0 + known)
        queue.add(job)
    return job


def begun(queue: JobQueue) -> Job:
    """Take a job, and write down that it is running."""
    job = queue.take()
    assert job
    queue.note(job)
    return job


def state_of(spool: Spool, job: Job) -> tuple[str, int]:
    """What stands on disk of a job."""
    written = Job.model_validate(json.loads((spool.folder_of(job.tag) / "job.json").read_bytes()))
    return written.state, written.attempts


def test_jobs_are_taken_in_the_order_in_which_they_came(spool: Spool) -> None:
    queue = queue_of(spool)
    jobs = [sent(queue) for _ in range(3)]
    assert [queue.position(job.tag) for job in jobs] == [0, 1, 2]
    taken = [begun(queue) for _ in range(3)]
    assert [job.tag for job in taken] == [job.tag for job in jobs]
    assert queue.take(wait=False) is None
    assert queue.position(jobs[0].tag) is None
    assert state_of(spool, jobs[0]) == ("running", 1)
    assert queue.counts() == {"uploading": 0, "queued": 0, "running": 3, "done": 0, "failed": 0}


def test_uploads_under_way_have_places_in_the_queue_and_no_more_are_taken_than_there_are(spool: Spool) -> None:
    queue = queue_of(spool, capacity=2)
    sent(queue)
    with queue.place():
        assert queue.counts()["uploading"] == 1
        with pytest.raises(QueueFull), queue.place():
            pass
    with queue.place():  # The upload came to nothing, and its place is free.
        pass
    sent(queue)
    with pytest.raises(QueueFull), queue.place():
        pass
    queue.take()  # What is at work does not wait.
    with queue.place():
        pass


def test_a_job_whose_worker_died_is_done_once_more_and_before_the_others(spool: Spool) -> None:
    queue = queue_of(spool)
    first, second = sent(queue), sent(queue)
    for attempt in (1, 2):
        job = queue.take()
        assert job and (job.tag, job.attempts) == (first.tag, attempt)
        queue.give_back(job, blamed=True)
    failed = queue.find(first.tag, "")
    assert failed and (failed.state, failed.failure) == ("failed", "death")
    assert failed.reason == "the process that worked on it was killed, 2 times: out of memory?"
    taken = queue.take()
    assert taken and taken.tag == second.tag


def test_a_job_is_not_blamed_for_what_was_not_its_fault(spool: Spool) -> None:
    queue = queue_of(spool)
    sent(queue)
    for _ in range(5):
        job = queue.take()
        assert job and job.attempts == 1
        queue.give_back(job, blamed=False)
    assert queue.counts()["queued"] == 1


def test_a_service_goes_on_from_its_spool(spool: Spool) -> None:
    queue = queue_of(spool)
    first, second, done, foreign = sent(queue), sent(queue), sent(queue), sent(queue, model="another")
    for _ in range(3):
        job = begun(queue)
        if job.tag == done.tag:
            queue.end(job, DONE)
    (spool.folder / "jobs" / "half").mkdir()
    after = JobQueue(spool, 8, keep_s=100)
    assert after.load(MODEL) == 2
    assert not (spool.folder / "jobs" / "half").exists()
    assert [after.position(job.tag) for job in (first, second)] == [0, 1]
    taken = begun(after)
    assert (taken.tag, taken.attempts) == (first.tag, 2)
    kept, failed = after.find(done.tag, ""), after.find(foreign.tag, "")
    assert kept and kept.state == "done"
    assert failed and "another model" in (failed.reason or "")
    # Begun twice, and the service did not survive it: a third time is not risked.
    assert JobQueue(spool, 8, keep_s=100).load(MODEL) == 1


def test_what_has_ended_keeps_no_image_and_goes_in_time(spool: Spool) -> None:
    queue = queue_of(spool)
    good, bad = sent(queue), sent(queue)
    for ended in (DONE, Ended(failure="volume", reason="it is none")):
        job = queue.take()
        assert job
        spool.label_of(job.tag).write_bytes(b"label")
        queue.end(job, ended)
    assert {p.name for p in spool.folder_of(good.tag).iterdir()} == {"job.json", f"{good.tag}.nii.gz"}
    assert {p.name for p in spool.folder_of(bad.tag).iterdir()} == {"job.json"}
    found = queue.find(good.tag, "")
    assert found and found.ended_s
    assert queue.expire(found.ended_s + 99) == 0
    assert queue.expire(found.ended_s + 101) == 2
    assert queue.find(good.tag, "") is None and not spool.folder_of(good.tag).exists()


def test_a_removed_job_is_gone_at_once_unless_it_is_at_work(spool: Spool) -> None:
    queue = queue_of(spool)
    running, waiting = sent(queue), sent(queue)
    job = queue.take()
    assert job
    queue.remove(waiting.tag)
    queue.remove(running.tag)
    assert not spool.folder_of(waiting.tag).exists() and spool.folder_of(running.tag).exists()
    assert queue.find(running.tag, "") is None
    queue.end(job, DONE)
    assert not spool.folder_of(running.tag).exists() and queue.counts()["done"] == 0
    queue.remove("unknown")


def test_whoever_waits_for_a_job_learns_of_its_end_or_of_the_services(spool: Spool) -> None:
    queue = queue_of(spool)
    first, second, third = sent(queue), sent(queue), sent(queue)
    promises: list[Future[Job]] = [queue.ended(job.tag) for job in (first, second, third)]
    job, other = queue.take(), queue.take()
    assert job and other
    queue.end(job, DONE)
    assert promises[0].result(0).state == "done"
    assert queue.ended(first.tag).result(0).state == "done"
    queue.stop()
    with pytest.raises(Stopping):
        promises[2].result(0)
    assert not promises[1].done()  # It is at work, and may still be finished.
    with pytest.raises(Stopping), queue.place():
        pass
    assert queue.take() is None
    queue.release()
    with pytest.raises(Stopping):
        promises[1].result(0)
    assert state_of(spool, third) == ("queued", 0)


def test_who_waits_for_a_job_to_take_is_woken(spool: Spool) -> None:
    queue = queue_of(spool)
    taken: list[Job | None] = []
    thread = threading.Thread(target=lambda: taken.extend([queue.take(), queue.take()]))
    thread.start()
    job = sent(queue)
    queue.spool.jobs()
    while not taken and thread.is_alive() and queue.counts()["queued"]:
        pass
    queue.stop()
    thread.join()
    assert [one and one.tag for one in taken] == [job.tag, None]


def test_a_spool_is_its_owners_and_goes_when_nothing_is_left_in_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    with spool.opened():
        for name in ("jobs", "incoming", ".medseg"):
            assert (spool.folder / name).stat().st_mode & 0o777 == 0o700
        queue = queue_of(spool)
        job = sent(queue)
        (spool.folder / "incoming" / "half").mkdir()
    with spool.opened():
        assert not (spool.folder / "incoming" / "half").exists()
        queue_of(spool).remove(job.tag)
    assert not spool.folder.exists()
    spool.folder.mkdir()
    with spool.opened():
        pass
    assert list(spool.folder.iterdir()) == []  # It was there before.


def test_ids_are_not_on_disk(spool: Spool) -> None:
    secret = new_id()
    assert len(secret) == 32 and new_id() != secret
    tag = digest_of_secret(secret)
    assert len(tag) == 32 and secret not in tag


def test_tokens_are_read_and_known_by_their_digests(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# of the wards\n{TOKENS[0]}\n\n  {TOKENS[1]}  \n")
    assert owners_of(path) == tuple(map(digest_of_secret, TOKENS))
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="there is none"):
        owners_of(path)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (VolumeError("x"), "volume"),
        (ResourceError("x"), "memory"),
        (MemoryError(), "memory"),
        (OSError(28, "No space left on device"), "disk"),
        (OSError(5, "Input/output error"), "bug"),
        (KeyError("x"), "bug"),
        (None, "bug"),
    ],
)
def test_whose_fault_an_error_is(error: Exception | None, failure: str) -> None:
    assert failure_of(error) == failure


def test_messages_name_channels_and_not_our_files() -> None:
    files = {"T1": Path("/s/a/0.nii"), "T2": Path("/s/a/1.mha")}
    said = without_paths("/s/a/1.mha: is not on the grid of /s/a/0.nii", files)
    assert said == "channel 'T2': is not on the grid of channel 'T1'"


def test_the_content_says_the_format(tmp_path: Path) -> None:
    scan = make_scan(tmp_path / "a.nii.gz", 0)
    for suffix in (".nii", ".nrrd", ".mha"):
        write_image(tmp_path / f"b{suffix}", read_image(scan))
        assert suffix_of((tmp_path / f"b{suffix}").rename(tmp_path / "nameless")) == suffix
    assert suffix_of(scan) == ".nii"
    (tmp_path / "text").write_text("something else")
    assert suffix_of(tmp_path / "text") == ".nii"


def test_channels_come_in_the_models_order_whatever_the_uploads(tmp_path: Path) -> None:
    with ExitStack() as stack:
        parts = Parts(tmp_path, ("T1", "T2", "FLAIR"), stack)
        for name in ("FLAIR", "T1"):
            parts.begin(name)
            parts.write(name.encode())
        with pytest.raises(Refusal, match="T1, T2, FLAIR"):
            parts.begin("image")  # Only where there is one channel.
    assert list(parts.named().items()) == [("T1", "0.nii"), ("FLAIR", "2.nii")]
    assert (tmp_path / "2.nii").read_bytes() == b"FLAIR"


def service_of(spool: Spool, folder: Path, **changes: object) -> Service:
    """A service whose workers were never started."""
    settings = ServiceSettings.model_validate({"spool": spool.folder, **changes})
    info = ModelInfo(
        name="tiny",
        members=1,
        channels={"T1": "MR"},
        labels={"background": 0},
        spacing_mm=(1.0, 1.0, 1.0),
        scores={},
        created="",
        versions={},
        card="# tiny",
        models_digest=MODEL,
    )
    jobs = queue_of(spool, settings.queue, settings.keep_minutes * 60)
    of_each = SegmentSettings(models=(folder,), out=spool.folder, run="x")
    return Service(settings, info, jobs, Pool(of_each, ("cpu",), 1, jobs, 1.0))


async def asked(
    service: Service, *requests: httpx.Request, hosts: tuple[str, ...] = ("testserver",)
) -> list[httpx.Response]:
    """What a service answers, without a network between."""
    metrics = Metrics()
    app = Guard(create_app(service, metrics), hosts, metrics)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
        return [await client.send(request) for request in requests]


def request(method: str, path: str, token: str | None = None, content: bytes = b"") -> httpx.Request:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    headers |= {"Content-Type": "application/octet-stream"} if method == "POST" else {}
    return httpx.Request(method, f"http://testserver{path}", headers=headers, content=content)


def test_with_tokens_nothing_but_health_is_told_without_and_nobody_sees_anothers_jobs(
    spool: Spool, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text("\n".join(TOKENS))
    service = service_of(spool, tmp_path, token_file=tmp_path / "tokens")
    secret = new_id()
    with service.jobs.place(), spool.incoming(digest_of_secret(secret)) as folder:
        (folder / "0.nii").touch()
        owner = service.owner_of(TOKENS[0])
        job = Job(tag=folder.name, owner=owner or "", model=MODEL, files={"T1": "0.nii"}, received_s=1)
        service.jobs.add(job)
    paths = ("/v1/model", "/metrics", f"/v1/jobs/{secret}", f"/v1/jobs/{secret}/label")
    refused = [request("GET", path, token) for path in paths for token in (None, "a-wrong-token-of-enough-letters")]
    refused += [request("POST", "/v1/jobs"), request("DELETE", f"/v1/jobs/{secret}"), request("POST", "/v1/segment")]
    answers = asyncio.run(asked(service, *refused))
    assert [answer.status_code for answer in answers] == [401] * len(refused)
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    own = [request("GET", f"/v1/jobs/{secret}", token) for token in TOKENS]
    mine, others, foreign = asyncio.run(asked(service, *own, request("DELETE", f"/v1/jobs/{secret}", TOKENS[1])))
    assert (mine.status_code, mine.json()["position"]) == (200, 0)
    assert (others.status_code, foreign.status_code) == (404, 404)
    healthy, unready = asyncio.run(asked(service, request("GET", "/healthz"), request("GET", "/readyz")))
    assert healthy.status_code == 200
    assert unready.status_code == 503 and "no worker has its models loaded" in unready.json()["detail"]


def test_a_full_queue_and_a_stopping_service_put_clients_off(spool: Spool, tmp_path: Path) -> None:
    service = service_of(spool, tmp_path, queue=1)
    with service.jobs.place():
        (full,) = asyncio.run(asked(service, request("POST", "/v1/jobs", content=b"x")))
    assert full.status_code == 429 and int(full.headers["retry-after"]) > 0
    assert full.json()["detail"] == "1 cases wait already; try again later"
    service.jobs.stop()
    (stopping,) = asyncio.run(asked(service, request("POST", "/v1/jobs", content=b"x")))
    assert stopping.status_code == 503 and "stopping" in stopping.json()["detail"]


def test_what_is_not_fetched_in_time_goes_while_the_application_runs(spool: Spool, tmp_path: Path) -> None:
    service = service_of(spool, tmp_path, keep_minutes=0.001)
    sent(service.jobs)
    job = service.jobs.take()
    assert job
    service.jobs.end(job, DONE)
    app = create_app(service, Metrics())

    async def until_gone() -> None:
        async with app.router.lifespan_context(app):
            while service.jobs.find(job.tag, ""):
                await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(until_gone(), 60))
    assert not spool.folder_of(job.tag).exists()


def test_a_bug_is_answered_with_the_id_that_the_log_has(
    spool: Spool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = service_of(spool, tmp_path)
    service.jobs.spool = Spool(tmp_path / "not there")
    (answer,) = asyncio.run(asked(service, request("GET", "/metrics")))
    assert answer.status_code == 500
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["x-request-id"] in caplog.text and "FileNotFoundError" in caplog.text


def test_clients_are_told_what_the_model_takes(tmp_path: Path) -> None:
    save_model(tmp_path / "model", make_model())
    save_model(tmp_path / "other", make_model(seed=1))
    info, both = info_of([tmp_path / "model"]), info_of([tmp_path / "model", tmp_path / "other"])
    assert (info.name, info.members, both.members) == ("tiny", 1, 2)
    assert info.channels == {"T1": "MR"} and info.labels == {"background": 0, "left": 1, "right": 7}
    assert info.card.startswith("# tiny")
    assert info.models_digest != both.models_digest
