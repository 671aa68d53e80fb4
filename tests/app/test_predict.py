"""New images through a trained network: equal to plain Python, whatever the form of the files."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from inmerge_wrap.app.predicting import find_files, predict, warnings_of, write_predictions
from inmerge_wrap.errors import ArgumentWarning
from tests.app.trained import code_of, pictures, trained
from tests.cli.common import complaint, run, run_json
from tests.stranger import Stranger


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("form", ["png8", "png16", "dicom", "dicom without windows", "multilabel"])
def test_the_lines_of_the_card_give_what_predict_gives(
    form: str, tmp_path: Path, stranger: Stranger
) -> None:
    """In a process that cannot import this library."""
    images, folder = tmp_path / "images", tmp_path / "model"
    pictures(images, form, count=6)
    if form.startswith("png"):  # a photograph on its side
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(images / "05.png") as picture:
            picture.copy().save(images / "05.png", exif=exif)
    if form == "png16":  # among deep ones: its pixels are places in a table of colours
        with Image.open(images / "04.png") as picture:
            values = (np.asarray(picture) >> 4).astype(np.uint8)
        Image.fromarray(values).convert("RGB").quantize(200).save(images / "04.png")
    trained(folder, form, images)
    run("predict", folder, images, "--out", tmp_path / "predictions.csv")
    rows = rows_of(tmp_path / "predictions.csv")
    code = code_of(folder)
    program = f"""
import json, pathlib
found = {{}}
for path in sorted(pathlib.Path({str(images)!r}).iterdir()):
    space = {{}}
    exec({code!r}.replace("image.png", str(path)).replace("image.dcm", str(path)), space)
    found[path.name] = space["probabilities"].tolist()
print("found:" + json.dumps(found))
"""
    *said, last = stranger.run(program, tmp_path)
    found = json.loads(last.removeprefix("found:"))
    assert found.keys() == rows.keys() and len(found) == 6
    for name, probabilities in found.items():
        told = [float(rows[name][label]) for label in "abc"]
        assert told == pytest.approx(probabilities, abs=1e-5)
        assert max(abs(value - told[0]) for value in told) > 1e-3  # a constant would agree too
        if form == "multilabel":
            expected = [n for n, p, t in zip("abc", told, (0.45, 0.5, 0.55), strict=True) if p > t]
            assert rows[name]["prediction"] == "; ".join(expected)
        else:
            assert rows[name]["prediction"] == "abc"[int(np.argmax(told))]
    if form == "multilabel":
        assert [eval(line) for line in said] == [
            rows[name]["prediction"].split("; ") if rows[name]["prediction"] else []
            for name in sorted(rows)
        ]


def test_classes_called_like_other_columns_have_columns_of_their_own(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "png8", count=2)
    model = trained(tmp_path / "model", "png8", tmp_path / "images")
    recipe = replace(model.recipe, classes=("image", "prediction", "c"))
    found = predict(replace(model, recipe=recipe), find_files([tmp_path / "images"]))
    write_predictions(found, recipe, tmp_path / "p.csv")
    row = rows_of(tmp_path / "p.csv")["00.png"]
    assert row["prediction"] in recipe.classes
    columns = ["probability of image", "probability of prediction", "c"]
    assert [float(row[name]) for name in columns] == pytest.approx(found[0].probabilities, abs=1e-6)


def test_deep_images_are_not_clipped(tmp_path: Path) -> None:
    """Pillow's convert("L") makes 255 of all that is above: every image would look the same."""
    images, folder = tmp_path / "images", tmp_path / "model"
    pictures(images, "png16", count=6)
    model = trained(folder, "png16", images)
    found = predict(model, find_files([images]))
    assert len({round(entry.probabilities[0], 4) for entry in found if entry.probabilities}) == 6
    code = code_of(folder)
    assert "4095" in code and ".open" in code


