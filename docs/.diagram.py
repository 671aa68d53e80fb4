"""Draws what merging does, from numbers that are computed, and what it was measured to give.

python docs/.diagram.py
"""

from __future__ import annotations

import csv
import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Square = list[list[float]]  # entries of a kernel or a map, row by row
Rows = dict[str, dict[str, float]]  # name -> mean, low and high

ALPHA, TAU = 0.8, 0.3
WIDTH = 400
# Each colour has one meaning in all pictures. A page can be light or dark, and a picture takes the
# side of the page that shows it.
PALETTE = {  # light, dark
    "ink": ("#1a1a1a", "#ececec"),
    "soft": ("#5c5c5c", "#b8b8b8"),  # also plain training
    "changed": ("#d08c00", "#e69f00"),  # a kernel or an output that merging changed
    "step": ("#d55e00", "#ff9a52"),  # merging after each step
    "forward": ("#0072b2", "#56b4e9"),  # merging in the forward pass
    "noise": ("#009e73", "#2fbf94"),  # noise, chance and other disturbances
}
FONT = "text{font-family:system-ui,Helvetica,Arial,sans-serif}"


def style() -> str:
    """A style sheet with a class for each colour of the palette."""

    def rules(side: int) -> str:
        return "".join(
            f"text.{name}{{fill:{both[side]}}}rect.{name}{{stroke:{both[side]}}}"
            f"path.{name}{{fill:{both[side]};stroke:{both[side]}}}"
            for name, both in PALETTE.items()
        )

    return f"{FONT}{rules(0)}@media (prefers-color-scheme:dark){{{rules(1)}}}"


K_I, K_J = (f'K<tspan baseline-shift="sub" font-size="11">{index}</tspan>' for index in "ij")
Y_I, Y_J = (f'y<tspan baseline-shift="sub" font-size="11">{index}</tspan>' for index in "ij")

PAIR: tuple[Square, Square] = (
    [[-0.6, 0.9, -0.5], [-0.4, 0.8, -0.6], [-0.5, 0.9, -0.4]],
    [[-0.5, 0.4, -0.8], [-0.1, 0.9, -0.9], [0.1, 0.9, -0.1]],
)
IMAGES: tuple[Square, Square] = (
    [[math.exp(-((x - 1.5) ** 2 + (y - 2) ** 2) / 2) for x in range(6)] for y in range(6)],
    [[float(x + y in (5, 6)) for x in range(6)] for y in range(6)],
)
KERNELS: list[Square] = [
    [[0.4, 0.6, 0.4], [0.0, 0.0, 0.0], [-0.4, -0.6, -0.4]],
    [[-0.3, 0.9, -0.3], [-0.3, 0.9, -0.3], [-0.3, 0.2, -0.3]],
    [[0.4, 0.0, -0.4], [0.6, 0.0, -0.6], [0.4, 0.0, -0.4]],
    [[0.3, 0.3, 0.2], [0.3, 0.3, 0.2], [0.2, 0.2, 0.2]],
    [[-0.2, -0.2, -0.2], [-0.2, 1.2, -0.2], [-0.2, -0.2, -0.2]],
]
COMPARISONS = {  # of the second study's confirmation: arm, baseline -> heading, colour
    ("transient, signed 0.3", "plain"): ("merging in the weights − plain training", "forward"),
    ("Gaussian noise 0.3", "plain"): ("Gaussian noise of that size − plain training", "noise"),
    ("transient, signed 0.3", "Gaussian noise 0.3"): (
        "merging in the weights − Gaussian noise",
        "ink",
    ),
}
PER_IMAGE = {  # the same of the third study's, and on top of which augmentation
    ("merging per image", "plain", "flips"): ("merging for each image − plain training", "forward"),
    ("channel noise", "plain", "flips"): ("channel noise − plain training", "noise"),
    ("channel dropout", "plain", "flips"): ("channel dropout − plain training", "noise"),
    ("merging per image", "channel noise", "flips"): (
        "merging for each image − channel noise",
        "ink",
    ),
    ("merging per image", "plain", "trivial"): (
        "with TrivialAugment: merging − plain training",
        "forward",
    ),
}
ARMS = {  # of the third study's pilot: name -> colour, shape
    "plain": ("soft", "circle"),
    "plain, TrivialAugment": ("soft", "open circle"),
    "merging per image": ("forward", "circle"),
    "channel noise": ("noise", "open square"),
    "channel dropout": ("noise", "square"),
}
LABORATORIES = ("Jiangxi", "CellaVision")
WAYS = {"as trained": "", "adapted": ", adapted"}  # as the table names them -> after a laboratory
PILOT = "bloodmnist", "600", "tf_efficientnet_lite0"
FROZEN = {  # steps and rate of the third study's confirmation; another rate was tried afterwards
    name: json.loads((ROOT / f"studies/3/frozen-{name}.json").read_text())["training"][name]
    for name in ("flips", "trivial")
}
INSIDE = {  # column of mechanism.csv -> in words, range
    "moved_by_mixing": ("probability moved by mixing", 0.45, 0.80),
    "channel_correlation": ("correlation of channels", 0.07, 0.18),
    "cka_under_noise": ("similarity under noise (CKA)", 0.40, 0.75),
}
MAPPED_ON = {"bloodmnist": "blood", "dermamnist": "skin"}
MAPPED = {"soft": "plain training", "forward": "merging for each image"}
AUGMENTATIONS = {  # as the runs name them -> in words
    "none": "no augmentation",
    "flips": "flips",
    "noise and blur": "flips, noise and blur",
    "augmix": "AugMix",
    "trivial": "TrivialAugmentWide",
    "trivial and jitter": "TrivialAugmentWide and colour jitter",
}
SHIFT = 2  # the partner of a channel, shared by the batch
SIGNS = ((1, -1, -1, 1, -1), (-1, 1, -1, 1, 1))  # of the channels, drawn for each image


