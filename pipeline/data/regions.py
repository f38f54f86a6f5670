"""Regions: targets that overlap, such as a tumour and its core, as unions of labels.

They are painted one after the other, so that a voxel has the label of the last one that holds it. For that each region
needs one label that is its own: all of its labels but those of the regions painted after it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TypeVar

Regions = Mapping[str, Sequence[str]]
Label = TypeVar("Label", bound=Hashable)


def own_labels(regions: Mapping[str, Collection[Label]]) -> dict[str, list[Label]]:
    """Return region -> the labels that no later region has: what is left to see of it when all are painted."""
    names = list(regions)
    later = {name: {label for after in names[at + 1 :] for label in regions[after]} for at, name in enumerate(names)}
    return {name: [label for label in regions[name] if label not in later[name]] for name in names}


def region_problems(regions: Regions, labels: Sequence[str], pairs: Sequence[tuple[str, str]] = ()) -> list[str]:
    """Return what keeps regions from being learned and painted.

    Args:
        regions: region -> its labels, in painting order; empty where labels are learned by themselves.
        labels: of the manifest, the background first.
        pairs: labels that swap when left and right are flipped.

    Returns:
        One message a problem. Where there is none, region number i owns label number i + 1, and left and right regions
        swap as their own labels do.
    """
    structures = labels[1:]
    problems = [
        f"regions: {region}: {name!r} is not a structure; structures are {', '.join(structures)}"
        for region, names in regions.items()
        for name in names
        if name not in structures
    ]
    problems += [
        f"regions: {name!r} is a label too, of other voxels; rename one" for name in _homonyms(regions, labels)
    ]
    own = own_labels(regions)
    problems += [
        f"regions: {region}: exactly one of its labels must be in no later region, got {', '.join(names) or 'none'}; "
        "list regions from the outermost to the innermost"
        for region, names in own.items()
        if len(names) != 1
    ]
    if not regions or problems:
        return problems
    order = [names[0] for names in own.values()]
    if lost := [name for name in structures if name not in order]:
        return [f"regions: {', '.join(lost)}: in no region, so it would never be learned; add it to one"]
    if order != list(structures):
        wanted = ", ".join([labels[0], *order])
        return [f"labels: with regions they stand in the order in which these are painted; order them {wanted}"]
    return _one_sided({names[0]: set(regions[region]) for region, names in own.items()}, pairs)


def named_regions(
    values: Mapping[str, Sequence[int]], class_order: object = None
) -> tuple[dict[str, int], dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """Name the labels of regions that are known by their values, as nnU-Net's are.

    Args:
        values: name -> values: of the background, and of the regions in painting order.
        class_order: nnU-Net's `regions_class_order`, the value that each region paints; None: not said.

    Returns:
        Label -> value; label -> the values in the files that stand for it, where they are several; and region ->
        labels. A region of one label is a label of that name; what the others leave to see is called after them, such
        as tumour_rest.

    Raises:
        ValueError: there is no background, a region leaves nothing to see, or another value than `class_order` says, or
            values of one label are not always together.
    """
    names = [name for name in values if name != "background"]
    if len(values.get("background", ())) != 1:
        raise ValueError(f"labels: beside regions, background needs one whole number, got {dict(values)}")
    own = list(own_labels({name: values[name] for name in names}).values())
    order = _painted(own, class_order)
    torn = [left for left in own for name in names if 0 < len({*left} & {*values[name]}) < len({*left})]
    if torn:
        raise ValueError(f"labels: {torn[0]} belong to one region alone, but another has only some of them: {values}")
    labels, stored = {"background": values["background"][0]}, {}
    for name, value, left in zip(names, order, own, strict=True):
        label = name if {*left} == {*values[name]} else f"{name}_rest"
        labels[label] = value
        if len(left) > 1:
            stored[label] = (value, *(other for other in left if other != value))
    named = {value: label for label in labels for value in stored.get(label, (labels[label],))}
    regions = {name: tuple(dict.fromkeys(named[value] for value in values[name])) for name in names}
    plain = all(own_one == (name,) for name, own_one in regions.items())
    return labels, stored, {} if plain else regions


def _painted(own: Sequence[Sequence[int]], class_order: object) -> list[int]:
    """Return the value that each region paints: nnU-Net's, where it says one, else the first of its own."""
    if all(own):
        order = [left[0] for left in own] if class_order is None else class_order
        if isinstance(order, list) and len(order) == len(own) and all(map(operator.contains, own, order)):
            return order
    raise ValueError(
        f"regions_class_order: {class_order}, but painted in their order the regions leave {own} to see; list "
        "regions from the outermost to the innermost, each with a value of its own"
    )


def _homonyms(regions: Regions, labels: Sequence[str]) -> list[str]:
    """Return the regions that have the name of a label but are not that label alone: tables could not tell them."""
    return [region for region, names in regions.items() if region in labels and set(names) != {region}]


def _one_sided(by_own: Mapping[str, set[str]], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return the regions, by their own labels, that flipping left and right does not turn into regions."""
    mirror = dict([*pairs, *((b, a) for a, b in pairs)])

    def mirrored(name: str) -> str:
        return mirror.get(name, name)

    return [
        f"regions: label_pairs swap {own} and {mirrored(own)}, so the region of {', '.join(sorted(names))} "
        f"would turn into one of {', '.join(sorted(map(mirrored, names)))} in which {mirrored(own)} is its own, and "
        "there is none; make label_pairs and regions agree"
        for own, names in by_own.items()
        if by_own.get(mirrored(own)) != set(map(mirrored, names))
    ]
