"""Phantoms: small synthetic patients, for `medseg demo` and the tests; made, and written as data sets."""

from pipeline.data.phantoms.layouts import LAYOUTS, write_phantom_dataset
from pipeline.data.phantoms.making import (
    CHANNELS,
    IGNORED,
    LABEL_PAIRS,
    LABELS,
    NESTED_LABELS,
    NESTED_REGIONS,
    Modality,
    Phantom,
    draw_geometry,
    made_sparse,
    make_phantom,
)

__all__ = [
    "CHANNELS",
    "IGNORED",
    "LABELS",
    "LABEL_PAIRS",
    "LAYOUTS",
    "NESTED_LABELS",
    "NESTED_REGIONS",
    "Modality",
    "Phantom",
    "draw_geometry",
    "made_sparse",
    "make_phantom",
    "write_phantom_dataset",
]
