"""``inmerge predict``: what a trained network says of new images."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from inmerge_wrap.cli import options
from inmerge_wrap.cli.options import check_file, check_path_column, check_there
from inmerge_wrap.cli.shell import command, print_json, progress, say, warn

if TYPE_CHECKING:
    from inmerge_wrap.app.predicting import Prediction


@command(
    "inmerge predict runs/mine/model new_images/",
    "inmerge predict runs/mine/model one.png two.dcm --out two.csv",
    "inmerge predict runs/mine/model patients.csv --path-column file --json",
)
def predict(
    model: options.TrainedFolder,
    images: Annotated[list[Path], Argument(metavar="IMAGES...")],
    out: Annotated[Path, Option(metavar="CSV")] = Path("predictions.csv"),
    path_column: options.PathColumn = "path",
    batch_size: options.BatchSize = 64,
    workers: options.Workers = 0,
    device: options.Device = "cpu",
    as_json: options.AsJson = False,
) -> None:
    """Classify new images with a trained network.

    Images are read and prepared as in training. A file that cannot be read gets a row with the
    reason. An image that differs from the training images gets a note.

    Args:
        images: Files, folders, or a CSV file with a column of paths relative to its folder.
        out: File with one row for each image.
    """
    for path in (model, *images):
        check_there(path)
    check_path_column(path_column, images)
    check_file(out, sources=images)
    from inmerge_wrap.app.model import TrainedModel
    from inmerge_wrap.app.predicting import find_files, warnings_of, write_predictions
    from inmerge_wrap.app.predicting import predict as answers_to
    from inmerge_wrap.images.files import counted

    trained = TrainedModel.read(model, device)
    files = find_files(images, path_column)
    check_file(out, sources=[path for _, path in files])
    with progress({"images": len(files)}) as show:
        read = partial(show, "images")
        found = answers_to(trained, files, batch_size=batch_size, workers=workers, progress=read)
    write_predictions(found, trained.recipe, out)
    notes = warnings_of(found, trained.recipe)
    for note in notes:
        warn(note)
    if as_json:
        print_json(_content(found, trained.recipe.classes, notes, out))
    else:
        counts = Counter(name for entry in found for name in entry.predicted)
        shown = ", ".join(f"{name} {counts[name]}" for name in trained.recipe.classes)
        say(f"{counted(len(found), 'image')}: {shown}\nwritten: {out}")
    if all(entry.error is not None for entry in found):
        raise typer.Exit(1)


def _content(
    found: list[Prediction], classes: tuple[str, ...], notes: list[str], out: Path
) -> dict[str, Any]:
    return {
        "output": str(out),
        "classes": list(classes),
        "warnings": notes,
        "images": [
            {
                "image": entry.name,
                "prediction": list(entry.predicted),
                "probabilities": entry.probabilities,
                "unlike_training": list(entry.unlike),
                "error": entry.error,
            }
            for entry in found
        ],
    }
