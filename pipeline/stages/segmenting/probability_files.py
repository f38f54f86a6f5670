"""Probabilities of a case on disk: a volume each label, written plane by plane as they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipeline.data.plan import Plan
from pipeline.geometry import Geometry
from pipeline.inference.probabilities import ProbabilityRequest, ProbabilityType
from pipeline.volumes.plane_writing import PlaneWriter


@contextmanager
def probabilities_into(
    path: Path,
    native: Geometry,
    plan: Plan,
    labels: Sequence[str],
    *,
    dtype: ProbabilityType = "uint8",
    temperature: float,
    header_of: Path | None,
) -> Iterator[ProbabilityRequest]:
    """Yield what a predictor is asked for; the file is written when the block ends well.

    Args:
        path: of the file, .nii.gz.
        native: the case's grid.
        plan: names the labels, in the order of their class indices.
        labels: whose probabilities are wanted.
        dtype: of the numbers, whose largest is 1.
        temperature: that logits are divided by.
        header_of: an image on the native grid; None: none that is NIfTI.
    """
    writer = PlaneWriter(
        path,
        native,
        volumes=len(labels),
        dtype=dtype,
        scale=1 / np.iinfo(dtype).max,
        header_of=header_of,
        comment={"probabilities": list(labels)},
    )
    names = list(plan.labels)
    with writer:
        yield ProbabilityRequest(
            tuple(names.index(label) for label in labels), writer.put, dtype, temperature=temperature
        )
