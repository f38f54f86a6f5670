"""`medseg serve` by a real client over HTTP: what it makes is what `medseg segment` makes; what is refused, how."""

import gzip
import json
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from serving_program import Served, ended, is_file_of, make_scan, serving, wait_until
from tiny_models import make_model

from pipeline.errors import PipelineError
from pipeline.model import save_model
from pipeline.stages import segment, serve
from pipeline.stages.serving.settings import ServiceSettings
from pipeline.volumes.volume import read_image
from pipeline.volumes.writing import write_image

MOST_BYTES = 2_000_000
RAW = {"Content-Type": "application/octet-stream"}
PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, make_model())
    return folder


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    spool = tmp_path_factory.mktemp("serve") / "spool"
    with serving(model, spool, max_upload_bytes=MOST_BYTES, max_memory_bytes=3 * 10**9) as running:
        yield running
        assert running.end() == 0


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One volume in each format that an upload may have."""
    folder = tmp_path_factory.mktemp("scans")
    make_scan(folder / "packed.nii.gz", 1)
    make_scan(folder / "plain.nii", 2)
    for name, seed in (("one.nrrd", 3), ("two.mha", 4)):
        write_image(folder / name, read_image(make_scan(folder / f"{seed}.nii.gz", seed)))
        (folder / f"{seed}.nii.gz").unlink()
    return folder


@pytest.fixture(scope="module")
def expected(model: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expected") / "out"
    report = segment.run(str(model), [scans], out, device="cpu")
    assert len(report.results) == 4 and not report.failures
    return out


def packed(header: bytes, voxels: bytes = b"") -> bytes:
    return gzip.compress(header + bytes(4) + voxels, 1)


def nifti_header(shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+1", 352
    header.set_sform(np.eye(4), code=1)
    return bytes(header.binaryblock)


def problem(response: httpx.Response, status: int) -> str:
    """What a refusal says; it has all that a refusal should."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    told = response.json()
    assert told["status"] == status
    assert told["request_id"] == response.headers["x-request-id"]
    detail: str = told["detail"]
    assert "spool" not in detail and "/tmp" not in detail
    return detail


def test_each_label_map_is_that_of_segment(client: httpx.Client, scans: Path, expected: Path) -> None:
    for scan in sorted(scans.iterdir()):
        name = scan.name.split(".")[0]
        waited = client.post("/v1/segment", content=scan.read_bytes(), headers=RAW)
        assert waited.status_code == 200, waited.text
        assert is_file_of(waited.content, expected / f"{name}.nii.gz")
        assert set(json.loads(waited.headers["medseg-result"])) == {"warnings", "low", "predicted_dice", "doubtful"}


@pytest.mark.parametrize("part", ["T1", "image"])
def test_a_job_goes_from_its_upload_to_its_removal(
    client: httpx.Client, served: Served, scans: Path, expected: Path, part: str
) -> None:
    sent = client.post("/v1/jobs", files={part: ("Mustermann_Erika.nii.gz", (scans / "packed.nii.gz").read_bytes())})
    assert sent.status_code == 202, sent.text
    job = sent.json()["id"]
    assert sent.headers["location"] == f"/v1/jobs/{job}"
    status = ended(client, job)
    reported = next(c for c in json.loads((expected / "report.json").read_text())["cases"] if c["name"] == "packed")
    assert status["state"] == "done" and status["volumes_ml"] == reported["volumes_ml"]
    assert status["confidence"] == reported["confidence"] and status["warnings"] == reported["warnings"]
    assert status["expires_s"] - status["received_s"] > 3600
    label = client.get(f"/v1/jobs/{job}/label")
    assert is_file_of(label.content, expected / "packed.nii.gz")
    (folder,) = (served.spool / "jobs").iterdir()
    assert {file.name for file in folder.iterdir()} == {"job.json", f"{folder.name}.nii.gz"}  # The image is gone.
    assert client.delete(f"/v1/jobs/{job}").status_code == 204
    assert not folder.exists()
    for method, path in (("GET", ""), ("GET", "/label"), ("DELETE", "")):
        assert "no such job" in problem(client.request(method, f"/v1/jobs/{job}{path}"), 404)
    log = served.log.read_text()
    assert job not in log and job[:8] not in log and "Mustermann" not in log


