"""The cases of an experiment: its manifest, less the cases that its rule for missing channels leaves out."""

from __future__ import annotations

import logging

from pipeline.config import Config, PreprocessingSection
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.errors import ManifestError

log = logging.getLogger(__name__)


def dataset_of(config: Config) -> Manifest:
    """Load an experiment's manifest.

    Raises:
        ManifestError: it cannot be read, or no case is left that has every channel.
    """
    return taking_part(load_manifest(config.data.manifest, config.data.root), config.preprocessing)


def taking_part(manifest: Manifest, section: PreprocessingSection) -> Manifest:
    """Return a manifest less the cases that a configuration's rule for missing channels leaves out.

    Raises:
        ManifestError: no case is left that has every channel.
    """
    if section.missing_channels == "zero":
        return manifest
    cases = tuple(case for case in manifest.cases if len(case.images) == len(manifest.channels))
    if not cases:
        raise ManifestError(
            f"manifest {manifest.name!r}: no case has all of {', '.join(manifest.channels)}; "
            "set preprocessing.missing_channels: zero"
        )
    if left_out := len(manifest.cases) - len(cases):
        log.info(
            "%s: %d of %d cases lack a channel and are left out (preprocessing.missing_channels: skip)",
            manifest.name,
            left_out,
            len(manifest.cases),
        )
    return manifest.changed(cases=cases)
