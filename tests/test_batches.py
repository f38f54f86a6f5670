"""Batches: the same patches whatever the batch, the process, the thread or the place that they are read from."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import AugmentationSection
from pipeline.training.distributed import Share
from pipeline.training.losses.target import Target
from pipeline.training.sampling.augmentation import Augmentation
from pipeline.training.sampling.batches import Batches, workers_for
from pipeline.training.sampling.cases import HeldCase, PatchCase, Size
from pipeline.training.sampling.patches import PatchSampler

PATCH = (12, 10, 8)
ALWAYS = {name: 1.0 for name in AugmentationSection.model_fields if name.endswith("_probability")}
CPU = torch.device("cpu")


def cases(count: int = 5) -> list[HeldCase]:
    """Cases of noise with a box of each of two classes; what was annotated in the second is told."""
    random = np.random.default_rng(0)
    made = []
    for number in range(count):
        image = random.normal(size=(2, 20, 16 + number, 14)).astype(np.float16)
        label = np.zeros(image.shape[1:], np.uint8)
        label[4:9, 5:10, 3:8], label[9:15, 5:10, 3:8] = 1, 2
        voxels = {index: np.argwhere(label == index).astype(np.int32) for index in (1, 2)}
        made.append(HeldCase(image, label, voxels, f"case_{number}", (True, False, True) if number == 1 else None))
    return made


def batches(of: list[PatchCase] | None = None, batch_size: int = 4, seed: int = 0, **changes: object) -> Batches:
    augmentation = Augmentation(
        AugmentationSection(**{**ALWAYS, "elastic_probability": 0.5, "flip_axes": ("x", "z")}),  # type: ignore[arg-type]
        patch_size=PATCH,
        target_size=PATCH,
        left_right_axis=0,
        paired_classes=((1, 2),),
        num_classes=3,
        spacing_mm=(1.0, 1.0, 1.0),
        seed=seed,
    )
    sampler = PatchSampler(
        cases() if of is None else of,
        patch_size=PATCH,
        read_size=augmentation.read_size,
        foreground_fraction=0.5,
        seed=seed,
    )
    settings: dict[str, object] = {"device": CPU, **changes}
    return Batches(sampler, augmentation, batch_size=batch_size, **settings)  # type: ignore[arg-type]


def assert_same(one: tuple[Tensor, Target], other: tuple[Tensor, Target]) -> None:
    (image, target), (other_image, other_target) = one, other
    assert torch.equal(image, other_image)
    assert torch.equal(target.classes, other_target.classes)
    assert target.annotated is not None
    assert other_target.annotated is not None
    assert torch.equal(target.annotated, other_target.annotated)


def rows(batch: tuple[Tensor, Target], first: int, last: int) -> tuple[Tensor, Target]:
    image, target = batch
    assert target.annotated is not None
    return image[first:last], Target(target.classes[first:last], target.annotated[first:last])


def test_a_patch_is_the_same_in_any_batch_and_process() -> None:
    whole = batches(batch_size=12)(1)  # patches 12 to 23
    for processes, size in ((1, 1), (1, 4), (2, 2), (2, 6), (3, 4)):
        for first in range(12, 24, size):
            number, rank = divmod(first // size, processes)
            part = batches(batch_size=size, share=Share(rank, processes))
            assert part.indices(number) == range(first, first + size)
            assert_same(part(number), rows(whole, first - 12, first - 12 + size))


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_that_read_ahead_change_nothing_wherever_training_goes(workers: int) -> None:
    ahead, plain = batches(workers=workers), batches()
    for number in (0, 1, 2, 7, 8, 1, 0, 3):  # on, on at another place, and back
        assert_same(ahead(number), plain(number))
    assert not torch.equal(plain(0)[0], plain(1)[0])
    assert not torch.equal(plain(0)[0], batches(seed=1)(0)[0])
    ahead.close()


class TogetherCase:
    """A case whose image is given out once so many threads ask for one."""

    def __init__(self, case: PatchCase, together: threading.Barrier) -> None:
        self.case, self.together = case, together

    def __getattr__(self, name: str) -> object:
        return getattr(self.case, name)

    def read_image(self, start: Size, stop: Size) -> np.ndarray | Tensor:
        self.together.wait()
        return self.case.read_image(start, stop)


def test_as_many_threads_as_are_said_read_at_once() -> None:
    together = threading.Barrier(6, timeout=20)  # broken unless so many come
    waiting = [cast(PatchCase, TogetherCase(case, together)) for case in cases()]
    reading, plain = batches(waiting, batch_size=1, workers=6), batches(batch_size=1)
    for number in range(3):
        assert_same(reading(number), plain(number))
    together.abort()
    reading.close()


def test_threads_end_with_the_training() -> None:
    read = batches(workers=2)
    read(0)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("patches")]
    read.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("patches")]


def test_a_case_that_cannot_be_read_ends_the_training_also_from_a_thread() -> None:
    unlabelled = [HeldCase(case.image, None, {}, "broken") for case in cases()]
    reading = batches(unlabelled, workers=1)
    with pytest.raises(ValueError, match="case 'broken' has no label"):
        reading(0)
    reading.close()


def test_a_batch_knows_its_cases_and_what_was_annotated_in_them() -> None:
    read = batches(batch_size=5)
    for number in range(3):
        ids = read.cases_of(number)
        assert sorted(ids) == [f"case_{n}" for n in range(5)]
        _, target = read(number)
        assert target.annotated is not None
        expected = [[True, case_id != "case_1", True] for case_id in ids]
        assert target.annotated.tolist() == expected
    assert read.cases_of(0) != read.cases_of(1)


def test_where_everything_is_annotated_nothing_is_told() -> None:
    everything = [HeldCase(case.image, case.label, case.class_voxels, case.id) for case in cases()]
    assert batches(everything)(0)[1].annotated is None


def test_waiting_and_augmenting_are_timed_apart() -> None:
    phases = []

    @contextmanager
    def clock(phase: str) -> Iterator[None]:
        phases.append(phase)
        yield

    batches(clock=clock)(0)
    assert phases == ["waiting for data", "augmentation"]


def test_threads_are_for_devices_that_would_wait() -> None:
    gpu = torch.device("cuda")
    assert [workers_for("auto", "disk", device) for device in (gpu, CPU)] == [4, 1]
    assert [workers_for("auto", "memory", device) for device in (gpu, CPU)] == [1, 0]
    assert workers_for(0, "disk", gpu) == 0
    assert workers_for(3, "memory", CPU) == 3
