"""Shards: parts of a list of cases for jobs that know nothing of one another, as batch systems start them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import PipelineError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a list.

    Attributes:
        index: 0 is the first.
        count: of the parts.
    """

    index: int
    count: int

    @classmethod
    def parsed(cls, text: str) -> Shard:
        """Return the shard that I/N names, 0/N being the first.

        Raises:
            PipelineError: it names none.
        """
        numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if numbers is None or int(numbers[1]) >= int(numbers[2]):
            raise PipelineError(f"--shard {text}: expected I/N with I from 0 to N-1, such as 0/10 to 9/10")
        return cls(int(numbers[1]), int(numbers[2]))

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this part of a list: every N-th, so that all parts together are each item once, and as good as even.

        By position, not by a digest of the name, which would leave some of ten shards of ten cases empty.
        """
        return list(items[self.index :: self.count])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
