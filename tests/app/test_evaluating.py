"""inmerge evaluate on networks of the application: their thresholds, temperature and images."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inmerge_wrap.app.model import TrainedModel
from inmerge_wrap.images.files import decode
from inmerge_wrap.images.preparation import Recipe, digest_of
from tests.app.trained import pictures, trained
from tests.cli.common import complaint, run, run_json

QUICKLY = ("--severity", 3, "--bootstrap", 0, "--preset", "quick")
DEEP = "6 images of more than 8 bits or in DICOM, such as "
LACKING = "model lacks preparation.json: without it the temperature, the thresholds and the range"


def table(path: Path, images: Path, *, several: bool, part: str | None = None) -> list[list[str]]:
    """Writes a CSV file of labels; returns its rows."""
    rows = []
    for index, image in enumerate(sorted(images.iterdir())):
        marks = [str(index % 2), str(index // 4 % 2), "" if index == 3 else str(index % 3 // 2)]
        labels = marks if several else ["abc"[index % 3]]
        rows.append([image.relative_to(path.parent).as_posix(), *labels, part or ""])
    with open(path, "w", newline="") as file:
        header = ["a", "b", "c"] if several else ["label"]
        csv.writer(file).writerows([["path", *header, "part"], *rows])
    return rows


def test_several_labels_are_evaluated_at_the_thresholds_of_the_training(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "multilabel", count=16)
    trained(tmp_path / "model", "multilabel", tmp_path / "images")
    model = TrainedModel.read(tmp_path / "model")
    pixels = torch.stack(
        [model.recipe.preparation(p) for p in sorted((tmp_path / "images").iterdir())]
    )
    answers = model.recipe.probabilities(model.scores(pixels))
    middle = answers.quantile(0.5, dim=0, interpolation="midpoint")
    recipe = replace(model.recipe, thresholds=tuple(middle.tolist()))
    recipe.write(tmp_path / "model")
    rows = table(tmp_path / "list.csv", tmp_path / "images", several=True)
    content = run_json("evaluate", tmp_path / "model", "--data", tmp_path / "list.csv", *QUICKLY)
    named = recipe.named(recipe.probabilities(model.scores(pixels)))
    errors = []
    for place in range(3):
        known = [index for index, row in enumerate(rows) if row[1 + place]]
        truth = torch.tensor([rows[index][1 + place] == "1" for index in known])
        said = named[known, place]
        recalls = [said[truth].double().mean(), (~said[~truth]).double().mean()]
        errors.append(1 - sum(recalls) / 2)
    clean = content["rows"][0]
    assert clean["balanced_error"] == pytest.approx(float(sum(errors) / 3), abs=1e-6)
    assert 0.1 < clean["balanced_error"] < 0.9
    assert content["settings"]["temperature"] == 1.7


def test_columns_of_the_classes_do_not_change_the_task(tmp_path: Path) -> None:
    """As in the tables of ISIC, which hold the label and a column for each class."""
    pictures(tmp_path / "images", "png16", count=12)
    trained(tmp_path / "model", "png16", tmp_path / "images")
    rows = table(tmp_path / "list.csv", tmp_path / "images", several=False)
    with open(tmp_path / "wide.CSV", "w", newline="") as file:
        csv.writer(file).writerows(
            [["path", "label", "a", "b", "c"]]
            + [[path, label, *(int(label == name) for name in "abc")] for path, label, _ in rows]
        )
    found = [
        run_json("evaluate", tmp_path / "model", "--data", tmp_path / name, *QUICKLY)
        for name in ("list.csv", "wide.CSV")
    ]
    assert found[1]["settings"]["task"] == "multiclass"
    assert found[0]["rows"] == found[1]["rows"]


def test_the_temperature_counts(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "png16", count=12)
    trained(tmp_path / "model", "png16", tmp_path / "images")
    model = TrainedModel.read(tmp_path / "model")
    table(tmp_path / "list.csv", tmp_path / "images", several=False)
    options = ("--data", tmp_path / "list.csv", *QUICKLY)
    found = run_json("evaluate", tmp_path / "model", *options)["rows"][0]["brier"]
    pixels = torch.stack(
        [model.recipe.preparation(p) for p in sorted((tmp_path / "images").iterdir())]
    )
    probabilities = model.recipe.probabilities(model.scores(pixels))
    truth = torch.nn.functional.one_hot(torch.arange(12) % 3, 3)
    assert found == pytest.approx(float(((probabilities - truth) ** 2).sum(1).mean()), abs=1e-5)


def test_before_and_after_are_compared_and_training_images_are_told(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "png16", count=12)
    trained(tmp_path / "model", "png16", tmp_path / "images")
    run("adapt", tmp_path / "model", tmp_path / "images", "--out", tmp_path / "adapted")
    table(tmp_path / "list.csv", tmp_path / "images", several=False, part="test")
    digests = [decode(path).digest for path in sorted((tmp_path / "images").iterdir())]
    recipe = Recipe.read(tmp_path / "model")
    known = tuple(digest_of(digest) for digest in digests[:5])
    replace(recipe, trained_on=known).write(tmp_path / "model")
    models = (f"before={tmp_path / 'model'}", f"after={tmp_path / 'adapted'}")
    result = run("evaluate", *models, "--data", tmp_path / "list.csv", *QUICKLY)
    said = " ".join(result.stderr.split())
    chosen = "before was trained, or its temperature and thresholds chosen, on 5 of the 12 images"
    assert chosen in said and "after was" not in said
    assert "after - before" in result.stdout


def test_groups_of_a_table_are_drawn_whole(tmp_path: Path) -> None:
    """The intervals of a patient's images: four equal copies count as one."""
    pictures(tmp_path / "images", "png16", count=12)
    trained(tmp_path / "model", "png16", tmp_path / "images")
    paths = sorted((tmp_path / "images").iterdir())
    widths = []
    for groups in ([""] * 12, [f"patient {index // 4}" for index in range(12)]):
        rows = [
            [path.relative_to(tmp_path).as_posix(), "abc"[index % 3], group, "test"]
            for index, (path, group) in enumerate(zip(paths, groups, strict=True))
        ]
        with open(tmp_path / "split.csv", "w", newline="") as file:
            csv.writer(file).writerows([["path", "label", "group", "part"], *rows])
        options = ("--data", tmp_path / "split.csv", "--severity", 3, "--preset", "quick")
        content = run_json("evaluate", tmp_path / "model", *options)
        assert content["settings"]["groups"] == (3 if groups[0] else None)
        clean = content["rows"][0]
        widths.append((clean["brier_low"], clean["brier_high"]))
    assert widths[0] != widths[1]
    shown = " ".join(run("evaluate", tmp_path / "model", *options).stdout.split())
    assert "95% confidence interval over 3 groups" in shown
    for row in rows:
        row[2] = "the only patient"
    with open(tmp_path / "split.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "group", "part"], *rows])
    shown = " ".join(run("evaluate", tmp_path / "model", *options).stdout.split())
    assert "interval over 1 group." in shown
    shown = " ".join(run("evaluate", tmp_path / "model", *options, "--bootstrap", 0).stdout.split())
    assert "Corruptions of preset quick" in shown and "In brackets" not in shown


def test_a_table_needs_a_preparation(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "png8", count=6)
    trained(tmp_path / "model", "png8", tmp_path / "images")
    table(tmp_path / "list.csv", tmp_path / "images", several=False)
    (tmp_path / "model" / "preparation.json").unlink()
    told = complaint("evaluate", tmp_path / "model", "--data", tmp_path / "list.csv", *QUICKLY)
    assert "has no preparation.json" in told


@pytest.mark.parametrize("table_or_folder", ["list.csv", "classes"])
def test_a_network_whose_images_are_prepared_for_another_is_named(
    table_or_folder: str, tmp_path: Path
) -> None:
    for seed, name in enumerate("abc"):
        pictures(tmp_path / "classes" / name, "png8", count=2, seed=seed)
    for name in ("own", "foreign"):
        trained(tmp_path / name, "png8", tmp_path / "classes" / "a")
    (tmp_path / "foreign" / "preparation.json").unlink()
    (tmp_path / "foreign" / "README.md").write_text("Exported.")
    rows = [f"classes/{name}/0{n}.png,{name}" for name in "abc" for n in range(2)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    models = tmp_path / "own", tmp_path / "foreign"
    with pytest.warns(
        UserWarning, match="foreign has no preparation.json: its images are prepared"
    ):
        run("evaluate", *models, "--data", tmp_path / table_or_folder, *QUICKLY)


def test_remedies_are_those_of_this_command(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "png8", count=6)
    trained(tmp_path / "model", "png8", tmp_path / "images")
    (tmp_path / "images" / "broken.png").write_bytes(b"nothing")
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(tmp_path / "images" / "deep.png")
    lines = {
        "file,label\nimages/00.png,a\n": "no column 'path'; it has file, label",
        "path,diagnosis\nimages/00.png,a\n": "no column 'label'; it has path, diagnosis",
        "path,label\nimages/broken.png,a\n": "Mend or remove them",
        "path,label\nimages/deep.png,a\n": "images/deep.png: uint16 values, and no range says",
        "path,label,part\nimages/00.png,a,test\nimages/01.png,b,\n": (
            "1 row without a part: row 3 (images/01.png); give every image a part"
        ),
    }
    for content, expected in lines.items():
        (tmp_path / "list.csv").write_text(content)
        options = ("--data", tmp_path / "list.csv", *QUICKLY)
        told = run("evaluate", tmp_path / "model", *options, code=1).stderr
        assert expected in told and "--" not in told
    told = complaint("evaluate", tmp_path / "model", *options, "--output", tmp_path / "images")
    assert "images is a folder: give the name of a file" in told


def test_one_class_for_each_image_does_not_answer_for_several_labels(tmp_path: Path) -> None:
    pictures(tmp_path / "images" / "a", "multilabel", count=4)
    pictures(tmp_path / "images" / "b", "multilabel", count=4, seed=1)
    trained(tmp_path / "model", "multilabel", tmp_path / "images" / "a")
    options = ("evaluate", tmp_path / "model", "--data", tmp_path / "images", *QUICKLY)
    told = run(*options, code=1).stderr
    assert "answers for several labels, and the images have one class each: give a table" in told
    (tmp_path / "list.csv").write_text("path,a,c\nimages/a/00.png,1,0\n")
    told = complaint("evaluate", tmp_path / "model", "--data", tmp_path / "list.csv", *QUICKLY)
    assert "no column 'b'; it has path, a, c" in told


def test_files_that_are_left_out_are_named(tmp_path: Path) -> None:
    pictures(tmp_path / "images" / "a", "png8", count=3)
    pictures(tmp_path / "images" / "b", "png8", count=3, seed=1)
    trained(tmp_path / "model", "png8", tmp_path / "images" / "a")
    Image.open(tmp_path / "images" / "a" / "00.png").save(tmp_path / "images" / "a" / "x.webp")
    options = ("--data", tmp_path / "images", *QUICKLY)
    with pytest.warns(UserWarning, match=r"^1 file ignored, not images in a class: a/x\.webp$"):
        run("evaluate", tmp_path / "model", *options)


@pytest.mark.parametrize(
    ("form", "by_training", "told"),
    [
        ("png16", False, [DEEP]),
        ("dicom", False, [DEEP]),
        ("png8", False, []),
        ("png8", True, [LACKING]),
        ("png16", True, [LACKING, DEEP]),
    ],
)
def test_what_nothing_says_without_a_preparation_is_told(
    form: str, by_training: bool, told: list[str], tmp_path: Path
) -> None:
    for seed, name in enumerate("abc"):
        pictures(tmp_path / "images" / name, form, count=2, seed=seed)
    trained(tmp_path / "model", form, tmp_path / "images" / "a")
    (tmp_path / "model" / "preparation.json").unlink()
    if not by_training:
        (tmp_path / "model" / "README.md").write_text("Exported.")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run("evaluate", tmp_path / "model", "--data", tmp_path / "images", *QUICKLY)
    assert len(found) == len(told)
    for warning, words in zip(found, told, strict=True):
        assert words in str(warning.message)
