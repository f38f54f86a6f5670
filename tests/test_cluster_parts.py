"""Parts of working on a cluster that want none: who takes part, what a worker takes, what is refused at once."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
from tiny_models import make_model

from pipeline.errors import PipelineError
from pipeline.model import save_model
from pipeline.records import exclusively
from pipeline.stages.cluster import fitness
from pipeline.stages.cluster.fitness import MOST_FILES, Common, misfits
from pipeline.stages.cluster.options import ray_options, refuse_beside_ray
from pipeline.stages.cluster.ray_cluster import Need, Node, joined
from pipeline.stages.cluster.segmenting import need_of
from pipeline.stages.segmenting.claims import Claims, left_by
from pipeline.stages.segmenting.sources import ChannelFile, SegmentInput


def node(cpus: float, gpus: float = 0, memory_bytes: float = 0) -> Node:
    return Node("id", "name", cpus, gpus, memory_bytes)


def test_a_node_has_room_for_as_many_as_its_scarcest_resource_admits() -> None:
    assert node(16, 4).room_for(Need(4)) == 4
    assert node(16, 4).room_for(Need(2, 1)) == 4
    assert node(16, 0).room_for(Need(2, 1)) == 0
    assert node(16, 0, 10).room_for(Need(1, 0, 4)) == 2
    assert node(0).room_for(Need(1)) == 0


@pytest.mark.parametrize(
    ("nodes", "device", "cpus", "need"),
    [
        ([node(32, 4), node(64, 4), node(128)], "auto", None, Need(8, 1)),
        ([node(32, 4), node(128)], "cpu", None, Need(32)),
        ([node(0), node(8), node(4)], "auto", None, Need(4)),
        ([node(8)], "cuda", None, Need(1, 1)),
        ([node(2, 4)], "auto", None, Need(1, 1)),
        ([node(32, 4)], "auto", 2, Need(2, 1)),
        ([], "auto", None, Need(1)),
    ],
)
def test_a_worker_takes_a_gpu_and_its_share_of_the_cores(
    nodes: list[Node], device: str, cpus: int | None, need: Need
) -> None:
    assert need_of(nodes, device, cpus) == need


def test_a_machine_takes_part_that_has_all_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "SEEN_WITHIN_S", 0.0)
    save_model(tmp_path / "model", make_model())
    scan, lock = tmp_path / "scan.nii.gz", tmp_path / "lock"
    scan.write_bytes(b"12345")
    with exclusively(lock, PipelineError("busy")):
        common = Common.of([lock], [scan, tmp_path / "missing"], [tmp_path / "model"], lock)
        assert common.files == {lock: 0, scan: 5}  # What is missing here fails case by case.
        assert Common.model_validate(json.loads(json.dumps(common.model_dump(mode="json")))) == common
        assert misfits(common) == ()
        others = common.changed(versions={**common.versions, "torch": "1.0", "cuDNN": "9"})
        starts = [f"{socket.gethostname()}: {name} is " for name in ("torch", "cuDNN")]
        assert all(text.startswith(start) for text, start in zip(misfits(others), starts, strict=True))
        save_model(tmp_path / "model", make_model(seed=1))
        (other_model,) = misfits(common)
        assert "does not see the model" in other_model
    save_model(tmp_path / "model", make_model())
    (unfelt,) = misfits(common)
    assert "does not feel locks on" in unfelt


def test_a_file_that_is_another_is_not_the_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert not fitness.is_seen(path, within_s=0)
    path.write_bytes(b"123")
    assert fitness.is_seen(path, within_s=0)
    assert fitness.is_seen(path, 3, within_s=0)
    assert not fitness.is_seen(path, 4, within_s=0)


def test_of_many_files_a_sample_is_looked_for(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(3 * MOST_FILES + 1)]
    for path in paths:
        path.touch()
    looked_for = list(Common.of([], paths).files)
    assert 0.7 * MOST_FILES < len(looked_for) <= MOST_FILES
    assert paths[0] in looked_for


def test_a_case_is_found_from_any_working_folder() -> None:
    case = SegmentInput("a", {"T1": ChannelFile(Path("scans/a.nii.gz"), 3)})
    assert case.absolute() == SegmentInput("a", {"T1": ChannelFile(Path.cwd() / "scans" / "a.nii.gz", 3)})


def test_a_worker_s_claims_are_known_by_its_name(tmp_path: Path) -> None:
    claim = Claims(tmp_path, "run", "task-1").take("a")
    assert claim is not None
    claim.begin()
    assert list(left_by(tmp_path, "task-1", ["a", "b"])) == ["a"]
    assert list(left_by(tmp_path, "task-11", ["a"])) == list(left_by(tmp_path, os.getpid(), ["a"])) == []
    claim.give_back(ended=True)


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PipelineError, match=r"Ray is not installed; pip install '\.\[ray\]'"), joined("auto"):
        pass


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:1", "no Ray cluster answers there"), ("node1", "expected HOST:PORT"), (":6379", "expected HOST:PORT")],
)
def test_where_no_cluster_is_that_is_said_at_once(address: str, said: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(PipelineError, match=said), joined(address):
        pass


def test_options_of_a_cluster() -> None:
    assert ray_options("local", None, None, None, 10.0) is None
    options = ray_options("ray", "auto", 2, None, 0.5)
    assert options is not None
    assert (options.address, options.workers, options.cpus, options.wait_s) == ("auto", 2, None, 30.0)
    refuse_beside_ray(options, jobs=None, shard=None, device="cuda")
    refuse_beside_ray(None, jobs=2, shard="0/2", device="cuda:0")
