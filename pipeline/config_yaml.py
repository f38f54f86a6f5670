"""YAML composed into entries: values that know the file, line and column where they stand.

The YAML is composed into nodes, never constructed into objects, so that no tag can run code. Scalars follow YAML 1.2's
core schema: `1e-3` is a number and `no` is text, both unlike YAML 1.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError

Keys = tuple[str, ...]

_TAG = "tag:yaml.org,2002:"
# YAML 1.2.2, section 10.3.2, as (kind, pattern, first characters; "" stands for the empty scalar).
_SCALARS = (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
)
_KNOWN_TAGS = {_TAG + kind for kind in ("map", "seq", "str", *(kind for kind, _, _ in _SCALARS))}


@dataclass(frozen=True, order=True)
class Place:
    """Where something is said: a file's line and column, both from 1, or an override (line 0)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong, where, and under which key."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (str(self.place), self.key, self.message)))


@dataclass(frozen=True)
class Entry:
    """A value and the place of its key; a mapping's values are entries again, a list is plain."""

    place: Place
    value: Any

    @property
    def plain(self) -> Any:
        """The value without its places."""
        return {key: entry.plain for key, entry in self.value.items()} if isinstance(self.value, dict) else self.value

    def get(self, keys: Keys) -> Entry | None:
        """Return the entry at a path of keys, None where nothing is said there."""
        entry: Entry | None = self
        for key in keys:
            entry = entry.value.get(key) if entry and isinstance(entry.value, dict) else None
        return entry

    def place_of(self, keys: Keys) -> Place:
        """Return the place of what stands at a path of keys, or of the innermost entry around it."""
        found = self.get(keys)
        return found.place if found else self.place_of(keys[:-1])


def read_file(path: Path, problems: list[Problem]) -> Entry:
    """Return a YAML file's mapping.

    Args:
        path: the file; its name opens every place.
        problems: what cannot be taken is added here, and stands as null in the result.

    Raises:
        ConfigError: the file cannot be read, is empty, is no YAML, or is no mapping.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: broken YAML: brackets within brackets, too deep to be a configuration") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = Place(str(path), mark.line + 1, mark.column + 1) if mark else Place(str(path))
        raise ConfigError(f"{place}: broken YAML: {_first_line(error)}") from error
    if root is None:
        raise ConfigError(f"{path}: is empty; expected sections, each with its keys")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1:1: expected a mapping of sections, got {str(root.value)[:80]!r}")
    return _Source(str(path), problems).entry(root, (), Place(str(path), 1, 1))


def read_override(text: str, problems: list[Problem]) -> Entry:
    """Return SECTION.KEY=VALUE, the value in YAML, as nested entries.

    Args:
        text: one override.
        problems: what cannot be taken is added here, and left out of the result.
    """
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    place = Place(f"--set {text}")
    if not equals or not all(keys):
        problems.append(Problem(place, "", "expected SECTION.KEY=VALUE"))
        return Entry(place, {})
    try:
        node = yaml.compose(value, Loader=_Loader)
    except yaml.YAMLError as error:
        problems.append(Problem(place, key, f"broken YAML: {_first_line(error)}"))
        return Entry(place, {})
    entry = _Source(place.source, problems, numbered=False).entry(node, keys, place) if node else Entry(place, None)
    for name in reversed(keys):
        entry = Entry(place, {name: entry})
    return entry


def write_yaml(value: Any) -> str:
    """Return a value as YAML that versions 1.1 and 1.2 read alike."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@dataclass
class _Source:
    """Turns the nodes of one file or override into entries, and gathers what is wrong on the way."""

    name: str
    problems: list[Problem]
    numbered: bool = True
    seen: set[int] = field(default_factory=set)

    def place(self, node: yaml.Node) -> Place:
        """Return where a node begins."""
        mark = node.start_mark
        return Place(self.name, mark.line + 1, mark.column + 1) if self.numbered else Place(self.name)

    def entry(self, node: yaml.Node, keys: Keys, place: Place) -> Entry:
        """Return a node as an entry; what cannot be taken is reported and becomes null."""
        problem = self._refusal(node)
        if problem:
            self.problems.append(Problem(place, ".".join(keys), problem))
            return Entry(place, None)
        self.seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return Entry(place, self._mapping(node, keys))
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return Entry(place, [self.entry(item, (*keys, str(i)), self.place(item)).plain for i, item in items])
        return Entry(place, _scalar(node))

    def _refusal(self, node: yaml.Node) -> str:
        """Say why a node cannot be taken; empty where it can."""
        # An alias is the same node again; a few of them can stand for billions of values, or for themselves.
        if id(node) in self.seen:
            return "YAML aliases (*name) are not taken; write the value out, or use `extends`"
        if node.tag not in _KNOWN_TAGS:
            return f"the YAML tag {node.tag.replace(_TAG, '!!')} is not taken"
        if isinstance(node, yaml.ScalarNode):
            try:
                _scalar(node)
            except ValueError:
                return f"{node.value[:40]!r} is no {node.tag.removeprefix(_TAG)}"
        return ""

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Entry]:
        """Return a mapping's entries; a key that occurs twice is reported, and its first value kept."""
        entries: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            path = (*keys, key)
            entry = self.entry(value_node, path, place)
            if not key:
                self.problems.append(Problem(place, ".".join(keys), "a key must be a word"))
            elif key in entries:
                first = entries[key].place
                self.problems.append(Problem(place, ".".join(path), f"the key occurs twice, first at {first}"))
            else:
                entries[key] = entry
        return entries


def _scalar(node: yaml.Node) -> Any:
    """Return a scalar's value by its tag; ValueError where the text is none of that tag."""
    text: str = node.value
    match node.tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case "float":
            number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            # 1e4 is how people write ten thousand steps; 3.0 is no count.
            return int(number) if "." not in text and number.is_integer() else number
    return text


def _first_line(error: yaml.YAMLError) -> str:
    """Return why the YAML breaks, in one line."""
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).splitlines()[0]


class _Loader(yaml.SafeLoader):
    """Composes nodes by YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes each text that YAML 1.1 or 1.2 would read as something else."""


for _kind, _pattern, _first in _SCALARS:
    for _style in (_Loader, _Dumper):
        _style.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _first)