def test_a_broken_file_is_a_row_with_its_reason(tmp_path: Path) -> None:
    images, folder = tmp_path / "images", tmp_path / "model"
    pictures(images, "png8", count=4)
    trained(folder, "png8", images)
    (images / "broken.png").write_bytes(b"\x89PNG nothing")
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(images / "deep.png")
    (images / "notes.txt").write_text("no image")
    out = tmp_path / "out" / "predictions.csv"
    with pytest.warns(ArgumentWarning, match=r"^1 file in .*images left out, .*: notes\.txt$"):
        result = run("predict", folder, images, "--out", out)
    assert "2 of 6 files cannot be read" in result.stderr
    (images / "notes.txt").unlink()
    rows = rows_of(out)
    assert set(rows) == {"00.png", "01.png", "02.png", "03.png", "broken.png", "deep.png"}
    assert "cannot identify image file" in rows["broken.png"]["error"]
    assert rows["deep.png"]["error"].startswith("uint16 values, and no range says which are black")
    assert (
        rows["broken.png"]["a"] == rows["broken.png"]["prediction"] == ""
        and not rows["00.png"]["error"]
    )
    content = run_json("predict", folder, images, "--out", out)
    assert content["images"][4]["probabilities"] is None and content["output"] == str(out)


def test_names_of_two_folders_differ_and_nothing_readable_is_a_failure(tmp_path: Path) -> None:
    images, other, folder = tmp_path / "images", tmp_path / "other", tmp_path / "model"
    pictures(images, "png8", count=3)
    pictures(other / "inside", "png8", count=3, seed=1)
    trained(folder, "png8", images)
    (images / "linked").symlink_to(other / "inside")
    (other / "inside" / "back").symlink_to(other)
    found = run_json("predict", folder, images, other, "--out", tmp_path / "p.csv")["images"]
    names = [str(images / f"0{n}.png") for n in range(3)]
    names += [str(images / "linked" / f"0{n}.png") for n in range(3)]
    names += [str(other / "inside" / f"0{n}.png") for n in range(3)]
    assert [entry["image"] for entry in found] == names
    (tmp_path / "broken.png").write_bytes(b"nothing")
    broken = ("predict", folder, tmp_path / "broken.png", "--out", tmp_path / "p.csv")
    said = run(*broken, code=1).stderr
    assert said == "warning: 1 of 1 file cannot be read: see the column error\n"
    assert rows_of(tmp_path / "p.csv")[str(tmp_path / "broken.png")]["error"]


def test_files_and_tables_of_spreadsheets_are_read(tmp_path: Path) -> None:
    images, folder = tmp_path / "images", tmp_path / "model"
    pictures(images, "png8", count=3)
    trained(folder, "png8", images)
    (images / "00.png").rename(images / "Zürich.png")
    everything = run_json("predict", folder, images, "--out", tmp_path / "p.csv")["images"]
    answers = {entry["image"]: entry["probabilities"] for entry in everything}
    for encoding in ("utf-8-sig", "cp1252", "utf-16"):
        text = "Datei;Alter\r\nimages/Zürich.png;40\r\nimages/02.png;\r\n"
        (tmp_path / "list.csv").write_bytes(text.encode(encoding))
        options = ("--path-column", "Datei", "--out", tmp_path / "p.csv")
        listed = run_json("predict", folder, tmp_path / "list.csv", *options)["images"]
        assert [entry["image"] for entry in listed] == ["images/Zürich.png", "images/02.png"]
        assert listed[0]["probabilities"] == answers["Zürich.png"]
    told = complaint("predict", folder, tmp_path / "list.csv", "--out", tmp_path / "p.csv")
    assert "no column 'path': name it with --path-column; it has Datei, Alter" in told
    (tmp_path / "list.csv").write_text("path,age\nimages/02.png,40\n,50\n")
    told = complaint("predict", folder, tmp_path / "list.csv", "--out", tmp_path / "p.csv")
    assert "list.csv, row 3 without a path: fill it in, or remove the row" in told
    for place in (tmp_path, images):  # two tables that name their images alike
        (place / "list.csv").write_text("path\n01.png\n")
    (images / "01.png").rename(tmp_path / "01.png")
    Image.open(images / "02.png").save(images / "01.png")
    tables = (tmp_path / "list.csv", images / "list.csv")
    listed = run_json("predict", folder, *tables, "--out", tmp_path / "p.csv")["images"]
    wanted = [str(tmp_path / "01.png"), str(images / "01.png")]
    assert [entry["image"] for entry in listed] == wanted
    two = (images / "02.png", images / "01.png")
    assert len(run_json("predict", folder, *two, "--out", tmp_path / "p.csv")["images"]) == 2


