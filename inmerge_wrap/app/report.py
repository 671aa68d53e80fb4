"""Renders one page with the results: a file for offline use and print, in light and dark.

Everything is inside the file: style, drawings (SVG), images. It loads nothing and runs no code.
The content is plain data, as the training writes it into results.json; report.html is its template.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from inmerge_wrap.app import drawings
from inmerge_wrap.files import replacing
from inmerge_wrap.images.collection import counted

FAMILIES = {
    "clean": ("As they are", "the test images themselves"),
    "noise": ("Noise", "low dose, short exposure, faulty pixels"),
    "blur": ("Blur", "out of focus, movement"),
    "digital": ("Digital", "strong JPEG compression, low resolution"),
    "colour": ("Light and colour", "exposure, contrast, white balance, staining"),
    "artefact": ("Artefacts", "borders, bubbles, dust, text, dead elements"),
    "all": ("All damage", "the mean of all of these"),
}
METRICS = {"balanced_accuracy": "Balanced accuracy", "auroc": "AUROC", "ece": "Calibration error"}
ROCS = 14  # classes for which a ROC is drawn


def number(value: float | None) -> str:
    """Formats a number as ``0.934``, or a dash if it is undefined."""
    return "–" if value is None else f"{value:.3f}"


def percent(value: float) -> str:
    """Formats a share as ``93.4%``."""
    return f"{100 * value:.1f}%"


def interval(entry: Mapping[str, Any], name: str = "", *, flip: bool = False) -> str:
    """Formats an interval as ``0.91 to 0.95``; nothing if there is none."""
    prefix = f"{name}_" if name else ""
    low, high = entry.get(f"{prefix}low"), entry.get(f"{prefix}high")
    if low is None or high is None:
        return ""
    low, high = (1 - high, 1 - low) if flip else (low, high)
    return f"{low:.3f} to {high:.3f}"


def flipped(value: float | None) -> float | None:
    """Turns an error into an accuracy."""
    return None if value is None else 1 - value


# -- images ----------------------------------------------------------------------------------------


def _inline(pixels: Tensor) -> str:
    picture, buffer = to_pil_image(pixels), io.BytesIO()
    small = max(picture.size) <= 64
    if small:  # a browser would blur it, and JPEG would degrade it
        picture = picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST)
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=88)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def contact_sheet(pictures: Sequence[Tensor], path: Path) -> None:
    """Writes all images to one sheet, row by row, as a PNG file."""
    sheet = make_grid(list(pictures), nrow=6, padding=4, pad_value=255)
    with replacing(path) as draft:
        to_pil_image(sheet).save(draft, "PNG")


# -- the page --------------------------------------------------------------------------------------


def write_report(content: Mapping[str, Any], pictures: Sequence[Tensor], path: Path) -> Path:
    """Renders the page and writes it atomically; returns its path.

    The pictures are uint8 (C, S, S), of the worst mistakes in their order.
    """
    environment = Environment(
        loader=PackageLoader("inmerge_wrap.app", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "interval": interval,
        "flipped": flipped,
    }
    environment.globals.update(counted=counted, families=FAMILIES, metrics=METRICS)
    test = content["test"]
    rocs = [entry for entry in test["classes"] if entry["roc"]]
    if content["task"] == "multiclass" and len(content["classes"]) == 2:
        rocs = rocs[-1:]  # the other is its mirror image
    names = {name: words for name, (words, _) in FAMILIES.items()}
    run = next(run for run in content["runs"] if run["name"] == content["chosen"])
    page = environment.get_template("report.html").render(
        content,
        several=content["task"] == "multilabel",
        clean=run["clean"],
        damaged=run["corrupted"],
        pictures=[_inline(pixels) for pixels in pictures],
        course=drawings.draw_course(content["runs"]),
        reliability={
            name: drawings.draw_reliability(found["bins"])
            for name, found in test["calibration"].items()
        },
        rocs=[drawings.draw_roc(entry) for entry in rocs[:ROCS]],
        damage=test["families"] and drawings.draw_families(test["families"], names),
        merging=run["merging"],
    )
    with replacing(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path
