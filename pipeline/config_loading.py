"""Reading a configuration: YAML files that extend each other, overrides, and every error with its file and line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config import Config
from pipeline.config_schema import choices, expectation, keys_named, schema_at, section_at
from pipeline.config_yaml import Entry, Keys, Place, Problem, read_file, read_override, write_yaml
from pipeline.errors import ConfigError, did_you_mean
from pipeline.records import said

OptionCheck = Callable[[str, Mapping[str, Any]], list[tuple[str, str]]]
OptionChecks = Mapping[str, OptionCheck]

# Paths that are relative to the YAML that says them.
_RELATIVE_PATHS: tuple[Keys, ...] = (("data", "manifest"), ("data", "root"), ("training", "init_from"))
# Configurations that come with medseg to be extended, and how `extends` names them.
PRESETS = ("fast", "standard", "large")
PRESET = "preset:"
# How a model's name begins that is no path.
_TRACKED = ("runs:/", "models:/")
# The keys that name an entry of a table, and that entry's options.
_TABLES: tuple[tuple[Keys, Keys], ...] = (
    (("network", "name"), ("network", "options")),
    (("training", "loss"), ("training", "loss_options")),
    (("training", "optimiser"), ("training", "optimiser_options")),
    (("training", "schedule"), ("training", "schedule_options")),
)


def load_config(
    path: Path, overrides: Iterable[str] = (), option_checks: Callable[[], OptionChecks] | None = None
) -> Config:
    """Read a configuration, what it extends, and its overrides.

    `extends` names one YAML or a list of them, relative to the YAML that says it, or preset:NAME; later ones win.
    Mappings are merged key by key; scalars and lists are replaced, and so is `training.budget`, of whose keys only one
    may stand. Options of a network, loss, optimiser or schedule are dropped where another one is named, or null stands
    in their place; those that an override says are of what another override names, whichever comes first.
    `data.manifest`, `data.root` and `training.init_from` are relative to the YAML that says them, in an override to the
    current folder; the paths of the result are absolute.

    Args:
        path: the YAML.
        overrides: SECTION.KEY=VALUE each, the value in YAML; later ones win.
        option_checks: returns, under `network.name`, `training.loss`, `training.optimiser` and `training.schedule`,
            the `check_options` of that table: (name, options) -> (key, message) of each problem, the key "name",
            "options" or "options.KEY". It is called, and so pays for what it imports, only where a name or options
            other than the defaults are said.

    Raises:
        ConfigError: a file is missing, empty, broken or no mapping, or extends itself; else every error of all files
            and overrides together, one a line: `FILE:LINE:COLUMN: KEY: what is wrong`.
    """
    problems: list[Problem] = []
    tree = _read(path, problems)
    for override in overrides:
        said = _settled(read_override(override, problems), Path.cwd())
        tree = Entry(tree.place, _merged(tree, said).value)
    refused = {problem.key for problem in problems}
    config, invalid = _validated(tree)
    problems += [problem for problem in invalid if problem.key not in refused]
    if option_checks is not None:
        problems += _option_problems(tree, option_checks)
    if config is None or problems:
        raise ConfigError("\n".join(map(str, sorted(set(problems)))))
    return config.changed(workspace=_absolute(Path.cwd(), config.workspace))


def dump_config(config: Config) -> str:
    """Return a configuration as YAML with every default written out; it loads to an equal one from any folder."""
    return write_yaml(config.model_dump(mode="json"))


def as_sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a YAML would have to say in place of overrides: sections, their keys within them.

    Args:
        settings: section.key -> value, as overrides have them; later ones win.
    """
    tree = Entry(Place("settings"), {})
    for key, value in settings.items():
        tree = _merged(tree, read_override(as_override(key, value), []))
    return dict(tree.plain)


def as_override(key: str, value: Any) -> str:
    """Return a setting as an override."""
    return f"{key}={json.dumps(value)}"


