"""The folder of an adapted network: plain weights, preparation.json and a card that says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from huggingface_hub import ModelCard, ModelCardData

from inmerge_wrap.app.adapting import Adaptation
from inmerge_wrap.app.snippet import snippet
from inmerge_wrap.card import PLACE
from inmerge_wrap.errors import ArgumentError
from inmerge_wrap.images.files import counted
from inmerge_wrap.markdown import plain_text


def check_folders(source: Path, out: Path) -> None:
    """Raises an error if `write_adapted` could not write what was adapted."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ArgumentError(f"<out> {out} exists: give another folder, or remove it")
    _read_card(source)


def write_adapted(adaptation: Adaptation, source: Path, out: Path, *, site: str) -> str:
    """Writes an adapted network into a new folder; returns the line of code that loads it.

    ``source`` is the folder of the network before, for its card.
    """
    check_folders(source, out)
    return adaptation.model.write(out, _card(_read_card(source), adaptation, site))


def _read_card(source: Path) -> ModelCard:
    path = source / "README.md"
    try:
        if not path.exists():
            return ModelCard(_BARE)
        return ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # someone has edited it, and its YAML is no more
        reason = " ".join(str(error).split())[:200]
        raise ArgumentError(
            f"{path} cannot be read ({reason}): mend the lines between the first two ---, or "
            "remove the file"
        ) from error


def _card(card: ModelCard, adaptation: Adaptation, site: str) -> str:
    """The card of the network before, with the adaptation, and without results as its own."""
    cast(ModelCardData, card.data).eval_results = None
    recipe = adaptation.model.recipe
    code = f"```python\n{snippet(recipe, PLACE)}```"
    body = re.sub(r"^```python\n.*?^```", lambda _: code, card.text, count=1, flags=re.M | re.S)
    if recipe.thresholds is not None:
        for place, threshold in enumerate(recipe.thresholds):
            row = rf"^(\| {place} \| .* \|) \S+ \|$"
            body = re.sub(row, rf"\g<1> {threshold:.4g} |", body, count=1, flags=re.M)
    if _BEFORE not in body:
        body = body.replace("## Results\n", f"## Results\n\n{_BEFORE}\n", 1)
    section = _section(adaptation, plain_text(site))
    if _BEFORE not in body:  # someone has edited the card, and figures may stand anywhere in it
        section += "\nFigures that were measured before the adaptation do not hold any more.\n"
    before, use, after = body.partition("## Use\n")  # likewise
    body = "\n".join([before, section, use + after])
    return f"---\n{card.data.to_yaml()}\n---\n{body}"


_BARE = """\
---
library_name: timm
---

# A network that was adapted to another site

## Use

```python
```
"""
_BEFORE = "**These figures were measured before the adaptation** and do not hold for these weights."


def _section(adaptation: Adaptation, site: str) -> str:
    recipe = adaptation.model.recipe
    lines = [
        "## Adaptation",
        "",
        f"Adapted to {counted(adaptation.images, 'image')} of {site}: BatchNorm's statistics were "
        "re-estimated on them without labels, with a prior of "
        f"{adaptation.prior:g} images (Schneider et al. 2020). All other weights are as they were.",
    ]
    if adaptation.labelled:
        what = "The temperature" if recipe.thresholds is None else "Temperature and thresholds"
        labelled = counted(adaptation.labelled, "labelled image")
        lines += ["", f"{what}: chosen on {labelled} of {site}."]
    lines += [
        "",
        "| class | in training | predicted before | predicted after |",
        "|---|---|---|---|",
    ]
    known = [f"{share:.1%}" for share in recipe.class_shares or ()] or ["-"] * len(recipe.classes)
    lines += [
        f"| {plain_text(name)} | {share} | {before:.1%} | {after:.1%} |"
        for (name, (before, after)), share in zip(adaptation.shares.items(), known, strict=True)
    ]
    lines += ["", *(f"- {plain_text(warning)}" for warning in adaptation.warnings)]
    return "\n".join(lines) + "\n"
