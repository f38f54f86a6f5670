"""A training that goes wrong names case and stage; one that goes right says where its time went and what it saw."""

import json
import logging
import re
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from phantom_experiments import changed, preprocessed, task_of
from torch import Tensor

from pipeline.config import Config
from pipeline.errors import TrainingError
from pipeline.model import WEIGHTS, weights_sha256
from pipeline.pictures import Patch, draw_learning_curves, draw_patches
from pipeline.stages import train
from pipeline.stages.fold.diagnosis import FoldDiagnosis
from pipeline.stages.fold.hooks import FoldHooks
from pipeline.stages.fold.run import complete_fold, train_fold
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.models import LAST
from pipeline.tracking import RunLog, metric_history
from pipeline.training.diagnosis.stopwatch import FINISHING, STARTING, Stopwatch, unheard
from pipeline.training.loop import train as run_loop
from pipeline.training.sampling.cases import PatchCase

SETTINGS = (
    "preprocessing.patch_size=[16, 16, 16]",
    "training.budget.steps=4",
    "training.steps_per_epoch=2",
    "training.validation_every_epochs=2",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An experiment on preprocessed phantoms, four steps long."""
    return preprocessed(tmp_path_factory.mktemp("diagnosis"), SETTINGS, cases=6, folds=3)


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["kind"] == kind]


def test_a_run_says_where_its_time_went_and_what_came_of_it(prepared: Config, caplog: pytest.LogCaptureFixture) -> None:
    task = task_of(prepared.changed(name="times"))
    state, clock = task.new_state(), Stopwatch(task.device)
    state.total_steps = 4
    batches = task.batches(state.network, clock)
    tracked = RunLog.create(task.folder, uri=None, workspace=prepared.workspace, experiment="x", name="x")
    diagnosis = FoldDiagnosis(task, state, batches, clock)
    diagnosis.count_to(STARTING)
    with caplog.at_level(logging.INFO):
        hooks = FoldHooks(task, state, tracked, diagnosis)
        run_loop(state, diagnosis.batch, task.schedule(state), task.settings, hooks, clock)
        diagnosis.count_to(FINISHING)
        diagnosis.summarise()
    epochs = [event["values"] for event in events(task.folder, "metrics")]
    assert len(epochs) == 2
    for values in epochs:
        assert isinstance(values, dict)
        shares = [share for name, share in values.items() if name.startswith("time/share/")]
        assert sum(shares) == pytest.approx(1.0)
        for name in ("time/share/forward_and_backward", "time/share/waiting_for_data", "time/share/augmentation"):
            assert values[name] > 0
        assert (values["time/share/validation"] > 0) == ("val/score" in values)
        assert values["train/gradient_norm"] > 0
    for phase in ("starting", "forward and backward", "validation"):
        assert phase in diagnosis.spent
    assert caplog.messages[-2].startswith("fold 0: where the time went")
    assert re.match(r"fold 0: steps 0 to 4 in \d+\.\d minutes; best score 0\.\d+ at step 4; ", caplog.messages[-1])
    assert caplog.messages[-1].endswith(str(task.folder / "models/best"))


@pytest.mark.parametrize("task_name", ["segment", "denoise"])
def test_the_first_patches_are_pictured_whoever_reads_them_and_drawn_again_in_training(
    prepared: Config, task_name: str
) -> None:
    pictures = []
    for workers in (0, 2):
        config = changed(prepared.changed(name=f"{task_name}_{workers}"), "training", workers=workers)
        task = task_of(config.changed(task=task_name))
        state, clock = task.new_state(), Stopwatch(task.device)
        batches = task.batches(state.network, clock)
        first, _ = batches(0)
        tracked = RunLog.create(task.folder, uri=None, workspace=config.workspace, experiment="x", name="x")
        FoldDiagnosis(task, state, batches, clock).picture_patches(tracked)
        assert torch.equal(batches(0)[0], first)
        batches.close()
        (picture,), (artifact,) = events(task.folder, "image"), events(task.folder, "artifact")
        assert (picture["key"], picture["step"]) == ("augmented patches", 0)
        assert picture["path"] == artifact["path"] == "pictures/augmented_patches.png"
        pictures.append((task.folder / str(picture["path"])).read_bytes())
    assert pictures[0] == pictures[1]


def test_patches_are_drawn_with_their_cases_and_outlines() -> None:
    classes = np.zeros((6, 5, 4), np.int64)
    classes[1:3, 1:3, 3] = 2
    image = np.arange(120.0).reshape(6, 5, 4)
    patches = [Patch("a", image, classes), Patch("b", image * np.nan, classes * 0), Patch("c", image, None)]
    figure = draw_patches(patches, (1.0, 1.0, 2.0), ("background", "x", "y", "ignored"), columns=2)
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["a", "b", "c", ""]
    # Across the thickest voxels, the slice that holds the structure; rows run upwards.
    drawn = panels[0].images[0].get_array()
    assert drawn is not None
    assert np.array_equal(drawn, image[:, :, 3].T)
    assert [bool(panel.collections) for panel in panels] == [True, False, False, False]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["y"]


def test_learning_curves_show_the_norm_of_the_gradient() -> None:
    curves = {"train/loss": [(1, 2.0)], "train/gradient_norm": [(1, 0.5), (2, 0.4)], "time/epoch_s": [(1, 9.0)]}
    loss, norm, validation = draw_learning_curves(curves).axes
    assert list(loss.lines[0].get_ydata()) == [2.0]
    assert list(norm.lines[0].get_ydata()) == [0.5, 0.4]
    assert not validation.lines


def test_a_poisoned_case_is_named_with_the_voxels_in_the_store(prepared: Config) -> None:
    task = task_of(prepared.changed(name="poisoned"))
    case = task.training_cases[1].id
    sound, key = task.store.read(case), task.store.key_of(case)
    assert key is not None
    image = sound.image.copy()
    image[0, ::2] = np.inf
    task.store.write(case, replace(sound, image=image), key)
    try:
        with pytest.raises(TrainingError, match=rf"the image of case {case} holds inf or NaN; mend the case") as error:
            train_fold(task, resume=False)
    finally:
        task.store.write(case, sound, key)
    assert f"{np.isinf(image).sum()} in {case}" in str(error.value)
    assert not (task.folder / "models").exists()
    assert events(task.folder, "finish")[-1]["status"] == "FAILED"


def test_weights_that_overflow_name_the_layer_and_what_to_do(prepared: Config) -> None:
    config = changed(prepared.changed(name="steep"), "training", learning_rate=1e38, gradient_clip=None)
    task = task_of(changed(config, "training", precision="fp32", warmup_fraction=0.0))
    with pytest.raises(TrainingError, match=r"step \d: .*inf or NaN.*lower training.learning_rate"):
        train_fold(task, resume=False)


@pytest.mark.slow
def test_a_training_is_over_once_its_log_says_so(prepared: Config) -> None:
    task = task_of(prepared.changed(name="cut_short"))
    train_fold(task, resume=False)
    log, last = task.folder / "events.jsonl", task.folder / LAST / WEIGHTS
    open_files = [Path(file).resolve() for file in Path("/proc/self/fd").iterdir() if file.exists()]
    assert log.resolve() not in open_files
    digest = weights_sha256(last)
    assert events(task.folder, "finish")[-1]["status"] == "FINISHED"
    # As of a process that was killed between its last model and its last word, by who sends its log.
    with closing(RunLog.open(task.folder)) as tracked:
        tracked.finish("KILLED")
    assert not task.is_finished
    complete_fold(task)
    assert task.is_finished
    assert weights_sha256(last) == digest


def test_where_nothing_is_held_out_nothing_stops_early(prepared: Config, caplog: pytest.LogCaptureFixture) -> None:
    often = {"early_stop_validations": 1, "validation_every_epochs": 1, "budget": {"steps": 8}}
    task = task_of(changed(prepared.changed(name="unvalidated"), "training", **often))
    assert task.settings.early_stop_validations == 1
    unlabelled = (case.changed(label=None) if case.fold == task.fold else case for case in task.manifest.cases)
    task = replace(task, manifest=task.manifest.changed(cases=tuple(unlabelled)))
    assert task.settings.early_stop_validations is None
    with caplog.at_level(logging.WARNING):
        train_fold(task, resume=False)
    assert "holds no case with a label to validate on" in caplog.text
    assert metric_history(task.folder)["val/score"] == [(2, 0.0), (4, 0.0), (6, 0.0), (8, 0.0)]


class Stalled(Exception):
    """What ends the training once it has been told."""


@dataclass(frozen=True)
class BlockedCase:
    """A case that cannot be read once training has begun, and says so when the stall has been told."""

    case: PatchCase
    begun: Path
    told: threading.Event

    def __getattr__(self, name: str) -> object:
        return getattr(self.case, name)

    def read_image(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> NDArray[np.float16] | Tensor:
        if self.begun.exists():
            assert self.told.wait(30)
            raise Stalled
        return self.case.read_image(start, stop)


class BlockedTask(FoldTask):
    """A training whose second case is such a one."""

    told = threading.Event()

    def patch_cases(self, reached: Callable[[str], None] = unheard) -> list[PatchCase]:
        first, second, *others = super().patch_cases(reached)
        return [first, cast(PatchCase, BlockedCase(second, self.checkpoint, self.told)), *others]


class UnreadableTask(FoldTask):
    """A training whose second case cannot be read into memory."""

    def patch_cases(self, reached: Callable[[str], None] = unheard) -> list[PatchCase]:
        reached(self.training_cases[1].id)
        assert BlockedTask.told.wait(30)
        raise Stalled


class Listener(logging.Handler):
    """Hears the first warning of data that do not come."""

    def __init__(self, where: str) -> None:
        super().__init__(logging.WARNING)
        self.where = where
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if self.where in record.getMessage():
            self.heard.append(record.getMessage())
            BlockedTask.told.set()


def stall_of(task: FoldTask, where: str) -> str:
    """Train until a stall has been told, and return what was said."""
    BlockedTask.told.clear()
    listener, logger = Listener(where), logging.getLogger("pipeline")
    logger.addHandler(listener)
    try:
        with pytest.raises(Stalled):
            train_fold(task, resume=False)
    finally:
        logger.removeHandler(listener)
    return listener.heard[-1]


def test_a_case_that_cannot_be_read_into_memory_is_named_before_the_first_step(prepared: Config) -> None:
    config = changed(prepared.changed(name="unreadable"), "training", stall_minutes=1 / 60)
    task = UnreadableTask.prepare(config, train.dataset_of(config), 0, torch.device("cpu"))
    said, stack = stall_of(task, "starting").split("\n", 1)
    assert said == f"no progress for 0.0 minutes; starting, case {task.training_cases[1].id}"
    assert "in patch_cases" in stack


@pytest.mark.parametrize("workers", [0, 2])
def test_a_case_that_cannot_be_read_is_named_with_stage_and_stack(prepared: Config, workers: int) -> None:
    config = changed(prepared.changed(name="blocked"), "training", stall_minutes=1 / 60, workers=workers, batch_size=2)
    task = BlockedTask.prepare(config, train.dataset_of(config), 0, torch.device("cpu"))
    said, stack = stall_of(task, "waiting for data, step").split("\n", 1)
    blocked = task.training_cases[1].id
    assert re.fullmatch(rf"no progress for 0\.0 minutes; waiting for data, step \d, case {blocked}", said)
    assert "in read_image" in stack
    assert {"medseg.stalled": said} in [event["values"] for event in events(task.folder, "tags")]
