"""Renders one page with the results: a file for offline use and print, in light and dark.

Everything is inside the file: style, drawings (SVG), images. It loads nothing and runs no code.
The content is plain data, as the training writes it into results.json.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

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
METRICS = {
    "balanced_accuracy": "Balanced accuracy",
    "auroc": "AUROC",
    "ece": "Calibration error",
}

# Okabe and Ito's blue and vermilion, which all kinds of colour vision distinguish; lighter on dark.
STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #dfe3e8; --panel: #f5f7f9;
  --blue: #0068a8; --orange: #c24e00; --blue-rgb: 0, 104, 168; --heat-ink: #ffffff;
  --warn: #fff6e5; --warn-line: #d99a1c; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181c; --ink: #e5e9ed; --soft: #9aa6b2; --line: #2d353d; --panel: #1c2228;
  --blue: #62b3ea; --orange: #f0925a; --blue-rgb: 98, 179, 234; --heat-ink: #0d1114;
  --warn: #2b2413; --warn-line: #c08a1e; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: 1.25rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0 .9rem; max-width: 44rem; }
.soft, .byline, figcaption, .n { color: var(--soft); }
.byline { margin: 0 0 1.5rem; }
.lead { font-size: 1.125rem; max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0; }
.card { background: var(--panel); border-radius: .6rem; padding: 1rem 1.1rem; }
.card .what { font-size: .875rem; color: var(--soft); }
.card .figure { font-size: 2rem; font-weight: 650; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card .range { font-size: .875rem; font-variant-numeric: tabular-nums; }
.card .means { font-size: .8125rem; line-height: 1.4; color: var(--soft); margin-top: .4rem; }
.notes { background: var(--warn); border-left: 4px solid var(--warn-line);
  border-radius: 0 .5rem .5rem 0; padding: .8rem 1.1rem; margin: 1rem 0; }
.notes ul { margin: .25rem 0 0; padding-left: 1.1rem; }
.notes li { overflow-wrap: anywhere; margin: .2rem 0; }
.scroll { overflow-x: auto; margin: .9rem 0; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: left; vertical-align: bottom; }
td, th[scope=row] { vertical-align: top; }
td, th { padding: .42rem .8rem .42rem 0; border-bottom: 1px solid var(--line); }
td.r, th.r { text-align: right; }
td.r { white-space: nowrap; }
th.r { max-width: 9rem; }
td:last-child, th:last-child { padding-right: 0; }
td .n, th .n { font-size: .8125rem; display: block; font-weight: 400; }
td .n { white-space: nowrap; }
th[scope=row] { font-weight: 500; min-width: 8rem; }
.heat th, .heat td { border: 0; padding: .2rem .35rem; text-align: center; }
.heat td { min-width: 3rem; height: 2.6rem; border-radius: .25rem; vertical-align: middle; }
.heat td.none { color: var(--soft); }
.heat { border-spacing: 2px; border-collapse: separate; }
.heat th[scope=row] { text-align: right; padding-right: .6rem; font-weight: 500; min-width: 0;
  vertical-align: middle; max-width: 9rem; }
.heat th.col { font-weight: 500; font-size: .875rem; }
.heat th.col span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem;
  text-align: left; line-height: 1.2; margin: 0 auto; }
figure { margin: 1rem 0; }
figcaption { font-size: .875rem; max-width: 44rem; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  fill: var(--ink); }
svg .faint { fill: var(--soft); } svg .grid { stroke: var(--line); }
svg .blue { stroke: var(--blue); fill: var(--blue); }
svg .orange { stroke: var(--orange); fill: var(--orange); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 7 5; }
svg .ideal { stroke: var(--soft); stroke-dasharray: 4 4; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
.sheet figure { margin: 0; break-inside: avoid; }
.sheet img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; background: #000;
  border-radius: .35rem; }
.sheet figcaption { font-size: .8125rem; line-height: 1.4; margin-top: .35rem;
  overflow-wrap: anywhere; color: var(--ink); }
code, pre { font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--panel); padding: .9rem 1rem; border-radius: .5rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { margin: .9rem 0; } summary { cursor: pointer; color: var(--blue); }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .35rem;
  vertical-align: -.03rem; }
.key.blue { background: var(--blue); } .key.orange { background: var(--orange); }
.legend span { margin-right: 1.1rem; font-size: .875rem; white-space: nowrap; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
.two { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 0 2.5rem;
  align-items: start; }
@media (max-width: 46rem) { .two { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 30rem) { main { padding-top: 1.5rem; } h1 { font-size: 1.6rem; }
  .cards { grid-template-columns: 1fr 1fr; }
  .card { padding: .75rem .8rem; } .card .figure { font-size: 1.6rem; } }
@media print { :root { color-scheme: light;
  --paper: #ffffff; --ink: #000000; --soft: #444c55; --line: #c8ced4; --panel: #f5f7f9;
  --blue: #0068a8; --orange: #c24e00; --blue-rgb: 0, 104, 168; --heat-ink: #ffffff;
  --warn: #fff6e5; --warn-line: #d99a1c; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } @page { margin: 16mm; }
  h2 { break-after: avoid; margin-top: 1.6rem; } tr, .card, figure, .notes { break-inside: avoid; }
  .card, .heat td, .notes, .sheet img { print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
  .scroll { overflow: visible; } .sheet { grid-template-columns: repeat(5, 1fr); } }
"""


