"""`medseg new-config`: a commented YAML to start from, written from the configuration's own schema."""

from __future__ import annotations

import json
import logging
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config_loading import PRESET, preset_values
from pipeline.config_schema import expectation, schema_at, section_at
from pipeline.config_yaml import Keys, write_yaml
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.errors import ConfigError
from pipeline.records import write_text

log = logging.getLogger(__name__)

LINE_LENGTH = 100
BUDGET = ("training", "budget")


def run(manifest: Path, out: Path, preset: str | None = None) -> Path:
    """Write a YAML in which every key stands with its meaning, its choices and its default.

    Args:
        manifest: of the data set; the YAML names it relative to itself.
        out: the YAML to write.
        preset: fast, standard or large: what it extends; None: nothing.

    Returns:
        The YAML's path.

    Raises:
        ConfigError: `out` is there already.
        ManifestError: the manifest cannot be used.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; remove it, or name another with --out")
    dataset = load_manifest(manifest)
    said = {
        ("name",): re.sub(r"[^A-Za-z0-9_.-]|^[^A-Za-z0-9]+", "", out.stem) or dataset.name,
        ("data", "manifest"): Path(os.path.relpath(manifest.resolve(), out.parent.resolve())).as_posix(),
    }
    examples = _examples(dataset)
    of_preset = {} if preset is None else preset_values(preset)
    budget = {keys: value for keys, value in of_preset.items() if keys[:-1] == BUDGET}
    said |= budget or {(*BUDGET, "epochs"): 100}  # one of its keys must stand
    extends = [] if preset is None else [f"extends: {PRESET}{preset} # its values are the defaults below", ""]
    lines = [*_heading(dataset), *extends, *_section((), said, {**examples, **of_preset})]
    write_text(out, "\n".join(lines) + "\n")
    log.info("wrote %s; next: medseg preprocess %s", out, out)
    return out


def _heading(dataset: Manifest) -> list[str]:
    """Return the comment on top: what the data set is, and how to use the file."""
    channels = ", ".join(f"{name} ({modality})" for name, modality in dataset.channels.items())
    pairs = ", ".join("/".join(pair) for pair in dataset.label_pairs) or "none"
    return [
        f"# {dataset.name}: {len(dataset.cases)} cases; channels {channels};",
        f"# labels {', '.join(dataset.labels)}; left-right pairs {pairs}.",
        "#",
        "# A line such as `#key: value` shows a default or an example: take the # away to change it.",
        "# `medseg schema --out FILE` writes the schema with which an editor completes and checks this file.",
        "",
    ]


def _examples(dataset: Manifest) -> dict[Keys, Any]:
    """Return what is shown, switched off, where the default would not say what a value looks like."""
    labels = list(dataset.labels)[1:]
    return {
        ("preprocessing", "normalisation"): {c: "ct" if m == "CT" else "zscore" for c, m in dataset.channels.items()},
        ("training", "budget", "steps"): 10000,
        ("training", "budget", "minutes"): 60,
        ("inference", "largest_component"): labels,
        ("inference", "smallest_volume_ml"): dict.fromkeys(labels, 0.1),
    }


def _section(keys: Keys, said: Mapping[Keys, Any], examples: Mapping[Keys, Any]) -> Iterator[str]:
    """Yield the lines of a section: keys that are said stand, the others are switched off."""
    indent = "  " * len(keys)
    for key in (schema_at(keys) or {})["properties"]:
        path = (*keys, key)
        schema = schema_at(path) or {}
        if section_at(path):
            if not keys:
                yield ""
            yield from _comment(schema["description"], indent)
            yield f"{indent}{key}:"
            yield from _section(path, said, examples)
        elif path != ("extends",):
            yield from _comment(f"{schema['description']}{_choices(schema)}", indent)
            value = said.get(path, examples.get(path, schema.get("default")))
            yield f"{indent}{'' if path in said else '#'}{key}: {_inline(value)}"


def _choices(schema: Mapping[str, Any]) -> str:
    """Return which values a key takes, where that is not any at all."""
    expected = expectation(schema)
    return "" if expected in ("text", "a path", "a mapping") else f" Takes {expected}."


def _comment(text: str, indent: str) -> list[str]:
    """Return a text as comment lines."""
    return textwrap.wrap(text, LINE_LENGTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    return (
        json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else write_yaml(value).splitlines()[0]
    )
