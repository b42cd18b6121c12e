"""The coverage report: how every trainable parameter is treated, by which engine, and whether that was verified."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Row:
    """One trainable parameter.

    `treatment` is the preconditioner's name or the fallback's; `verified` is "yes", "no", "pending" (no gradient
    other than zero seen yet) or "-" where nothing is captured.
    """

    parameter: str
    shape: str
    treatment: str
    engine: str
    verified: str
    reason: str


class Coverage(Sequence[Row]):
    """Rows, printable as a table.

    >>> print(Coverage([Row("0.weight", "3x2", "kfac", "hooks", "yes", "Linear")]))
    parameter  shape  treatment  engine  verified  reason
    0.weight   3x2    kfac       hooks   yes       Linear
    """

    def __init__(self, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        self.rows, self.notes = list(rows), list(notes)

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        names = [f.name for f in fields(Row)]
        table = [names, *([getattr(row, name) for name in names] for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(names))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        return "\n".join([*lines, *self.notes])
