"""A worker of `medseg train --fold all`: run as a module, it trains the one fold that its parent names.

It is a training like any other, in a process of its own: what kills it costs no other fold, and `--resume` goes on
with it. When its parent closes the pipe, dead or alive, it ends as by Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import NoReturn

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.progress import lines_only
from pipeline.records import Record, write_text
from pipeline.stages.fold.run import train_fold
from pipeline.stages.train import fold_tasks
from pipeline.stages.worker_processes import begin_work, interrupted_when_parent_ends

log = logging.getLogger(__name__)

FAILED, INTERRUPTED = 2, 130


class FoldOrder(Record):
    """What a worker is told: a line of JSON on its standard input.

    Attributes:
        config: the experiment.
        fold: the fold to hold out.
        resume: go on from its checkpoint.
        reason: file that takes why it failed.
        device: auto, cpu, cuda or cuda:N.
        threads: of this worker.
        log_level: of our log.
    """

    config: Config
    fold: int
    resume: bool
    reason: Path
    device: str
    threads: int
    log_level: int

    def as_line(self) -> bytes:
        """Return it as a worker reads it: through a pipe, for a tracking server's address may hold a password."""
        return json.dumps(self.model_dump(mode="json")).encode() + b"\n"


def main() -> None:
    """Train the fold."""
    order = FoldOrder.model_validate(json.loads(sys.stdin.buffer.readline()))
    begin_work(order.threads, order.log_level)
    lines_only()
    interrupted_when_parent_ends()
    try:
        (task,) = fold_tasks(order.config, str(order.fold), order.device)
        train_fold(task, resume=order.resume)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except PipelineError as error:
        _fail(order, str(error))
    except Exception as error:
        log.exception("fold %d: failed", order.fold)  # A bug: the traceback is wanted.
        _fail(order, f"{type(error).__name__}: {error}")


def _fail(order: FoldOrder, reason: str) -> NoReturn:
    """End with a reason, for the parent's list."""
    write_text(order.reason, reason)
    sys.exit(FAILED)


if __name__ == "__main__":
    main()
