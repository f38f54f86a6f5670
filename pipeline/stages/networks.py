"""`medseg networks`: the networks that a configuration can name, and the options of one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline.errors import ConfigError
from pipeline.networks import NETWORKS, NetworkTask, build_network, check_options
from pipeline.options import options_schema

# What a network is asked to fit where no data are spoken of: one channel, a patch of 64^3 voxels of 1 mm or a plane.
_TASK = NetworkTask(1, 2, patch_size=(64, 64, 64), spacing_mm=(1.0, 1.0, 1.0))
_FLAT_TASK = NetworkTask(1, 2, patch_size=(64, 64, 1), spacing_mm=(1.0, 1.0, 1.0), flat_axis=2)


@dataclass(frozen=True)
class NetworkEntry:
    """A network of the table.

    Attributes:
        name: what `network.name` says.
        summary: what it is, of its builder's docstring.
        spatial_dims: what `network.spatial_dims` may say.
        margin: voxels that it loses on each side of each axis, by its default options; 0 for padded networks.
    """

    name: str
    summary: str
    spatial_dims: tuple[int, ...]
    margin: int


@dataclass(frozen=True)
class NetworkOption:
    """An option of a network.

    Attributes:
        name: its key in `network.options`.
        type: what it takes.
        default: what it is where nothing is said, as a YAML would write it.
    """

    name: str
    type: str
    default: str


def run() -> list[NetworkEntry]:
    """Return every network of the table, in its order."""
    return [_entry(name) for name in NETWORKS]


def options_of(name: str) -> tuple[str, list[NetworkOption]]:
    """Return a network's docstring and its options.

    Raises:
        ConfigError: there is no such network; names the nearest.
    """
    if name not in NETWORKS:
        raise ConfigError("; ".join(message for _, message in check_options(name, {})))
    fields = options_schema(NETWORKS, name)["properties"]
    options = [NetworkOption(key, type_text(field), json.dumps(field.get("default"))) for key, field in fields.items()]
    return inspect.getdoc(NETWORKS[name]) or "", options


def entries_text(entries: Sequence[NetworkEntry]) -> str:
    """Return a line a network."""
    rows = [("name", "dims", "margin", "what it is")]
    rows += [(e.name, ", ".join(f"{n}-D" for n in e.spatial_dims), str(e.margin), e.summary) for e in entries]
    return "\n".join(aligned(rows))


def options_text(name: str, documentation: str, options: Sequence[NetworkOption]) -> str:
    """Return one network's docstring, and a line an option."""
    rows = [("option", "default", "takes"), *((o.name, o.default, o.type) for o in options)]
    return "\n".join([f"{name}: {documentation}", "", *aligned(rows)])


def as_json(values: Sequence[NetworkEntry | NetworkOption]) -> list[dict[str, Any]]:
    """Return entries or options for machines."""
    return [asdict(value) for value in values]


def type_text(field: dict[str, Any]) -> str:
    """Return what a field of a JSON Schema takes, in words."""
    if "anyOf" in field:
        return " or ".join(map(type_text, field["anyOf"]))
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if field.get("type") == "array":
        own = field.get("prefixItems")
        return f"[{', '.join(map(type_text, own))}]" if own else f"[{type_text(field['items'])}, ...]"
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{words} {field[key]:g}" for key, words in bounds.items() if key in field]
    if "multipleOf" in field:
        said.append(f"a multiple of {field['multipleOf']}")
    return " ".join([str(field.get("type", "anything")), ", ".join(said)]).strip()


def _entry(name: str) -> NetworkEntry:
    """Build a network by its default options, without weights, and say what it is."""
    with torch.device("meta"):
        margin = max(build_network(name, {}, _TASK).margin)
    first_sentence = (inspect.getdoc(NETWORKS[name]) or "").split("\n\n")[0].replace("\n", " ")
    summary = first_sentence.removeprefix("Build ")
    return NetworkEntry(name, summary, (2, 3) if _takes_planes(name) else (3,), margin)


def _takes_planes(name: str) -> bool:
    """Say whether a network can be a 2-D one."""
    try:
        with torch.device("meta"):
            build_network(name, {}, _FLAT_TASK)
    except ValueError:
        return False
    return True


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
