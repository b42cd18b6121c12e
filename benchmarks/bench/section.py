"""A part of a report."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Section:
    """A heading, what is to be said, a table, and the names of figures."""

    title: str
    text: str = ""
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figures: Sequence[str] = field(default_factory=tuple)
