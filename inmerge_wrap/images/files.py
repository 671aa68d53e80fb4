"""One image file into values: PNG, JPEG, TIFF and DICOM, 8 or 16 bit, grey or colour, any size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from inmerge_wrap.errors import ArgumentError

RASTER = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
DICOM = (".dcm", ".dicom")
_OTHER = tuple(".csv .gif .htm .html .json .log .md .pdf .txt .webp .xlsx .xml .zip".split())
SHOWN = 5  # of names, before "and 7 more"
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_PHOTOMETRIC = 262  # a tag of TIFF


class DataError(ArgumentError):
    """Something about the user's images that the user can mend; the message says how."""

    # Any other ``<name>`` in a message is part of the user's own names of files and classes.
    arguments = frozenset(
        "allow_overlap channels crop_mode data_dir groups labels path_column pixel_range shares "
        "site size skip_broken split_seed subgroups".split()
    )

    def __init__(self, message: str, *, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


def named(names: Sequence[str], limit: int = SHOWN) -> str:
    """``a, b, c, d, e and 7 more``."""
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


def counted(count: int, what: str) -> str:
    """``1 file``, ``12 files``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _canonical(values: np.ndarray) -> np.ndarray:
    """The values in the smallest type that holds all of them, so equal ones in the same."""
    if values.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        exact = -(2**53) <= low and high <= 2**53  # beyond it, floats have gaps
        if not (exact and (values == np.rint(values)).all()):
            single = values.astype("<f4")
            least = single if (single == values).all() else values.astype("<f8")
            return least + np.float32(0)  # without the sign of a zero
    kinds = [np.min_scalar_type(int(value)) for value in (low, high)]
    return values.astype(np.result_type(*kinds).newbyteorder("<"))


@dataclass(frozen=True)
class Decoded:
    """What a file holds; uint8 is ready to be shown, anything else needs a window or a range."""

    values: np.ndarray  # (H, W) or (H, W, 3)
    window: Callable[[np.ndarray], np.ndarray] | None = None  # to [0, 1], as a DICOM file says
    windowed: bool = False  # by a window or table of the file, not by its number of bits
    inverted: bool = False  # low values are bright (MONOCHROME1)
    ends: float = 0.0  # the least plus the largest possible value, of one that is inverted

    @property
    def digest(self) -> str:
        """Of the values, so that one image in two formats is found to be the same."""
        values = self.values
        if values.ndim == 3 and not self.colour:
            values = values[..., 0]
        if self.inverted:  # as the file would hold them if high values were bright
            values = self.ends - values
        values = np.ascontiguousarray(_canonical(values))
        digest = hashlib.sha256(f"{values.shape}{values.dtype}".encode())
        digest.update(values.data)
        return digest.hexdigest()

    @property
    def colour(self) -> bool:
        """Whether the channels differ: grey images are often stored as colour."""
        return self.values.ndim == 3 and bool((self.values != self.values[..., :1]).any())

    @property
    def kind(self) -> str:
        """``"bytes"``; ``"integers"`` or ``"floats"``, which need a range; of DICOM ``"windowed"``
        or ``"unwindowed"``, unless it holds colours, which are bytes.
        """
        if self.window is not None:
            return "windowed" if self.windowed else "unwindowed"
        if self.values.dtype == np.uint8:
            return "bytes"
        return "floats" if self.values.dtype.kind == "f" else "integers"

    def to_bytes(self, pixel_range: tuple[float, float] | None, *, override: bool) -> np.ndarray:
        """The values as uint8; with ``override``, the range replaces a DICOM file's own window."""
        if self.values.dtype == np.uint8 and self.window is None:
            return self.values
        if self.window is None or override:
            if pixel_range is None:
                raise DataError(
                    f"{self.values.dtype} values, and no range says which are black and white: "
                    "convert the image to 8 bits, or train with a range"
                )
            black, white = pixel_range
            shown = (self.values.astype(np.float64) - black) / (white - black)
        else:
            shown = self.window(self.values.astype(np.float64))
        shown = np.clip(shown, 0, 1)
        return np.round(255 * (1 - shown if self.inverted else shown)).astype(np.uint8)


def is_image(path: Path) -> bool:
    """Whether a file is one that `decode` reads: by its suffix, or one of DICOM by its start."""
    suffix = path.suffix.lower()
    if suffix in RASTER + DICOM:
        return True
    if suffix in _OTHER or path.name == "DICOMDIR":
        return False
    # Scanners write .IMA, or names that are UIDs and end in .123.
    return path.is_file() and os.access(path, os.R_OK) and _starts_as_dicom(path)


def _starts_as_dicom(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def decode(path: Path, *, first_frame: bool = False) -> Decoded:
    """Reads a file, upright as its EXIF orientation says; raises anything on a broken one.

    One that holds several images is refused, or its first one read.
    """
    if path.suffix.lower() in DICOM or _starts_as_dicom(path):
        from inmerge_wrap.images.dicom import decode_dicom

        return decode_dicom(path)
    with Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and not first_frame and image.format != "MPO":  # cameras add a preview
            raise ValueError(f"it holds {frames} images; give each its own file")
        if image.mode in _DEEP and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
            raise ValueError(  # Pillow inverts images of 8 bits alone
                "it is a TIFF image of more than 8 bits in which 0 is white: invert its values and "
                "save it as MinIsBlack"
            )
        # Pillow keeps the upper 8 of the 16 bits of a colour.
        shortened = "16" in str(image.tile[0][3]) if image.tile else False
        upright = ImageOps.exif_transpose(image)
        if upright.mode in _DEEP:
            values = np.asarray(upright)
            if values.dtype.byteorder == ">":
                values = values.astype(values.dtype.newbyteorder("="))
        elif upright.mode in ("1", "L", "LA", "La"):
            values = np.asarray(upright.convert("L"))
        else:
            values = np.asarray(upright.convert("RGB"))
            if shortened and values.max() < 64:
                raise ValueError(
                    "it is a colour image of 16 bits that uses only the lowest of them: "
                    "scale it to 8 bits"
                )
    return Decoded(finite(values))


def finite(values: np.ndarray) -> np.ndarray:
    """Returns the values, if they are numbers."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite (NaN or infinite)")
    return values


@dataclass(frozen=True)
class Facts:
    """What is found out about a file by reading it once; plain data."""

    error: str | None = None  # why it could not be read; the rest is then empty
    digest: str = ""
    colour: bool = False
    height: int = 0
    width: int = 0
    kind: str = "bytes"  # see `Decoded.kind`
    low: float = 0.0  # its smallest value
    high: float = 0.0

    @property
    def sides(self) -> tuple[int, int]:
        """The shorter and the longer side in pixels."""
        return min(self.height, self.width), max(self.height, self.width)


def facts_of(decoded: Decoded) -> Facts:
    """What is found out about a file that was read."""
    values = decoded.values
    return Facts(
        digest=decoded.digest,
        colour=decoded.colour,
        height=values.shape[0],
        width=values.shape[1],
        kind=decoded.kind,
        low=float(values.min()),
        high=float(values.max()),
    )


def examine(path: Path) -> Facts:
    """Reads a file and says what it is, or what is wrong with it."""
    try:
        decoded = decode(path)
        if decoded.window is not None:
            decoded.to_bytes(None, override=False)  # a window may be impossible
        return facts_of(decoded)
    except DataError:  # a package is missing, which is not the file's fault
        raise
    except Exception as error:  # readers raise all sorts of things on files that are not sound
        return Facts(error=failure(error, path))


def failure(error: Exception, path: Path) -> str:
    """Returns in one line why a file could not be read."""
    missing = not os.path.exists(path)  # a Path raises on names that are too long
    if missing and os.path.islink(path):
        return f"it is a link to {path.readlink()}, which does not exist"
    if missing and isinstance(error, FileNotFoundError):
        return f"No such file: {path.absolute()}"
    reason = " ".join(str(error).split()).replace(str(path), path.name)
    return f"{reason[:200] or 'no reason given'} ({type(error).__name__})"


def range_of(
    facts: Sequence[Facts], given: tuple[float, float] | None, names: Sequence[str] = ()
) -> tuple[float, float] | None:
    """The values that become black and white in images that do not say so; None if all do.

    Whole numbers get the range of the fewest bits (8, 10, 12, 14, 16) that hold all of them:
    12-bit images stored in 16 bits would be nearly black otherwise. One range holds for all images.
    """
    if given is not None:
        return given
    floats = [n for n, entry in enumerate(facts) if entry.kind == "floats"]
    whole = [n for n, entry in enumerate(facts) if entry.kind == "integers"]
    deep = [facts[n] for n in floats + whole]
    if not deep:
        return None
    low, high = min(entry.low for entry in deep), max(entry.high for entry in deep)
    mixed = ""
    if floats and whole:
        mixed = f" ({len(whole):,} of them whole numbers, {len(floats):,} fractions)"
        odd = min(floats, whole, key=len)
    else:
        whites = [1] if floats else [2**bits - 1 for bits in (8, 10, 12, 14, 16)]
        if low >= 0 and high <= whites[-1]:
            return 0.0, float(next(white for white in whites if high <= white))
        odd = [n for n in floats + whole if facts[n].low < 0 or facts[n].high > whites[-1]]
    odd_names = [names[n] for n in odd] if names else []
    raise DataError(
        f"{len(deep):,} images hold values from {low:g} to {high:g}{mixed}, and nothing says which "
        "values are black and white: give <pixel_range=BLACK WHITE>"
        + (f", or convert or remove {named(odd_names)}" if odd_names else ""),
        names=odd_names,
    )
