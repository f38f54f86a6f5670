"""The cases of an experiment: its manifest, less the cases that its rule for missing channels leaves out."""

from __future__ import annotations

import logging

from pipeline.config import Config
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.errors import ManifestError

log = logging.getLogger(__name__)


def dataset_of(config: Config) -> Manifest:
    """Load an experiment's manifest.

    Raises:
        ManifestError: it cannot be read, or no case is left that has every channel.
    """
    manifest = load_manifest(config.data.manifest, config.data.root)
    if config.preprocessing.missing_channels == "zero":
        return manifest
    cases = tuple(case for case in manifest.cases if len(case.images) == len(manifest.channels))
    if not cases:
        raise ManifestError(
            f"{config.data.manifest}: no case has all of {', '.join(manifest.channels)}; "
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
