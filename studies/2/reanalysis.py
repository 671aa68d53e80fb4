"""The confirmation of the second study, analysed as a journal would ask.

Its first analysis pooled three data sets with an interval that counts seeds alone. Here data sets
are random effects, the primary family has two members that Holm adjusts, "level" is an equivalence
test, and merging is compared with noise of the same size directly. The runs kept no predictions,
so the sampling of test images is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studies.common.names import in_words
from studies.common.statistics import (
    Effect,
    equivalence,
    holm,
    leave_one_out,
    over_seeds,
    random_effects,
)

from .paired import CONFIRMED, Runs, Setting, values

ARM = "transient, signed 0.3"
COMPARISONS = (  # arm, baseline
    (ARM, "plain"),
    ("Gaussian noise 0.3", "plain"),
    ("EMA .98", "plain"),
    (ARM, "Gaussian noise 0.3"),
    (ARM, "EMA .98"),
)
MEASURES = (
    ("AUROC", "corrupted"),
    ("balanced accuracy", "corrupted"),
    ("calibration error", "corrupted"),
    ("AUROC", "clean"),
    ("balanced accuracy", "clean"),
    ("calibration error", "clean"),
)
PRIMARY = MEASURES[:2]  # named after the fact: the freeze file names none
MARGIN = 0.02  # of "level", also named after the fact


def effects(
    settings: Mapping[Setting, Runs], arm: str, baseline: str, key: tuple[str, str]
) -> dict[str, Effect]:
    """Returns data set -> arm minus baseline on the test part, over pairs of seeds."""
    found = {}
    for setting, runs in settings.items():
        if setting.dataset in CONFIRMED:
            seeds = sorted(set(runs[arm]) & set(runs[baseline]))
            pairs = [
                values(runs[arm][seed], "test")[key] - values(runs[baseline][seed], "test")[key]
                for seed in seeds
            ]
            found[setting.dataset.removesuffix("mnist").capitalize()] = over_seeds(pairs)
    return found


def reanalysis(settings: Mapping[Setting, Runs]) -> list[dict[str, Any]]:
    """Returns a row for each comparison, measure and data set, then pooled and without each set."""
    rows = []
    for arm, baseline in COMPARISONS:
        pooled = {}
        first = len(rows)
        for key in MEASURES:
            found = effects(settings, arm, baseline, key)
            head = {"arm": arm, "baseline": baseline, "measure": key[0], "images": key[1]}
            for name, one in found.items():
                row = {"data": name, "mean": one.mean, "low": one.low, "high": one.high}
                rows.append(head | row | {"pairs": one.pairs})
            pooled[key] = random_effects(list(found.values()))
            others = {f"without {name}": one for name, one in leave_one_out(found).items()}
            for name, one in {"all": pooled[key], **others}.items():
                level = equivalence(one, MARGIN)
                row = {"data": name} | one.to_row()
                rows.append(head | row | {"p_level": level["p"], "p_loss": level["loss"]})
        adjusted = holm({" ".join(key): pooled[key].p for key in PRIMARY})
        for row in rows[first:]:
            name = f"{row['measure']} {row['images']}"
            if row["data"] == "all" and name in adjusted:
                row["p_holm"] = adjusted[name]
    return rows


def reanalysis_table(rows: list[dict[str, Any]]) -> str:
    """Returns Markdown: each comparison pooled, and the primary measures by data set."""
    heads = ["arm", "minus", "measure", "difference (95% interval)", "I²", "p", "p, Holm"]
    heads += ["p that it is level"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        if row["data"] == "all":
            cells = [*_names(row), f"{row['i2']:.2f}", f"{row['p']:.3f}"]
            cells += [f"{row['p_holm']:.3f}" if "p_holm" in row else "", f"{row['p_level']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    heads = ["arm", "minus", "measure", "difference (95% interval)", "data"]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        primary = (row["measure"], row["images"]) in PRIMARY
        if primary and row["data"] != "all" and (row["arm"], row["baseline"]) == COMPARISONS[0]:
            lines.append(f"| {' | '.join([*_names(row), row['data']])} |")
    return "\n".join(lines) + "\n"


def _names(row: Mapping[str, Any]) -> list[str]:
    interval = f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
    measure = f"{row['measure']}, {row['images']}"
    return [in_words(row["arm"]), in_words(row["baseline"]), measure, interval]
