"""The arms of the studies, in words: results files hold the keys, reports print these names."""

from __future__ import annotations

import re

SAID = {
    "plain": "plain training",
    "plain, temperature scaled": "plain training, temperature scaled",
    # Other methods.
    "ema .98": "weight averaging (EMA 0.98)",
    "EMA .98": "weight averaging (EMA 0.98)",
    "swa": "weight averaging (SWA)",
    "SWA": "weight averaging (SWA)",
    "sam": "sharpness-aware (SAM)",
    "SAM": "sharpness-aware (SAM)",
    "dropout .3": "dropout 0.3",
    "drop path .1": "stochastic depth 0.1",
    "label smoothing .1": "label smoothing 0.1",
    "mixup": "mixup",
    "soup of 3": "soup of three networks",
    "ensemble of 3": "ensemble of three networks",
    # Merging, in the first study.
    "paper": "merge as in the paper (cosine > 0.3)",
    "all, cosine": "merge all pairs, fading",
    "all, a=.95, cosine": "merge all pairs, α = 0.95, fading",
    "all, to the end, recalibrated": "merge all pairs to the end, recalibrated",
    "all, norm kept": "merge all pairs, norms kept, fading",
    "z > 2, cosine": "merge pairs with z > 2, fading",
    "z > 2, norm kept": "merge pairs with z > 2, norms kept, fading",
    "z > 2, p=1, cosine": "merge pairs with z > 2, p = 1, fading",
    "top 10%, cosine": "merge the most similar tenth, fading",
    "top half, cosine": "merge the most similar half, fading",
    "top half, strength": "merge the most similar half, strength fading",
    "top half, momentum": "merge the most similar half, momentum too, fading",
    "top half, second half": "merge the most similar half, late, fading",
    "top half, second half, ema .98": "merge the most similar half, late, and EMA 0.98",
    "top half, norm kept": "merge the most similar half, norm kept, fading",
    "top half, norm kept, to the end": "merge the most similar half, norm kept, to the end",
    "nearest, top half, cosine": "merge half, most similar partner, fading",
    "nearest, top half, norm kept": "merge half, most similar partner, norms kept",
    "nearest, z > 3, cosine": "merge z > 3, most similar partner, fading",
    "unit kernels, top half, cosine": "merge directions only, half, fading",
    "cluster means, cosine": "merge toward cluster means, fading",
    # Merging, in the second study.
    "persistent, the paper's": "merge as in the paper (cosine > 0.3)",
    "persistent, recommended": "merge pairs with z > 2, fading",
    "persistent, most alike half": "merge the most similar half, fading",
    "persistent, apart from a random kernel 0.3": "after each step, away from a random one by 0.3",
    "persistent, Gaussian noise 0.3": "Gaussian noise after each step, 0.3, norms kept",
    "transient, random": "merge in the weights, random partner",
    "transient, random, a=.9": "merge in the weights, random partner, α = 0.9",
    "transient, random, a=.7": "merge in the weights, random partner, α = 0.7",
    "transient, most similar": "merge in the weights, most similar partner",
}
GLOSSARY = (
    "Merged are all pairs drawn, their most similar half or tenth, or those whose cosine is z "
    "standard deviations above that of random kernels; the partner is random unless it is the most "
    "similar kernel. Fading: merging runs out along a cosine. Late: it begins at half-time. p = 1: "
    "every kernel is drawn in every step."
)


def in_words(arm: str) -> str:
    """The name that a reader sees.

    Args:
        arm: As results files hold it; several joined by " + ", or after an architecture and ": ".

    Returns:
        The name in words; a name that says its settings itself, as "a=0.8, p=0.3", is itself.
    """
    architecture, colon, own = arm.rpartition(": ")
    if colon:
        return f"{architecture}: {in_words(own)}"
    if " + " in arm:
        first, *others = map(in_words, arm.split(" + "))
        return " and ".join([first, *(re.sub(r".*\((EMA .*|SWA|SAM)\)", r"\1", x) for x in others)])
    if found := re.fullmatch(r"(Gaussian|multiplicative) noise (\S+)", arm):
        return f"{found[1]} noise, size {found[2]}"
    if found := re.fullmatch(r"transient, signed (\S+)", arm):
        return f"merge in the weights, signed, size {found[1]}"
    if found := re.fullmatch(r"(persistent|transient), (together|apart) (\S+)", arm):
        where = "after each step" if found[1] == "persistent" else "in the weights"
        way = "pulled together" if found[2] == "together" else "pushed apart"
        return f"{where}, {way} by {found[3]}"
    return SAID.get(arm, arm)
