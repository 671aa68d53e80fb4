"""CSV files: read as spreadsheets write them, and written so that they run no cell as a formula."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inmerge_wrap.files import replacing
from inmerge_wrap.images.files import DataError

_SEPARATOR = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)
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


def numbered_rows(
    path: Path, needed: Mapping[str, str | None] | None = None
) -> list[tuple[int, dict[str, str]]]:
    """Returns the rows of a CSV file with a header, each after its number in the file.

    A row is text by column, without space around it; the numbers count empty rows too. Comma,
    semicolon or tab; UTF-8, UTF-16 or Windows-1252.
    """
    try:
        text, delimiter = _delimited(_decoded(path.read_bytes()), needed or {})
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: save it as CSV UTF-8 ({error})") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        if reader.fieldnames is not None and not any(map(str.strip, reader.fieldnames)):
            raise DataError(f"{path}, row 1 is empty: it must name the columns")
        for row in reader:
            if any(cell.strip() for cell in row.get(None, ())):
                raise DataError(
                    f"{path}, row {reader.line_num} has more cells than the header: put a text "
                    f"that holds {delimiter!r} in quotes, and the header into row 1"
                )
            cells = {_cell(key): _cell(value or "") for key, value in row.items() if key}
            if any(cells.values()):  # spreadsheets end in rows of delimiters
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise DataError(f"{path}, row {reader.line_num}: {error}") from error
    columns = [_cell(name) for name in reader.fieldnames or () if name]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{path} has several columns {twice[0]!r}: keep one of them")
    check_columns(path, columns, needed or {})
    if not rows:
        raise DataError(f"{path} has a header and no rows")
    return rows


def check_columns(path: Path, columns: Iterable[str], needed: Mapping[str, str | None]) -> None:
    """Raises an error if a column is missing; ``needed`` has the argument that names it, if any."""
    there = list(columns)
    for name, argument in needed.items():
        if name not in there:
            remedy = f": name it with <{argument}>" if argument else ""
            raise DataError(
                f"{path} has no column {name!r}{remedy}; it has {', '.join(there) or 'none'}"
            )


def _cell(text: str) -> str:
    return restored(text.strip()).strip()


def _delimited(text: str, needed: Iterable[str]) -> tuple[str, str]:
    """A table without Excel's line ``sep=;``, and what separates its cells.

    That is what gives the columns that are needed, else what the header holds most of.
    """
    if said := _SEPARATOR.match(text):
        return text[said.end() :], said[1]
    headers = {  # a name in quotes may go on in the next line
        delimiter: next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        for delimiter in ",;\t"
    }
    often = sorted(headers, key=lambda delimiter: len(headers[delimiter]), reverse=True)
    for delimiter in often:
        if set(needed) <= {_cell(cell) for cell in headers[delimiter]}:
            return text, delimiter
    return text, often[0]


def _decoded(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252")  # what Windows writes in Western Europe