def with_absolute_paths(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings that mean the same from any folder.

    Args:
        settings: section.key -> value.
        folder: of the YAML that says them, to which their paths are relative.
    """
    return {key: _with_absolute_paths(value, folder, tuple(key.split("."))) for key, value in settings.items()}


def are_options_of(key: str, name: str) -> bool:
    """Tell whether a key belongs to the options of what another key names: network.options.width to network.name."""
    keys = tuple(key.split("."))
    return any(".".join(named) == name and keys[: len(options)] == options for named, options in _TABLES)


def packaged(name: str) -> Path:
    """Return the path of a YAML that comes with medseg: inside the installed package, beside it in a checkout.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no configuration {name!r} comes with medseg")


def _read(path: Path, problems: list[Problem], chain: tuple[Path, ...] = ()) -> Entry:
    """Return a file's entries merged onto those of the files it extends; `chain` leads here from the first file."""
    own = _settled(read_file(path, problems), path.parent.resolve())
    extends = own.value.pop("extends", None)
    chain = (*chain, path.resolve())
    tree = Entry(own.place, {})
    for base in _bases(path, extends, problems, chain):
        tree = _merged(tree, _read(base, problems, chain))
    return Entry(own.place, _merged(tree, own).value)


def _bases(path: Path, extends: Entry | None, problems: list[Problem], chain: tuple[Path, ...]) -> list[Path]:
    """Return the files that a file extends, as seen from the current folder."""
    if extends is None:
        return []
    names = extends.value if isinstance(extends.value, list) else [extends.value]
    if not all(isinstance(name, str) for name in names):
        expected = f"expected {expectation(schema_at(('extends',)) or {})}, got {_shown(extends.plain)}"
        problems.append(Problem(extends.place, "extends", expected))
        return []
    bases = [_base(path.parent, name, extends) for name in names]
    for base in bases:
        if not _is_file(base):
            raise ConfigError(f"{extends.place}: extends: no such file: {base}")
        if base.resolve() in chain:
            way = " -> ".join(link.name for link in (*chain, base))
            raise ConfigError(f"{extends.place}: extends: a file may not extend itself: {way}")
    return bases


def _base(folder: Path, name: str, extends: Entry) -> Path:
    """Return the file that `extends` names: one that comes with medseg, or one relative to a folder."""
    if not name.startswith(PRESET):
        return _absolute(folder, Path(name))
    preset = name.removeprefix(PRESET)
    if preset not in PRESETS:
        raise ConfigError(
            f"{extends.place}: extends: no preset {preset!r}{did_you_mean(preset, PRESETS)}; there are "
            f"{', '.join(PRESETS)}"
        )
    return packaged(f"presets/{preset}.yaml")


def preset_values(preset: str) -> dict[Keys, Any]:
    """Return what a preset says: path of keys -> value.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    tree = _read(packaged(f"presets/{preset}.yaml"), [])
    return dict(_leaves(tree, ()))


def _leaves(entry: Entry, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    """Yield each key that is no section, with its value."""
    for key, child in entry.value.items():
        if section_at((*keys, key)):
            yield from _leaves(child, (*keys, key))
        else:
            yield (*keys, key), child.plain


def _settled(entry: Entry, folder: Path, keys: Keys = ()) -> Entry:
    """Return entries whose paths are absolute and whose empty sections are mappings."""
    if isinstance(entry.value, dict):
        return Entry(entry.place, {k: _settled(child, folder, (*keys, k)) for k, child in entry.value.items()})
    if entry.value is None and section_at(keys):
        return Entry(entry.place, {})  # a section of which every line is commented out
    return Entry(entry.place, _with_absolute_paths(entry.value, folder, keys))


def _with_absolute_paths(value: Any, folder: Path, keys: Keys) -> Any:
    """Return a plain value at a path of keys with its paths, said in a folder, as they are seen from anywhere."""
    if isinstance(value, dict):
        return {key: _with_absolute_paths(child, folder, (*keys, key)) for key, child in value.items()}
    if isinstance(value, str) and keys in _RELATIVE_PATHS and not value.startswith(_TRACKED):
        return str(_absolute(folder, Path(value)))
    return value


def _absolute(folder: Path, path: Path) -> Path:
    """Return a path said in a folder as one seen from there; a link stays, for what lies beside it is meant."""
    # Not pathlib's expanduser, which raises where there is no such user: ~name is a folder's name then.
    return Path(os.path.normpath(folder / os.path.expanduser(path)))  # noqa: PTH111


def _is_file(path: Path) -> bool:
    """Tell whether there is such a file; there is none of a name that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def _merged(base: Entry, over: Entry, keys: Keys = ()) -> Entry:
    """Return `base` with what `over` says in its place."""
    section = section_at(keys)
    whole = section is not None and not section.merges
    if whole or not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = _without_foreign_options(base, over, keys)
    for key, entry in over.value.items():
        merged[key] = _merged(merged[key], entry, (*keys, key)) if key in merged else entry
    return Entry(over.place, merged)


def _without_foreign_options(base: Entry, over: Entry, keys: Keys) -> dict[str, Entry]:
    """Return what `base` says but for options of another entry of their table than `over` names."""
    kept = dict(base.value)
    for name, options in _TABLES:
        if name[:-1] == keys and name[-1] in over.value and options[-1] in kept:
            default = Entry(base.place, getattr(Config.model_fields[name[0]].default, name[-1]))
            if base.value.get(name[-1], default).plain != over.value[name[-1]].plain:
                foreign = kept.pop(options[-1])
                if own := _said_by_overrides(foreign):
                    kept[options[-1]] = Entry(foreign.place, own)
    return kept


def _said_by_overrides(options: Entry) -> dict[str, Entry]:
    """Return those of options that an override says, and not a file."""
    children = options.value if isinstance(options.value, dict) else {}
    return {key: child for key, child in children.items() if not child.place.line}


def _validated(tree: Entry) -> tuple[Config | None, list[Problem]]:
    """Return the entries as a configuration, or what is wrong with them."""
    try:
        # As JSON, strictly: neither is "3" a number nor true 1, while a list may be a tuple and text a path.
        return Config.model_validate_json(json.dumps(tree.plain), strict=True), []
    except ValidationError as error:
        return None, [_problem(tree, details) for details in error.errors(include_url=False)]


def _problem(tree: Entry, error: ErrorDetails) -> Problem:
    """Return one of pydantic's errors in our words."""
    keys = tuple(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return Problem(tree.place_of(keys), ".".join(keys), _unknown_key(keys))
    # Below a key that we know, pydantic names a list's items and a union's branches; the error is the whole value's.
    while (schema := schema_at(keys)) is None:
        keys = keys[:-1]
    entry = tree.get(keys)
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
    elif entry is None:
        message = f"is missing, expected {expectation(schema)}"
    else:
        near = did_you_mean(entry.plain, choices(schema))
        message = f"expected {expectation(schema)}, got {_shown(entry.plain)}{near}"
    return Problem(tree.place_of(keys), ".".join(keys), message)


def _option_problems(tree: Entry, option_checks: Callable[[], OptionChecks]) -> list[Problem]:
    """Return what is wrong with names and their options; the defaults are not checked, so that they cost no import."""
    problems = []
    for name_keys, options_keys in _TABLES:
        name, options = _plain_at(tree, name_keys), _plain_at(tree, options_keys) or {}
        if not isinstance(name, str) or not isinstance(options, dict) or (name == _default(name_keys) and not options):
            continue
        for key, message in option_checks()[".".join(name_keys)](name, options):
            first, *rest = key.split(".")
            keys = (*options_keys, *rest) if first == "options" else name_keys
            problems.append(Problem(tree.place_of(keys), ".".join(keys), message))
    return problems


def _plain_at(tree: Entry, keys: Keys) -> Any:
    """Return what is said at a path of keys, else the default."""
    entry = tree.get(keys)
    return entry.plain if entry else _default(keys)


def _default(keys: Keys) -> Any:
    """Return the default of a key of a section that may be left out."""
    section, key = keys
    return getattr(Config.model_fields[section].default, key)


def _unknown_key(keys: Keys) -> str:
    """Say that a key is unknown, and which one may be meant: of the same section, or of that name in another."""
    *section, key = keys
    names = list((schema_at(section) or {}).get("properties", {}))
    elsewhere = keys_named(key)
    if near := did_you_mean(key, names):
        return f"unknown key{near}"
    if elsewhere:
        return f"unknown key, did you mean {elsewhere[0]!r}?"
    return f"unknown key, expected one of {', '.join(names)}"


def record_problem(tree: Entry, found: ErrorDetails, record: type[BaseModel]) -> Problem:
    """Return one of pydantic's errors in our words.

    Args:
        tree: the YAML.
        found: the error.
        record: whose keys are known where it stands.
    """
    keys, message = tuple(map(str, found["loc"])), said(found)
    if found["type"] == "extra_forbidden":
        names = [field.alias or name for name, field in record.model_fields.items()]
        message = "unknown key" + (did_you_mean(keys[-1], names) or f", expected one of {', '.join(names)}")
    elif found["type"] == "missing":
        message = "is missing"
    return Problem(tree.place_of(keys), ".".join(keys), message)


def _shown(value: Any) -> str:
    """Return a value as an error shows it."""
    if isinstance(value, dict):
        return "a mapping"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
