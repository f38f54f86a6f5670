"""Long runs of `medseg segment`: shared, killed, interrupted, disks full; what is done is valid, the rest goes on."""

import base64
import csv
import errno
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
import SimpleITK as sitk
from label_maps import label_files
from scipy import ndimage
from tiny_models import NEAREST_MEAN, make_model, make_plan, nearest_mean

from pipeline.confidence.calibration import Calibration, save_calibration
from pipeline.confidence.judging import judge
from pipeline.confidence.measuring import StructureConfidence
from pipeline.confidence.reliability import Reliability
from pipeline.errors import PipelineError
from pipeline.free_memory import resident_bytes
from pipeline.geometry import Geometry
from pipeline.model import save_model
from pipeline.networks import NETWORKS
from pipeline.predictor import Engine, Predictor
from pipeline.stages import segment
from pipeline.stages.segmenting import viewing
from pipeline.stages.segmenting.batch import Batch, Room
from pipeline.stages.segmenting.case import CaseInHand, CaseSteps, SegmentSettings
from pipeline.stages.segmenting.claims import CLAIMS, Claims, left_by
from pipeline.stages.segmenting.inputs import find_inputs
from pipeline.stages.segmenting.journal import JOURNAL, Journal
from pipeline.stages.segmenting.page import LARGEST_EMBEDDED, Preview, picture_of, write_page
from pipeline.stages.segmenting.plan import CASES_SHOWN, bytes_of, case_memory
from pipeline.stages.segmenting.report import CaseResult, SegmentReport
from pipeline.stages.worker_processes import shared_out
from pipeline.viewer import assets
from pipeline.viewer.assets import niivue
from pipeline.volumes.volume import Volume, read_label
from pipeline.volumes.writing import write_image

CASES = 10
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net with random weights: what another process can load."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "model", make_model())
    return folder / "model"


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes in a folder whose name is no UTF-8; the last is a pair of links, as stores of large files make them."""
    folder = tmp_path_factory.mktemp("all") / os.fsdecode(b"sc\xe4ns")
    folder.mkdir()
    for index in range(CASES):
        noise = np.random.default_rng(index).normal(100, 30, (34, 36, 40)).astype(np.float32)
        kind, suffix = (nib.Nifti1Image, ".nii.gz") if index < CASES - 1 else (nib.Nifti1Pair, ".hdr")
        nib.save(kind(noise, np.eye(4)), folder / f"case_{index}{suffix}")
    for number, file in enumerate(folder.glob(f"case_{CASES - 1}.*")):
        file.rename(folder.parent / f"content_{number}")
        file.symlink_to(folder.parent / f"content_{number}")
    return folder


@pytest.fixture(scope="module")
def undisturbed(model: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    segment.run(str(model), [scans], out, device="cpu")
    return label_files(out)


def arguments(model: Path, scans: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pipeline", "segment", str(scans)),
        *("--model", str(model), "--out", str(out), "--device", "cpu", *more),
    ]


def start(model: Path, scans: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    return subprocess.Popen(
        arguments(model, scans, out, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def entries(out: Path, status: str = "done") -> list[str]:
    """The cases that the journal says were done, as often as it says so."""
    journal = out / JOURNAL
    lines = journal.read_text().splitlines() if journal.exists() else []
    results = [json.loads(line)["result"] for line in lines if line.strip()]
    return [result["name"] for result in results if result["status"] == status]


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def unfinished(out: Path) -> Iterator[None]:
    """Hold a batch's last case, so that the batch cannot end, however slow this process is."""
    claim = Claims(out, "test").take(f"case_{CASES - 1}")
    assert claim is not None
    yield
    claim.give_back(ended=False)


