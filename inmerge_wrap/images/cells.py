"""Cells of CSV files that a spreadsheet must not run as formulas."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from inmerge_wrap.files import replacing

__all__ = ["restored", "safe", "write_table"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")


def safe(text: str) -> str:
    """Returns a text that a spreadsheet shows and does not run: an apostrophe in front of it."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def restored(text: str) -> str:
    """Returns the text of which `safe` made this one."""
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file atomically, UTF-8; texts are made `safe`, numbers are not touched."""
    with replacing(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for row in (header, *rows):
            writer.writerow([safe(cell) if isinstance(cell, str) else cell for cell in row])
