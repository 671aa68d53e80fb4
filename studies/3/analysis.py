"""The differences of the third study: per cell, pooled over data sets, in other laboratories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from studies.common.contributions import classes_of, unpack
from studies.common.exams import by_family
from studies.common.statistics import (
    Effect,
    equivalence,
    holm,
    leave_one_out,
    over_seeds,
    over_seeds_and_images,
    random_effects,
)

from .arms import FIRST_CONFIRMING_SEED, LABORATORY_PAIRS, LITE0, TRAINING, Cell

Result = Mapping[str, Any]
Arms = dict[str, dict[int, Result]]  # arm -> seed -> result
MEASURES = {"AUROC": "auroc", "balanced accuracy": "balanced_error", "calibration error": "ece"}
BASELINES = ("plain", "channel noise", "channel dropout")
WAYS = ("as trained", "adapted")  # in another laboratory
MARGIN = 0.02  # of clean balanced accuracy
PRIMARY = (  # arm, baseline, augmentation, of the AUROC under corruption
    ("merging per image", "plain", "flips"),
    ("merging per image", "channel noise", "flips"),
    ("merging per image", "plain", "trivial"),
)


@dataclass(frozen=True)
class Group:
    """Runs that may be compared: one cell, one length and rate, of the choice or confirmation."""

    cell: Cell
    steps: int
    lr: float
    confirming: bool


def grouped(runs: Iterable[Result]) -> dict[Group, Arms]:
    """Groups runs by what must agree for a comparison.

    Raises:
        SystemExit: If a group holds two runs of an arm and seed.
    """
    groups: dict[Group, Arms] = defaultdict(lambda: defaultdict(dict))
    for result in runs:
        run = result["run"]
        cell = Cell(run["dataset"], run["train_images"], run["augmentation"], run["arch"])
        confirming = run["seed"] >= FIRST_CONFIRMING_SEED
        seeds = groups[Group(cell, run["steps"], run["lr"], confirming)][run["arm"]]
        if run["seed"] in seeds:
            raise SystemExit(f"{cell}: a second run of {run['arm']!r}, seed {run['seed']}")
        seeds[run["seed"]] = result
    return groups


def score(result: Result, part: str, measure: str, images: str) -> float:
    """Returns a measure of one run; ``images`` is clean, corrupted or a family."""
    value = by_family(result[part], MEASURES[measure])[images]
    return 1 - value if measure == "balanced accuracy" else value


def is_compared(arm: str, baseline: str) -> bool:
    """Returns whether arm minus baseline is a row; of two baselines, only one way round."""
    order = (*BASELINES, arm)
    return order.index(arm) > order.index(baseline)


def effect(arms: Arms, arm: str, baseline: str, measure: str, images: str) -> Effect | None:
    """Returns arm minus baseline on the test part; None with fewer than two pairs.

    The interval counts test images where their contributions are kept.
    """
    seeds = sorted(set(arms.get(arm, {})) & set(arms.get(baseline, {})))
    if len(seeds) < 2:
        return None
    pairs = [(arms[arm][seed], arms[baseline][seed]) for seed in seeds]
    if images in pairs[0][0]["contributions"].get(measure, {}):
        kept = [(a["contributions"], b["contributions"]) for a, b in pairs]
        return over_seeds_and_images(*_by_image(kept, measure, images))
    return over_seeds(
        [score(a, "test", measure, images) - score(b, "test", measure, images) for a, b in pairs]
    )


def _by_image(
    pairs: Sequence[tuple[Result, Result]], measure: str, images: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the contributions (pairs, images) to the difference, and the classes."""
    rows = [unpack(a[measure][images]) - unpack(b[measure][images]) for a, b in pairs]
    return np.stack(rows), classes_of(pairs[0][0])