# -- words and numbers -----------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Formats a number as ``0.934``, or a dash if it is undefined."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """Formats a share as ``93.4%``."""
    return f"{100 * value:.1f}%"


def interval(entry: dict[str, Any], name: str = "", *, flip: bool = False) -> str:
    """Formats an interval as ``0.91 to 0.95``, or nothing if there is none."""
    prefix = f"{name}_" if name else ""
    low, high = entry.get(f"{prefix}low"), entry.get(f"{prefix}high")
    if low is None or high is None:
        return ""
    low, high = (1 - high, 1 - low) if flip else (low, high)
    return f"{low:.3f} to {high:.3f}"


def cell(entry: dict[str, Any], name: str = "value") -> str:
    """Returns a figure with its interval below, for a table."""
    value = entry.get(name)
    text = interval(entry, "" if name == "value" else name)
    return number(value) + (f'<span class="n">{text}</span>' if text else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Returns a table of HTML cells; the first ``left`` columns are text."""
    heads = "".join(
        f"<th{'' if n < left else ' class=r'} scope=col>{text}</th>" for n, text in enumerate(head)
    )
    lines = []
    for row in rows:
        first, *others = row
        cells = "".join(
            f"<td{'' if n < left else ' class=r'}>{text}</td>" for n, text in enumerate(others, 1)
        )
        lines.append(f"<tr><th scope=row>{first}</th>{cells}</tr>")
    body = "".join(lines)
    inner = f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


# -- drawings --------------------------------------------------------------------------------------


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Returns round numbers inside a range."""
    rough = max(high - low, 1e-9) / about
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = np.ceil(low / step - 1e-9) * step + 0.0  # which turns -0 into 0
    return [float(round(value, 6)) for value in np.arange(first, high + step / 1e6, step)]


def _whole(last: int) -> list[int]:
    """Returns whole numbers from 1 to the last, at most seven, evenly spaced."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, last) if last / step <= 6)
    return sorted({1, *range(step, last + 1, step)})


def draw_reliability(bins: Sequence[dict[str, Any]]) -> str:
    """Draws predicted probability against accuracy; a dot's area is its number of images."""
    x, y = _scale(0, 1, 52, 372), _scale(0, 1, 330, 10)
    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="52" x2="372" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(
            f'<text class="faint" x="44" y="{y(value) + 4}" text-anchor="end">{value:g}</text>'
        )
        parts.append(
            f'<text class="faint" x="{x(value)}" y="350" text-anchor="middle">{value:g}</text>'
        )
    parts.append(f'<line class="ideal" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    most = max((entry["n"] for entry in bins), default=1)
    for entry in bins:
        at, size = x(entry["stated"]), 3 + 7 * (entry["n"] / most) ** 0.5
        parts.append(
            f'<line class="blue" x1="{at}" x2="{at}" y1="{y(entry["low"])}" '
            f'y2="{y(entry["high"])}" stroke-width="1.5" opacity=".6"/>'
            f'<circle class="blue" cx="{at}" cy="{y(entry["value"])}" r="{size:.1f}">'
            f"<title>{entry['n']} images: stated {entry['stated']:.2f}, right {entry['value']:.2f}"
            "</title></circle>"
        )
    parts.append('<text x="212" y="374" text-anchor="middle">probability the network states</text>')
    parts.append(
        '<text transform="translate(13 170) rotate(-90)" text-anchor="middle">how often it is right'
        "</text>"
    )
    return _svg(384, 384, "Reliability diagram", parts)


def draw_families(families: Sequence[dict[str, Any]]) -> str:
    """Draws balanced accuracy by corruption family with intervals; a line marks clean images."""
    shown = [entry for entry in families if entry["family"] in FAMILIES]
    ends = [
        entry.get(f"balanced_accuracy{suffix}", entry["balanced_accuracy"])
        for entry in shown
        for suffix in ("", "_low", "_high")
    ]
    low, high = max(0.0, min(ends) - 0.03), min(1.0, max(ends) + 0.03)
    x, height = _scale(low, high, 128, 410), 34 * len(shown)
    parts = []
    for value in _ticks(low, high, 4):
        parts.append(f'<line class="grid" x1="{x(value)}" x2="{x(value)}" y1="4" y2="{height}"/>')
        parts.append(
            f'<text class="faint" x="{x(value)}" y="{height + 18}" text-anchor="middle">{value:g}'
            "</text>"
        )
    clean = next((entry for entry in shown if entry["family"] == "clean"), None)
    if clean is not None:
        at = x(clean["balanced_accuracy"])
        parts.append(f'<line class="ideal" x1="{at}" x2="{at}" y1="4" y2="{height}"/>')
    for place, entry in enumerate(shown):
        middle, name = 34 * place + 20, FAMILIES[entry["family"]][0]
        parts.append(f'<text x="116" y="{middle + 4}" text-anchor="end">{escape(name)}</text>')
        if "balanced_accuracy_low" in entry:
            ends = [x(entry[f"balanced_accuracy_{end}"]) for end in ("low", "high")]
            parts.append(
                f'<line class="blue" x1="{ends[0]}" x2="{ends[1]}" y1="{middle}" y2="{middle}" '
                'stroke-width="2"/>'
            )
        at = x(entry["balanced_accuracy"])
        parts.append(f'<circle class="blue" cx="{at}" cy="{middle}" r="5.5"/>')
        parts.append(
            f'<text x="460" y="{middle + 4}" text-anchor="end">'
            f"{number(entry['balanced_accuracy'])}</text>"
        )
    parts.append(f'<text x="269" y="{height + 40}" text-anchor="middle">balanced accuracy</text>')
    return _svg(464, height + 50, "Balanced accuracy by family of damage", parts)


def draw_course(runs: Sequence[dict[str, Any]]) -> str:
    """Draws validation AUROC over the epochs of every run; a ring marks the epoch that was kept.

    Returns an empty string if it is undefined or there is only one epoch.
    """
    values = [e["val_auroc"] for run in runs for e in run["history"] if e["val_auroc"] is not None]
    if not values or max(len(run["history"]) for run in runs) < 2:
        return ""
    low, high = max(0.0, min(values) - 0.02), min(1.0, max(values) + 0.02)
    epochs = max(len(run["history"]) for run in runs)
    x, y = _scale(1, max(2, epochs), 52, 452), _scale(low, high, 226, 10)
    parts = []
    for value in _ticks(low, high):
        parts.append(f'<line class="grid" x1="52" x2="452" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(
            f'<text class="faint" x="44" y="{y(value) + 4}" text-anchor="end">{value:g}</text>'
        )
    for value in _whole(epochs):
        parts.append(
            f'<text class="faint" x="{x(value)}" y="246" text-anchor="middle">{value}</text>'
        )
    for run in runs:
        # Dashed, because the two of a pair are drawn over each other where they agree.
        colour, style = ("orange", " dashed") if run["method"] == "merged" else ("blue", "")
        places = [
            (x(entry["epoch"]), y(entry["val_auroc"]))
            for entry in run["history"]
            if entry["val_auroc"] is not None
        ]
        points = " ".join(f"{across},{down}" for across, down in places)
        parts.append(
            f'<polyline class="line {colour}{style}" style="fill:none" points="{points}"/>'
        )
        best = run["history"][run["best_epoch"] - 1]
        if best["val_auroc"] is not None:
            parts.append(
                f'<circle class="{colour}" cx="{x(best["epoch"])}" cy="{y(best["val_auroc"])}" '
                'r="5" stroke-width="2" style="fill: var(--paper)"/>'
            )
    parts.append('<text x="252" y="268" text-anchor="middle">epoch</text>')
    return _svg(464, 276, "AUROC on validation over the epochs", parts)


def heat_table(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Draws the confusion matrix: counts, shaded by their share of the row's class."""
    heads = "".join(
        f'<th class="col" scope=col><span>{escape(name)}</span></th>' for name in classes
    )
    rows = []
    for name, row in zip(classes, counts, strict=True):
        total, cells = sum(row), []
        for count in row:
            share = count / total if total else 0.0
            ink = "; color: var(--heat-ink)" if share > 0.55 else ""
            shade = f"background: rgba(var(--blue-rgb), {0.04 + 0.96 * share:.2f}){ink}"
            title = escape(f"{percent(share)} of {name}")
            none = "" if count else ' class="none"'
            cells.append(f'<td{none} style="{shade}" title="{title}">{count:,}</td>')
        rows.append(f"<tr><th scope=row>{escape(name)}</th>{''.join(cells)}</tr>")
    inner = f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="heat">{inner}</table></div>'


# -- images ----------------------------------------------------------------------------------------


def _picture(pixels: Tensor) -> Image.Image:
    values = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def _inline(pixels: Tensor) -> str:
    picture, buffer = _picture(pixels), io.BytesIO()
    small = max(picture.size) <= 64
    if small:  # a browser would blur it, and JPEG would degrade it
        picture = picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST)
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=88)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def contact_sheet(pictures: Sequence[Tensor], path: Path, columns: int = 6) -> None:
    """Writes all images to one sheet, row by row, as a PNG file."""
    tiles = [_picture(pixels) for pixels in pictures]
    side, gap = max(tiles[0].size), 4
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    size = (columns * (side + gap) - gap, rows * (side + gap) - gap)
    sheet = Image.new(tiles[0].mode, size, "white")
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * (side + gap), place // columns * (side + gap)))
    with replacing(path) as draft:
        sheet.save(draft, "PNG")


# -- the sections ----------------------------------------------------------------------------------


def _row(content: dict[str, Any], name: str) -> dict[str, Any]:
    return [row for row in content["test"]["rows"] if row["corruption"] == name][-1]


def _summary(content: dict[str, Any]) -> str:
    clean, n = _row(content, "clean"), content["images"]["test"]
    classes = content["classes"]
    if content["task"] == "multilabel":
        return (
            f"On {counted(n, 'test image')} that it never saw, the network was asked for "
            f"{len(classes)} findings: {escape(', '.join(classes))}. The figures below are means "
            "over the findings."
        )
    right = round(clean["accuracy"] * n)
    counts = content["counts"]["test"]
    common = max(range(len(counts)), key=counts.__getitem__)
    return (
        f"Of {counted(n, 'test image')} that it never saw, the network put <b>{right:,}</b> "
        f"({percent(right / n)}) into the right one of {len(classes)} classes. Naming the "
        f"commonest class, {escape(classes[common])}, every time would be right for "
        f"{percent(counts[common] / n)}"
        + ("." if right > counts[common] else ": <b>the network does no better than that</b>.")
    )


def _cards(content: dict[str, Any]) -> str:
    clean, damaged = _row(content, "clean"), _row(content, "all")
    labels = "findings" if content["task"] == "multilabel" else "classes"
    kinds = [entry["family"] for entry in content["test"]["families"]]
    damage = ", ".join(FAMILIES[kind][0].lower() for kind in kinds if kind not in ("clean", "all"))

    def card(what: str, row: dict[str, Any], metric: str, means: str, *, flip: bool = False) -> str:
        value = row.get(metric)
        shown = number(None if value is None else 1 - value if flip else value)
        ends = {"low": row.get(f"{metric}_low"), "high": row.get(f"{metric}_high")}
        return (
            f'<div class="card"><div class="what">{what}</div><div class="figure">{shown}</div>'
            f'<div class="range">{interval(ends, flip=flip) or "no interval"}</div>'
            f'<div class="means">{means}</div></div>'
        )

    return '<div class="cards">{}</div>'.format(
        "".join(
            [
                card(
                    METRICS["balanced_accuracy"], clean, "balanced_error",
                    f"share that is right, all {labels} counted alike; a coin toss between two "
                    "gives 0.5", flip=True,
                ),
                card(
                    METRICS["auroc"], clean, "auroc",
                    "how well it ranks an image of a class above one of another; chance gives 0.5",
                ),
                card(
                    METRICS["ece"], clean, "ece",
                    "how far stated probabilities are from how often it is right; 0 is best",
                ),
                card(
                    "On damaged images", damaged, "balanced_error",
                    f"balanced accuracy, mean over {damage}",
                    flip=True,
                ),
            ]
        )
    )  # fmt: skip


def _warnings(content: dict[str, Any]) -> str:
    if not content["warnings"]:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in content["warnings"])
    return f'<div class="notes"><b>Before you read the figures</b><ul>{items}</ul></div>'


