"""What is known of a structure beforehand, applied to its prediction: it is one piece, or not smaller than so much.

The rules of a model are those of its configuration, and beside them those that `medseg find-best` has chosen on
predictions of cases that it had not seen: they lie in the model's folder as postprocessing.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveFloat
from scipy import ndimage

from pipeline.config import InferenceSection
from pipeline.data.plan import Plan
from pipeline.errors import ConfigError, ModelError
from pipeline.geometry import Geometry
from pipeline.records import Record, refuse_other_format, write_json
from pipeline.volumes.components import VOLUME_SLACK, component_sizes, components_of

POSTPROCESSING, POSTPROCESSING_FORMAT_VERSION = "postprocessing.json", 1


class Rules(Protocol):
    """Which components of which labels cannot be of their structure."""

    @property
    def largest_component(self) -> tuple[str, ...]:
        """Labels of which only the largest component stays."""

    @property
    def smallest_volume_ml(self) -> Mapping[str, float]:
        """Label -> volume below which a component goes."""


class Postprocessing(Record):
    """Rules that were chosen on out-of-fold predictions.

    Attributes:
        format_version: of the file.
        largest_component: labels of which only the largest component stays.
        smallest_volume_ml: label -> volume below which a component goes.
        chosen_on: on which predictions, for people.
    """

    format_version: int = POSTPROCESSING_FORMAT_VERSION
    largest_component: tuple[str, ...] = ()
    smallest_volume_ml: dict[str, PositiveFloat] = {}
    chosen_on: str = ""

    @property
    def has_rules(self) -> bool:
        """Whether there is any rule."""
        return bool(self.largest_component or self.smallest_volume_ml)

    def as_text(self) -> str:
        """Return the rules in a line; "none" where there is none."""
        largest = [f"largest component of {label}" for label in self.largest_component]
        smallest = [f"{label} in pieces of at least {ml:g} ml" for label, ml in self.smallest_volume_ml.items()]
        return ", ".join([*largest, *smallest]) or "none"


def save_postprocessing(folder: Path, rules: Postprocessing) -> None:
    """Write chosen rules into a model's folder."""
    write_json(folder / POSTPROCESSING, rules.model_dump(mode="json"))


def read_postprocessing(folder: Path) -> Postprocessing:
    """Read the rules that were chosen for a model; none where it has no such file.

    Raises:
        ModelError: it is damaged, or of another format version.
    """
    path = folder / POSTPROCESSING
    if not path.exists():
        return Postprocessing()
    try:
        content = json.loads(path.read_bytes())
        version = content.get("format_version")
        refuse_other_format(ModelError, path, version, POSTPROCESSING_FORMAT_VERSION, "run `medseg find-best` again")
        return Postprocessing.model_validate(content)
    except (ValueError, AttributeError) as error:  # not JSON, not an object, or other fields
        what = str(error).partition("\n")[0]
        raise ModelError(f"{path}: is damaged ({what}); run `medseg find-best` again, or remove it") from None


def common_rules(folders: Sequence[Path]) -> Postprocessing:
    """Return the chosen rules of a model, or of an ensemble: those that all members have, of volumes the smallest.

    So nothing is taken away that one of them alone would have kept.

    Args:
        folders: of the models, at least one.

    Raises:
        ModelError: a model's rules are damaged, or of another format version.
    """
    members = [read_postprocessing(folder) for folder in folders]
    first = members[0]
    largest = [label for label in first.largest_component if all(label in m.largest_component for m in members)]
    volumes = {
        label: min(m.smallest_volume_ml[label] for m in members)
        for label in first.smallest_volume_ml
        if all(label in m.smallest_volume_ml for m in members)
    }
    sources = dict.fromkeys(m.chosen_on for m in members) if largest or volumes else ()
    return Postprocessing(
        largest_component=tuple(largest), smallest_volume_ml=volumes, chosen_on="; ".join(filter(None, sources))
    )


def with_rules(inference: InferenceSection, chosen: Postprocessing) -> InferenceSection:
    """Return a model's inference with chosen rules beside its own: a component stays where both let it."""
    smallest = dict(inference.smallest_volume_ml)
    for label, ml in chosen.smallest_volume_ml.items():
        smallest[label] = max(ml, smallest.get(label, 0.0))
    largest = dict.fromkeys((*inference.largest_component, *chosen.largest_component))
    return inference.changed(largest_component=tuple(largest), smallest_volume_ml=smallest)


def postprocess(classes: NDArray[Any], plan: Plan, native: Geometry, rules: Rules) -> NDArray[Any]:
    """Turn components that cannot be of their structure into background.

    Of a label in `largest_component` only the largest 26-connected component stays (of equal ones the first in memory
    order of the axes); of a label in `smallest_volume_ml` only components of at least that volume do. Labels that no
    rule names are left as they are, and so is a label that is not there.

    Args:
        classes: (X, Y, Z) class indices; not changed.
        plan: names the labels, in the order of their class indices.
        native: the grid of `classes`.
        rules: of a configuration, or chosen.

    Returns:
        (X, Y, Z) class indices of the same type; `classes` itself where there is no rule.

    Raises:
        ConfigError: a rule names a label that the plan does not.
    """
    names = list(plan.labels)
    ruled = {*rules.largest_component, *rules.smallest_volume_ml}
    if unknown := sorted(ruled - set(names[1:])):
        raise ConfigError(f"inference: rules for {', '.join(unknown)}; the plan's labels are {', '.join(names[1:])}")
    if not ruled:
        return classes
    result = classes.copy()
    boxes = ndimage.find_objects(classes, max_label=len(names) - 1)
    for index, name in enumerate(names):
        if name not in ruled or boxes[index - 1] is None:
            continue
        smallest_voxels = rules.smallest_volume_ml.get(name, 0.0) / native.voxel_volume_ml
        _clear(result[boxes[index - 1]], index, smallest_voxels, name in rules.largest_component)
    return result


def postprocessing_bytes(shape: Sequence[int], rules: Rules) -> int:
    """Return what `postprocess` takes at most on a grid, beside the label map that it is given; 0 without rules."""
    # For a voxel the class that stays, whether it is of the label at hand, and the number of its component.
    return (1 + 1 + 4) * math.prod(shape) if rules.largest_component or rules.smallest_volume_ml else 0


def _clear(within: NDArray[Any], index: int, smallest_voxels: float, largest_only: bool) -> None:
    """Turn the components of a class that cannot be of its structure into background."""
    components = components_of(within == index)
    goes = np.concatenate(([False], ~kept(component_sizes(components), smallest_voxels, largest_only)))
    for classes, numbers in zip(within, components, strict=True):  # numbers become indices of 64 bits
        classes[goes[numbers]] = 0


def kept(sizes: NDArray[Any], smallest: float, largest_only: bool) -> NDArray[np.bool_]:
    """Tell which of a structure's components stay.

    Args:
        sizes: (n,) of the components, in their order.
        smallest: that may stay, in the same unit.
        largest_only: whether all but the largest, or the first of the largest, go.
    """
    stays = sizes >= smallest * (1 - VOLUME_SLACK)
    if largest_only and sizes.size:
        stays &= np.arange(sizes.size) == sizes.argmax()
    return np.asarray(stays)