def cosine(a: Square, b: Square) -> float:
    first, second = list(chain(*a)), list(chain(*b))
    return sum(map(math.prod, zip(first, second, strict=True))) / (
        math.hypot(*first) * math.hypot(*second)
    )


def blend(a: Square, b: Square, share: float) -> Square:
    """Moves ``a`` by a share of the way to ``b``."""
    return [
        [x + share * (y - x) for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)
    ]


def convolve(image: Square, kernel: Square) -> Square:
    side = len(image) - 2
    return [
        [
            sum(kernel[v][u] * image[y + v][x + u] for v in range(3) for u in range(3))
            for x in range(side)
        ]
        for y in range(side)
    ]


def colour(value: float, *, signed: bool = True) -> str:
    """Red above zero, blue below, white at it; a grey level for an image."""
    if not signed:
        return "#{0:02x}{0:02x}{0:02x}".format(round(255 * min(1.0, value)))
    red, green, blue = (178, 24, 43) if value > 0 else (33, 102, 172)
    strength = min(1.0, abs(value))
    mixed = (round(255 + (part - 255) * strength) for part in (red, green, blue))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def text(
    x: float,
    y: float,
    words: str,
    size: int = 15,
    kind: str = "ink",
    bold: bool = False,
    anchor: str = "",
) -> str:
    weight = ' font-weight="600"' if bold else ""
    side = f' text-anchor="{anchor}"' if anchor else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" class="{kind}"{weight}{side}>{words}</text>'
    )


def square(
    x: float, y: float, side: float, values: Square, *, marked: bool = False, signed: bool = True
) -> list[str]:
    cell = side / len(values)
    cells = [
        f'<rect x="{x + cell * column:g}" y="{y + cell * row:g}" width="{cell:g}" '
        f'height="{cell:g}" fill="{colour(value, signed=signed)}"/>'
        for row, line in enumerate(values)
        for column, value in enumerate(line)
    ]
    edge = 'class="changed" stroke-width="3"' if marked else 'stroke="#8a8a8a"'
    frame = f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" fill="none" '
    return [*cells, f"{frame}{edge}/>"]


def arrow(x: float, y: float, length: float) -> str:
    end = x + length
    return (
        f'<path class="soft" stroke-width="2" d="M{x:g} {y:g} H{end - 7:g}"/>'
        f'<path class="ink" d="M{end:g} {y:g} l-9 -5 v10 z"/>'
    )


def picture(title: str, height: int, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" text-anchor="middle">'
    )
    lines = [head, f"<title>{title}</title>", f"<style>{style()}</style>", *parts, "</svg>"]
    return "\n".join(lines) + "\n"


