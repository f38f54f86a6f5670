"""Images on which an export is held against its model: given ones, else the run's validation cases, else phantoms."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config_loading import load_config
from pipeline.data.cases import read_case_images
from pipeline.data.phantoms import make_phantom
from pipeline.data.plan import Plan
from pipeline.errors import PipelineError
from pipeline.model import CONFIG, ModelDescription
from pipeline.stages.evaluating.cases import is_own, own_manifest
from pipeline.stages.segmenting.inputs import find_inputs
from pipeline.volumes.volume import Volume

log = logging.getLogger(__name__)

# Cases looked at of a run's validation, and phantoms.
CASES = 2

Channels = dict[str, Volume]


@dataclass(frozen=True, eq=False)
class ParityImages:
    """What an export is held against its model on.

    Attributes:
        source: where the images are from, without the name of a case.
        cases: channel -> volume of each.
    """

    source: str
    cases: tuple[Channels, ...]


def parity_images(folder: Path, description: ModelDescription, plan: Plan, given: Sequence[Path]) -> ParityImages:
    """Read the images for a parity report.

    Args:
        folder: of the model.
        description: of the model.
        plan: of the model.
        given: files as `medseg segment` takes them; none: the validation cases of the model's fold, else phantoms.

    Raises:
        PipelineError: a given file cannot be read, or fits no channel.
    """
    if given:
        sources = find_inputs(given, list(plan.channels), Path("no-such-folder"))
        cases = tuple({name: file.read_image() for name, file in source.files.items()} for source in sources)
        return ParityImages(f"{len(cases)} image{'s' if len(cases) > 1 else ''} given", cases)
    try:
        cases = _validation_cases(folder, description)
    except PipelineError as error:
        log.info("the run's own images are not here (%s)", str(error).partition("\n")[0])
        cases = ()
    if cases:
        return ParityImages(f"{len(cases)} validation cases of {description.manifest_name}", cases)
    log.warning("no real image is here to compare on: phantoms serve; give one by --image")
    return ParityImages(f"{CASES} phantoms, for no real image was at hand", _phantoms(plan))


def _validation_cases(folder: Path, description: ModelDescription) -> tuple[Channels, ...]:
    """Read the first validation cases of a model's fold, where its manifest is still the one it was trained on."""
    manifest = own_manifest(load_config(folder / CONFIG))
    if description.fold is None or not is_own(manifest, description):
        return ()
    cases = manifest.validation_cases(description.fold, unlabelled=True)[:CASES]
    return tuple(read_case_images(manifest, case) for case in cases)


def _phantoms(plan: Plan) -> tuple[Channels, ...]:
    """Make phantoms with the plan's channels, all of one grid."""
    modality: Literal["CT", "MR"] = "CT" if "CT" in plan.channels.values() else "MR"
    made = []
    for seed in range(CASES):
        (image,) = make_phantom(seed, modality=modality).images.values()
        made.append(dict.fromkeys(plan.channels, image))
    return tuple(made)
