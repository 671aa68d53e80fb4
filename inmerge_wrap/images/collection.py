"""What a data set of image files is, how it is split without leaks, and what is wrong with it.

Nothing here reads a file: see folders.py for that.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from inmerge_wrap.images.files import SHOWN, DataError, Facts, counted, named

PARTS = ("train", "val", "test")
SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


# -- what there is ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFile:
    """An image and what is known of it."""

    path: Path
    name: str  # for people: relative to the data directory, with forward slashes
    label: int | tuple[float, ...]  # class index; or 0.0, 1.0 or NaN (unknown) for each label
    group: str | None = None  # whose image it is: those of one group never stand in two parts
    part: str | None = None
    marks: tuple[tuple[str, str], ...] = ()  # what else is known, by name: its site, its scanner
    facts: Facts = field(default_factory=Facts)  # of its file, once that was read

    @property
    def digest(self) -> str:
        """Of its content: equal images have equal ones."""
        return self.facts.digest

    def mark(self, name: str) -> str:
        """What is known under a name, or an empty text."""
        return dict(self.marks).get(name, "")


@dataclass(frozen=True)
class ImageCollection:
    """All images of a data set."""

    classes: tuple[str, ...]  # in the order of the outputs
    task: str  # "multiclass", two classes included, or "multilabel"
    images: tuple[ImageFile, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # what makes figures worse or less sure than they look
    lists: tuple[tuple[str, tuple[str, ...]], ...] = ()  # all names of a note, by its title

    def part(self, name: str) -> tuple[ImageFile, ...]:
        """The images of one part."""
        return tuple(image for image in self.images if image.part == name)

    def counts(self, images: Iterable[ImageFile]) -> list[int]:
        """How many of the images show each class."""
        found = Counter(index for image in images for index in shown(image))
        return [found[index] for index in range(len(self.classes))]

    def cells(self, image: ImageFile) -> list[str]:
        """An image's label as a table holds it: its class, or 0, 1 or nothing for each label."""
        if isinstance(image.label, int):
            return [self.classes[image.label]]
        return ["" if value != value else f"{value:.0f}" for value in image.label]

    @property
    def fingerprint(self) -> str:
        """Of all contents, labels and parts."""
        rows = [(image.digest, image.label, image.part) for image in self.images]
        return hashlib.sha256(json.dumps([self.classes, rows]).encode()).hexdigest()[:12]

    def in_parts(self, parts: Iterable[str | None]) -> ImageCollection:
        """The same, each image in its part."""
        pairs = zip(self.images, parts, strict=True)
        return replace(self, images=tuple(replace(image, part=part) for image, part in pairs))

    def noted(self, *notes: str) -> ImageCollection:
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def warned(self, *warnings: str) -> ImageCollection:
        """The same with more warnings."""
        return replace(self, warnings=(*self.warnings, *warnings))

    def listed(self, title: str, names: Sequence[str], *, warn: bool = False) -> ImageCollection:
        """The same with a note or warning about names, all of which are kept."""
        where = " (all of them in lists.txt)" if len(names) > SHOWN else ""
        text = f"{title}: {named(names)}{where}."
        kept = replace(self, lists=(*self.lists, (title, tuple(names))))
        return kept.warned(text) if warn else kept.noted(text)


def shown(image: ImageFile) -> list[int]:
    """The classes that an image shows."""
    if isinstance(image.label, int):
        return [image.label]
    return [index for index, value in enumerate(image.label) if value == 1]


def units_of(images: Sequence[ImageFile]) -> list[str] | None:
    """Whose image each is, an image without a group being its own; None where no groups are."""
    if all(image.group is None for image in images):
        return None
    return [image.group or f"image {image.name}" for image in images]


def spaced(count: int, most: int | None) -> list[int]:
    """Places of up to ``most`` of ``count`` images, evenly: the first ones may be of one class."""
    if most is None or most >= count:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


# -- splitting -------------------------------------------------------------------------------------


