"""One case's way into the store; the same wherever it is done: in a thread of `preprocess`, or on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.data.cases import read_case_images, read_case_label
from pipeline.data.manifest import Case, Manifest
from pipeline.data.plan import Plan
from pipeline.data.store import CaseStore
from pipeline.preparation.preprocessing import prepare_case


@dataclass(frozen=True)
class Wanted:
    """A case that is to be made.

    Attributes:
        case: it.
        key: digest of all that it is made from.
        memory_bytes: what making it takes at its peak.
    """

    case: Case
    key: str
    memory_bytes: int


def prepare_into(store: CaseStore, manifest: Manifest, case: Case, plan: Plan, key: str) -> None:
    """Read, prepare and write a case.

    Args:
        store: where it is written.
        manifest: of its data set.
        case: it.
        plan: how it is prepared.
        key: digest of all that it is made from.
    """
    images = read_case_images(manifest, case)
    label = read_case_label(manifest, case, images)
    native = label.geometry if label else next(iter(images.values())).geometry
    store.write(case.id, prepare_case(images, label, plan, native), key)