@pytest.mark.parametrize(
    ("form", "other", "options", "told"),
    [
        ("png8", "png8", {"seed": 1}, None),
        ("png16", "png16", {"seed": 0}, None),
        ("png16", "png16", {"seed": 1, "high": 60000}, "hold values outside of 0 to"),
        ("png16", "png16", {"seed": 1, "high": 256}, "up to a quarter of"),
        ("png16", "png8", {"seed": 1}, "show colours, and no training image did"),
        ("png16", "dicom", {"seed": 1}, "of a kind that training did not see (it saw integers)"),
    ],
)
def test_images_unlike_those_of_the_training_are_told(
    form: str, other: str, options: dict, told: str | None, tmp_path: Path
) -> None:
    pictures(tmp_path / "images", form, count=30)
    pictures(tmp_path / "new", other, count=30, **options)
    model = trained(tmp_path / "model", form, tmp_path / "images")
    found = predict(model, find_files([tmp_path / "new"]))
    said = warnings_of(found, model.recipe)
    if told is None:
        assert said == [] and not any("range" in entry.unlike for entry in found)
    else:
        assert any(told in sentence for sentence in said), said
        assert all(entry.unlike for entry in found if "quarter" in told or "colours" in told)


def test_outputs_that_are_not_finite_are_no_answer(tmp_path: Path) -> None:
    """The first class was named, and the probabilities were nan."""
    pictures(tmp_path / "images", "png8", count=2)
    trained(tmp_path / "model", "png8", tmp_path / "images")
    weights = tmp_path / "model" / "model.safetensors"
    damaged = {name: value * float("nan") for name, value in load_file(weights).items()}
    save_file(damaged, weights)
    out = tmp_path / "p.csv"
    told = complaint("predict", tmp_path / "model", tmp_path / "images", "--out", out)
    assert "outputs are not finite" in told and "copy the folder again" in told
    assert not out.exists()


def test_predict_answers_mistakes(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "png8", count=2)
    assert "no such file" in complaint("predict", tmp_path / "modle", tmp_path / "images")
    (tmp_path / "model").mkdir()
    told = complaint("predict", tmp_path / "model", tmp_path / "images")
    assert "has no preparation.json" in told and "give the folder model/" in told
    trained(tmp_path / "model", "png8", tmp_path / "images")
    told = complaint("predict", tmp_path / "model", tmp_path / "images", "--path-column", "file")
    assert "--path-column file names a column of a CSV file, and none is given" in told
    (tmp_path / "empty").mkdir()
    assert "no image in" in complaint("predict", tmp_path / "model", tmp_path / "empty")
    there = ("--out", tmp_path / "empty")
    told = complaint("predict", tmp_path / "model", tmp_path / "images" / "00.png", *there)
    assert "empty is a folder: give the name of a file" in told
    table = tmp_path / "table.csv"
    table.write_text("path\nimages/00.png\n")
    for there, images in ((table, table), (tmp_path / "images" / "00.png", tmp_path / "images")):
        before = there.read_bytes()
        told = complaint("predict", tmp_path / "model", images, "--out", there)
        assert "is one of the files to read: name another file" in told
        assert there.read_bytes() == before
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])  # a copy that was interrupted
    told = complaint("predict", tmp_path / "model", tmp_path / "images")
    assert "model.safetensors is not a safetensors file" in told
    (tmp_path / "model" / "config.json").unlink()
    told = complaint("predict", tmp_path / "model", tmp_path / "images")
    assert "lacks config.json or model.safetensors: copy all of the folder" in told
    assert not Path("predictions.csv").exists()
