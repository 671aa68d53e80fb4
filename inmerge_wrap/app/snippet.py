"""The lines of Python that use a trained network without this library, for the model card."""

from __future__ import annotations

from pathlib import Path

from inmerge_wrap.images.preparation import Recipe

_NETWORK = """\
# Without pretrained=True the weights are random, without a warning.
model = timm.create_model("{place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
"""

_DEEP = """\
image = ImageOps.exif_transpose(Image.open("image.png"))
if image.mode[0] in "IF":  # of more than 8 bits: {black:g} is black and {white:g} is white
    values = ((np.asarray(image).astype(float) - {black!r}) / ({white!r} - {black!r})).clip(0, 1)
    image = Image.fromarray(np.round(255 * values).astype(np.uint8))
image = image.convert("{mode}")
"""

_DICOM = """\
file = pydicom.dcmread("image.dcm")
values = apply_modality_lut(file.pixel_array, file).astype(float)
{shown}
if file.PhotometricInterpretation == "MONOCHROME1":
    shown = 1 - shown
image = Image.fromarray(np.round(255 * shown.clip(0, 1)).astype(np.uint8)).convert("{mode}")
"""

_GIVEN = "shown = ((values - {black!r}) / ({white!r} - {black!r})).clip(0, 1)"
_WINDOW = """\
# The file's first window, linear. Other functions and tables are read by inmerge predict.
centre = float(np.atleast_1d(file.WindowCenter)[0])
width = float(np.atleast_1d(file.WindowWidth)[0])
shown = ((values - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)"""
_BITS = """\
# Files without a window show the whole range of their bits.
rescaled = "RescaleSlope" in file and "RescaleIntercept" in file  # one alone is not used
slope, intercept = (file.RescaleSlope, file.RescaleIntercept) if rescaled else (1.0, 0.0)
low = -(2.0 ** (file.BitsStored - 1)) if file.PixelRepresentation else 0.0
black, white = (x * float(slope) + float(intercept) for x in (low, low + 2.0**file.BitsStored - 1))
shown = ((values - black) / (white - black)).clip(0, 1)"""

_ANSWER = """\
with torch.no_grad():
    scores = model(transform(image)[None])[0]
"""


def snippet(recipe: Recipe, place: str) -> str:
    """Returns code that reads one image as training did and computes the network's answer.

    It needs timm, Pillow and, for DICOM, pydicom, and ends with ``probabilities``, a tensor in the
    order of the classes.
    """
    mode = "L" if recipe.preparation.channels == 1 else "RGB"
    deep = recipe.preparation.pixel_range
    dicom = recipe.seen is not None and bool({"windowed", "unwindowed"} & set(recipe.seen.kinds))
    pillow = "from PIL import Image" if dicom else "from PIL import Image, ImageOps"
    imports = ["import timm", "import torch", pillow]
    if dicom:
        reading = _DICOM.format(mode=mode, shown=_shown(recipe))
        imports = ["import numpy as np", "import pydicom", *imports]
        imports += ["from pydicom.pixels import apply_modality_lut"]
    elif deep is not None:
        black, white = deep
        reading = _DEEP.format(mode=mode, black=black, white=white)
        imports = ["import numpy as np", *imports]
    else:
        reading = 'image = ImageOps.exif_transpose(Image.open("image.png"))'
        reading += f'.convert("{mode}")\n'
    parts = ["\n".join(imports) + "\n", _NETWORK.format(place=place), reading + _ANSWER]
    return "\n".join(parts) + _meaning(recipe)


def in_card(folder: Path) -> bool:
    """Returns whether the card of a folder holds such code, as those of a training do."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return "\nclasses = [" in text and "\nprobabilities = " in text


def _shown(recipe: Recipe) -> str:
    """The line that makes a DICOM file's values run from 0 to 1, as its kind in training."""
    assert recipe.seen is not None
    deep = recipe.preparation.pixel_range
    if recipe.preparation.override_windows and deep is not None:
        return _GIVEN.format(black=deep[0], white=deep[1])
    if {"windowed", "unwindowed"} <= set(recipe.seen.kinds):
        windowed, whole = (text.replace("\n", "\n    ") for text in (_WINDOW, _BITS))
        return f'if "WindowWidth" in file:\n    {windowed}\nelse:\n    {whole}'
    return _WINDOW if "windowed" in recipe.seen.kinds else _BITS


def _meaning(recipe: Recipe) -> str:
    """The lines that turn scores into probabilities and, for several labels, into names."""
    scaled = "scores" if recipe.temperature == 1 else f"(scores / {recipe.temperature!r})"
    lines = [f"classes = {list(recipe.classes)!r}"]
    if recipe.thresholds is None:
        lines += [
            f"probabilities = {scaled}.softmax(0)",
            "print(classes[probabilities.argmax()], probabilities.tolist())",
        ]
    else:
        lines += [
            f"probabilities = {scaled}.sigmoid()  # of each label; no sum of 1",
            f"thresholds = {[float(value) for value in recipe.thresholds]!r}",
            "print([c for c, p, t in zip(classes, probabilities, thresholds) if p > t])",
        ]
    return "\n".join(lines) + "\n"