def check_shares(shares: Mapping[str, float]) -> None:
    """Raises an error unless each part has a positive share and they add up to 1."""
    positive = set(shares) == set(PARTS) and all(share > 0 for share in shares.values())
    if not positive or not np.isclose(sum(shares.values()), 1):
        given = ", ".join(f"{share:g} for {part}" for part, share in shares.items())
        raise DataError(f"<shares> must be three positive shares that add up to 1, got {given}")


def split(
    collection: ImageCollection,
    *,
    shares: Mapping[str, float] | None = None,
    seed: int | None = None,
) -> ImageCollection:
    """Gives every image a part: stratified by label, whole groups, equal images together.

    Parts that the data have stay as they are; missing ones are taken from train, by their shares.
    The seed is 0 if it is None.
    """
    sizes = shares or SHARES
    check_shares(sizes)
    given = {image.part for image in collection.images}
    wanted = [part for part in PARTS if part == "train" or part not in given]
    if wanted == ["train"]:
        for name, value in {"shares": shares, "split_seed": seed}.items():
            if value is not None:
                raise DataError(f"<{name}> would do nothing: the data have all three parts already")
        return collection
    seed = seed or 0
    chosen = [n for n, image in enumerate(collection.images) if image.part in (None, "train")]
    units = _units([collection.images[n] for n in chosen])
    contents = np.zeros((len(units), len(collection.classes) + 1))
    for row, unit in enumerate(units):
        for n in unit:  # the last column counts images that show nothing
            contents[row, shown(collection.images[chosen[n]]) or [-1]] += 1
    total = sum(sizes[part] for part in wanted)
    assigned = deal(contents, [sizes[part] / total for part in wanted], seed)
    if empty := [part for place, part in enumerate(wanted) if place not in assigned]:
        raise DataError(
            f"{counted(len(chosen), 'image')} with these labels are too few to split: those of one "
            "group, or with equal pixels, stay together, and none is left for "
            f"{' and '.join(empty)}. Check <groups>, or add images"
        )
    parts = [image.part for image in collection.images]
    for unit, place in zip(units, assigned, strict=True):
        for n in unit:
            parts[chosen[n]] = wanted[place]
    grouped = any(image.group is not None for image in collection.images)
    new = [part for part in wanted if part != "train"]
    made = f"{' and '.join(new)} {'was' if len(new) == 1 else 'were'}"
    note = (
        f"{'All parts were' if None in given else made} split from the data with seed "
        f"{seed}, in equal proportions of the classes, "
        + ("each group in one part." if grouped else "image by image.")
    )
    done = collection.in_parts(parts).noted(note)
    if grouped:
        return done
    return done.warned(
        "Images were split one by one, because no groups were named. If a patient has several "
        "images, figures are too good: name the patients with --groups."
    )


def _units(images: Sequence[ImageFile]) -> list[list[int]]:
    """Indices of what must stay together: of one group, of equal content, and chains of both."""
    parent = list(range(len(images)))

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    first: dict[tuple[str, str], int] = {}
    for n, image in enumerate(images):
        for kind, key in (("content", image.digest), ("group", image.group)):
            if key is not None:
                parent[root(n)] = root(first.setdefault((kind, key), n))
    units: dict[int, list[int]] = {}
    for n in range(len(images)):
        units.setdefault(root(n), []).append(n)
    return list(units.values())