def _classes(content: dict[str, Any]) -> str:
    several = content["task"] == "multilabel"
    rows = [
        [
            escape(entry["class"])
            + (f'<span class="n">above {entry["threshold"]:.3g}</span>' if several else ""),
            f"{entry['n']:,}",
            *(cell(entry[name]) for name in ("sensitivity", "specificity", "precision", "auroc")),
        ]
        for entry in content["test"]["classes"]
    ]
    what = "finding" if several else "class"
    text = (
        f"<p><b>Sensitivity</b>: of the images of the {what}, the share that was recognised. "
        "<b>Specificity</b>: of the others, the share that was not taken for it. <b>Precision</b>: "
        "of those it named so, the share that was right; it depends on how common the "
        f"{what} is here.</p>"
    )
    if several:
        text += "<p>A finding is named above a threshold that was chosen on validation images.</p>"
    head = [what.capitalize(), "Test images", "Sensitivity", "Specificity", "Precision", "AUROC"]
    return f"<h2>Each {what}</h2>{text}{table(head, rows)}"


def _confusions(content: dict[str, Any]) -> str:
    matrix = ""
    if content["test"]["confusion"] is not None:
        matrix = (
            '<div><h3>What is taken for what</h3><p class="soft">A row holds the images of one '
            "class, the columns what the network said of them: right answers stand on the "
            "diagonal. The stronger the colour, the larger the share of the row.</p>"
            + heat_table(content["test"]["confusion"], content["classes"])
            + "</div>"
        )
    what = "of each finding" if matrix == "" else "of the class it names"
    # A matrix of many classes needs the whole width.
    side_by_side = "two" if matrix and len(content["classes"]) <= 4 else "one"
    return (
        f'<h2>Mistakes and certainty</h2><div class="{side_by_side}">{matrix}<div>'
        "<h3>Can its probabilities be trusted?</h3>"
        f"<figure>{draw_reliability(content['test']['reliability'])}</figure>"
        f'<p class="soft">The probability {what}, in 15 bins, and how often that was right. On the '
        "dashed line they agree; below it the network is too sure of itself. Larger dots hold more "
        "images; lines are 95% intervals.</p></div></div>"
    )


