"""One DICOM file into values, as pydicom reads, rescales and windows it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inmerge_wrap.images.files import DataError, Decoded, finite

# A small file can claim, or inflate to, more than a machine holds. Pillow's limit for other files.
_MOST_VALUES = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
_MOST_BYTES = 2**30
_OPTIONAL = [
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth"),
]


def decode_dicom(path: Path) -> Decoded:
    """Reads a file whole."""
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing
    except ImportError as error:
        raise DataError(
            f'{path} is DICOM, which needs pydicom: pip install "inmerge-wrap[dicom]"'
        ) from error
    _check_inflated(path)
    data = pydicom.dcmread(path)
    _check_size(data)
    for name in _OPTIONAL:
        if name in data and data[name].is_empty:  # as anonymisers leave them
            del data[name]
    values = data.pixel_array  # YBR becomes RGB here
    if data.get("SamplesPerPixel", 1) == 3:
        if values.dtype != np.uint8:
            raise ValueError(f"its colours are {values.dtype}; only 8 bits a colour are read")
        return Decoded(values)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(values, data)
        return Decoded((colours >> (8 if colours.dtype == np.uint16 else 0)).astype(np.uint8))
    values = finite(np.asarray(apply_modality_lut(values, data)))
    inverted = data.PhotometricInterpretation == "MONOCHROME1"
    black, white = _range_of_bits(data)
    if black == white:
        raise ValueError("its rescale slope is 0, which makes all of its values equal")
    has_table = "VOILUTSequence" in data
    has_window = "WindowCenter" in data and "WindowWidth" in data

    def shown(x: np.ndarray) -> np.ndarray:
        if has_table:
            most = 2 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1
            return apply_voi(x.astype(np.int64), data) / most
        if has_window:  # by a negative slope from white to black, as the range is
            return (apply_windowing(x, data) - black) / (white - black)
        return (x - min(black, white)) / abs(white - black)

    return Decoded(values, shown, has_table or has_window, inverted, ends=black + white)


def _check_inflated(path: Path) -> None:
    """Refuses a deflated file that is a bomb, before pydicom inflates it whole."""
    from pydicom.filereader import read_file_meta_info

    meta = read_file_meta_info(path)
    if not getattr(meta.get("TransferSyntaxUID"), "is_deflated", False):
        return
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with open(path, "rb") as file:
        file.seek(144 + int(meta.FileMetaInformationGroupLength))  # preamble, and the length itself
        while not inflater.eof and (chunk := file.read(2**16)):
            while chunk and not inflater.eof:  # the tail never empties once the stream has ended
                total += len(inflater.decompress(chunk, 2**20))
                chunk = inflater.unconsumed_tail
                if total > _MOST_BYTES:
                    raise ValueError(
                        f"it inflates to more than {_MOST_BYTES / 2**30:g} GiB: no image does"
                    )


def _check_size(data: Any) -> None:
    frames = int(data.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ValueError(f"it holds {frames} frames; give each its own file")
    rows, columns = int(data.Rows), int(data.Columns)
    if rows * columns * int(data.get("SamplesPerPixel", 1)) > _MOST_VALUES:
        raise ValueError(
            f"it claims {rows:,} x {columns:,} pixels; at most {_MOST_VALUES:,} values are read"
        )


def _range_of_bits(data: Any) -> tuple[float, float]:
    """The least and the largest value that a file can hold, when rescaled."""
    if "ModalityLUTSequence" in data:
        return 0.0, 2.0 ** int(data.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    bits, signed = int(data.BitsStored), int(data.PixelRepresentation)
    low = -(2.0 ** (bits - 1)) if signed else 0.0
    high = low + 2.0**bits - 1
    if "RescaleSlope" not in data or "RescaleIntercept" not in data:  # pydicom needs both, too
        return low, high
    slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
    return low * slope + intercept, high * slope + intercept
