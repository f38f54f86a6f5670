"""Where prepared cases are kept, and that it changes nothing."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.manifest import Case
from pipeline.data.plan import Plan
from pipeline.data.store import CaseStore, PreparedCase
from pipeline.errors import ConfigError
from pipeline.geometry import Geometry
from pipeline.stages.fold.task import class_weights
from pipeline.training.sampling.cases import Place, bytes_of, keep, nearest, place_for

CPU = torch.device("cpu")
SHAPES = {"a": (40, 30, 20), "b": (9, 8, 7)}


def plan(**changes: object) -> Plan:
    return Plan(
        channels={"t1": "MR", "t2": "MR"},
        labels={"background": 0, "left": 1, "right": 2},
        orientation="RAS",
        spacing_mm=(1.0, 1.0, 1.0),
        patch_size=(8, 8, 8),
        batch_size=2,
        crop="none",
        normalisation={"t1": {"scheme": "none"}, "t2": {"scheme": "none"}},
        **changes,  # type: ignore[arg-type]
    )


@pytest.fixture
def store(tmp_path: Path) -> CaseStore:
    random = np.random.default_rng(0)
    made = CaseStore(tmp_path)
    for case_id, shape in SHAPES.items():
        grid = Geometry(shape, np.eye(4))
        image = random.normal(size=(2, *shape)).astype(np.float16)
        label = random.integers(0, 3, shape).astype(np.uint8)
        voxels = {k: np.argwhere(label == k).astype(np.int32) for k in (1, 2)}
        made.write(case_id, PreparedCase(image, label, label, grid, grid, voxels, ("t1", "t2")), "key")
    return made


def manifest_cases() -> list[Case]:
    file = {"path": "x.nii.gz"}
    some = {"a": None, "b": ("right",)}
    return [
        Case(id=case_id, patient=case_id, images={"t1": file}, label=file, fold=0, annotated_classes=some[case_id])  # type: ignore[arg-type]
        for case_id in SHAPES
    ]


def test_what_cases_take_is_two_bytes_a_channel_and_one_of_label(store: CaseStore) -> None:
    assert bytes_of(manifest_cases(), store, plan()) == (40 * 30 * 20 + 9 * 8 * 7) * (2 * 2 + 1)
    many = plan().changed(labels={str(n): n for n in range(256)})
    assert bytes_of(manifest_cases(), store, many) == (40 * 30 * 20 + 9 * 8 * 7) * (2 * 2 + 2)


def test_cases_are_in_memory_where_they_fit_and_the_log_says_where(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert place_for(10**6, CPU) == "memory"
        assert place_for(10**18, CPU) == "disk"
        # Many processes on one machine keep a copy each.
        assert place_for(10**6, CPU, processes=10**9) == "disk"
    assert "0.00 GB of prepared cases are kept in memory; free: " in caplog.messages[0]
    assert "1000000000.00 GB of prepared cases are kept on disk" in caplog.messages[1]


@pytest.mark.parametrize(
    ("gigabytes", "step", "place"), [(1.5, 0, "GPU"), (1.5, 6.6, "memory"), (2.5, 0, "memory"), (30, 0, "disk")]
)
def test_cases_leave_a_gpu_what_a_step_takes(gigabytes: float, step: float, place: str) -> None:
    free: dict[Place, int] = {"GPU": 8 * 10**9, "memory": 100 * 10**9}
    assert nearest(int(gigabytes * 1e9), free, int(step * 1e9)) == place


def test_disk_and_memory_hold_the_same_bits(store: CaseStore) -> None:
    kept = [keep(manifest_cases(), store, plan(), place, CPU) for place in ("disk", "memory", "GPU")]
    for disk, memory, device in zip(*kept, strict=True):
        assert disk.id == memory.id == device.id
        assert disk.shape == memory.shape == device.shape == (2, *SHAPES[disk.id])
        assert isinstance(device.read_image((0, 0, 0), (1, 1, 1)), torch.Tensor)
        for box in (((0, 0, 0), disk.shape[1:]), ((1, 2, 3), (8, 7, 6))):
            for read in ("read_image", "read_label"):
                first, *others = (np.asarray(getattr(case, read)(*box)) for case in (disk, memory, device))
                assert all(np.array_equal(first, other) and first.dtype == other.dtype for other in others)
        assert all(np.array_equal(disk.class_voxels[k], memory.class_voxels[k]) for k in (1, 2))


def test_a_case_knows_what_was_annotated_in_it(store: CaseStore) -> None:
    for place in ("disk", "memory"):
        a, b = keep(manifest_cases(), store, plan(), place, CPU)
        assert a.annotated is None
        assert b.annotated == (True, False, True)


def test_weights_are_of_labels_that_can_be_drawn() -> None:
    assert class_weights({"right": 3.0}, plan().labels) == {2: 3.0}
    assert class_weights({}, plan().labels) == {}
    for name in ("rihgt", "background"):
        with pytest.raises(ConfigError, match=f"training.sampling_weights: '{name}' cannot be drawn; .* left, right"):
            class_weights({"left": 1.0, name: 2.0}, plan().labels)
