"""`medseg schema`: the JSON Schema of the YAML, for editors."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config_schema import json_schema
from pipeline.records import write_text


def run(out: Path | None = None) -> str:
    """Return the JSON Schema (draft 2020-12) as text, and write it where a file is named."""
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False)
    if out is not None:
        write_text(out, text + "\n")
    return text