def _robustness(content: dict[str, Any]) -> str:
    test = content["test"]
    rows = []
    for entry in test["families"]:
        name, about = FAMILIES[entry["family"]]
        rows.append(
            [
                f'{name}<span class="n" style="white-space: normal">{about}</span>',
                cell(entry, "balanced_accuracy"),
                number(entry.get("auroc")),
                number(entry["ece"]),
            ]
        )
    details = [
        [
            escape(row["corruption"].replace("_", " ")),
            escape(row["kind"]),
            str(row["severity"]),
            number(1 - row["balanced_error"]) if "balanced_error" in row else "–",
            number(row.get("auroc")),
            number(row["ece"]),
        ]
        for row in test["rows"]
        if row["severity"] != "mean" and row["kind"] not in ("clean", "attack")
    ]
    levels = ", ".join(map(str, test["severities"]))
    return (
        "<h2>On damaged images</h2><p>Every test image was damaged as scanners, cameras and file "
        f"formats do, at severity {levels} of 5, and shown to the network again. Dots left of the "
        "dashed line show what such damage costs.</p>"
        f"<figure>{draw_families(test['families'])}</figure>"
        + table(["Damage", "Balanced accuracy", "AUROC", "Calibration error"], rows)
        + f"<details><summary>Each of the {len(details)} measurements</summary>"
        + table(
            ["Damage", "Family", "Severity", "Balanced accuracy", "AUROC", "Calibration error"],
            details,
            left=2,
        )
        + "</details>"
    )


