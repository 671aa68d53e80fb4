"""Paired differences of the second study: each arm minus the plain run of the same seed.

Pure functions of the results of run.py; tables are in report.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean, stdev
from typing import Any

from scipy import stats

from studies.common.exams import by_family
from studies.common.records import name_of

from .run import CONFIRMING

MEASURES = {  # display name -> metric of a run
    "balanced accuracy": "balanced_error",
    "AUROC": "auroc",
    "calibration error": "ece",
}
WHERE = ("clean", "corrupted")
CONFIRMED = {regime.dataset for regime in CONFIRMING.values()}
POOLED = "pooled"
SCALED = "plain, temperature scaled"  # derived from the plain runs, and compared like an arm

Runs = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> result


@dataclass(frozen=True)
class Setting:
    """The settings that runs must share to be compared."""

    dataset: str
    pretrained: bool
    augmentation: str

    def __str__(self) -> str:
        name = self.dataset.removesuffix("mnist").capitalize()
        parts = [name, "from ImageNet" if self.pretrained else "", self.augmentation]
        return ", ".join(part for part in parts if part and part != "flips")


@dataclass(frozen=True)
class Difference:
    """An arm minus plain: a mean with its 95% t interval, and what it was computed from.

    ``n`` is the number of pairs; for a pooled one, the smallest of its data sets. Interval, ``sd``
    and ``p`` are None for a single pair. ``p_adjusted`` is set by ``adjust``.
    """

    mean: float
    n: int
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_adjusted: float | None = None


Key = tuple[str, str, str, str]  # setting or POOLED, arm, measure, where


def by_setting(results: Sequence[Mapping[str, Any]]) -> dict[Setting, Runs]:
    """Groups results by setting, arm and seed; adds the temperature-scaled plain runs.

    Raises:
        SystemExit: If there is none, two of the same arm and seed in a setting, or two of a setting
            that were measured on different images.
    """
    settings: dict[Setting, Runs] = defaultdict(lambda: defaultdict(dict))
    measured: dict[Setting, Any] = {}
    for result in sorted(results, key=lambda result: name_of(result["run"])):
        run = result["run"]
        setting = Setting(run["dataset"], bool(run["weights"]), run["augmentation"])
        said = f"{setting}: {run['arm']!r}, seed {run['seed']}"
        seeds = settings[setting][run["arm"]]
        if run["seed"] in seeds:
            raise SystemExit(f"{said}: there is a second run")
        seeds[run["seed"]] = dict(result)
        images = result.get("measured_images")  # the first runs did not record it
        if images and measured.setdefault(setting, images) != images:
            raise SystemExit(f"{said} was measured on {images} images, not {measured[setting]}")
        if run["arm"] == "plain":
            settings[setting][SCALED][run["seed"]] = temperature_scaled(result)
    if not settings:
        raise SystemExit("there are no runs: create some with python -m studies.2.run")
    return settings


def temperature_scaled(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the run with its logits divided by the temperature fitted on validation.

    The decisions do not change; the AUROC, which may change slightly, is left out.
    """
    parts = {
        part: {
            name: {"balanced_error": row["balanced_error"], "ece": row["scaled_ece"]}
            for name, row in result[part].items()
        }
        for part in ("validation", "test")
    }
    return {**result, **parts}


def values(result: Mapping[str, Any], part: str) -> dict[tuple[str, str], float]:
    """Returns every measure of one run on a part, clean and corrupted.

    ``retained`` is the share of the clean balanced accuracy that is left under corruption.
    """
    found: dict[tuple[str, str], float] = {}
    for measure, metric in MEASURES.items():
        rows = {name: row for name, row in result[part].items() if metric in row}
        if "clean" not in rows:
            continue
        of_family = by_family(rows, metric)
        for where in WHERE:
            value = of_family[where]
            found[measure, where] = 1.0 - value if metric == "balanced_error" else value
    clean, corrupted = (found["balanced accuracy", where] for where in WHERE)
    found["retained", "corrupted"] = corrupted / clean
    return found


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Returns the mean of first - second over pairs."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n, center = len(differences), mean(differences)
    if n < 2:
        return Difference(center, n)
    sd = stdev(differences)
    return _with_interval(center, n, sd, sd / sqrt(n), n - 1)