def deal(contents: np.ndarray, shares: Sequence[float], seed: int) -> list[int]:
    """Deals units out to parts, each part with its share of every label.

    Iterative stratification (K. Sechidis et al., "On the stratification of multi-label data",
    2011): the rarest label first, each unit to the part that still lacks most of this label. Before
    that, a label that has a unit for every part gives each of them one.
    """
    order = list(range(len(contents)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda unit: -contents[unit].sum())  # stable: large units are hard to place late
    lacking = np.outer(shares, contents.sum(0))
    has = np.zeros_like(lacking, dtype=bool)
    assigned = [-1] * len(contents)

    def give(unit: int, part: int) -> None:
        assigned[unit] = part
        lacking[part] -= contents[unit]
        has[part] |= contents[unit] > 0

    rarest_first = np.argsort((contents > 0).sum(0), kind="stable")
    for label in rarest_first:
        holders = [unit for unit in order if contents[unit, label] > 0]
        if len(holders) >= len(shares):
            # Small units here: a large one would fill a small part.
            free = [unit for unit in reversed(holders) if assigned[unit] < 0]
            for part in range(len(shares)):
                if not has[part, label] and free:
                    give(free.pop(0), part)
    for label in rarest_first:
        for unit in order:
            if assigned[unit] < 0 and contents[unit, label] > 0:
                needs = list(zip(lacking[:, label], lacking.sum(1), strict=True))
                give(unit, max(range(len(shares)), key=lambda part: needs[part]))
    return assigned


# -- checking --------------------------------------------------------------------------------------


def check(collection: ImageCollection, *, allow_overlap: bool = False) -> ImageCollection:
    """Looks for what makes figures wrong, names all of it at once, and warns of the suspicious."""
    errors, warnings = [], []
    if len(collection.classes) < 2:
        errors.append(f"there is one class, {collection.classes[0]!r}: at least two are needed")
    for part in PARTS:
        images = collection.part(part)
        if not any(any(collection.cells(image)) for image in images):
            errors.append(
                f"the part {part} holds no image of which a label is known: give it some, or let "
                "the split make it"
            )
            continue
        counts = collection.counts(images)
        by_class = list(zip(collection.classes, counts, strict=True))
        missing = [name for name, count in by_class if not count]
        if missing and part == "train":
            errors.append(f"no training image of {named(missing)}: nothing can be learnt of it")
        elif missing:
            warnings.append(f"No image of {named(missing)} in {part}: figures there leave it out.")
        few = [f"{name} ({count})" for name, count in by_class if 0 < count < 10]
        if few and part == "test":
            warnings.append(f"Fewer than 10 test images of {named(few)}: their figures say little.")
    overlaps = _overlaps(collection)
    if overlaps and not allow_overlap:
        errors += [f"{title}: {named(names)}" for title, names in overlaps.items()]
        errors.append(
            "figures would be too good: remove the overlap, or pass <allow_overlap=True> to train "
            "all the same"
        )
    if errors:
        raise DataError("\n".join(errors), names=[n for names in overlaps.values() for n in names])
    for title, names in overlaps.items():
        collection = collection.listed(f"Figures are too good, with {title}", names, warn=True)
    return _suspicious(collection.warned(*warnings))


def _overlaps(collection: ImageCollection) -> dict[str, list[str]]:
    """What stands in several parts, by what it is."""
    parts: dict[str, set[str]] = {}
    for image in collection.images:
        if image.group is not None and image.part is not None:
            parts.setdefault(image.group, set()).add(image.part)
    groups = [
        f"{group} ({', '.join(part for part in PARTS if part in found)})"
        for group, found in sorted(parts.items())
        if len(found) > 1
    ]
    equal = [
        " = ".join(f"{image.name} ({image.part})" for image in same)
        for same in _equal(collection)
        if len({image.part for image in same}) > 1
    ]
    titles = {
        f"{counted(len(groups), 'group')} in several parts": groups,
        f"{counted(len(equal), 'image')} with equal pixels in several parts": equal,
    }
    return {title: names for title, names in titles.items() if names}


def _equal(collection: ImageCollection) -> list[list[ImageFile]]:
    by_digest: dict[str, list[ImageFile]] = {}
    for image in collection.images:
        by_digest.setdefault(image.digest, []).append(image)
    return [same for same in by_digest.values() if len(same) > 1]


def _suspicious(collection: ImageCollection) -> ImageCollection:
    same = _equal(collection)
    contradicting = [
        " = ".join(image.name for image in images)
        for images in same
        if len({str(image.label) for image in images}) > 1
    ]
    repeated = sum(len(images) - 1 for images in same)
    titles = {
        f"{counted(len(contradicting), 'image')} with equal pixels and different labels": (
            contradicting
        ),
        f"{counted(repeated, 'image')} there more than once": [
            f"{images[0].name} = {images[1].name}" for images in same
        ],
    }
    for title, names in titles.items():
        if names:
            collection = collection.listed(title, names, warn=True)
    return collection