def _mistakes(content: dict[str, Any], pictures: Sequence[Tensor]) -> str:
    classes, found = content["classes"], []
    for mistake, pixels in zip(content["test"]["mistakes"], pictures, strict=True):
        said = escape(classes[mistake["said"]])
        if "truth" in mistake:
            lines = f"<b>{escape(classes[mistake['truth']])}</b> taken for <b>{said}</b>"
            lines += f" ({percent(mistake['stated'])})"
        else:
            verb = "missed" if mistake["present"] else "wrongly named"
            lines = f"<b>{said}</b> {verb} ({percent(mistake['stated'])})"
        name = escape(mistake["image"])
        broken = name.replace("/", "/<wbr>").replace("_", "_<wbr>")
        found.append(
            f'<figure><img src="{_inline(pixels)}" alt="{name}"><figcaption>{lines}'
            f'<br><span class="soft">{broken}</span></figcaption></figure>'
        )
    if not found:
        return "<h2>Worst mistakes</h2><p>There were none on these test images.</p>"
    return (
        "<h2>Worst mistakes</h2><p>The test images about which the network was surest and wrong, "
        "the worst first, with the probability it gave. Look here for wrong labels, and for what "
        f'it looks at.</p><div class="sheet">{"".join(found)}</div>'
    )