@pytest.mark.slow
def test_killed_again_and_again_two_jobs_go_on_and_all_files_are_those_of_an_undisturbed_run(
    model: Path, scans: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with unfinished(out):
        for _ in range(2):
            done = len(entries(out))
            process = start(model, scans, out)
            wait_until(lambda done=done: len(entries(out)) >= done + 2, process)  # type: ignore[misc]
            process.kill()
            process.communicate()
    jobs = [start(model, scans, out) for _ in range(2)]
    said = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert label_files(out) == undisturbed
    assert Counter(entries(out)) == Counter(f"case_{n}" for n in range(CASES))
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_and_the_report_is_in_order(
    model: Path, scans: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    names = [f"case_{n}" for n in range(CASES)]
    with unfinished(out):
        process = start(model, scans, out, "--jobs", "2")
        held_by: list[psutil.Process] = []
        wait_until(lambda: bool(held_by.extend(holders(process, out, names)) or held_by), process)
        held_by[0].kill()
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "a worker was killed by signal 9 (out of memory?)" in said
    report = json.loads((out / "report.json").read_text())
    assert [case["name"] for case in report["cases"]] == names
    assert {case["status"] for case in report["cases"]} == {"done"}
    assert label_files(out) == undisturbed


def holders(process: subprocess.Popen[str], out: Path, names: list[str]) -> Iterator[psutil.Process]:
    """Yield the workers of a batch that have a case in hand."""
    return (child for child in psutil.Process(process.pid).children() if any(left_by(out, child.pid, names)))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_signal_lets_the_cases_in_hand_be_finished_and_reported(
    jobs: str, model: Path, scans: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with unfinished(out):
        process = start(model, scans, out, "--jobs", jobs)
        wait_until(lambda: len(entries(out)) >= 1, process)
        # A terminal tells the parent alone, a batch system all its processes.
        children = psutil.Process(process.pid).children()
        for one in [*children, process]:
            one.send_signal(signal.SIGTERM if children else signal.SIGINT)
        said = process.communicate()[0]
    assert process.returncode == 130, said
    report = json.loads((out / "report.json").read_text())
    done = [case["name"] for case in report["cases"] if case["status"] == "done"]
    assert 1 <= len(done) == CASES - report["not_reached"] < CASES
    assert label_files(out) == {f"{name}.nii.gz": undisturbed[f"{name}.nii.gz"] for name in done}
    assert not list(out.rglob(".tmp-*"))
    assert {file.read_text() for file in (out / CLAIMS).iterdir()} == {""}


IN_TMPFS = """
mount -t tmpfs -o size=$SIZE tmpfs "$OUT" || exit 77
"$@"
code=$?
cp -r "$OUT" "$COPY"
exit $code
"""


@pytest.mark.slow
def test_a_full_disk_leaves_what_is_done_valid_and_is_said(
    model: Path, scans: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    out.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to mount a small disk with")
    answer = subprocess.run(
        ["unshare", "-rm", "sh", "-c", IN_TMPFS, "sh", *arguments(model, scans, out)],
        env=os.environ | {"OUT": str(out), "COPY": str(copy), "SIZE": "400k"},
        check=False,
        capture_output=True,
        text=True,
    )
    if (answer.returncode in (1, 77) and "mount" in answer.stderr + answer.stdout) or "unshare" in answer.stderr:
        pytest.skip(f"no small disk can be mounted: {answer.stderr.strip()}")
    assert answer.returncode == 2, answer.stderr
    assert re.search(rf"error: .*: the disk is full; \d+ of {CASES} cases are done and valid", answer.stderr)
    there = label_files(copy)
    assert 0 < len(there) < CASES
    assert there == {name: undisturbed[name] for name in there}
    assert {f"{name}.nii.gz" for name in entries(copy)} <= set(there)
    done = len(entries(copy))
    report = segment.run(str(model), [scans], copy, device="cpu")
    assert label_files(copy) == undisturbed
    assert Counter(r.status for r in report.results) == {"skipped": done, "done": CASES - done}


def test_four_thousand_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "nearest_mean", nearest_mean)
    save_model(tmp_path / "model", make_model(plan=make_plan(patch_size=(8, 8, 64)), network=NEAREST_MEAN))
    classes = np.random.default_rng(0).integers(0, 3, (1, 6, 5, 4000))
    write_image(tmp_path / "long.nii.gz", Volume((100 * classes).astype(np.float32), Geometry((6, 5, 4000), np.eye(4))))
    report = segment.run(str(tmp_path / "model"), [tmp_path / "long.nii.gz"], tmp_path / "out", device="cpu")
    assert not report.failures
    label = read_label(tmp_path / "out" / "long.nii.gz").array
    assert np.array_equal(label, np.array([0, 1, 7])[classes[0]])


def batch_of(model: Path, scans: Path, out: Path, run: str) -> tuple[Batch, list[segment.SegmentInput]]:
    settings = SegmentSettings(models=(model,), out=out, run=run, device="cpu")
    return Batch(CaseSteps(settings), threading.Event()), find_inputs([scans], ("T1",), out)[:3]


def test_a_case_over_which_two_workers_of_a_run_died_is_given_up(model: Path, scans: Path, tmp_path: Path) -> None:
    claims = tmp_path / CLAIMS
    claims.mkdir(parents=True)
    (claims / "case_0").write_text("this 11\nthis 12\n")
    (claims / "case_1").write_text("this 13\nother 14\n")
    batch, cases = batch_of(model, scans, tmp_path, "this")
    results = list(batch.results(cases))
    # What has killed others comes last.
    assert [result.name for result in results] == ["case_2", "case_0", "case_1"]
    assert [result.status for result in results] == ["done", "failed", "done"]
    assert results[1].reason == "the process that worked on it was killed, 2 times: out of memory?"
    assert [(claims / f"case_{n}").read_text() for n in range(3)] == [""] * 3
    assert list(label_files(tmp_path)) and "case_0.nii.gz" not in label_files(tmp_path)


def test_a_case_that_waits_for_one_over_which_a_worker_died_is_not_begun(
    model: Path, scans: Path, tmp_path: Path
) -> None:
    """If the first kills the process again, the second is not to blame."""
    claims = tmp_path / CLAIMS
    claims.mkdir(parents=True)
    for name in ("case_0", "case_1"):
        (claims / name).write_text("this 11\n")

    class Watched(CaseSteps):
        def predict(self, case: CaseInHand) -> None:
            other = "case_1" if case.source.name == "case_0" else None
            until = time.monotonic() + DEADLINE_S
            while other and (claim := Claims(tmp_path, "look").take(other)):  # Until it is read ahead.
                claim.give_back(ended=False)
                assert time.monotonic() < until
                time.sleep(0.02)
            in_hand.append({file.name for file in claims.iterdir() if file.read_text().count("this") == 2})
            super().predict(case)

    in_hand: list[set[str]] = []
    steps = Watched(SegmentSettings(models=(model,), out=tmp_path, run="this", device="cpu"))
    cases = find_inputs([scans], ("T1",), tmp_path)[:2]
    assert [result.status for result in Batch(steps, threading.Event()).results(cases)] == ["done", "done"]
    assert in_hand == [{"case_0"}, {"case_1"}]


def test_a_claim_is_given_back_on_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    claims = Claims(tmp_path, "one")
    (tmp_path / CLAIMS / "a").write_text("before 11\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        claim = claims.take("a")
        assert claim is not None
        claim.begin()
        claims.give_all_back()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = claims.take("a")
    assert again is not None
    again.give_back(ended=True)


def test_without_locks_the_living_are_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("pipeline.stages.segmenting.claims.fcntl.flock", no_locks)
    for _ in range(3):
        claim = Claims(tmp_path, "one").take("a")
        assert claim is not None
        assert claim.left_before == ()
        claim.begin()
        claim._file.close()
    assert "its file system knows no locks" in caplog.text


def test_leftovers_of_a_dead_process_are_removed_and_no_others(model: Path, scans: Path, tmp_path: Path) -> None:
    (tmp_path / CLAIMS).mkdir(parents=True)
    (tmp_path / CLAIMS / "case_0").write_text("old 11\n")
    mine, others = tmp_path / ".tmp-abcdefg1-case_0.nii.gz", tmp_path / ".tmp-abcdefg1-a-case_0.nii.gz"
    mine.touch()
    others.touch()
    batch, cases = batch_of(model, scans, tmp_path, "new")
    assert [result.status for result in batch.results(cases[:1])] == ["done"]
    assert (mine.exists(), others.exists()) == (False, True)


def test_a_claimed_case_is_done_when_its_holder_dies_and_adopted_when_it_ends(
    model: Path, scans: Path, tmp_path: Path
) -> None:
    batch, cases = batch_of(model, scans, tmp_path, "this")
    other = Claims(tmp_path, "this")
    died, ended = other.take("case_0"), other.take("case_1")
    assert died and ended
    results = batch.results(cases)
    assert next(results).name == "case_2"
    # A worker of the same run has ended the one, and vanishes with the other in hand.
    Journal(tmp_path, "this").add(CaseResult(name="case_1", status="done", inputs=("x",), output="case_1.nii.gz"))
    ended.give_back(ended=True)
    died._file.close()
    assert [(result.name, result.status) for result in results] == [("case_0", "done")]
    assert batch.journal.of_run["case_1"].inputs == ("x",)


def test_a_stopped_batch_begins_nothing(model: Path, scans: Path, tmp_path: Path) -> None:
    settings = SegmentSettings(models=(model,), out=tmp_path, run="this", device="cpu")
    stop = threading.Event()
    batch = Batch(CaseSteps(settings), stop)
    results = batch.results(find_inputs([scans], ("T1",), tmp_path))
    first = next(results)
    stop.set()
    assert len([first, *results]) <= 3
    assert len(label_files(tmp_path)) <= 3
    assert {(tmp_path / CLAIMS / f"case_{n}").read_text() for n in range(3)} == {""}


def test_claims_exclude_one_another_and_count_the_dead(tmp_path: Path) -> None:
    one, two = Claims(tmp_path, "one"), Claims(tmp_path, "two")
    claim = one.take("a")
    assert claim is not None
    assert claim.left_before == ()
    assert two.take("a") is None
    assert list(left_by(tmp_path, os.getpid(), ["a", "b"])) == []
    claim.begin()
    assert list(left_by(tmp_path, os.getpid(), ["a", "b"])) == ["a"]
    claim._file.close()  # As the kernel does when a process dies.
    second = two.take("a")
    assert second is not None
    assert second.left_before == ("one",)
    second.begin()
    second.give_back(ended=False)
    third = two.take("a")
    assert third is not None
    assert third.left_before == ("one",)
    third.give_back(ended=True)
    fourth = one.take("a")
    assert fourth is not None
    assert fourth.left_before == ()
    one.give_all_back()


def test_the_journal_is_read_on_and_passes_half_a_line_over(tmp_path: Path) -> None:
    mine, theirs = Journal(tmp_path, "mine"), Journal(tmp_path, "theirs")
    done = CaseResult(name="ä", status="done", inputs=("x",), key="k", output="ä.nii.gz", volumes_ml={"left": 2.0})
    theirs.add(done)
    assert mine.done == {}
    mine.refresh()
    assert (mine.done, mine.of_run) == ({"ä": done}, {})
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"run": "mine", "result": {"name": "b", "sta')
    mine.refresh()
    mine.add(done.changed(status="skipped"))
    mine.refresh()
    assert mine.of_run == {"ä": done.changed(status="skipped")}
    assert Journal(tmp_path, "theirs").of_run == {"ä": done}
    assert (tmp_path / JOURNAL).read_text().count("volumes_ml") == 1


def test_a_case_whose_files_are_being_replaced_is_neither_done_nor_failed(tmp_path: Path) -> None:
    mine, theirs = Journal(tmp_path, "mine"), Journal(tmp_path, "theirs")
    done = CaseResult(name="a", status="done", inputs=("x",), key="k", output="a.nii.gz")
    mine.add(done)
    mine.revoke("a")
    for journal in (mine, theirs, Journal(tmp_path, "later")):
        journal.refresh()
        assert (journal.done, journal.last) == ({}, {})
    assert mine.of_run == {"a": done}
    mine.add(done.changed(key="l"))
    theirs.refresh()
    assert theirs.done == theirs.last == {"a": done.changed(key="l")}


class Forgetful(Batch):
    """Writes a label map, and dies before that is written down."""

    def _finish(self, case: CaseInHand) -> CaseResult:
        case.attempt(self._steps.write)
        return case.result


def test_a_case_that_is_done_anew_by_other_models_counts_as_neither_until_it_is_done(
    model: Path, scans: Path, tmp_path: Path
) -> None:
    (scan,), out = scans.glob("case_0.*"), tmp_path / "out"
    save_model(tmp_path / "other", make_model(seed=1))

    def statuses(chosen: Path) -> list[str]:
        return [result.status for result in segment.run(str(chosen), [scan], out, device="cpu").results]

    assert statuses(model) == ["done"]
    own = label_files(out)
    settings = SegmentSettings(models=(tmp_path / "other",), out=out, run="killed", device="cpu")
    batch = Forgetful(CaseSteps(settings), threading.Event())
    assert [result.status for result in batch.results(find_inputs([scan], ("T1",), out))] == ["done"]
    assert label_files(out) != own
    assert statuses(model) == ["done"]
    assert label_files(out) == own
    assert statuses(model) == ["skipped"]


def test_room_admits_what_fits_and_alone_what_does_not(tmp_path: Path) -> None:
    stop = threading.Event()
    room = Room(10.0, stop)
    assert room.enter("large", 20.0)
    entered = []
    waiting = threading.Thread(target=lambda: entered.append(room.enter("small", 1.0)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    room.leave("large")
    waiting.join()
    assert entered == [True]
    assert room.enter("middle", 9.0)
    stop.set()
    assert not room.enter("another", 1.0)


def test_workers_are_shared_out_over_devices() -> None:
    assert shared_out("cuda:0,cuda:1", None) == ["cuda:0", "cuda:1"]
    assert shared_out("cuda:0, cuda:1", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert shared_out("cpu", None) == ["cpu"]
    with pytest.raises(PipelineError, match="at least one job for each"):
        shared_out("cuda:0,cuda:1", 1)


class Page(HTMLParser):
    """The headings of the cases and the sources of the images, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self._in_heading = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_heading = tag == "h2"
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        if self._in_heading and data.strip():
            self.names.append(data)
            self._in_heading = False


def result_of(name: str, dice: float | None = None, **more: object) -> CaseResult:
    sure = None
    if dice is not None:
        sure = judge({"left": StructureConfidence(voxels=10, entropy=0.1, expected_dice=dice)})
    return CaseResult.model_validate(
        {"name": name, "status": "done", "inputs": ["x"], "output": f"{name}.nii.gz", "confidence": sure, **more}
    )


def test_the_page_shows_failures_then_the_doubtful_and_escapes(tmp_path: Path) -> None:
    results = (
        result_of("sure", 0.95, volumes_ml={"left": 1.5, "right": 0.0}),
        result_of("doubtful", 0.4, warnings=("an extent of 5 mm",)),
        result_of("middling", 0.8),
        result_of("<broken>", status="failed", reason="cut <short>", output=None),
    )
    image = Volume(
        np.random.default_rng(0).normal(size=(1, 20, 22, 24)).astype(np.float32), Geometry((20, 22, 24), np.eye(4))
    )
    Preview.of(image).write(tmp_path, "sure", np.ones((20, 22, 24), np.uint8))
    report = SegmentReport(tmp_path, (Path("model"),), results, not_reached=2)
    write_page(report)
    page = Page(tmp_path / "report.html")
    assert page.names[:4] == ["<broken>", "doubtful", "middling", "sure"]
    text = (tmp_path / "report.html").read_text()
    assert "cut &lt;short&gt;" in text
    assert "doubtful: left (Dice of 0.40 expected)" in text
    assert [(image["src"] or "")[:23] for image in page.images] == ["data:image/jpeg;base64,"]
    assert "warning  doubtful: doubtful: left (Dice of 0.40 expected)" in report.as_text()
    assert "2 not reached" in report.as_text()


def test_the_viewer_shows_the_most_doubtful_cases_as_far_as_there_is_room(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if niivue() is None:
        pytest.skip("NiiVue is not installed; `make setup` or `medseg install-viewer` does it")
    monkeypatch.setattr(viewing, "ROOM_BYTES", 3e5)  # a case of noise takes some 60 kB
    report = segment.run(str(model), [scans], tmp_path / "out", device="cpu", viewer=True)
    text = (tmp_path / "out" / "report.html").read_text()
    found = re.search(r'id="viewer-facts">(.*?)</script>', text)
    assert found is not None
    cases = json.loads(found.group(1))["cases"]
    doubts = {result.name: result.confidence.doubt for result in report.results if result.confidence}
    assert [case["name"] for case in cases] == sorted(doubts, key=lambda name: -doubts[name])
    assert [case["score"] for case in cases] == pytest.approx(sorted(1 - doubt for doubt in doubts.values()))
    shown = [case["shown"] for case in cases]
    assert 1 < sum(shown) < CASES
    assert shown == sorted(shown, reverse=True)
    volumes = re.search(r'id="viewer-volumes-0">(.*?)</script>', text)
    assert volumes is not None
    carried = gzip.decompress(base64.b64decode(volumes.group(1).split()[1]))
    label = read_label(tmp_path / "out" / f"{cases[0]['name']}.nii.gz")
    assert np.array_equal(np.asarray(nib.Nifti1Image.from_bytes(carried).dataobj) > 0, label.array > 0)
    assert "Reference, outlined" not in text


def test_a_viewer_that_is_not_there_is_refused_before_the_batch(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_OWN", tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assets.niivue.cache_clear()
    try:
        with pytest.raises(PipelineError, match="--viewer: NiiVue is not installed here; `medseg install-viewer`"):
            segment.run(str(model), [scans], tmp_path / "out", device="cpu", viewer=True)
        assert not (tmp_path / "out").exists()
    finally:
        assets.niivue.cache_clear()


def test_the_page_of_hundreds_of_cases_is_small_and_loads_pictures_when_they_are_seen(tmp_path: Path) -> None:
    results = tuple(result_of(f"case {n}", n / 300, volumes_ml={"left": 1.0}) for n in range(300))
    for result in results:
        picture_of(tmp_path, result.name).parent.mkdir(exist_ok=True)
        picture_of(tmp_path, result.name).touch()
    write_page(SegmentReport(tmp_path, (Path("model"),), results))
    page = Page(tmp_path / "report.html")
    assert len(page.images) == 300 > LARGEST_EMBEDDED
    assert page.names[:2] == ["case 0", "case 1"]
    assert page.images[0]["src"] == "pictures/case%200.jpg"
    assert {image["loading"] for image in page.images} == {"lazy"}
    assert (tmp_path / "report.html").stat().st_size < 6e5


def test_a_preview_is_seen_as_radiologists_look_at_it(tmp_path: Path) -> None:
    """A bright block at the left, front and head of the patient, stored the other way round and larger than shown."""
    from PIL import Image

    shape = (40, 600, 30)
    affine = np.diag([-2.0, -0.2, -3.0, 1.0])  # LPI
    image = np.zeros((1, *shape), np.float32)
    image[0, 24:, :200, :10] = 100.0
    classes = (image[0] > 0).astype(np.uint8)
    preview = Preview.of(Volume(image, Geometry(shape, affine)))
    assert max(preview.array.shape) <= 256
    preview.write(tmp_path, "a", classes)
    with Image.open(picture_of(tmp_path, "a")) as picture:
        strip = np.asarray(picture.convert("L")).astype(float)
    last = strip[:, strip.shape[1] * 3 // 4 :]  # In the last panel across head and feet: rows front to back.
    rows, columns = np.nonzero(last > 128)
    assert rows.mean() < 120
    assert columns.mean() > 0.4 * last.shape[1]


def test_sizes_are_read_as_people_write_them() -> None:
    assert bytes_of("8GB") == 8 * 10**9
    assert bytes_of(" 1.5 gib ") == 3 * 2**29
    assert bytes_of("500") == 500
    with pytest.raises(PipelineError, match="expected a size such as 8GB"):
        bytes_of("8 apples")


def test_the_plan_names_windows_and_peak_and_writes_nothing(model: Path, scans: Path, tmp_path: Path) -> None:
    text = segment.plan(str(model), [scans], tmp_path / "out", device="cpu")
    assert re.search(r"^case_0: peak memory [\d.]+ GB; (\d+) windows in (\d+) slabs", text, re.MULTILINE)
    assert f"and {CASES - CASES_SHOWN} smaller cases" in text
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_read_as_a_whole_is_counted_as_a_whole(model: Path, tmp_path: Path) -> None:
    voxels = np.zeros((6, 7, 8, 5), np.float64)
    sitk.WriteImage(sitk.GetImageFromArray(voxels.T, isVector=False), str(tmp_path / "a.nrrd"))
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "b.nii.gz")
    predictor = Predictor.load(model, Engine("cpu"))
    for name, volumes in (("a.nrrd", 5), ("b.nii.gz", 1)):
        (case,) = find_inputs([f"{tmp_path / name}#2"], ["T1"], tmp_path / "out")
        assert case_memory(predictor, case, 0).input == 6 * 7 * 8 * (4 + volumes * 8)


def test_too_little_memory_is_the_cases_failure_and_more_of_it_changes_no_label(
    model: Path, scans: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    scan = scans / "case_0.nii.gz"
    refused = segment.run(str(model), [scan], tmp_path / "out", device="cpu", max_memory="1MB")
    assert [result.status for result in refused.results] == ["failed"]
    assert "give --max-memory more" in (refused.results[0].reason or "")
    limit = str(resident_bytes() + 200 * 10**6)
    report = segment.run(str(model), [scan], tmp_path / "out", device="cpu", max_memory=limit)
    assert [result.status for result in report.results] == ["done"]
    assert label_files(tmp_path / "out") == {"case_0.nii.gz": undisturbed["case_0.nii.gz"]}


def test_probabilities_are_written_on_request_and_asked_for_later(model: Path, scans: Path, tmp_path: Path) -> None:
    scan, out = scans / "case_0.nii.gz", tmp_path / "out"
    segment.run(str(model), [scan], out, device="cpu")
    again = segment.run(str(model), [scan], out, device="cpu", probabilities=["all"])
    assert [result.status for result in again.results] == ["done"]
    written = nib.load(out / "probabilities" / "case_0.nii.gz").get_fdata()
    label = read_label(out / "case_0.nii.gz").array
    assert written.shape == (34, 36, 40, 2)
    # A random network is hardly sure: where a structure is the label, no other's probability is clearly larger.
    assert (written[label == 1, 0] >= written[label == 1, 1] - 1 / 255).all()
    later = segment.run(str(model), [scan], out, device="cpu")
    assert [result.status for result in later.results] == ["skipped"]
    shutil.copytree(model, tmp_path / "calibrated")
    unknown = Reliability(ece=0, brier=0, ece_foreground=None, brier_foreground=None)
    calibration = Calibration(temperature=2.0, cases=1, before=unknown, after=unknown, labels={})
    save_calibration(tmp_path / "calibrated", calibration)
    softer = segment.run(str(tmp_path / "calibrated"), [scan], out, device="cpu", probabilities=["all"])
    assert [result.status for result in softer.results] == ["done"]
    segment.run(str(model), [scan], out, device="cpu", overwrite=True)
    assert not (out / "probabilities" / "case_0.nii.gz").exists()  # They would be of another label map.


def test_instances_are_numbered_on_request_and_asked_for_later(model: Path, scans: Path, tmp_path: Path) -> None:
    files, out = [scans / "case_0.nii.gz", scans / "case_1.nii.gz"], tmp_path / "out"
    segment.run(str(model), files, out, device="cpu")
    before = label_files(out)
    later = segment.run(str(model), files, out, device="cpu", instances=["all"])
    # Of the label maps that are there: nothing is predicted again.
    assert [result.status for result in later.results] == ["done", "done"]
    assert label_files(out) == before
    with (out / "instances.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for result in later.results:
        own = [line for line in lines if line["case"] == result.name]
        label, instances = (read_label(out / folder / f"{result.name}.nii.gz") for folder in ("", "instances"))
        assert instances.geometry == label.geometry
        assert [line["instance"] for line in own] == [str(n) for n in range(1, instances.array.max() + 1)]
        counts = Counter(line["label"] for line in own)
        assert result.instances == {name: counts[name] for name in ("left", "right")}
        for name, value in (("left", 1), ("right", 7)):
            _, expected = ndimage.label(label.array == value, np.ones((3, 3, 3)))
            assert counts[name] == expected
            ml = [float(line["volume_ml"]) for line in own if line["label"] == name]
            assert ml == sorted(ml, reverse=True)
            assert sum(ml) == pytest.approx(result.volumes_ml[name], rel=1e-4)
            assert [line["component"] for line in own if line["label"] == name] == [str(n + 1) for n in range(expected)]
        for line in own[:3] + own[-3:]:
            voxels = np.argwhere(instances.array == int(line["instance"]))
            assert len({*label.array[tuple(voxels.T)]}) == 1
            assert [float(line[f"{axis}_mm"]) for axis in "xyz"] == pytest.approx(
                label.geometry.to_mm(voxels.mean(axis=0)), rel=1e-4, abs=1e-4
            )
    assert f",{later.results[0].instances['left']}," in (out / "report.csv").read_text().splitlines()[1]
    # What is there is not made again; other labels are, and a label map that is made again takes its instances away.
    same = segment.run(str(model), files, out, device="cpu", instances=["all"])
    assert [result.status for result in same.results] == ["skipped", "skipped"]
    assert same.results[0].instances == later.results[0].instances
    (out / "instances" / "case_0.csv").unlink()
    half = segment.run(str(model), files, out, device="cpu", instances=["all"])
    assert [result.status for result in half.results] == ["done", "skipped"]
    other = segment.run(str(model), files, out, device="cpu", instances=["right"])
    assert [result.status for result in other.results] == ["done", "done"]
    assert read_label(out / "instances" / "case_0.nii.gz").array.max() == other.results[0].instances["right"]
    assert [*other.results[0].instances] == ["right"]
    segment.run(str(model), files[:1], out, device="cpu", overwrite=True)
    assert not [*(out / "instances").glob("case_0.*")]
    assert len([*(out / "instances").glob("case_1.*")]) == 2
    fresh = segment.run(str(model), files[:1], out, device="cpu", overwrite=True, instances=["right"])
    assert fresh.results[0].instances == other.results[0].instances


def test_what_cannot_be_asked_for_is_refused_before_anything_is_written(
    model: Path, scans: Path, tmp_path: Path
) -> None:
    out, scan = tmp_path / "out", scans / "case_0.nii.gz"
    with pytest.raises(PipelineError, match=r"liver: unknown; the labels are background, left, right, or all"):
        segment.run(str(model), [scan], out, device="cpu", probabilities=["liver"])
    with pytest.raises(PipelineError, match=r"--instances background: unknown; the labels are left, right, or all"):
        segment.run(str(model), [scan], out, device="cpu", instances=["background"])
    plan = make_plan(regions={"both": ("left", "right"), "right": ("right",)})
    save_model(tmp_path / "regions", make_model(plan=plan, output="regions"))
    with pytest.raises(PipelineError, match=r"--probabilities background: unknown; the labels are left, right, or all"):
        segment.run(str(tmp_path / "regions"), [scan], out, device="cpu", probabilities=["background"])
    with pytest.raises(PipelineError, match="expected a size"):
        segment.run(str(model), [scan], out, device="cpu", max_memory="8 apples")
    with pytest.raises(PipelineError, match="'gpu': unknown; use auto"):
        segment.run(str(model), [scan], out, device="gpu,cpu")
    assert not out.exists()
