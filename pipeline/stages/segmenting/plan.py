"""`medseg segment --plan`: what each case will take in memory, from headers alone, before a voxel is read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from pipeline.errors import PipelineError, ResourceError
from pipeline.free_memory import available_bytes, resident_bytes
from pipeline.inference.memory import MemoryPlan
from pipeline.predictor import Predictor
from pipeline.stages.segmenting.inputs import SegmentInput
from pipeline.volumes.formats.header import Header
from pipeline.volumes.formats.itk import is_itk

# Of a longer batch the largest cases are shown.
CASES_SHOWN = 5
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def case_memory(predictor: Predictor, source: SegmentInput, process_bytes: int) -> MemoryPlan:
    """Return what a case takes, by its files' headers; what is cut off around the body is not known yet, and counted.

    Args:
        predictor: that will segment it.
        source: the case.
        process_bytes: what the process takes without the case.

    Raises:
        PipelineError, OSError: a header cannot be read, or the case does not fit in memory.
    """
    headers = [file.read_header() for file in source.files.values()]
    native = headers[0].geometry
    prepared = native.reoriented(predictor.plan.orientation).respaced(predictor.plan.spacing_mm)
    return predictor.memory_plan(prepared, native, input_bytes=_bytes_read(headers), process_bytes=process_bytes)


def plan_text(predictor: Predictor, cases: Sequence[SegmentInput]) -> str:
    """Return the memory plans of the cases for people, the largest first; those that cannot be planned before them."""
    plans: dict[str, MemoryPlan] = {}
    lines = []
    process_bytes = resident_bytes()
    for case in cases:
        try:
            plans[case.name] = case_memory(predictor, case, process_bytes)
        except (PipelineError, OSError) as error:
            lines.append(f"{case.name}: {error}")
    largest = sorted(plans, key=lambda name: -plans[name].peak_ram_bytes)[:CASES_SHOWN]
    lines += [f"{name}: {plans[name].as_text()}" for name in largest]
    if len(plans) > len(largest):
        windows = sum(plan.windows for plan in plans.values())
        lines.append(f"and {len(plans) - len(largest)} smaller cases; {windows} windows in all")
    return "\n".join([*lines, "while one case is predicted the next is read and the last written, if memory admits it"])


def memory_share(max_memory: str | None, processes: int) -> int | None:
    """Return what each process may take; None: a single one takes what is free."""
    if max_memory is None:
        return None if processes == 1 else available_bytes() // processes
    return bytes_of(max_memory) // processes


def bytes_of(text: str, option: str = "--max-memory") -> int:
    """Read a size such as 8GB or 500 MiB.

    Raises:
        PipelineError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if found is None or found[2].upper() not in _UNITS:
        raise PipelineError(f"{option} {text}: expected a size such as 8GB or 500MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def wanted_bytes(predictor: Predictor, source: SegmentInput, process_bytes: int) -> float:
    """Return what a case takes beside the process itself; infinite where it does not fit, 0 where that is not known."""
    try:
        return case_memory(predictor, source, process_bytes).peak_ram_bytes - process_bytes
    except ResourceError:
        return math.inf
    except (PipelineError, OSError):
        return 0.0  # It fails when it is read, which says why.


def _bytes_read(headers: Sequence[Header]) -> int:
    """Return what the channels take while they are read: a volume each as float32, and one file's voxels at a time."""
    return sum(4 * math.prod(header.shape[:3]) for header in headers) + max(map(_stored_bytes, headers))


def _stored_bytes(header: Header) -> int:
    """Return what a channel's voxels take as they are stored: ITK reads a file's volumes all at once."""
    return math.prod(header.shape if is_itk(header.path) else header.shape[:3]) * header.dtype.itemsize
