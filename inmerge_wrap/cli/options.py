"""Options that several commands share, and the network that they name."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from inmerge_wrap.architectures import known_models, resolve
from inmerge_wrap.errors import ArgumentError

if TYPE_CHECKING:
    from torch import nn


def complete_model(incomplete: str) -> list[str]:
    """Returns the models that begin like this, for shell completion."""
    known = known_models("timm") | known_models("torchvision")
    return sorted(name for name in known if name.startswith(incomplete))


Arch = Annotated[
    str | None,
    Option(
        "--arch",
        metavar="MODEL",
        help="Name of a timm or torchvision model; `timm:NAME` and `torchvision:NAME` choose the "
        "library. Not needed for a folder that `inmerge export` wrote.",
        autocompletion=complete_model,
    ),
]
NumClasses = Annotated[
    int | None, Option(min=1, help="Number of outputs; default: that of the weights.")
]
InChans = Annotated[
    int | None, Option(min=1, help="Image channels; default: those of the weights.")
]
Include = Annotated[
    list[str] | None,
    Option(
        metavar="NAME",
        help="Use exactly the convolutions that match (`*` is a wildcard). Repeatable.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    Option(metavar="NAME", help="Leave out convolutions that match. Repeatable."),
]
Key = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="Checkpoint entry that holds the weights, such as `state_dict_ema`.",
    ),
]
InputSize = Annotated[
    tuple[int, int, int] | None,
    Option(metavar="C H W", help="Channels, height and width of an image."),
]
AsJson = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Weights = Annotated[
    Path,
    Argument(
        help="A .safetensors file, a state dict (.pt, .pth), a checkpoint folder of Accelerate, or "
        "a timm folder.",
    ),
]
TrainedFolder = Annotated[Path, Argument(help="The folder `model/` that `inmerge train` wrote.")]
PathColumn = Annotated[str, Option(metavar="NAME", help="Column with the paths in CSV files.")]
BatchSize = Annotated[int, Option(min=1, help="Images per batch; does not affect the results.")]
Device = Annotated[str, Option(help="Device: cpu or cuda.")]
Workers = Annotated[int, Option(min=0, help="Processes that read images; 0 reads in this one.")]


def load(
    weights: Path,
    arch: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    key: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a network; usage errors are reported before torch is imported, which takes seconds."""
    check_there(weights)
    if arch is not None:
        resolve(arch)
    from inmerge_wrap.checkpoints import load_network

    return load_network(weights, arch, num_classes=num_classes, in_chans=in_chans, key=key)


def check_there(path: Path) -> None:
    """Raises an error that names files with a similar name, if there is no such file."""
    if path.exists():
        return
    there = [entry.name for entry in path.parent.glob("*")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
    hint = f"; in {path.parent} there is {', '.join(close)}" if close else ""
    raise ValueError(f"no such file or folder: {path}{hint}")


def check_file(path: Path | None, *, sources: Iterable[Path] = ()) -> None:
    """Raises an error before hours of work if a file cannot be written, or is one that is read."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file in it")
    if path.resolve() in {source.resolve() for source in sources}:
        raise ValueError(f"{path} is one of the files to read: name another file")
    check_place(path)


def check_path_column(column: str, tables: Iterable[Path | None]) -> None:
    """Raises an error if a column of paths is named and there is no table that could have it."""
    named = column != "path"
    if named and not any(path is not None and path.suffix.lower() == ".csv" for path in tables):
        raise ArgumentError(
            f"<path_column={column}> names a column of a CSV file, and none is given: leave it out"
        )


def check_place(path: Path) -> None:
    """Raises an error if nothing can be written where a file or folder is to be."""
    try:
        place = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): name another place"
        ) from error


def check_image(input_size: tuple[int, int, int] | None) -> None:
    """Raises an error for an image without pixels."""
    if input_size is not None and min(input_size) < 1:
        given = " ".join(map(str, input_size))
        raise ArgumentError(
            f"<input_size> is {given}: channels, height and width are each at least 1, for "
            "example <input_size=3 224 224>"
        )