def differences(groups: Mapping[Group, Arms]) -> list[dict[str, Any]]:
    """Returns a row for each group, arm, baseline and measure with two pairs or more."""
    rows = []
    for group, arms in groups.items():
        head = vars(group.cell) | {"steps": group.steps, "lr": group.lr}
        head |= {"confirmation": group.confirming}
        for baseline in BASELINES:
            for arm in arms:
                for measure in MEASURES if is_compared(arm, baseline) else ():
                    for images in ("clean", "corrupted"):
                        one = effect(arms, arm, baseline, measure, images)
                        if one:
                            rows.append(
                                head
                                | {"arm": arm, "baseline": baseline, "measure": measure}
                                | {"tested_on": images, "pairs": one.pairs, "mean": one.mean}
                                | {"low": one.low, "high": one.high}
                            )
    return rows


def training(groups: Mapping[Group, Arms]) -> list[dict[str, Any]]:
    """Returns a row for each length and rate of plain training: scores of the validation part.

    The length of an augmentation is chosen from these, by the rule of protocol.md.
    """
    rows = []
    for group, arms in groups.items():
        runs = [] if group.confirming else list(arms.get("plain", {}).values())
        scores = {
            f"{measure}, {images}": float(
                np.mean([score(run, "validation", measure, images) for run in runs])
            )
            for measure in ("AUROC", "balanced accuracy")
            for images in ("clean", "corrupted")
            if runs
        }
        if scores:
            head = vars(group.cell) | {"steps": group.steps, "lr": group.lr, "runs": len(runs)}
            rows.append(head | scores)
    return sorted(rows, key=lambda row: tuple(row.values())[:6])


def inside(groups: Mapping[Group, Arms]) -> list[dict[str, Any]]:
    """Returns a row for each run at the rate chosen: see :func:`studies.common.mechanism`.

    Beside it the AUROC under corruption, of which it may be the reason.
    """
    return [
        vars(group.cell)
        | {"steps": group.steps, "arm": arm, "seed": seed}
        | run["mechanism"]
        | {"AUROC, corrupted": score(run, "test", "AUROC", "corrupted")}
        for group, arms in groups.items()
        for arm, runs in arms.items()
        for seed, run in sorted(runs.items())
        if "mechanism" in run
        and not group.confirming
        and group.lr == TRAINING[group.cell.augmentation].lr
    ]


def chart(groups: Mapping[Group, Arms]) -> list[dict[str, Any]]:
    """Returns the map: a row for each cell of the choice that merging was trained in, too.

    Means over the seeds that both networks have, at the length of the augmentation.
    """
    rows = []
    for group, arms in groups.items():
        cell, length = group.cell, TRAINING[group.cell.augmentation]
        seeds = sorted(arms.get("merging per image", {}).keys() & arms.get("plain", {}).keys())
        if group.confirming or not seeds or (group.steps, group.lr) != (length.steps, length.lr):
            continue
        for measure, images in (("AUROC", "corrupted"), ("balanced accuracy", "clean")):
            plain, merging = (
                float(np.mean([score(arms[arm][seed], "test", measure, images) for seed in seeds]))
                for arm in ("plain", "merging per image")
            )
            rows.append(
                vars(cell)
                | {"steps": group.steps, "measure": measure, "tested_on": images}
                | {"pairs": len(seeds), "plain": plain, "merging": merging}
                | {"difference": merging - plain}
            )
    return sorted(rows, key=lambda row: tuple(row.values())[:6])


# -- the confirmation ------------------------------------------------------------------------------


def by_data_set(
    groups: Mapping[Group, Arms],
    arm: str,
    baseline: str,
    augmentation: str,
    measure: str,
    images: str,
) -> dict[str, Effect]:
    """Returns data set -> effect of the confirming cells of EfficientNet-lite0.

    BloodMNIST, on which was chosen, is left out, and so is a rate that was tried afterwards.
    """
    found = {}
    for group, arms in groups.items():
        cell, frozen = group.cell, TRAINING[augmentation].lr
        kind = cell.augmentation, cell.arch, group.lr
        if group.confirming and kind == (augmentation, LITE0, frozen):
            one = effect(arms, arm, baseline, measure, images)
            if one and cell.dataset != "bloodmnist":
                found[cell.dataset.removesuffix("mnist").capitalize()] = one
    return found


