"""The viewer as a part of a page: the list of cases, their volumes, NiiVue, and what drives it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.viewer.assets import niivue
from pipeline.viewer.volumes import CaseVolumes
from pipeline.volumes.label_tables import colour_of

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ViewedCase:
    """A case in the viewer's list.

    Attributes:
        name: of the case.
        score: by which the list is ordered; nan: unknown.
        mark: a word beside the name, such as "worst"; empty: none.
        by_class: class -> its own score.
        unknown: class indices that the reference says nothing of: of them nothing differs.
        volumes: None: the page has no room for them, and the case is only listed.
    """

    name: str
    score: float
    mark: str = ""
    by_class: Mapping[str, float] = field(default_factory=dict)
    unknown: tuple[int, ...] = ()
    volumes: CaseVolumes | None = None


def viewer_part(cases: Sequence[ViewedCase], class_names: Sequence[str], score_name: str) -> Markup:
    """Return the viewer as HTML that asks for nothing outside the page; empty where NiiVue or every volume is missing.

    Args:
        cases: in the order of the list; those with volumes can be looked at.
        class_names: by class index, the background first.
        score_name: what the scores are, for people.
    """
    script = niivue()
    shown = [case for case in cases if case.volumes]
    if script is None or not shown:
        return Markup("")
    # Imported here: only pages need it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    facts = {
        "classes": [{"name": name, "colour": colour_of(k)} for k, name in enumerate(class_names) if k],
        "score": score_name,
        "cases": [_facts_of(case) for case in cases],
    }
    part = environment.get_template("viewer.html.j2").render(
        cases=cases,
        shown=len(shown),
        score_name=score_name,
        classes=facts["classes"],
        has_reference=any(case.volumes and case.volumes.reference for case in shown),
        facts=Markup(_in_script(json.dumps(facts))),
        style=Markup((_FOLDER / "viewer.css").read_text(encoding="utf-8")),
        niivue=Markup(script),
        script=Markup((_FOLDER / "viewer.js").read_text(encoding="utf-8")),
    )
    return Markup(part)


def _facts_of(case: ViewedCase) -> dict[str, Any]:
    """Return what the script has to know of a case beside its volumes."""
    known = {name: value for name, value in case.by_class.items() if not math.isnan(value)}
    facts: dict[str, Any] = {"name": case.name, "mark": case.mark, "by_class": known, "shown": case.volumes is not None}
    facts["unknown"] = case.unknown
    facts["score"] = None if math.isnan(case.score) else case.score
    if case.volumes:
        facts |= {"window": case.volumes.window, "focus": case.volumes.focus_mm, "grid": case.volumes.grid}
    return facts


def _in_script(text: str) -> str:
    """Return JSON that cannot end the element it stands in, nor begin another."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
