"""What images are like, and whether new ones are like those of the training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom
from torch import Tensor

from inmerge_wrap.images.files import Facts
from inmerge_wrap.images.preparation import Seen

_OUTSIDE = 0.02  # of the training images, by the definition of the percentiles
_CHANCE = 0.001  # that as many images differ although nothing has changed


@dataclass(frozen=True)
class Look:
    """One image as its file holds it, and as the network sees it."""

    facts: Facts
    mean: float  # of the prepared pixels in [0, 1]
    spread: float  # their standard deviation


def look_at(facts: Facts, pixels: Tensor) -> Look:
    """What an image is like; its pixels are uint8, as a `Preparation` made them."""
    shown = pixels.float() / 255
    return Look(facts, float(shown.mean()), float(shown.std(correction=0)))


def seen_of(facts: Sequence[Facts], looks: Sequence[Look]) -> Seen:
    """What a training keeps of its images, to recognise others; not all need be looked at."""

    def percentiles(values: list[float]) -> tuple[float, float]:
        low, high = np.percentile(values, [100 * _OUTSIDE / 2, 100 * (1 - _OUTSIDE / 2)])
        return float(low), float(high)

    return Seen(
        images=len(facts),
        kinds=tuple(sorted({entry.kind for entry in facts})),
        colour=sum(entry.colour for entry in facts) / len(facts),
        low=min(entry.low for entry in facts),
        high=max(entry.high for entry in facts),
        dimmest=min(entry.high for entry in facts),
        smallest=min(entry.sides[0] for entry in facts),
        largest=max(entry.sides[1] for entry in facts),
        means=percentiles([look.mean for look in looks]),
        spreads=percentiles([look.spread for look in looks]),
    )


def unlike(look: Look, seen: Seen) -> list[str]:
    """Returns a word for each respect in which an image differs from those of the training."""
    facts = look.facts
    differs = {
        "values": facts.low < seen.low or facts.high > seen.high,
        "range": facts.high <= seen.high / 4 and facts.high < seen.dimmest,
        "format": facts.kind not in seen.kinds,
        "colour": facts.colour and seen.colour == 0,
        "grey": not facts.colour and seen.colour == 1,
        "size": facts.sides[0] < seen.smallest or facts.sides[1] > seen.largest,
        "brightness": not seen.means[0] <= look.mean <= seen.means[1],
        "contrast": not seen.spreads[0] <= look.spread <= seen.spreads[1],
    }
    return [word for word, is_so in differs.items() if is_so]


def warnings_about(differences: Sequence[Sequence[str]], seen: Seen) -> list[str]:
    """Returns a sentence for each respect in which more images differ than chance explains.

    A few images outside of the percentiles are expected; a warning needs more than would occur
    once in a thousand times (binomial).
    """
    (low, high), (least, most) = seen.means, seen.spreads
    sentences = {
        "values": f"hold values outside of {seen.low:g} to {seen.high:g}, the range in training",
        "range": f"hold only values up to a quarter of {seen.high:g}, the highest in training: "
        "their range may be another",
        "format": f"are of a kind that training did not see (it saw {', '.join(seen.kinds)})",
        "colour": "show colours, and no training image did",
        "grey": "are grey, and all training images showed colours",
        "size": f"have sides outside of {seen.smallest} to {seen.largest} pixels, those in "
        "training",
        "brightness": f"have a mean outside of {low:.3f} to {high:.3f}, that of 98% of the "
        "training images",
        "contrast": f"have a spread outside of {least:.3f} to {most:.3f}, that of 98% of the "
        "training images",
    }
    extremes, percentiles = 1 / (seen.images + 1), _OUTSIDE + 2 / seen.images
    counts = Counter(word for words in differences for word in words)
    found = []
    for word, sentence in sentences.items():
        expected = percentiles if word in ("brightness", "contrast") else extremes
        chance = binom.sf(counts[word] - 1, len(differences), min(expected, 1.0))
        if counts[word] and chance < _CHANCE:
            found.append(f"{counts[word]} of {len(differences)} images {sentence}")
    return found
