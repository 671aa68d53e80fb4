"""Tables of the command line that keep their main columns on a narrow terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

KEPT = 9
"""Importance of a column that a table never drops."""

AS_IT_IS: Mapping[str, Any] = {"markup": False, "emoji": False}
"""Of a console: a class may be called ``[left]``, and a file ``a:x:b``."""


@dataclass(frozen=True)
class Column:
    """A column of a table; on a narrow terminal the least important ones are left out."""

    heading: str
    cells: Sequence[str]
    importance: int
    justify: Literal["left", "right"] = "right"
    wraps: bool = False

    @property
    def width(self) -> int:
        """Minimum width at which the cells are readable."""
        texts = [self.heading, *self.cells]
        return max(
            len(part) for text in texts for part in (text.split(" ") if self.wraps else [text])
        )


def print_table(
    title: str, columns: Sequence[Column], styles: Sequence[str] = (), footer: str = ""
) -> None:
    """Prints a table of columns, with a style for each row, and names the columns left out."""
    console = Console(**AS_IT_IS)
    shown = list(columns)

    def too_wide() -> bool:
        # Three spaces between two columns, one on either side.
        return sum(column.width + 3 for column in shown) - 1 > console.width

    while too_wide() and min(column.importance for column in shown) < KEPT:
        shown.remove(min(shown, key=lambda column: column.importance))
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
    )
    for column in shown:
        # A column that must be kept but is too wide is folded, never cut off.
        whole = not column.wraps and not too_wide()
        table.add_column(column.heading, justify=column.justify, no_wrap=whole, overflow="fold")
    for place, cells in enumerate(zip(*(column.cells for column in shown), strict=True)):
        table.add_row(*cells, style=styles[place] if styles else "")
    console.print(table)
    hidden = [column.heading for column in columns if column not in shown]
    if hidden:
        console.print(f"Too narrow for {', '.join(hidden)}: see --json.", highlight=False)
    if footer:
        console.print(footer, highlight=False)