def _with_interval(center: float, n: int, sd: float, error: float, freedom: float) -> Difference:
    if error == 0:
        return Difference(center, n, sd, center, center)
    low, high = map(float, stats.t.interval(0.95, freedom, center, error))
    p = 2 * float(stats.t.sf(abs(center) / error, freedom))
    return Difference(center, n, sd, low, high, p)


def pool(parts: Sequence[Difference]) -> Difference:
    """Returns the mean over these data sets, equally weighted.

    Its error comes from the variation over seeds within each set, with degrees of freedom after
    Welch and Satterthwaite. ``sd`` is that of one pair on every data set.
    """
    center, n = mean(part.mean for part in parts), min(part.n for part in parts)
    if any(part.sd is None for part in parts):
        return Difference(center, n)
    squares = [part.sd**2 / part.n for part in parts if part.sd is not None]
    total = sum(squares)
    sd = sqrt(sum(part.sd**2 for part in parts if part.sd is not None)) / len(parts)
    if total == 0:
        return Difference(center, n, sd, center, center)
    freedom = total**2 / sum(
        square**2 / (part.n - 1) for square, part in zip(squares, parts, strict=True)
    )
    return _with_interval(center, n, sd, sqrt(total) / len(parts), freedom)


def compare(settings: Mapping[Setting, Runs], part: str) -> dict[Key, Difference]:
    """Returns every arm minus plain, by setting and, for several data sets, pooled.

    ``pools`` defines what is pooled. The p-values of a setting, measure and kind of images are
    adjusted for the number of arms.
    """
    found: dict[Key, Difference] = {}
    for setting, runs in settings.items():
        if "plain" not in runs:
            continue
        scores = {
            arm: {seed: values(result, part) for seed, result in done.items()}
            for arm, done in runs.items()
        }
        for arm in runs:
            seeds = sorted(set(scores[arm]) & set(scores["plain"]))
            if arm == "plain" or not seeds:
                continue
            for key in scores[arm][seeds[0]]:
                mine, plain = (
                    [scores[name][seed][key] for seed in seeds] for name in (arm, "plain")
                )
                found[(str(setting), arm, *key)] = difference(mine, plain)
    for name, members in pools(s for s in settings if "plain" in settings[s]).items():
        for key in dict.fromkeys(key[1:] for key in found if key[0] in members):
            parts = [found.get((member, *key)) for member in members]
            if all(parts):
                found[(name, *key)] = pool([part for part in parts if part])
    return adjust(found)


def pools(settings: Iterable[Setting]) -> dict[str, list[str]]:
    """Returns named groups of settings that differ only in their data set, to be pooled.

    The data sets of the confirmation form their own pool, since nothing was chosen on them.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for setting in settings:
        parts = [POOLED, "confirmation" if setting.dataset in CONFIRMED else ""]
        parts += ["from ImageNet" if setting.pretrained else "", setting.augmentation]
        groups[", ".join(part for part in parts if part and part != "flips")].append(str(setting))
    return {name: members for name, members in groups.items() if len(members) > 1}


def adjust(found: Mapping[Key, Difference]) -> dict[Key, Difference]:
    """Adjusts p-values over the arms of each setting, measure and kind of images.

    The method is Benjamini and Hochberg's, which controls the false discovery rate.
    """
    families: dict[tuple[str, str, str], list[Key]] = defaultdict(list)
    for key, one in found.items():
        if one.p is not None:
            families[key[0], key[2], key[3]].append(key)
    adjusted = dict(found)
    for keys in families.values():
        ps = stats.false_discovery_control([found[key].p for key in keys])
        for key, p in zip(keys, ps, strict=True):
            adjusted[key] = replace(found[key], p_adjusted=float(p))
    return adjusted
