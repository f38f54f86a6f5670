"""A worker process: loads the models once, and segments one case after another as it is told.

Headers are examined in a thread of their own, while the network runs. A worker ends when its parent closes the pipe,
dead or alive: what it leaves half done is done again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np

from pipeline.errors import PipelineError, ResourceError, VolumeError
from pipeline.free_memory import resident_bytes
from pipeline.geometry import Geometry
from pipeline.stages.segmenting.case import CaseInHand, CaseSteps
from pipeline.stages.segmenting.inputs import SegmentInput
from pipeline.stages.segmenting.plan import case_memory
from pipeline.stages.segmenting.sources import ChannelFile
from pipeline.stages.serving.job import Failure
from pipeline.stages.serving.messages import READY, Answer, Order, WorkerTask
from pipeline.stages.worker_processes import begin_work
from pipeline.volumes.stored import files_of, read_header

log = logging.getLogger(__name__)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Answers:
    """The way back: lines on what was the standard output, which is the log's from now on."""

    def __init__(self) -> None:
        self._file: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # What a library prints would otherwise stand among the answers.
        self._mutex = threading.Lock()

    def give(self, answer: Answer) -> None:
        """Write an answer."""
        with self._mutex:
            self._file.write(answer.model_dump_json(exclude_defaults=True) + "\n")
            self._file.flush()


def examined(steps: CaseSteps, order: Order, process_bytes: int) -> Answer:
    """Tell by its headers whether a case can be segmented; next to nothing is read."""
    try:
        for path in order.files.values():
            _refuse_shape(path)
        case_memory(steps.predictor, _source(order), process_bytes)
    except (PipelineError, OSError) as error:
        return _refused(order, failure_of(error), str(error))
    except Exception as error:
        log.exception("job %s: its headers could not be examined", order.name)
        return _refused(order, "bug", f"{type(error).__name__}: {error}")
    return Answer(number=order.number)


def segmented(steps: CaseSteps, order: Order) -> Answer:
    """Segment a case as `medseg segment` does."""
    # One case is in hand at a time: the folder may change between them.
    steps.settings = steps.settings.changed(out=order.folder)
    case = CaseInHand.of(_source(order))
    for step in (steps.read, steps.predict, steps.write):
        case.attempt(step)
    if case.result.status == "failed":
        return _refused(order, failure_of(case.error), case.result.reason or "")
    return Answer(number=order.number, result=case.result.changed(inputs=()))


def failure_of(error: Exception | None) -> Failure:
    """Say whose fault an error is."""
    if isinstance(error, OSError):
        return "disk" if error.errno in _DISK_FULL else "bug"
    if isinstance(error, ResourceError | MemoryError):
        return "memory"
    return "volume" if isinstance(error, PipelineError) else "bug"


def without_paths(reason: str, files: Mapping[str, Path]) -> str:
    """Put a channel's name where a message names its file, which is ours."""
    for channel, path in files.items():
        reason = reason.replace(str(path), f"channel {channel!r}").replace(path.name, f"channel {channel!r}")
    return reason


def main() -> None:
    """Load the models, say so, and work until the parent closes the pipe."""
    path, device = sys.argv[1:]
    task = WorkerTask.model_validate(json.loads(Path(path).read_bytes()))
    answers = Answers()
    begin_work(task.threads, task.log_level)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Service managers send it to all; the parent ends us in time.
    try:
        steps = CaseSteps(task.settings.changed(device=device))
    except PipelineError as error:
        answers.give(Answer(number=READY, failure="bug", reason=str(error)))
        sys.exit(2)
    _warm_up(steps)
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(steps, orders, answers), daemon=True).start()
    answers.give(Answer(number=READY))
    while True:
        answers.give(segmented(steps, orders.get()))


def _warm_up(steps: CaseSteps) -> None:
    """Load what the first memory plan loads, torch's tracer among it, before a client waits for it."""
    window = Geometry(steps.predictor.plan.patch_size, np.eye(4))
    with suppress(ResourceError):
        steps.predictor.memory_plan(window, window)


def _listen(steps: CaseSteps, orders: queue.SimpleQueue[Order], answers: Answers) -> None:
    """Take orders; examine at once, leave the rest to the main thread; at the end of the pipe end at once."""
    process_bytes = resident_bytes()
    for line in sys.stdin:
        order = Order.model_validate_json(line)
        if order.kind == "examine":
            answers.give(examined(steps, order, process_bytes))
        else:
            orders.put(order)
    os._exit(0)  # The main thread may be deep in a network.


def _source(order: Order) -> SegmentInput:
    """Return an order's case."""
    return SegmentInput(order.name, {channel: ChannelFile(path) for channel, path in order.files.items()})


def _refuse_shape(path: Path) -> None:
    """Refuse what an upload cannot be: several volumes in one file, or a file that names another."""
    if len(files_of(path)) > 1:
        raise VolumeError(f"{path}: its voxels stand in a file of their own; send one file: .nii.gz, .nrrd or .mha")
    header = read_header(path)
    if len(header.shape) > 3 or header.kind != "scalar":
        raise VolumeError(
            f"{path}: holds {header.kind} voxels of shape {header.shape}; send one volume (X, Y, Z) of real numbers"
            " a channel"
        )
    _ = header.geometry


def _refused(order: Order, failure: Failure, reason: str) -> Answer:
    """Return the answer to an order that cannot be done."""
    told = without_paths(reason, order.files).replace(f"{order.folder}/", "")
    return Answer(number=order.number, failure=failure, reason=told)


if __name__ == "__main__":
    main()
