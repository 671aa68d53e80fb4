"""Tables of images: what they may hold, and what is said where they are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inmerge_wrap.errors import for_command_line
from inmerge_wrap.images.collection import ImageCollection
from inmerge_wrap.images.files import DataError
from inmerge_wrap.images.finding import find_images
from inmerge_wrap.images.folders import open_images, read_part, write_split
from inmerge_wrap.images.tables import numbered_rows


def table_of(
    folder: Path,
    rows: Sequence[Sequence[str]],
    header: str = "path,label",
    *,
    write: bool = True,
) -> Path:
    """A table whose first column names images, which are written too."""
    for number, row in enumerate(rows):
        path = folder / row[0].replace("\\", "/")
        if write and row[0] and not path.exists():
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    path = folder / "table.csv"
    path.write_text("\n".join([header, *map(",".join, rows), ""]), encoding="utf-8")
    return path


def opened(table: Path) -> ImageCollection:
    return open_images(table.parent, size=8, table=table)[0]


# -- groups ----------------------------------------------------------------------------------------


def test_a_column_group_keeps_patients_together_without_being_named(tmp_path: Path) -> None:
    rows = [(f"{n}.png", "ab"[n % 2], f"p{n // 4}") for n in range(48)]
    collection = opened(table_of(tmp_path, rows, "path,label,group"))
    parts = {(image.group, image.part) for image in collection.images}
    assert len(parts) == 12, "a patient in two parts"
    assert any("groups are those of the column group of" in note for note in collection.notes)
    write_split(collection, tmp_path / "split.csv")
    again = opened(tmp_path / "split.csv")
    assert [i.group for i in again.images] == [i.group for i in collection.images]
    *_, part = read_part(tmp_path / "split.csv", "test", size=8)
    assert {image.group for image in part.images} == {g for g, p in parts if p == "test"}


def test_an_empty_column_group_is_as_none(tmp_path: Path) -> None:
    rows = [(f"{n}.png", "ab"[n % 2], "") for n in range(24)]
    table = table_of(tmp_path, rows, "path,label,group")
    collection = opened(table)
    assert all(image.group is None for image in collection.images)
    assert any("no groups were named" in text for text in collection.warnings)
    assert not any("group" in note for note in find_images(tmp_path, table=table).notes)


def test_a_column_group_that_holds_the_labels_holds_no_groups(tmp_path: Path) -> None:
    table = table_of(tmp_path, [(f"{n}.png", "ab"[n % 2]) for n in range(24)], "path,group")
    collection = find_images(tmp_path, table=table, labels=["group"])
    assert all(image.group is None for image in collection.images)


# -- rows ------------------------------------------------------------------------------------------


def test_the_number_of_a_row_counts_empty_rows(tmp_path: Path) -> None:
    table = table_of(tmp_path, [("0.png", "a"), ("", ""), ("1.png", "b"), ("2.png", "")])
    text = table.read_text().replace(",\n", ",\n\n", 1)
    table.write_text(text)
    line = text.splitlines().index("2.png,") + 1
    with pytest.raises(DataError, match=f"row {line}"):
        find_images(tmp_path, table=table)
    assert [number for number, _ in numbered_rows(table)] == [2, 5, line]


@pytest.mark.parametrize("again", ["./d/a.png", r"d\a.png", "d/../d//a.png", "{}/d/a.png"])
def test_one_file_is_named_once_however_its_path_is_written(tmp_path: Path, again: str) -> None:
    (tmp_path / "d").mkdir()
    table = table_of(tmp_path, [("d/a.png", "a"), ("d/b.png", "b"), (again.format(tmp_path), "b")])
    with pytest.raises(
        DataError, match=r"1 row with an image of another row: row 4 \(.*, as row 2"
    ):
        find_images(tmp_path, table=table)


@pytest.mark.parametrize("line", ["sep=;\r\n", '"sep=;"\n', "SEP=;\n"])
def test_the_line_that_tells_excel_the_delimiter_is_no_header(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.csv").write_bytes(f"{line}path;label\na,b,c.png;x\n".encode("utf-8-sig"))
    assert numbered_rows(tmp_path / "t.csv") == [(2, {"path": "a,b,c.png", "label": "x"})]


@pytest.mark.parametrize("label", ["label, final", "a, b, c"])
def test_the_delimiter_is_that_which_gives_the_columns(tmp_path: Path, label: str) -> None:
    rows = [(f"{n}.png", "ab"[n % 2]) for n in range(24)]
    table = table_of(tmp_path, rows)
    lines = [f"path;{label}", *map(";".join, rows)]
    table.write_text("\n".join(lines), encoding="utf-8")
    assert len(find_images(tmp_path, table=table, labels=[label]).images) == 24
    with pytest.raises(DataError, match=f"no column 'label'.*it has path, {label}"):
        read_part(table, "test", size=8)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_table_of_any_system_is_read(tmp_path: Path, end: str, delimiter: str) -> None:
    """Excel for Macintosh ends lines with a carriage return alone, and headers can be broken."""
    lines = ['"Patient\nID";path;label', "5;a.png;x", "6;b.png;y"]
    (tmp_path / "t.csv").write_bytes(end.join(lines).replace(";", delimiter).encode())
    rows = numbered_rows(tmp_path / "t.csv", {"path": None})
    assert [row for _, row in rows] == [
        {"Patient\nID": "5", "path": "a.png", "label": "x"},
        {"Patient\nID": "6", "path": "b.png", "label": "y"},
    ]


@pytest.mark.parametrize(
    "text,told",
    [
        ("\npath,label\na.png,x\n", "row 1 is empty: it must name the columns"),
        (";;\npath;label;\na.png;x;\n", "row 1 is empty: it must name the columns"),
        ("Export\npath,label\na.png,x\n", "more cells than the header.* header into row 1"),
        ("x" * 200_000, r"save it as CSV UTF-8 \(field larger"),
        (None, r"t\.csv cannot be read \(No such file or directory\)$"),
    ],
)
def test_what_is_wrong_above_the_rows_is_said(text: str | None, told: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=told):
        numbered_rows(tmp_path / "t.csv", {"path": None})


def test_all_rows_with_a_fault_are_named_at_once(tmp_path: Path) -> None:
    rows = [(f"{n}.png", "ab"[n % 2], "train") for n in range(12)]
    for n in range(7):
        rows[n] = (f"{n}.png", "", "train")
    rows[7:11] = [("8.png", "a", "Train"), ("8.png", "a", "test"), ("", "a", "val"), ("x", "b", "")]
    table = table_of(tmp_path, rows, "path,label,part", write=False)
    with pytest.raises(DataError) as raised:
        find_images(tmp_path, table=table)
    assert str(raised.value).replace(str(table), "T").splitlines() == [
        "T, 7 rows without a label: row 2 (0.png), row 3 (1.png), row 4 (2.png), row 5 (3.png), "
        "row 6 (4.png) and 2 more; fill it in, or remove the row",
        "T, 1 row with an unknown part: row 9 ('Train'); give train, val or test",
        "T, 1 row with an image of another row: row 10 (8.png, as row 9); keep one row for each "
        "image",
        "T, 1 row without a path: row 11; fill it in, or remove the row",
        "T, 1 row without a part: row 12 (x); give every image a part, or none",
    ]
    assert len(raised.value.names) == 11 and "row 8 (6.png)" in raised.value.names


def test_all_wrong_marks_are_named_at_once(tmp_path: Path) -> None:
    rows = [("0.png", "1", "yes"), ("1.png", "2", "0"), ("2.png", "N/A", "1.0")]
    table = table_of(tmp_path, rows, "path,a,b")
    said = r"2 rows with another label: row 2 \(b is 'yes'\), row 3 \(a is '2'\); of several"
    with pytest.raises(DataError, match=said):
        find_images(tmp_path, table=table, labels=["a", "b"])


def test_a_row_that_only_repeats_another_is_left_out_and_told(tmp_path: Path) -> None:
    rows = [(f"{n}.png", "ab"[n % 2], f"p{n // 2}") for n in range(24)]
    table = table_of(tmp_path, [*rows[:3], ("./1.png", *rows[1][1:]), *rows[3:]], "path,label,who")
    collection = find_images(tmp_path, table=table, groups="who")
    assert [(i.name, i.group) for i in collection.images] == [(row[0], row[2]) for row in rows]
    assert collection.warnings == ("1 row left out that only repeated another one: ./1.png.",)


# -- cells -----------------------------------------------------------------------------------------


def test_a_column_of_labels_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    table = table_of(tmp_path, [("0.png", "1"), ("1.png", "0")], "path,nodule")
    with pytest.raises(DataError, match="labels names a column twice: nodule, nodule"):
        find_images(tmp_path, table=table, labels=["nodule", "nodule"])


def test_classes_that_differ_only_in_case_are_told(tmp_path: Path) -> None:
    rows = [(f"{n}.png", ("Mass", "MASS", "cyst")[n % 3]) for n in range(36)]
    told = " ".join(opened(table_of(tmp_path, rows)).warnings)
    assert "differ only in upper and lower case, " in told and ": MASS = Mass. If" in told
    rows = [(path, label.lower()) for path, label in rows]
    assert "lower case" not in " ".join(opened(table_of(tmp_path, rows)).warnings)


def test_a_warning_names_classes_that_are_one_number_in_two_forms(tmp_path: Path) -> None:
    rows = [(f"{n}.png", ["0", "1", "0.0", "1.0", "x"][n % 5]) for n in range(40)]
    table = table_of(tmp_path, rows)
    told = [w for w in opened(table).warnings if "one number in two forms" in w]
    assert len(told) == 1 and "0 = 0.0, 1 = 1.0. If they are one class" in told[0]


def test_what_is_too_little_to_split_is_said(tmp_path: Path) -> None:
    table = table_of(tmp_path, [(f"{n}.png", "abc"[n]) for n in range(3)])
    with pytest.raises(DataError, match=r"3 images with .* none is left for val and test\. Check"):
        opened(table)
    rows = [(f"{n}.png", "ab"[n % 2], "ward") for n in range(24)]
    table = table_of(tmp_path, rows, "path,label,patient")
    with pytest.raises(DataError, match=r"24 images with these .* of one group, .* stay together"):
        open_images(tmp_path, size=8, table=table, groups="patient")


def test_a_part_that_a_program_wrote_as_missing_is_no_part(tmp_path: Path) -> None:
    rows = [(f"{n}.png", "ab"[n % 2], ("NaN", "#N/A")[n // 2 % 2]) for n in range(24)]
    collection = find_images(tmp_path, table=table_of(tmp_path, rows, "path,label,part"))
    assert all(image.part is None for image in collection.images)


# -- files -----------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_has_the_path_that_was_looked_for(tmp_path: Path) -> None:
    table = table_of(tmp_path, [(f"{n}.png", "ab"[n % 2]) for n in range(9)])
    (tmp_path / "3.png").unlink()
    with pytest.raises(DataError, match=f"3.png: No such file: {tmp_path}/3.png\n"):
        opened(table)
    table.write_text(table.read_text() + f"{'long' * 99}.png,a\n")
    with pytest.raises(DataError, match="File name too long"):
        opened(table)


def test_a_table_of_which_no_file_is_there_says_where_its_paths_start(tmp_path: Path) -> None:
    rows = [(f"{n}.png", "ab"[n % 2]) for n in range(9)]
    table = table_of(tmp_path, rows)
    (tmp_path / "out").mkdir()
    said = f"none of the 9 images .*{tmp_path}/out/0.png; its paths start from {tmp_path}/out; .*"
    with pytest.raises(DataError, match=f"{said}name that folder with data_dir") as raised:
        open_images(tmp_path / "out", size=8, table=table)
    assert for_command_line(raised.value).endswith("name that folder with --data-dir")
    moved = table.rename(tmp_path / "out" / "table.csv")
    with pytest.raises(DataError, match=f"{said}move the table there, or write whole paths"):
        read_part(moved, "test", size=8)
    for gone in ("/gone", "C:/gone", f"/{'long' * 99}"):
        whole = [(f"{gone}/{name}", label) for name, label in rows]
        with pytest.raises(DataError, match=rf"{gone}/0\.png; mend the paths in the table"):
            opened(table_of(tmp_path, whole, write=False))
