"""``inmerge adapt``: a trained network at another site."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from inmerge_wrap.cli import options
from inmerge_wrap.cli.options import check_path_column, check_place, check_there
from inmerge_wrap.cli.shell import command, print_json, progress, say, warn
from inmerge_wrap.cli.tables import KEPT, Column, print_table

if TYPE_CHECKING:
    from inmerge_wrap.app.adapting import Adaptation


@command(
    "inmerge adapt runs/mine/model other_hospital/ --out runs/mine/other_hospital",
    "inmerge adapt runs/mine/model images/ --labels some.csv --out adapted",
    "inmerge evaluate before=runs/mine/model after=adapted --data labelled.csv",
)
def adapt(
    model: options.TrainedFolder,
    images: Path,
    out: Annotated[Path, Option(metavar="DIR")],
    prior: Annotated[float, Option(min=0, metavar="N")] = 16.0,
    labels: Annotated[Path | None, Option(metavar="CSV")] = None,
    site: Annotated[str | None, Option(metavar="NAME")] = None,
    limit: Annotated[int, Option(min=1, metavar="N")] = 2000,
    path_column: options.PathColumn = "path",
    workers: options.Workers = 0,
    device: options.Device = "cpu",
    as_json: options.AsJson = False,
) -> None:
    """Adapt a trained network to unlabelled images of another site.

    BatchNorm's statistics are re-estimated; no other weight changes. The images must show about
    the same mix of classes as those of the training.

    Args:
        images: A folder of images of the other site, or a CSV file with a column of paths. They
            need no labels.
        out: New folder for the adapted network.
        prior: Number of images that the training's statistics count as.
        labels: Labels of some of the images: columns path (as below the folder of images) and
            label, or path and a column of 0 and 1 for each label. The temperature and the
            thresholds are chosen on these images.
        site: Name of the site, for the model card; default: that of the folder.
        limit: Number of images to use, evenly spaced over all.
    """
    for path in (model, images, *([labels] if labels else [])):
        check_there(path)
    check_path_column(path_column, (images, labels))
    from inmerge_wrap.app.adapted_folder import check_folders, write_adapted
    from inmerge_wrap.app.adapting import adapt as adapted_to
    from inmerge_wrap.app.adapting import check_norms, read_site
    from inmerge_wrap.app.model import TrainedModel
    from inmerge_wrap.app.predicting import find_files, read_labels

    check_folders(model, out)
    check_place(out)
    trained = TrainedModel.read(model, device)
    check_norms(trained.network)
    # A table may have several rows of an image, one a finding: each image counts once.
    files = list(dict.fromkeys(find_files([images], path_column)))
    marks = read_labels(labels, trained.recipe, path_column) if labels else None
    used = min(limit, len(files))
    # Each image is read once, and passes the network before, during and after the adaptation.
    with progress({"reading": used, "adapting": 3 * used}) as show:
        reading, adapting = partial(show, "reading"), partial(show, "adapting")
        read = read_site(trained, files, limit=limit, workers=workers, progress=reading)
        found = adapted_to(trained, read, prior=prior, labels=marks, progress=adapting)
    place = images.resolve()
    name = place.name if place.is_dir() else place.stem
    load = write_adapted(found, model, out, site=site or name)
    for warning in found.warnings:
        warn(warning)
    if as_json:
        print_json({"output": str(out), "load": load, **found.to_dict()})
    else:
        _print(found, out, load)


def _print(found: Adaptation, out: Path, load: str) -> None:
    trained = found.model.recipe.class_shares
    columns = [
        Column("class", list(found.shares), KEPT, justify="left"),
        *([Column("training", [f"{share:.1%}" for share in trained], KEPT)] if trained else []),
        Column("before", [f"{before:.1%}" for before, _ in found.shares.values()], KEPT),
        Column("after", [f"{after:.1%}" for _, after in found.shares.values()], KEPT),
    ]
    print_table(
        f"Share of images in which each class is predicted, of {found.images}"
        + (", beside its share of the training images" if trained else ""),
        columns,
    )
    if found.balanced_accuracy is not None:
        before, after = found.balanced_accuracy
        scores = f"{before:.3f} before, {after:.3f} after"
        say(f"Balanced accuracy on {found.labelled} labelled images: {scores}.")
    say(f"written: {out}\nload it with: {load}")
