"""The configuration's JSON Schema: for editors, and as the words in which an error says what it expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pipeline.config import Config, Section


@cache
def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a YAML, with the fields' docstrings as descriptions."""
    schema = Config.model_json_schema()
    paths = [{"type": "string", "format": "path"}, {"type": "array", "items": {"type": "string", "format": "path"}}]
    extends = {
        "anyOf": paths,
        "description": "One YAML or a list of them that this one changes: relative to this YAML, or one of "
        "preset:fast, preset:standard and preset:large, which come with medseg.",
    }
    # What a file lacks may stand in one that it extends.
    data = {"required": schema["$defs"]["DataSection"].pop("required")}
    whole = {"required": schema.pop("required"), "properties": {"data": data}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": {"extends": extends, **schema["properties"]},
        "if": {"not": {"required": ["extends"]}},
        "then": whole,
    }


def schema_at(keys: Sequence[str]) -> dict[str, Any] | None:
    """Return the JSON Schema of what stands at a path of keys; None where nothing may stand."""
    node = json_schema()
    for key in keys:
        child = node.get("properties", {}).get(key) or node.get("additionalProperties")
        if not isinstance(child, dict):
            return None
        node = _dereferenced(child)
    return node


def section_at(keys: Sequence[str]) -> type[Section] | None:
    """Return the section that stands at a path of keys; None where something else stands, or nothing."""
    section: type[Section] = Config
    for key in keys:
        kind = section.model_fields[key].annotation if key in section.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return None
        section = kind
    return section


def keys_named(name: str, section: tuple[str, ...] = ()) -> list[str]:
    """Return the dotted path of each key of that name, in whichever section."""
    found = []
    for key in (schema_at(section) or {}).get("properties", {}):
        if key == name:
            found.append(".".join((*section, key)))
        found += keys_named(name, (*section, key))
    return found


def choices(schema: Mapping[str, Any]) -> list[str]:
    """Return the words or numbers that a schema names one by one; none where it takes other things only."""
    if "anyOf" in schema:
        return [word for part in schema["anyOf"] for word in choices(_dereferenced(part))]
    return [str(word) for word in ([schema["const"]] if "const" in schema else schema.get("enum", []))]


def expectation(schema: Mapping[str, Any]) -> str:
    """Say in words which values a schema takes: `a number above 0`, `auto or a list of 3, each a number above 0`."""
    if "anyOf" in schema:
        return " or ".join(expectation(_dereferenced(part)) for part in schema["anyOf"])
    if words := choices(schema):
        return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
    match schema.get("type"):
        case "number" | "integer" as kind:
            return ("a number" if kind == "number" else "a whole number") + _bounds(schema)
        case "array":
            return _items(schema)
        case "string":
            return _text(schema)
        case "boolean":
            return "true or false"
        case "null":
            return "null"
    values = schema.get("additionalProperties")
    return f"a mapping, each value {expectation(values)}" if isinstance(values, dict) else "a mapping"


def _dereferenced(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with the definition that it refers to written out."""
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    return {**json_schema()["$defs"][name], **schema} if name else schema


def _bounds(schema: Mapping[str, Any]) -> str:
    """Return a number's bounds in words."""
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']:g} to {schema['maximum']:g}"
    words = {
        "exclusiveMinimum": "above",
        "minimum": "of at least",
        "exclusiveMaximum": "below",
        "maximum": "of at most",
    }
    return " and".join(f" {word} {schema[key]:g}" for key, word in words.items() if key in schema)


def _items(schema: Mapping[str, Any]) -> str:
    """Say what a list holds."""
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {expectation(schema['prefixItems'][0])}"
    return f"a list, each {expectation(schema['items'])}"


def _text(schema: Mapping[str, Any]) -> str:
    """Say what a text holds."""
    if "pattern" in schema:
        return f"text that matches {schema['pattern']}"
    return "a path" if schema.get("format") == "path" else "text"
