"""CSV files as spreadsheets write them: comma, semicolon or tab; UTF-8, UTF-16 or Windows-1252."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from inmerge_wrap.errors import ArgumentError
from inmerge_wrap.images.cells import restored

__all__ = ["read_table"]


def read_table(
    path: Path, needed: Sequence[str] = (), *, option: str | None = None
) -> list[dict[str, str]]:
    """Returns the rows of a CSV file with a header, each as text by column.

    Args:
        path: The file.
        needed: Columns that must be there.
        option: The argument that names these columns, for the error.

    Raises:
        ArgumentError: If it cannot be read, has no row, or a needed column is missing.
    """
    try:
        text = _decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} cannot be read: save it as CSV UTF-8 ({error})") from error
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [
            {restored(key): restored(value or "") for key, value in row.items() if key}
            for row in reader
        ]
    except csv.Error as error:
        raise ArgumentError(f"{path}, row {reader.line_num}: {error}") from error
    columns = [restored(name) for name in reader.fieldnames or () if name]
    for name in needed:
        if name not in columns:
            remedy = f": name it with <{option}>" if option else ""
            raise ArgumentError(
                f"{path} has no column {name!r}{remedy}; it has {', '.join(columns) or 'none'}"
            )
    if not rows:
        raise ArgumentError(f"{path} has a header and no rows")
    return rows


def _decoded(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252")  # what Windows writes in Western Europe
