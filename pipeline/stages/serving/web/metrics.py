"""Figures of the service as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# What a client may call a method has no end.
_METHODS = ("GET", "POST", "DELETE")


class Metrics:
    """Counts of responses since the start."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._responses: defaultdict[tuple[str, str, int], float] = defaultdict(float)
        self._seconds: defaultdict[tuple[str, str, int], float] = defaultdict(float)
        self.upload_bytes = 0

    def count_response(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a response."""
        method = method if method in _METHODS else "other"
        with self._mutex:
            self._responses[method, route, status] += 1
            self._seconds[method, route, status] += seconds

    def as_text(self, jobs: Mapping[str, int], figures: Mapping[str, tuple[str, float]]) -> str:
        """Return all figures.

        Args:
            jobs: state -> how many jobs are in it.
            figures: name -> its kind (counter or gauge) and value.
        """
        with self._mutex:
            responses, seconds = dict(self._responses), dict(self._seconds)
        lines = list(_family("medseg_responses_total", "counter", _labelled(responses)))
        lines += _family("medseg_response_seconds_total", "counter", _labelled(seconds))
        lines += _family("medseg_jobs", "gauge", ((f'{{state="{state}"}}', n) for state, n in jobs.items()))
        figures = {"medseg_upload_bytes_total": ("counter", self.upload_bytes), **figures}
        for name, (kind, value) in figures.items():
            lines += _family(name, kind, [("", value)])
        return "\n".join(lines) + "\n"


def _labelled(counts: Mapping[tuple[str, str, int], float]) -> Iterator[tuple[str, float]]:
    """Yield labels and value of each count."""
    for (method, route, status), value in sorted(counts.items()):
        yield f'{{method="{method}",route="{route}",status="{status}"}}', value


def _family(name: str, kind: str, samples: Iterable[tuple[str, float]]) -> Iterator[str]:
    """Yield the lines of one figure."""
    yield f"# TYPE {name} {kind}"
    yield from (f"{name}{labels} {round(value, 6):.15g}" for labels, value in samples)