def after_each_step() -> str:
    first, second = PAIR
    found = cosine(first, second)
    assert found > TAU
    side, top = 72, 44
    middle = top + side / 2
    return picture(
        "After an optimizer step, the weights of a kernel are blended with a similar kernel's",
        200,
        [
            text(104, 26, "a drawn pair of kernels", 14, bold=True),
            text(326, 26, "the new weights", 14, bold=True),
            *square(14, top, side, first, marked=True),
            *square(122, top, side, second),
            *square(290, top, side, blend(first, second, 1 - ALPHA), marked=True),
            arrow(212, middle, 60),
            text(50, top + side + 22, K_I),
            text(158, top + side + 22, K_J),
            text(326, top + side + 22, f"{ALPHA:g} {K_I} + {1 - ALPHA:.1f} {K_J}"),
            text(200, 166, f"cosine {found:.2f} is above the threshold {TAU:g}: blend"),
            text(200, 189, "one set of weights for all images, from then on", 14, "soft"),
        ],
    )


def in_the_forward_pass() -> str:
    side, gap, left = 44, 14, 92
    parts = [
        text(40, 26, "image", bold=True),
        text(230, 26, "outputs of a convolution", bold=True),
    ]
    for lane, (image, signs) in enumerate(zip(IMAGES, SIGNS, strict=True)):
        top = 40 + 138 * lane
        outputs = [convolve(image, kernel) for kernel in KERNELS]
        parts += square(12, top, 56, image, signed=False)
        parts.append(text(40, top + 76, "AB"[lane], kind="soft"))
        for channel, (output, sign) in enumerate(zip(outputs, signs, strict=True)):
            x, partner = left + channel * (side + gap), (channel + SHIFT) % len(KERNELS)
            mixed = blend(output, outputs[partner], sign * (1 - ALPHA))
            parts += square(x, top, side, output)
            words = f"{'+' if sign > 0 else '−'} y{partner + 1}"
            parts.append(text(x + side / 2, top + side + 18, words, 15, bold=True))
            parts += square(x, top + side + 26, side, mixed, marked=True)
    parts += [
        text(200, 332, f"{Y_I} becomes {Y_I} ± {1 - ALPHA:.1f} ({Y_J} − {Y_I})"),
        text(200, 356, "toward the partner (+) or away from it (−),", 14, "soft"),
        text(200, 375, "drawn for each image; no weight is written", 14, "soft"),
    ]
    return picture("In the forward pass, each image blends the channels in its own way", 388, parts)


def table_of(study: int, name: str) -> list[dict[str, str]]:
    """Returns the rows of a table that a study wrote."""
    path = ROOT / "studies" / str(study) / f"{name}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ends(row: dict[str, str]) -> dict[str, float]:
    """Returns the mean of a difference and the ends of its interval."""
    return {name: float(row[name]) for name in ("mean", "low", "high")}


def evidence() -> str:
    """The second study's confirmation: each data set, and all of them as random effects."""
    found: dict[tuple[str, ...], Rows] = {}
    for row in table_of(2, "reanalysis"):
        is_drawn = (row["measure"], row["images"]) == ("AUROC", "corrupted")
        if is_drawn and not row["data"].startswith("without"):
            found.setdefault((row["arm"], row["baseline"]), {})[row["data"]] = ends(row)
    return area_under_corruption("Second", found, COMPARISONS, 1900, 205)


def confirmation() -> str:
    """The third study's confirmation, drawn as the second's."""
    found: dict[tuple[str, ...], Rows] = {}
    for table in ("differences", "pooled"):
        for row in table_of(3, table):
            if (row["measure"], row["tested_on"]) != ("AUROC", "corrupted"):
                continue
            name = "all"
            if table == "differences":
                name = row["dataset"].removesuffix("mnist").capitalize()
                confirms = row["confirmation"] == "True" and name != "Blood"
                if not confirms or float(row["lr"]) != FROZEN[row["augmentation"]]["lr"]:
                    continue
            elif row["data"].startswith("without"):
                continue
            compared = row["arm"], row["baseline"], row["augmentation"]
            found.setdefault(compared, {})[name] = ends(row)
    return area_under_corruption("Third", found, PER_IMAGE, 620, 203, tick=0.1)


