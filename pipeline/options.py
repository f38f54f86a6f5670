"""Options of the things in tables: a builder's keyword-only, typed signature IS the schema of its options in the YAML.

A new network or loss so touches no configuration class, and a misspelt option is named with the nearest right one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from pipeline.errors import did_you_mean

Builder = Callable[..., Any]


def check_options(table: Mapping[str, Builder], name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every problem of a table entry's name and options as (key, message); an empty list when all is right.

    The key is "name", "options" or "options.KEY": where in the section the problem stands.
    """
    if name not in table:
        return [("name", f"unknown, got {name!r}; expected one of {', '.join(table)}{did_you_mean(name, table)}")]
    schema = _schema(table[name])
    try:
        schema.model_validate(dict(options))
    except ValidationError as error:
        return [_problem(name, schema, dict(found)) for found in error.errors()]
    return []


def validated_options(table: Mapping[str, Builder], name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table entry's options with their types as the builder declares them and defaults filled in.

    Raises:
        ValueError: the name or an option is wrong; says every problem.
    """
    problems = check_options(table, name, options)
    if problems:
        raise ValueError("; ".join(f"{key}: {message}" for key, message in problems))
    values = _schema(table[name]).model_validate(dict(options))
    return {key: getattr(values, key) for key in type(values).model_fields}


def options_schema(table: Mapping[str, Builder], name: str) -> dict[str, Any]:
    """Return the JSON Schema of a table entry's options."""
    return _schema(table[name]).model_json_schema()


def _schema(builder: Builder) -> type[BaseModel]:
    """Return a model whose fields are the builder's keyword-only parameters."""
    parameters = inspect.signature(builder, eval_str=True).parameters.values()
    fields: dict[str, Any] = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model(builder.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def _problem(name: str, schema: type[BaseModel], found: dict[str, Any]) -> tuple[str, str]:
    """Turn one of pydantic's errors into (key, message)."""
    key = ".".join(["options", *map(str, found["loc"])])
    if found["type"] == "extra_forbidden":
        known = list(schema.model_fields)
        others = ", ".join(known) or "none"
        return key, f"{name} has no such option{did_you_mean(str(found['loc'][-1]), known)}; it has {others}"
    return key, f"{found['msg']}, got {found['input']!r}"
