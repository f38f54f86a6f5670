"""Reading a case of a manifest: its channels and its label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pipeline.data.manifest import Case, ImageFile, Manifest
from pipeline.volumes.relabelling import Array, relabelled
from pipeline.volumes.volume import Volume, read_image, read_label, smallest_type


def read_file(manifest: Manifest, file: ImageFile) -> Volume:
    """Read the image that a manifest names."""
    return read_image(manifest.path_of(file), file.index)


def read_case_images(manifest: Manifest, case: Case) -> dict[str, Volume]:
    """Read a case's channels, each on its own grid, in the manifest's order; those the case lacks are left out."""
    return {name: read_file(manifest, case.images[name]) for name in manifest.channels if name in case.images}


def read_case_label(manifest: Manifest, case: Case, images: Mapping[str, Volume]) -> Volume | None:
    """Read a case's label, its values as the manifest's labels have them; None where it has none.

    It takes over the grid of the first image whose corners lie within a tenth of a voxel of its own, since headers are
    rounded; where there is none it keeps its own.
    """
    if case.label is None:
        return None
    label = read_label(manifest.path_of(case.label), case.label.index)
    if manifest.file_values:
        label = replace(label, array=as_labels(label.array, manifest))
    grids = (image.geometry for image in images.values())
    return replace(label, geometry=next((grid for grid in grids if grid.matches(label.geometry)), label.geometry))


def as_labels(label: Array, manifest: Manifest) -> Array:
    """Return a label map as it is stored with the values that the manifest's labels have.

    Raises:
        VolumeError: it holds a value that stands for no label.
    """
    table = manifest.value_table
    kind = smallest_type(min(table.values()), max(table.values()))
    return relabelled(label, table, kind, f"the manifest's, {manifest.stored_values}")