def pooled(groups: Mapping[Group, Arms]) -> list[dict[str, Any]]:
    """Returns pooled comparisons of the confirmation, with Holm's p for the primary family.

    A comparison of the family that has not been run counts as one that found nothing. A row needs
    two data sets; "no loss" is the equivalence test of clean balanced accuracy.
    """
    rows: list[dict[str, Any]] = []
    augmentations = sorted({g.cell.augmentation for g in groups if g.confirming})
    names = sorted({arm for g, arms in groups.items() if g.confirming for arm in arms})
    for augmentation in augmentations:
        for baseline in BASELINES:
            for arm in names:
                for measure in MEASURES if is_compared(arm, baseline) else ():
                    for images in ("clean", "corrupted"):
                        found = by_data_set(groups, arm, baseline, augmentation, measure, images)
                        if len(found) < 2:
                            continue
                        one = random_effects(list(found.values()))
                        head = {"arm": arm, "baseline": baseline, "augmentation": augmentation}
                        head |= {"measure": measure, "tested_on": images}
                        row = head | {"data": ", ".join(found)} | one.to_row()
                        if (measure, images) == ("balanced accuracy", "clean"):
                            level = equivalence(one, MARGIN)
                            row |= {"p_level": level["p"], "p_loss": level["loss"]}
                        rows.append(row)
                        if len(found) > 2:
                            rows += [
                                head | {"data": f"without {name}"} | other.to_row()
                                for name, other in leave_one_out(found).items()
                            ]
    family = {
        index: row["p"]
        for index, row in enumerate(rows)
        if (row["arm"], row["baseline"], row["augmentation"]) in PRIMARY
        and (row["measure"], row["tested_on"]) == ("AUROC", "corrupted")
        and not row["data"].startswith("without")
    }
    if family:
        left = {f"not run {number}": 1.0 for number in range(len(PRIMARY) - len(family))}
        adjusted = holm({str(index): p for index, p in family.items()} | left)
        for index in family:
            rows[index]["p_holm"] = adjusted[str(index)]
    return rows


def laboratories(groups: Mapping[Group, Arms]) -> list[dict[str, Any]]:
    """Returns the other laboratories' rows: the mean of each arm, and paired differences.

    A difference is of two arms, ``arm`` minus ``baseline``, or of one network before and after
    re-estimating BatchNorm: there ``way`` is ``adapted - as trained``. An arm has no rows before
    all its pairs have run.
    """
    rows = []
    for group, arms in groups.items():
        all_held = {
            arm: {seed: run["laboratories"] for seed, run in done.items() if "laboratories" in run}
            for arm, done in arms.items()
        }
        held = {arm: done for arm, done in all_held.items() if len(done) >= LABORATORY_PAIRS[arm]}
        runs = [run for done in held.values() for run in done.values()]
        names = dict.fromkeys(name for run in runs for name in run)
        for name, measure in product(names, ("balanced accuracy", "AUROC")):
            for found in _in_laboratory(held, name, measure):
                rows.append(vars(group.cell) | {"laboratory": name, "measure": measure} | found)
    return rows


def _in_laboratory(
    held: Mapping[str, Mapping[int, Result]], name: str, measure: str
) -> Iterator[dict[str, Any]]:
    def kept(arm: str, way: str) -> dict[int, Result]:
        return {seed: run[name][way]["contributions"] for seed, run in held[arm].items()}

    def difference(left: Mapping[int, Result], right: Mapping[int, Result]) -> dict[str, Any]:
        pairs = [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]
        one = over_seeds_and_images(*_by_image(pairs, measure, "clean"))
        return {"runs": one.pairs, "mean": one.mean, "low": one.low, "high": one.high}

    for arm in held:
        for way in WAYS:
            totals = [unpack(run[measure]["clean"]).sum() for run in kept(arm, way).values()]
            head = {"arm": arm, "baseline": "", "way": way}
            yield head | {"runs": len(totals), "mean": float(np.mean(totals))}
            for baseline in BASELINES:
                if baseline in held and is_compared(arm, baseline):
                    head = {"arm": arm, "baseline": baseline, "way": way}
                    yield head | difference(kept(arm, way), kept(baseline, way))
        head = {"arm": arm, "baseline": "", "way": f"{WAYS[1]} - {WAYS[0]}"}
        yield head | difference(kept(arm, WAYS[1]), kept(arm, WAYS[0]))
