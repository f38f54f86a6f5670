"""The errors a user can mend: one tree under PipelineError.

A message says what, where, got, expected and what to do. `cli/` prints it without a traceback and exits with 2; any
other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class PipelineError(Exception):
    """Something a user can mend: in a file, a configuration, or the way a command was called."""


class ConfigError(PipelineError):
    """A configuration cannot be used; the message holds every error found, one a line."""


class ManifestError(PipelineError):
    """A manifest, or the folder it is made from, cannot be used."""


class VolumeError(PipelineError):
    """A volume's file cannot be read, or what it holds cannot be used."""


class GeometryError(VolumeError):
    """A volume's place in space makes no sense, or two volumes that must share a grid do not."""


class StoreError(PipelineError):
    """A preprocessed case is missing, stale or damaged."""


class ModelError(PipelineError):
    """A model, run or checkpoint is missing, incomplete or of a kind that this version cannot read."""


class TrainingError(PipelineError):
    """Training cannot begin, go on or be resumed."""


class TrainingEnded(PipelineError):
    """A training was ended before its time by whoever listened to its scores."""


class EvaluationError(PipelineError):
    """Results of evaluations cannot be read, or cannot be compared with each other."""


class DownloadError(PipelineError):
    """A file cannot be fetched, or is not what it should be; or an archive cannot be unpacked safely."""


class ResourceError(PipelineError):
    """The machine has not the memory or the disk space that a case needs."""


@contextmanager
def config_errors_of(what: str) -> Iterator[None]:
    """Turn a ValueError over what a configuration says into a ConfigError that names it.

    Args:
        what: the key and its value, such as "network unet".

    Raises:
        ConfigError: in place of a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` with the known word nearest to a text; empty where none is near it."""
    near = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f", did you mean {near[0]!r}?" if near else ""
