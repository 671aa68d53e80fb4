"""The files of a collection: each read once and its facts kept, then as the data set of a part.

An item of an `ImageSet` is ``(pixels, label)``: uint8 (C, S, S) and a class index, or float32
(labels,) of 0, 1 and NaN for unknown; in a fixed order. Pixels are not normalised: divided by 255
they are what corruptions act on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from inmerge_wrap.files import read_json, replacing, write_json
from inmerge_wrap.images.collection import ImageCollection, ImageFile, spaced
from inmerge_wrap.images.files import DataError, Facts, counted, examine, named
from inmerge_wrap.images.preparation import Preparation

# -- examining -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Mapped(Dataset[Any]):
    """A function of each of some items, which the processes of a DataLoader compute."""

    function: Callable[[Any], Any]
    items: Sequence[Any]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.items[index])


def _examined(path: Path) -> Facts | str:
    try:
        return examine(path)
    except DataError as error:  # a worker's traceback would bury the message
        return str(error)


def examine_all(
    collection: ImageCollection,
    *,
    skip_broken: bool | None = False,
    workers: int = 0,
    memory: Path | None = None,
) -> ImageCollection:
    """The images that can be read, with the facts of each.

    Every file is read once; ``memory``, a JSON file, keeps the facts until a file changes. With
    ``skip_broken=None`` the reader of an error has no such choice.
    """
    facts = _facts_of([image.path for image in collection.images], workers, memory)
    images = [replace(i, facts=f) for i, f in zip(collection.images, facts, strict=True)]
    left = replace(collection, images=tuple(i for i in images if i.facts.error is None))
    broken = [image for image in images if image.facts.error is not None]
    if not broken:
        return left
    title = f"{len(broken):,} of {counted(len(images), 'image')} cannot be read"
    lines = [f"  {image.name}: {image.facts.error}" for image in broken]
    if len(lines) > 10:
        where = f", all of them in {memory}" if memory is not None else ""
        lines[10:] = [f"  and {len(broken) - 10:,} more{where}"]
    shown = "\n".join(lines)
    if not skip_broken:
        choice = "" if skip_broken is None else ", or leave them out with <skip_broken=True>"
        raise DataError(f"{title}:\n{shown}\nMend or remove them{choice}")
    counts = left.counts(left.images)
    gone = [name for name, count in zip(left.classes, counts, strict=True) if not count]
    if gone:
        raise DataError(f"{title}, and so no image is left of {named(gone)}:\n{shown}")
    names = [image.name for image in broken]
    return left.listed(f"{title} and were left out", names, warn=True)


def _facts_of(paths: Sequence[Path], workers: int, memory: Path | None) -> list[Facts]:
    known: dict[Path, tuple[list[int] | None, Facts]] = {}
    if memory is not None and memory.exists():
        try:
            for name, entry in read_json(memory).items():
                known[Path(name)] = entry["stamp"], Facts(**entry["facts"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{memory} cannot be used ({error}): remove it, and the images are checked again"
            ) from error
    stamps = {path: _stamp(path) for path in paths}
    # One that could not be read may be readable now: its decoder may have been missing.
    fresh = [
        path
        for path, stamp in stamps.items()
        if path not in known or known[path][0] != stamp or known[path][1].error is not None
    ]
    loader = DataLoader(Mapped(_examined, fresh), batch_size=None, num_workers=workers)
    bar = tqdm(loader, desc="checking images", unit="image", disable=not fresh)
    for path, facts in zip(fresh, bar, strict=True):
        if isinstance(facts, str):
            raise DataError(facts)
        known[path] = stamps[path], facts
    if memory is not None and fresh:
        kept = {str(p): {"stamp": stamps[p], "facts": asdict(known[p][1])} for p in stamps}
        write_json(memory, kept)
    return [known[path][1] for path in paths]


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


# -- reading ---------------------------------------------------------------------------------------


class PixelFile(Sequence[np.ndarray]):
    """Pixels in an .npy file that each process maps itself; a pickled map would be a full copy."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def array(self) -> np.ndarray:
        """All of them, mapped read-only."""
        return np.load(self.path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        return self.array[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


@dataclass(eq=False)
class ImageSet(Dataset):
    """The images of one part, in order. See the top of this file for what an item is."""

    images: Sequence[ImageFile]
    preparation: Preparation
    pixels: PixelFile | None = None  # (N, C, S, S), decoded before: see `keep_pixels`

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.pixels is None:
            pixels = self.preparation(self.images[index].path)
        else:
            pixels = torch.from_numpy(np.array(self.pixels[index]))
        return pixels, torch.tensor(self.images[index].label)

    @property
    def labels(self) -> Tensor:
        """Class indices (N,), or 0, 1 and NaN (N, labels)."""
        return torch.tensor([image.label for image in self.images])

    def sample(self, most: int | None, what: str) -> Iterator[tuple[ImageFile, Tensor]]:
        """Up to ``most`` images, evenly spaced, with their pixels; the bar says ``what``."""
        hidden = self.pixels is not None  # decoded already, so it takes no time
        for n in tqdm(spaced(len(self), most), what, unit="image", leave=False, disable=hidden):
            yield self.images[n], self[n][0]


def as_floats(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collates items of an ImageSet for corruptions, which act on floats in [0, 1]."""
    pixels, labels = zip(*batch, strict=True)
    return torch.stack(pixels).float() / 255, torch.stack(labels)


def keep_pixels(images: ImageSet, path: Path, *, workers: int = 0) -> ImageSet:
    """The same set, its pixels decoded once into a file; see `decoded_once`."""
    shape = (len(images), images.preparation.channels, *[images.preparation.size] * 2)
    pixels = decoded_once(images, shape, path, workers=workers)
    return ImageSet(images.images, images.preparation, pixels)


def decoded_once(
    images: Dataset[Any], shape: tuple[int, ...], path: Path, *, workers: int = 0
) -> PixelFile:
    """The pixels of all items, bytes of this shape together, written into an .npy file first.

    An existing file is used as it is: its name must be of these images and this preparation.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
        if needed > 0.9 * free:
            raise DataError(
                f"the decoded images take {needed / 1e9:.1f} GB in {path.parent} and "
                f"{free / 1e9:.1f} GB are free: make room, or decode them in every epoch, without "
                "a cache (inmerge train --no-cache)"
            )
        loader = DataLoader(images, batch_size=None, num_workers=workers)
        # Written, not mapped: on a full disk, a map ends the process without an error message.
        with replacing(path) as draft, open(draft, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            part = path.stem.partition("-")[0]
            for pixels, _ in tqdm(loader, desc=f"reading {part}", unit="image"):
                file.write(pixels.numpy().tobytes())
    try:
        found = PixelFile(path)
        if found.array.shape != shape or found.array.dtype != np.uint8:
            raise ValueError(f"it holds {found.array.dtype} {found.array.shape}")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be used ({error}): remove it, and the images are decoded again"
        ) from error
    return found