def test_what_is_no_volume_is_refused_with_the_reason(client: httpx.Client, tmp_path: Path) -> None:
    four = packed(nifti_header((4, 4, 4, 2)), bytes(4 * 4 * 4 * 2 * 4))
    apart = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: raw\ndata file: job.json\n\n"
    (sheared := np.eye(4))[0, 1] = 0.5
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), sheared), tmp_path / "sheared.nii")
    for content, reason in (
        (b"GIF89a, not a volume", "channel 'T1': is not NIfTI"),
        (b"", "not NIfTI, or cut short: 0 bytes"),
        (b"\x1f\x8b damaged gzip", "damaged"),
        (four, "shape (4, 4, 4, 2)"),
        (apart, "a file of their own"),
        ((tmp_path / "sheared.nii").read_bytes(), "sheared"),
        (packed(nifti_header((0, 4, 4))), "shape"),
    ):
        assert reason in problem(client.post("/v1/segment", content=content, headers=RAW), 422)
        assert reason in problem(client.post("/v1/jobs", files={"T1": content}), 422)


def test_what_would_not_fit_in_memory_is_refused_before_it_is_read_in_the_words_of_segment(
    client: httpx.Client, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "huge.nii.gz").write_bytes(packed(nifti_header((30000, 30000, 30000))))
    report = segment.run(str(model), [tmp_path / "huge.nii.gz"], tmp_path / "out", device="cpu", max_memory="3GB")
    detail = problem(client.post("/v1/jobs", files={"T1": (tmp_path / "huge.nii.gz").read_bytes()}), 413)
    volume = "a volume of 30000x30000x30000 voxels does not fit in 2.79 GB, even window by window"
    assert volume in detail and volume in (report.failures[0].reason or "")


def test_a_file_that_unpacks_to_more_than_its_header_says_fails_by_itself(client: httpx.Client) -> None:
    bomb = packed(nifti_header((8, 8, 8)), bytes(8 * 8 * 8 * 4 + 100_000_000))
    assert len(bomb) < MOST_BYTES
    job = client.post("/v1/jobs", files={"T1": bomb}).json()["id"]
    status = ended(client, job)
    assert (status["state"], status["failure"]) == ("failed", "volume")
    assert status["reason"].startswith("channel 'T1': holds more than")
    assert "holds more than" in problem(client.get(f"/v1/jobs/{job}/label"), 409)
    assert "holds more than" in problem(client.post("/v1/segment", content=bomb, headers=RAW), 422)