def _comparison(content: dict[str, Any]) -> str:
    runs, differences = content["runs"], content["differences"]
    methods = {run["method"] for run in runs}
    legend = "".join(
        f'<span><i class="key {colour}"></i>{text}</span>'
        for method, colour, text in (
            ("plain", "blue", "plain training"),
            ("merged", "orange", "in-model merging"),
        )
        if method in methods
    )
    drawing = draw_course(runs)
    if drawing:
        drawing = (
            f"<figure>{drawing}<figcaption>AUROC on validation images after each epoch; a ring "
            "marks the epoch whose weights were kept.</figcaption></figure>"
            f'<p class="legend">{legend}</p>'
        )
    rows, exported = [], '<span class="n">this is the one exported</span>'
    for run in runs:
        clean, damaged = run["clean"], run["corrupted"]
        rows.append(
            [
                escape(run["name"]) + (exported if run["name"] == content["chosen"] else ""),
                str(run["best_epoch"]),
                number(run["history"][run["best_epoch"] - 1]["val_auroc"]),
                number(None if "balanced_error" not in clean else 1 - clean["balanced_error"]),
                number(clean.get("auroc")),
                number(None if "balanced_error" not in damaged else 1 - damaged["balanced_error"]),
            ]
        )
    text = (
        f"<h2>Training</h2>{drawing}"
        + table(
            [
                "Run", "Epoch kept", "Validation AUROC", "Test balanced accuracy", "Test AUROC",
                "Damaged, balanced accuracy",
            ],
            rows,
        )
    )  # fmt: skip
    if not differences:
        return text
    pairs = differences[0]["n"]
    lines = [
        [
            METRICS[entry["metric"]] + (", damaged images" if entry["on"] == "all" else ""),
            number(entry["plain"]),
            number(entry["merged"]),
            f"{entry['mean']:+.3f}"
            + (
                f'<span class="n">{entry["low"]:+.3f} to {entry["high"]:+.3f}</span>'
                if "low" in entry
                else ""
            ),
        ]
        for entry in differences
    ]
    caution = (
        "One pair of runs says nothing about which is better: another seed may turn it round. "
        "Train with <code>--seeds 5</code> to find out."
        if pairs == 1
        else f"Differences are paired over {pairs} seeds, with 95% t intervals. An interval that "
        "holds zero means that no difference was found."
    )
    return (
        text
        + "<h3>Does merging help here?</h3>"
        + table(["Test images", "Plain", "Merged", "Difference"], lines)
        + f"<p>{caution}</p>"
    )


