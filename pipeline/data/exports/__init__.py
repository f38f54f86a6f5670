"""Exports: a manifest's cases -> how another tool wants them on disk. A new one is a file here and its line below."""

from __future__ import annotations

from pipeline.data.exports import bids, decathlon, nnunet
from pipeline.data.exports.bringing import Bringing, CaseFiles, Links
from pipeline.data.exports.layout import RECORD, Export

__all__ = ["EXPORTS", "RECORD", "Bringing", "CaseFiles", "Export", "Links"]

EXPORTS: dict[str, Export] = {
    "nnunet": nnunet.EXPORT,
    "decathlon": decathlon.EXPORT,
    "bids": bids.EXPORT,
}
