"""Draws what one merge does, from numbers that are computed: docs/images/merging.svg.

python docs/.diagram.py
"""

from __future__ import annotations

import math
from pathlib import Path

Kernel = list[float]  # nine weights, row by row

ALPHA, TAU = 0.8, 0.3
KERNELS: list[Kernel] = [
    [0.9, 0.8, 0.7, 0.1, 0.0, -0.1, -0.8, -0.9, -0.7],
    [-0.6, 0.9, -0.5, -0.4, 0.8, -0.6, -0.5, 0.9, -0.4],
    [0.2, -0.7, 0.6, 0.9, -0.2, -0.8, 0.3, 0.5, -0.6],
    [-0.5, 0.4, -0.8, -0.1, 0.9, -0.9, 0.1, 0.9, -0.1],
    [-0.7, -0.1, 0.8, -0.8, 0.1, 0.9, -0.6, 0.0, 0.7],
    [-0.5, -0.6, -0.4, -0.6, 0.9, -0.5, 0.6, 0.7, -0.7],
]
PAIR = (1, 3)
CELL, GAP = 15, 17
K_I, K_J = (f'K<tspan baseline-shift="sub" font-size="9">{index}</tspan>' for index in "ij")
NOTE = "In training alone: the network that is exported has the same graph, size and speed."
INK, SOFT, ACCENT = "#1a1a1a", "#5c5c5c", "#D55E00"


def cosine(a: Kernel, b: Kernel) -> float:
    return (
        sum(map(math.prod, zip(a, b, strict=True))) / math.dist(a, [0] * 9) / math.dist(b, [0] * 9)
    )


def colour(weight: float) -> str:
    """Red above zero, blue below, white at it."""
    red, green, blue = (178, 24, 43) if weight > 0 else (33, 102, 172)
    strength = min(1.0, abs(weight))
    mixed = (round(255 + (part - 255) * strength) for part in (red, green, blue))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def text(
    x: float, y: float, words: str, *, size: int = 13, fill: str = INK, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}"{weight}>{words}</text>'


def kernel(x: float, y: float, weights: Kernel, *, marked: bool = False) -> list[str]:
    side = 3 * CELL
    cells = [
        f'<rect x="{x + CELL * (n % 3):g}" y="{y + CELL * (n // 3):g}" width="{CELL}" '
        f'height="{CELL}" fill="{colour(weight)}"/>'
        for n, weight in enumerate(weights)
    ]
    edge, width = (ACCENT, 3) if marked else ("#8a8a8a", 1)
    frame = f'<rect x="{x:g}" y="{y:g}" width="{side}" height="{side}" fill="none" '
    return [*cells, f'{frame}stroke="{edge}" stroke-width="{width}"/>']


def arrow(x: float, y: float, length: float) -> str:
    end = x + length
    return (
        f'<path d="M{x:g} {y:g} H{end - 7:g}" stroke="{SOFT}" stroke-width="2"/>'
        f'<path d="M{end:g} {y:g} l-9 -5 v10 z" fill="{SOFT}"/>'
    )


def diagram() -> str:
    first, second = (KERNELS[index] for index in PAIR)
    likeness = cosine(first, second)
    assert likeness > TAU
    blend = [ALPHA * a + (1 - ALPHA) * b for a, b in zip(first, second, strict=True)]
    side = 3 * CELL
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 232" role="img" '
        'font-family="system-ui, Helvetica, Arial, sans-serif" text-anchor="middle">',
        "<title>After an optimizer step, two similar kernels of a layer are blended</title>",
        '<rect width="760" height="232" rx="6" fill="#ffffff"/>',
        text(112, 30, "1. the optimizer steps", bold=True),
        text(380, 30, "2. drawn pairs are compared", bold=True),
        text(648, 30, "3. alike kernels are blended", bold=True),
    ]
    for column, replaced in ((20, None), (556, blend)):
        for index, weights in enumerate(KERNELS):
            x = column + (index % 3) * (side + GAP) + 8
            y = 52 + (index // 3) * (side + GAP)
            if replaced and index == PAIR[0]:
                weights = replaced
            marked = index in PAIR if replaced is None else index == PAIR[0]
            parts += kernel(x, y, weights, marked=marked)
    parts += [arrow(224, 105, 50), arrow(486, 105, 50)]
    parts += kernel(300, 62, first, marked=True) + kernel(415, 62, second, marked=True)
    parts += [
        text(322, 128, K_I),
        text(437, 128, K_J),
        text(380, 90, f"{likeness:.2f}", bold=True),
        text(380, 154, f"cosine {likeness:.2f} &gt; tau = {TAU:g}"),
        text(112, 186, "kernels of a deep layer", fill=SOFT),
        text(648, 186, f"{K_I} becomes {ALPHA:g} {K_I} + {1 - ALPHA:.1f} {K_J}", fill=SOFT),
        text(380, 216, NOTE, fill=SOFT),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    path = Path(__file__).parent / "images" / "merging.svg"
    path.write_text(diagram(), encoding="utf-8")