def _data(content: dict[str, Any]) -> str:
    parts = ("train", "val", "test")
    rows = [
        [escape(name), *(f"{content['counts'][part][index]:,}" for part in parts)]
        for index, name in enumerate(content["classes"])
    ]
    rows.append(["<b>Images</b>", *(f"<b>{content['images'][part]:,}</b>" for part in parts)])
    made = content["preparation"]
    colour = "grey" if made["channels"] == 1 else "colour"
    fitted = {
        "squash": "resized to a square, which changes the proportions of those that are not square",
        "center": "resized by the shorter side and cropped to a square at the centre",
    }[made["crop_mode"]]
    text = (
        f"The network sees {made['size']} × {made['size']} pixels in {colour}; images are {fitted}."
    )
    if made["pixel_range"]:
        black, white = made["pixel_range"]
        text += f" Of more than 8 bits, {black:g} is shown black and {white:g} white."
    if content["groups"]:
        text += f" The images come from {counted(content['groups'], 'group')}, such as patients."
    text += " " + escape(" ".join(content["notes"]))
    head = ["Class" if content["task"] == "multiclass" else "Finding"]
    return f"<h2>Images</h2>{table([*head, 'Training', 'Validation', 'Test'], rows)}<p>{text}</p>"


def _how(content: dict[str, Any]) -> str:
    made, settings = content["environment"], content["settings"]
    grouped = (
        "The intervals treat images as independent; several images of one patient are not, so they "
        "are too narrow. "
        if content["groups"]
        else ""
    )
    merging = next(run["merging"] for run in content["runs"] if run["name"] == content["chosen"])
    rows = [[escape(name), escape(value)] for name, value in {**settings, **merging}.items()]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        f"<h2>How to read this</h2><p>The network is a {escape(content['arch'])} with "
        f"{content['parameters'] / 1e6:.1f} million weights ({escape(content['chosen'])}). Which "
        "run and which epoch to keep was decided on validation images, never on the test images. "
        "Intervals are 95%: they cover the choice of test images from the same source, not the "
        f"randomness of training. {grouped}Images of another scanner, hospital or population may "
        "give other figures.</p><p><b>This is not a medical device.</b> Do not base a decision "
        "about a patient on it. This page shows images of the data: share it only with people who "
        "may see them.</p><h2>How to use the network</h2>"
        f"<pre>import timm\n\nmodel = {escape(content['load'])}.eval()</pre>"
        "<p>The README in its folder describes how to prepare images for it.</p>"
        "<details><summary>Settings, command and versions</summary>"
        f"<pre>{escape(made['command'])}</pre>{table(['Setting', 'Value'], rows, left=2)}"
        f'<p class="soft">{escape(versions)}; {escape(made["device"])}.</p></details>'
    )


def render(content: dict[str, Any], pictures: Sequence[Tensor]) -> str:
    """Renders the whole page.

    Args:
        content: As recipes/own_images.py writes it into results.json.
        pictures: uint8 (C, S, S) of each of the worst mistakes, in their order.
    """
    title = escape(content["title"])
    method = "in-model merging" if content["method"] == "merged" else "plain training"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: how good is the classifier?</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="byline">An image classifier and what it can do · {escape(content["arch"])}, {method} ·
{escape(content["date"])}</p>
<p class="lead">{_summary(content)}</p>
</header>
{_cards(content)}
{_warnings(content)}
{_classes(content)}
{_confusions(content)}
{_robustness(content)}
{_mistakes(content, pictures)}
{_comparison(content)}
{_data(content)}
{_how(content)}
</main>
</body>
</html>
"""


def write_report(content: dict[str, Any], pictures: Sequence[Tensor], path: Path) -> Path:
    """Renders the page and writes it atomically; returns its path."""
    with replacing(path) as draft:
        draft.write_text(render(content, pictures), encoding="utf-8")
    return path
