"""What a service and its worker processes say to each other: a line of JSON each, orders one way, answers the other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.records import Record
from pipeline.stages.segmenting.case import SegmentSettings
from pipeline.stages.segmenting.report import CaseResult
from pipeline.stages.serving.job import Failure

# The number of a worker's first answer, which follows no order: its models are loaded, or why they are not.
READY = 0


class WorkerTask(Record):
    """What a worker is told at its start, but for its device.

    Attributes:
        settings: of every case.
        threads: of this worker.
        log_level: of our log.
    """

    settings: SegmentSettings
    threads: int
    log_level: int


class Order(Record):
    """What a worker is to do.

    Attributes:
        number: which the answer repeats.
        kind: examine: tell by the headers whether the case can be segmented; segment: do it.
        name: of the case.
        folder: where the label map goes.
        files: channel -> file, in the model's order of channels.
    """

    number: int
    kind: Literal["examine", "segment"]
    name: str
    folder: Path
    files: dict[str, Path]


class Answer(Record):
    """What became of an order.

    Attributes:
        number: the order's.
        failure: whose fault it is that it could not be done; None where it was.
        reason: why it could not.
        result: of a case that was segmented.
    """

    number: int
    failure: Failure | None = None
    reason: str | None = None
    result: CaseResult | None = None