def test_an_upload_that_is_too_large_is_refused_before_it_is_there(served: Served, client: httpx.Client) -> None:
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n{'Content-Type'}: {RAW['Content-Type']}\r\n"
    with socket.create_connection(served.address) as connection:
        connection.sendall(f"{head}Content-Length: 10000000000\r\n\r\n".encode())
        assert b" 413 " in connection.recv(4096)  # Nothing of it was sent.

    def endless() -> Iterator[bytes]:
        for _ in range(10 * MOST_BYTES // 2**16):
            yield bytes(2**16)

    said = problem(client.post("/v1/jobs", content=endless(), headers=RAW), 413)
    assert f"more than {MOST_BYTES} bytes" in said
    wait_until(lambda: served.incoming() == [])


@pytest.mark.parametrize(
    ("status", "reason", "request_"),
    [
        (415, "no type that is taken", {"json": {}}),
        (415, "no type that is taken", {}),
        (415, "Content-Encoding", {"content": b"x", "headers": {**RAW, "Content-Encoding": "gzip"}}),
        (422, "no channel of the model", {"files": {"T2": b"x"}}),
        (422, "no channel of the model", {"files": {"../../etc": b"x"}}),
        (422, "there twice", {"files": [("T1", b"x"), ("image", b"y")]}),
        (400, "no boundary", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}),
        (400, "cut short", {"content": b"--a\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=a"}}),
        (
            400,
            "is no multipart",
            {"content": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=a"}},
        ),
        (421, "Host", {"files": {"T1": b"x"}, "headers": {"Host": "evil.example"}}),
        (403, "web page", {"files": {"T1": b"x"}, "headers": {"Origin": "https://evil.example"}}),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    client: httpx.Client, served: Served, status: int, reason: str, request_: dict[str, Any]
) -> None:
    assert reason in problem(client.post("/v1/jobs", **request_), status)
    assert served.incoming() == []


def test_a_client_that_hangs_up_within_its_upload_leaves_nothing(served: Served, client: httpx.Client) -> None:
    head = "POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    with socket.create_connection(served.address) as connection:
        connection.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + bytes(50000))
        wait_until(lambda: len(served.incoming()) == 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: served.incoming() == [])
    assert 'medseg_jobs{state="uploading"} 0' in client.get("/metrics").text


def test_a_request_keeps_its_id_if_that_is_one(client: httpx.Client) -> None:
    asked = {"X-Request-ID": "ward-7.scan_12"}
    assert client.get("/healthz", headers=asked).headers["x-request-id"] == "ward-7.scan_12"
    for wrong in ("a b", "x" * 65, "ü".encode(), "a\tb"):
        made = client.get("/healthz", headers={"X-Request-ID": wrong}).headers["x-request-id"]  # type: ignore[dict-item]
        assert re.fullmatch("[0-9a-f]{16}", made)


def test_health_model_figures_and_openapi(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["ready"] is True
    card = client.get("/v1/model").json()
    assert card["labels"] == {"background": 0, "left": 1, "right": 7} and card["channels"] == {"T1": "MR"}
    assert re.search(
        r'^medseg_responses_total\{method="GET",route="/healthz",status="200"\} \d+$', client.get("/metrics").text, re.M
    )
    document = client.get("/openapi.json").json()
    assert set(document["paths"]["/v1/jobs"]["post"]["responses"]) >= {"202", "413", "422", "429"}
    assert PROBLEM in document["paths"]["/v1/jobs/{id}"]["get"]["responses"]["404"]["content"]
    for path, status in (("/", 404), ("/docs", 404), ("/v1/jobs/", 404)):
        problem(client.get(path), status)
    assert problem(client.put("/v1/jobs"), 405) == "Method Not Allowed"
    assert client.put("/v1/jobs/x").headers["allow"] == "DELETE, GET"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0: whoever reaches this port"),
        ({"token_file": "tokens"}, "of 16 characters or more; token 2 is shorter"),
        ({"token_file": "none"}, "--token-file none: cannot be read"),
        ({"host": "192.0.2.1", "token_file": "good"}, "192.0.2.1:0: cannot be listened on"),
        ({"devices": ("cuda:77",)}, "cuda:77"),
    ],
)
def test_a_service_that_should_not_begin_does_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good").write_text("a-token-of-more-than-sixteen-letters\n")
    Path("tokens").write_text("a-token-of-more-than-sixteen-letters\nshort\n")
    settings = ServiceSettings.model_validate({"spool": tmp_path / "spool", "port": 0, **changes})
    with pytest.raises(PipelineError, match=re.escape(said)):
        serve.run(str(model), settings)
    assert not (tmp_path / "spool").exists()


def test_a_spool_belongs_to_one_service(model: Path, served: Served) -> None:
    with pytest.raises(PipelineError, match="another `medseg serve` works here"):
        serve.run(str(model), ServiceSettings(spool=served.spool, port=0, devices=("cpu",)))