def area_under_corruption(
    study: str,
    found: dict[Any, Rows],
    drawn: dict[Any, tuple[str, str]],
    scale: float,
    zero: float,
    tick: float = 0.04,
) -> str:
    """A forest plot of the comparisons of a confirmation."""
    groups = []
    for pair, (heading, kind) in drawn.items():
        rows = found[pair]
        names = {name: name for name in sorted(rows.keys() - {"all"})} | {"all three": "all"}
        groups.append((heading, kind, {shown: rows[name] for shown, name in names.items()}))
    parts, bottom = forest(groups, scale, (-tick, 0.0, tick), zero=zero)
    parts.append(text(200, bottom + 40, "difference in AUROC under corruption, 95% interval", 14))
    return picture(f"{study} study, confirmation: AUROC under corruption", bottom + 52, parts)


def laboratories() -> str:
    """What each disturbance changes in two other laboratories, before and after adapting."""
    found: dict[str, Rows] = {}
    for row in table_of(3, "laboratories"):
        drawn = (row["measure"], row["baseline"]) == ("balanced accuracy", "plain")
        if drawn and row["arch"] == "tf_efficientnet_lite0" and row["augmentation"] == "flips":
            found.setdefault(row["arm"], {})[row["laboratory"] + WAYS[row["way"]]] = ends(row)
    groups = [
        (
            f"{arm.replace('per image', 'for each image')} − plain training",
            kind,
            {lab + way: found[arm][lab + way] for lab in LABORATORIES for way in WAYS.values()},
        )
        for arm, (kind, _) in ARMS.items()
        if arm in found
    ]
    parts, bottom = forest(groups, 520, (-0.1, 0.0, 0.1, 0.2), zero=210, names=150)
    parts.append(text(200, bottom + 40, "difference in balanced accuracy, 95% interval", 14))
    return picture("Third study: blood cells of two other laboratories", bottom + 52, parts)


def forest(
    groups: list[tuple[str, str, Rows]],
    scale: float,
    ticks: tuple[float, ...],
    *,
    zero: float,
    names: float = 88,
) -> tuple[list[str], int]:
    """Returns the parts of a forest plot, and where its last row ends.

    Args:
        groups: Heading, colour, and the rows below it; a row over all data is bold, with a diamond.
        scale: Pixels for a difference of one.
        ticks: Labelled differences.
        zero: Where a difference of zero stands.
        names: Where the names of the rows end.
    """
    line, top = 23, 26
    parts: list[str] = []
    for heading, kind, rows in groups:
        parts.append(text(8, top, heading, 14, bold=True, anchor="start"))
        axis = f"M{zero} {top + 8} v{line * len(rows)}"
        parts.append(f'<path class="soft" stroke-dasharray="3 4" d="{axis}"/>')
        for name, of in rows.items():
            top += line
            pooled = name.startswith("all")
            mean, low, high = (zero + scale * of[end] for end in ("mean", "low", "high"))
            parts.append(text(names, top, name, 14, anchor="end", bold=pooled))
            parts.append(text(392, top, f"{of['mean']:+.3f}", 14, anchor="end", bold=pooled))
            middle = top - 5
            parts.append(
                f'<path class="{kind}" stroke-width="2" d="M{low:.1f} {middle} H{high:.1f}"/>'
            )
            shape = f"M{mean - 7:.1f} {middle} l7 -6 l7 6 l-7 6 z"
            if not pooled:
                shape = f"M{mean - 4:.1f} {middle} a4 4 0 1 0 8 0 a4 4 0 1 0 -8 0"
            parts.append(f'<path class="{kind}" d="{shape}"/>')
        top += 38
    bottom = top - 30
    parts += [text(zero + scale * at, bottom + 18, f"{at:+.2f}", 13, "soft") for at in ticks]
    return parts, bottom


