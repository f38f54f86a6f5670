"""What a fold's training says of itself: its time, its stalls, its faults, and the patches that it learns from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice

import numpy as np

from pipeline.errors import TrainingError
from pipeline.networks.contract import centre_crop
from pipeline.pictures import Patch, draw_patches
from pipeline.records import atomic_path
from pipeline.stages.fold.task import FoldTask
from pipeline.stages.models import BEST
from pipeline.tracking import RunLog
from pipeline.training.budget import repeated
from pipeline.training.checkpoints import load_checkpoint
from pipeline.training.diagnosis.advice import Circumstances, advice, shares_of, spoken
from pipeline.training.diagnosis.explanation import explained, named
from pipeline.training.diagnosis.finiteness import Fault
from pipeline.training.diagnosis.replay import Finding, replay
from pipeline.training.diagnosis.stopwatch import AUGMENTATION, STEPS, WAITING, Stopwatch
from pipeline.training.diagnosis.watchdog import Watchdog
from pipeline.training.distributed import gathered_texts
from pipeline.training.loop import Batch
from pipeline.training.losses.target import Target
from pipeline.training.optimisation import Schedule
from pipeline.training.sampling.batches import CaseBatches
from pipeline.training.state import TrainState

log = logging.getLogger(__name__)

# Patches in the picture at the start of a run.
PICTURED_PATCHES = 8


def watchdog_of(task: FoldTask, clock: Stopwatch) -> Watchdog:
    """Return what warns when a training stands still, from its first file on."""
    return Watchdog(
        clock,
        60 * task.config.training.stall_minutes,
        place=lambda: f"case {clock.case}" if clock.case else "before the first case",
        report=lambda said: None,
    )


class FoldDiagnosis:
    """Looks after one fold's training.

    Attributes:
        clock: of the training's thread; for the loop.
        spent: seconds by phase, as far as they have been read.
    """

    def __init__(self, task: FoldTask, state: TrainState, batches: CaseBatches, clock: Stopwatch) -> None:
        self.task = task
        self.state = state
        self.batches = batches
        self.clock = clock
        self.spent: dict[str, float] = {}
        self._first_step = state.step  # a resumed training begins at its checkpoint
        self._number = 0
        self._advised: set[str] = set()

    def batch(self, number: int) -> Batch:
        """Return a batch, and remember that it is being worked on."""
        self._number = number
        return self.batches(number)

    def count_to(self, phase: str) -> None:
        """Count all of the time since the last reading to one phase."""
        self._count({phase: sum(self.clock.read().values())})

    def epoch_times(self) -> dict[str, float]:
        """Return the times since the last reading as metrics; say them in a line, and what to change for the better."""
        seconds = self.clock.read()
        self._count(seconds)
        log.info("fold %d  %s", self.task.fold, spoken(seconds))
        # The first epoch pays for memory and for the choice of kernels.
        if self.state.step > self.task.settings.steps_per_epoch:
            self._advise()
        shares = {f"time/share/{phase.replace(' ', '_')}": share for phase, share in shares_of(seconds).items()}
        return {"time/epoch_s": sum(seconds.values()), **shares}

    def _count(self, seconds: Mapping[str, float]) -> None:
        """Add to what has been spent."""
        self.spent = {
            phase: self.spent.get(phase, 0.0) + seconds.get(phase, 0.0) for phase in {**self.spent, **seconds}
        }

    def advice(self) -> dict[str, str]:
        """Return what to change, by the phase that takes too long."""
        section = self.task.config.training
        return advice(
            self.spent,
            Circumstances(
                on_disk=self.task.cases_at == "disk",
                workers=self.task.workers,
                validation_every_epochs=section.validation_every_epochs,
                steps_per_epoch=section.steps_per_epoch,
            ),
        )

    def _advise(self) -> None:
        """Give the advice that has not been given yet."""
        for phase, sentence in self.advice().items():
            if phase not in self._advised:
                log.warning("%s", sentence)
                self._advised.add(phase)

    def takes_over(self, watchdog: Watchdog, tracked: RunLog) -> None:
        """Let a watchdog know where training stands, and write stalls into the run too, with one told before."""

        def report(said: str) -> None:
            tracked.tags({"medseg.stalled": said})

        watchdog.place, watchdog.report = self.place, report
        if watchdog.last:
            report(watchdog.last)

    def place(self) -> str:
        """Say what is worked on: the case that was reached or is being read, or the cases of the batch."""
        if self.clock.case:
            return f"case {self.clock.case}"
        if self.clock.phase not in (WAITING, AUGMENTATION, STEPS):
            return f"step {self.state.step}"
        return f"step {self.state.step}, {named(self.batches.cases_at_work(self._number))}"

    def not_finite(self, schedule: Schedule, bad_step: int) -> TrainingError:
        """Return the error for a loss or gradient that was not finite, after the steps before it were done again."""
        task = self.task
        log.warning("fold %d: not finite at step %d; looking for the cause from the checkpoint on", task.fold, bad_step)
        recount = repeated(dict(self.state.recounts))  # as it is now
        load_checkpoint(task.checkpoint, self.state, task.facts)
        finding = replay(self.state, self.batch, schedule, task.settings, bad_step, recount)
        return TrainingError(
            _earliest(finding.order if finding else (), self._said(finding) if finding else "")
            or f"step {bad_step}: loss or gradient was inf or NaN, and finite when the step was done again; among "
            f"{named(self._cases_of_step(bad_step))}; go on with --resume, or lower training.learning_rate"
        )

    def _said(self, finding: Finding) -> str:
        """Say what was found."""
        cases = self._cases_of(finding)
        said = explained(finding, cases, half_precision=self.task.dtype.itemsize == 2)
        return f"{said}{self._stored_faults(finding.fault, cases)}"

    def _cases_of(self, finding: Finding) -> list[str]:
        """Return the ids of the cases that a finding concerns."""
        if finding.batch is None:
            return []
        cases = self.batches.cases_of(finding.batch)
        return [cases[row] for row in finding.fault.rows] or list(cases)

    def _cases_of_step(self, step: int) -> list[str]:
        """Return the ids of the cases of a step."""
        every = self.task.settings.accumulate
        return [case for number in range(step * every, (step + 1) * every) for case in self.batches.cases_of(number)]

    def _stored_faults(self, fault: Fault, cases: list[str]) -> str:
        """Say how many voxels of the cases' prepared images are not finite: augmentation may have made them so."""
        if fault.kind != "image":
            return ""
        images = {case: self.task.store.read(case).image for case in dict.fromkeys(cases)}
        counts = {case: int((~np.isfinite(image)).sum()) for case, image in images.items()}
        return f" (such voxels in the store: {', '.join(f'{number} in {case}' for case, number in counts.items())})"

    def picture_patches(self, tracked: RunLog) -> None:
        """Draw the first patches as the network will see them, with the outlines of what it is to learn."""
        path = self.task.folder / "pictures" / "augmented_patches.png"
        with atomic_path(path) as temporary:
            patches = list(islice(self._patches(), PICTURED_PATCHES))
            draw_patches(patches, self.task.plan.spacing_mm, self.task.plan.class_names).savefig(temporary)
        tracked.image("augmented patches", path, 0)
        tracked.artifact(path, "pictures")

    def _patches(self) -> Iterator[Patch]:
        """Yield patch after patch of the training; to take them draws nothing that the training would miss."""
        for number in count():
            image, target = self.batch(number)
            shown = centre_crop(image[:, :1], self.task.plan.patch_size)[:, 0].float().cpu().numpy()
            classes = target.classes.cpu().numpy() if isinstance(target, Target) else [None] * len(shown)
            for case, *patch in zip(self.batches.cases_of(number), shown, classes, strict=True):
                yield Patch(case, *patch)

    def summarise(self) -> None:
        """Say what came of the training, where its time went in all, and what to change next time."""
        state, minutes = self.state, sum(self.spent.values()) / 60
        lines = [
            f"where the time went, {spoken(self.spent)}",
            *self.advice().values(),
            f"steps {self._first_step} to {state.step} in {minutes:.1f} minutes; "
            f"best score {state.best_score:.4f} at step {state.best_step}; model in {self.task.folder / BEST}",
        ]
        for line in lines:
            log.info("fold %d: %s", self.task.fold, line)


def _earliest(order: Sequence[int], said: str) -> str:
    """Return what the processes say whose findings came about first, each of them having looked into its own patches.

    Args:
        order: which of several findings is earlier; of as many numbers everywhere, less than a million.
        said: "" where this process has found nothing.
    """
    # As text that may be cut off: digits come first, and sort as the numbers do.
    mine = " ".join(f"{number + 1:07d}" for number in order) + f"\n{said}" if said else ""
    found = [text.partition("\n") for text in gathered_texts(mine) if text]
    first = min((order for order, _, _ in found), default="")
    return "; ".join(dict.fromkeys(said for order, _, said in found if order == first))