def mechanism() -> str:
    """Draws each network of the third study's pilot: one panel for each quantity inside it."""
    wide, high, top = 290, 118, 98
    parts, areas = [], (0.86, 0.99)
    for place, (name, kind) in enumerate(ARMS.items()):
        x, y = 22 + 200 * (place % 2), 20 + 20 * (place // 2)
        parts += [dot(x, y - 5, kind[0], kind[1]), text(x + 12, y, name, 13, anchor="start")]
    parts.append(text(14, 88, "AUROC under corruption", 14, anchor="start"))
    for quantity, (label, low, most) in INSIDE.items():
        for area in (0.88, 0.98):
            y = top + high * (areas[1] - area) / (areas[1] - areas[0])
            parts.append(text(54, y + 5, f"{area:.2f}", 13, "soft", anchor="end"))
        parts.append(f'<path class="soft" d="M62 {top} v{high}" fill="none"/>')
        parts.append(f'<path class="soft" d="M62 {top + high} h{wide}" fill="none"/>')
        for run in table_of(3, "mechanism"):
            arm = run["arm"] + {"trivial": ", TrivialAugment"}.get(run["augmentation"], "")
            cell = run["dataset"], run["images"], run["arch"]
            is_drawn = cell == PILOT and arm in ARMS and run["augmentation"] in FROZEN
            if not is_drawn or int(run["steps"]) != FROZEN[run["augmentation"]]["steps"]:
                continue
            x = 62 + wide * (float(run[quantity]) - low) / (most - low)
            y = top + high * (areas[1] - float(run["AUROC, corrupted"])) / (areas[1] - areas[0])
            parts.append(dot(x, y, *ARMS[arm]))
        for value in (low, most):
            x = 62 + wide * (value - low) / (most - low)
            parts.append(text(x, top + high + 17, f"{value:.2f}", 13, "soft"))
        parts.append(text(62 + wide / 2, top + high + 18, label, 13))
        top += high + 40
    return picture("Third study, pilot: networks inside, and their robustness", top - 14, parts)


def augmentations() -> str:
    """The third study's map: plain training and merging, by augmentation and number of images."""
    shown = ("tf_efficientnet_lite0", "AUROC")
    rows = [row for row in table_of(3, "map") if (row["arch"], row["measure"]) == shown]
    first, scale, parts, top = 0.64, 630, [], 26
    for place, (kind, words) in enumerate(MAPPED.items()):
        parts.append(dot(18 + 130 * place, top - 5, kind, "circle"))
        parts.append(text(28 + 130 * place, top, words, 14, anchor="start"))
    for augmentation, words in AUGMENTATIONS.items():
        top += 30
        parts.append(text(8, top, words, 14, bold=True, anchor="start"))
        drawn = [row for row in rows if row["augmentation"] == augmentation]
        for row in sorted(drawn, key=lambda row: (row["dataset"], int(row["images"]))):
            top += 21
            places = [106 + scale * (float(row[arm]) - first) for arm in ("plain", "merging")]
            line = f"M{places[0]:.1f} {top - 5} H{places[1]:.1f}"
            name = f"{int(row['images']):,} {MAPPED_ON[row['dataset']]}"
            parts += [
                text(88, top, name, 14, anchor="end"),
                f'<path class="forward" stroke-width="2" d="{line}"/>',
                dot(places[0], top - 5, "soft", "circle"),
                dot(places[1], top - 5, "forward", "circle"),
                text(398, top, f"{float(row['difference']):+.3f}", 14, anchor="end"),
            ]
    for value in (0.7, 0.8, 0.9, 1.0):
        parts.append(text(106 + scale * (value - first), top + 24, f"{value:.1f}", 13, "soft"))
    parts.append(text(200, top + 46, "AUROC under corruption, by number of training images", 14))
    title = "Third study: merging for each image on top of augmentation, by training images"
    return picture(title, top + 58, parts)


def dot(x: float, y: float, kind: str, shape: str) -> str:
    """A mark: a circle, a square, or either of them open."""
    path = "m-4 0 a4 4 0 1 0 8 0 a4 4 0 1 0 -8 0" if "circle" in shape else "m-4 -4 h8 v8 h-8 z"
    hollow = ' style="fill:none" stroke-width="1.8"' if "open" in shape else ""
    return f'<path class="{kind}"{hollow} d="M{x:.1f} {y:.1f} {path}"/>'


PICTURES = {
    "after-each-step.svg": after_each_step,
    "augmentations.svg": augmentations,
    "confirmation.svg": confirmation,
    "evidence.svg": evidence,
    "forward-pass.svg": in_the_forward_pass,
    "laboratories.svg": laboratories,
    "mechanism.svg": mechanism,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (ROOT / "docs" / "images" / name).write_text(draw(), encoding="utf-8")
