"""Figures on the pages: each is that of a file which a study or a benchmark wrote."""

from __future__ import annotations

import csv
import importlib
import json
import re
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from studies.common.records import read_runs

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "studies"
ANALYSIS = importlib.import_module("studies.3.analysis")
PLACES = ("Jiangxi", "CellaVision")
CHANNELS = ("channel noise", "channel dropout")
FROZEN_RATE = ANALYSIS.TRAINING["trivial"].lr  # of the confirmation; another was tried later
LITE0, HOW = "tf_efficientnet_lite0", ("clean", "corrupted")
OTHER_ARMS = ("merging per step", "random erasing", "EMA", "DAMP")
MEASURES = (
    ("AUROC", "corrupted"),
    ("balanced accuracy", "corrupted"),
    ("balanced accuracy", "clean"),
)


def page_of(name: str) -> str:
    return (ROOT / name).read_text()


def words(text: str) -> str:
    """A text in one line, as a sentence is found in it."""
    return " ".join(text.split())


def table_of(study: str, name: str) -> list[dict[str, str]]:
    """The rows of a table that a study wrote."""
    with (STUDIES / study / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def written_lines() -> set[str]:
    """The lines of all tables that studies wrote."""
    return {
        line.strip()
        for path in (ROOT / "studies").rglob("*.md")
        for line in path.read_text().splitlines()
    }


@pytest.mark.parametrize("page", ["docs/evidence-negative.md", "recipes/README.md"])
def test_figures_with_a_spread_come_from_results_files(page: str) -> None:
    shown = [line for line in page_of(page).splitlines() if line.startswith("|") and "±" in line]
    assert len(shown) >= 4
    written = written_lines()
    assert [line for line in shown if line not in written] == []


def test_the_figures_of_the_performance_page_come_from_results_files() -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "overhead.py"))
    measured = [
        benchmark["markdown"](row)
        for path in (ROOT / "benchmarks" / "results" / "overhead").glob("*.json")
        for row in json.loads(path.read_text())["rows"]
    ]
    text = page_of("docs/performance.md")
    counting = runpy.run_path(str(ROOT / "benchmarks" / "launches.py"))
    stored = json.loads((ROOT / "benchmarks" / "results" / "launches.json").read_text())
    counted = [counting["markdown"](row) for row in stored["rows"]]
    assert [line for line in counted if line not in text.splitlines()] == []
    lines = [line for line in text.splitlines() if line.startswith("|") and " px |" in line]
    shown = [line for line in lines if line not in counted]
    assert bool(shown) == bool(measured)
    assert [line for line in shown if line not in measured] == []


def test_an_inspection_takes_as_long_as_the_performance_page_says() -> None:
    folder = ROOT / "benchmarks" / "results" / "overhead"
    steps = []
    for network in ("resnet18-28px", "resnet34-64px"):
        ratios = [
            row["quartiles"][1]
            for inspected in ("", "-inspected")  # in no step, and in each
            for row in json.loads((folder / f"cpu-{network}{inspected}.json").read_text())["rows"]
            if row["way"] == "after each step, every pair"
        ]
        steps.append(ratios[1] - ratios[0])
    page = words(page_of("docs/performance.md"))
    shown = "{:.1f} steps of ResNet-18 at 28 px and {:.1f} steps of ResNet-34".format(*steps)
    assert shown in page and max(steps) < 1.5


def test_the_two_phases_on_the_page_are_those_of_the_runs() -> None:
    page = page_of("docs/evidence-negative.md")
    readme = words(page_of("recipes/README.md"))
    plain: dict[str, list[float]] = {}
    done = [run for run in read_runs(STUDIES / "1" / "runs.jsonl.gz") if "arm" in run]
    for name, label in (
        ("paper", "merging with the paper's settings"),
        ("signed", "merging in the weights, signed"),
    ):
        runs = [run for run in done if run["arm"] == name]
        runs.sort(key=lambda run: run["seed"])
        assert [run["seed"] for run in runs] == list(range(10))
        merged = np.array([run["test_mean_auroc"] for run in runs])
        plain[name] = [run["control_test_mean_auroc"] for run in runs]
        difference = merged - plain[name]
        low, high = stats.t.interval(0.95, 9, difference.mean(), stats.sem(difference))
        said = f"{difference.mean():+.3f} ({low:+.3f} to {high:+.3f})"
        layers = [layer for run in runs for layer in run["merging"].values()]
        share = sum(layer["merged"] for layer in layers) / sum(layer["drawn"] for layer in layers)
        spread = f"{merged.mean():.3f} ({merged.std(ddof=1):.3f})"
        shown = f"{share:.1%}".replace("100.0%", "100%")
        assert f"| {label} | {shown} | {spread} | {said} |" in page
        assert said in readme
        if name == "signed":
            eight = "above the control in eight of ten pairs"
            assert eight in words(page) and (difference > 0).sum() == 8
        else:
            front = f"{said.replace('(', '(95% interval ')}, which is no gain".replace("+", "")
            text = words(page_of("README.md"))
            assert front in text.replace("+", "")
    assert plain["paper"] == plain["signed"]  # paired to the bit: only the second phase differs
    own = f"{np.mean(plain['paper']):.3f} ({np.std(plain['paper'], ddof=1):.3f})"
    assert f"| plain | | {own} | |" in page


def test_the_tables_of_the_first_study_are_made_from_the_runs_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = importlib.import_module("studies.1.report")
    monkeypatch.setattr(sys, "argv", ["report.py", "--out", str(tmp_path)])
    report.main()
    for name in ("table.md", "differences.csv"):
        assert (tmp_path / name).read_text() == (STUDIES / "1" / name).read_text()
    rows = shown_rows("docs/evidence-negative.md")
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len([row for row in rows if row in table]) > 5


def shown_rows(page: str) -> list[str]:
    """The rows of a page that hold intervals."""
    return re.findall(r"^\| .*\(\S+ to \S+\).*\|$", page_of(page), re.MULTILINE)


AUGMENTATIONS = {  # rows of a table of the page -> sections of the results
    "flips": "pooled, from ImageNet",
    "TrivialAugmentWide": "pooled, from ImageNet, trivial",
    "AugMix": "pooled, from ImageNet, augmix",
    "mixup": "pooled, from ImageNet, mixup",
}


def test_the_tables_of_the_second_study_are_made_from_the_runs_beside_them(tmp_path: Path) -> None:
    study = STUDIES / "2"
    report = importlib.import_module("studies.2.report")
    settings = report.by_setting(read_runs(study / "runs.jsonl.gz"))
    found = report.compare(settings, "test")
    report.write_csv(found, tmp_path / "differences.csv")
    assert (tmp_path / "differences.csv").read_text() == (study / "differences.csv").read_text()
    table = report.table(settings, found, "test")
    assert table == (study / "table.md").read_text()
    page = page_of("docs/evidence-negative.md")
    rows = [row for row in shown_rows("docs/evidence-negative.md") if re.search(r" \d+ \|$", row)]
    assert len(rows) > 10 and set(table.splitlines()).issuperset(rows)
    for name, setting in AUGMENTATIONS.items():
        section = table.partition(f"### {setting}\n")[2].partition("### ")[0]
        found = re.search(r"^\| merge in the weights, signed, size 0.3 (.*) \d", section, re.M)
        assert found and f"| {name} {found[1]}\n" in page


def test_the_answer_of_the_second_study_is_that_of_its_reanalysis() -> None:
    study = STUDIES / "2"
    module = importlib.import_module("studies.2.reanalysis")
    grouped = importlib.import_module("studies.2.paired").by_setting
    rows = module.reanalysis(grouped(read_runs(study / "runs.jsonl.gz")))
    written = module.reanalysis_table(rows)
    assert (study / "reanalysis.md").read_text() == written
    readme = (study / "README.md").read_text()
    shown = [line for line in readme.splitlines() if line.startswith("|") and " to " in line]
    assert len(shown) == 5 and set(shown) <= set(written.splitlines())


def interval(row: dict[str, str]) -> str:
    mean, low, high = (float(row[name]) for name in ("mean", "low", "high"))
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def in_pilot(row: dict[str, str]) -> bool:
    """Whether a row is of the third study's pilot: blood cells, 600 images, EfficientNet-lite0."""
    cell = ("bloodmnist", "600", "tf_efficientnet_lite0")
    return (row["dataset"], row["images"], row["arch"]) == cell


@cache
def third_groups() -> Any:
    """The runs of the third study, by what may be compared."""
    return ANALYSIS.grouped(read_runs(STUDIES / "3" / "runs.jsonl.gz"))


@cache
def third_study(table: str) -> list[dict[str, str]]:
    """The rows of a table of the third study, after they have been made again from its runs."""
    rows = table_of("3", table)
    for row, again in zip(rows, getattr(ANALYSIS, table)(third_groups()), strict=True):
        for name in ("mean", "low", "high"):
            stored = float(row[name]) if row[name] else None
            assert stored == pytest.approx(again.get(name), abs=1e-5)
    return rows


def test_the_pages_of_evidence_show_the_third_study_as_it_was_analysed() -> None:
    rows = third_study("differences")
    page = page_of("docs/evidence-negative.md").partition("## The pilot")[2]
    parts = page.partition("### After fewer steps")
    fewer = parts[2].partition("\n### ")[0]
    for steps, part in (("300", fewer), ("600", parts[0])):
        measured = {
            tuple(row[name] for name in ("arm", "baseline", "measure", "tested_on")): row
            for row in rows
            if (row["augmentation"], row["steps"]) == ("flips", steps)
            and in_pilot(row)
            and row["confirmation"] == "False"
        }
        shown = re.findall(r"^\| (.+) − (.+) \| (\d+) \| (.+) \|$", part, re.MULTILINE)
        assert len(shown) == 5
        for arm, baseline, pairs, cells in shown:
            names = arm.replace("for each image", "per image"), baseline
            found = [measured[(*names, *measure)] for measure in MEASURES]
            assert {row["pairs"] for row in found} == {pairs}
            assert cells == " | ".join(interval(row) for row in found)
    confirmed = {
        (row["arm"], row["measure"], row["tested_on"]): row
        for row in rows
        if (row["baseline"], row["confirmation"]) == ("plain", "True")
        and row["dataset"] == "bloodmnist"
    }
    part = page_of("docs/evidence.md").partition("### The same networks")[2]
    shown = [line for line in part.partition("\n## ")[0].splitlines() if line.startswith("|")][2:]
    for line, arm in zip(shown, ("merging per image", *CHANNELS), strict=True):
        cells = [interval(confirmed[(arm, *measure)]) for measure in MEASURES]
        assert line == f"| {arm.replace('per image', 'for each image')} | {' | '.join(cells)} |"


def test_the_page_shows_the_network_from_scratch_as_it_was_analysed() -> None:
    page = page_of("docs/evidence-negative.md").partition("## From scratch")[2]
    shown = re.findall(r"^\| (.+) − (.+) \| (\d+) \| (.+) \|$", page, re.MULTILINE)
    assert len(shown) == 3
    names = ("arm", "baseline", "measure", "tested_on", "arch", "pairs")
    measured = {tuple(row[name] for name in names): row for row in third_study("differences")}
    for arm, baseline, pairs, cells in shown:
        pair = arm.replace("for each image", "per image"), baseline
        found = [measured[(*pair, *measure, "resnet18", pairs)] for measure in MEASURES]
        assert cells == " | ".join(interval(row) for row in found)


def test_the_page_shows_the_volumes_as_they_were_analysed() -> None:
    page = page_of("docs/evidence-negative.md").partition("### Volumes")[2]
    shown = re.findall(r"^\| (\d+), (.+) \| (\d+) \| (.+) \|$", page, re.MULTILINE)
    names = ("images", "augmentation", "pairs", "arm", "baseline", "measure", "tested_on")
    measured = {
        tuple(row[name] for name in names): row
        for row in third_study("differences")
        if row["arch"] == "volumes_small"
    }
    assert len(shown) == 4
    gains = []
    for images, augmentation, pairs, cells in shown:
        cell = images, {"no augmentation": "none"}.get(augmentation, augmentation), pairs
        found = [
            measured[(*cell, arm, "plain", *measure)]
            for arm, measure in (
                ("merging per image", MEASURES[0]),
                ("channel noise", MEASURES[0]),
                ("merging per image", MEASURES[2]),
            )
        ]
        assert cells == " | ".join(interval(row) for row in found)
        gains.append(float(found[0]["mean"]))
        assert all(float(row["low"]) < 0 < float(row["high"]) for row in found)
    ends = f"three pairs in each of four cells: {min(gains):+.3f} to {max(gains):+.3f}, none"
    assert ends in words(page_of("docs/evidence.md"))


def pooled_over_all(augmentation: str) -> dict[tuple[str, ...], dict[str, str]]:
    return {
        tuple(row[name] for name in ("arm", "baseline", "measure", "tested_on")): row
        for row in third_study("pooled")
        if row["augmentation"] == augmentation and not row["data"].startswith("without")
    }


PAGE_NAMES = {
    "merging for each image": "merging per image",
    "merging in the weights": "merging per step",
}

CONFIRMED = {  # augmentation -> where the page has it, up to what, and what was compared
    "flips": (
        "## On three other data sets",
        "\n### ",
        [
            ("merging per image", "plain"),
            ("channel noise", "plain"),
            ("merging per image", "channel noise"),
        ],
    ),
    "trivial": ("### On top of TrivialAugmentWide", "\n##", [("merging per image", "plain")]),
}


@pytest.mark.parametrize("augmentation", list(CONFIRMED))
def test_the_page_of_evidence_shows_the_confirmation_as_it_was_pooled(augmentation: str) -> None:
    begin, end, compared = CONFIRMED[augmentation]
    found = pooled_over_all(augmentation)
    page = page_of("docs/evidence.md").partition(begin)[2].partition(end)[0]
    shown = [line for line in page.splitlines() if line.startswith("| ")][1:]
    plain = {
        group.cell.dataset.removesuffix("mnist").capitalize(): list(arms["plain"].values())
        for group, arms in third_groups().items()
        if (group.confirming, group.cell.augmentation, group.lr)
        == (True, augmentation, FROZEN_RATE)
    }
    wanted = []
    for name in ("Breast", "Chest", "Pneumonia"):
        values = [
            [ANALYSIS.score(run, "test", *measure) for run in plain[name]] for measure in MEASURES
        ]
        cells = [f"{np.mean(of):.3f} ± {np.std(of, ddof=1):.3f}" for of in values]
        wanted.append(f"| plain, {name} | {' | '.join(cells)} |")
    for arm, baseline in compared:
        cells = [interval(found[(arm, baseline, *measure)]) for measure in MEASURES]
        name = f"{arm} − {baseline}".replace("per image", "for each image")
        wanted.append(f"| {name} | {' | '.join(cells)} |")
    assert shown == wanted
    gain = found[("merging per image", "plain", *MEASURES[0])]
    text = words(page)
    assert f"p is {float(gain['p_holm']):.2f}" in text
    wide = "{:+.3f} to {:+.3f}".format(*(float(gain[end]) for end in ("wide_low", "wide_high")))
    assert wide in text
    level = found[("merging per image", "plain", "balanced accuracy", "clean")]
    assert f"p = {float(level['p_loss']):.2f}" in text
    text = words(page_of("README.md")).replace("95% interval ", "")
    assert interval(gain).replace("+", "") in text.replace("+", "")


OTHERS = ("channel dropout", *OTHER_ARMS)
LEFT = {  # augmentation -> where the page has the arms that were left, pairs, and what was compared
    "flips": (
        "### The other arms\n",
        ("4", "four"),
        [*((arm, "plain") for arm in OTHERS), ("merging per image", "channel dropout")],
    ),
    "trivial": (
        "### The other arms on top of TrivialAugmentWide\n",
        ("2", "two"),
        [
            *((arm, "plain") for arm in ("channel noise", *OTHERS)),
            *(("merging per image", arm) for arm in CHANNELS),
        ],
    ),
}


@pytest.mark.parametrize("augmentation", list(LEFT))
def test_the_page_of_evidence_shows_the_arms_that_were_left_as_they_were_pooled(
    augmentation: str,
) -> None:
    heading, (number, word), compared = LEFT[augmentation]
    found = pooled_over_all(augmentation)
    page = page_of("docs/evidence.md").partition(heading)[2].partition("\n##")[0]
    shown = re.findall(r"^\| (.+) − (.+) \| (.+\|.+\|.+) \|$", page, re.M)
    assert [(PAGE_NAMES.get(arm, arm), baseline) for arm, baseline, _ in shown] == compared
    for arm, baseline, cells in shown:
        rows = [found[(PAGE_NAMES.get(arm, arm), baseline, *of)] for of in MEASURES]
        assert cells == " | ".join(map(interval, rows))
    pairs = {
        row["pairs"]
        for row in third_study("differences")
        if row["confirmation"] == "True" and row["dataset"] != "bloodmnist"
        if row["augmentation"] == augmentation and float(row["lr"]) == FROZEN_RATE
        if row["arm"] in OTHER_ARMS and row["baseline"] == "plain"
    }
    assert pairs == {number} and f"{word} pairs of seeds on each" in words(page)


def test_the_page_of_evidence_says_what_the_arms_with_flips_found() -> None:
    found = pooled_over_all("flips")
    page = page_of("docs/evidence.md").partition("### The other arms\n")[2].partition("\n##")[0]
    # The pages on which the second study's gain stands beside this one.
    weights_alone = interval(found[("merging per step", "plain", *MEASURES[0])])
    for name in ("README.md", "docs/evidence.md"):
        lines = page_of(name).partition("## Merging in the weights")
        shown = lines[2] if name == "docs/evidence.md" else lines[0]
        assert weights_alone.replace("+", "") in words(shown).replace("+", "")
    text = words(page)
    losses = [float(found[(arm, "plain", *MEASURES[2])]["p_loss"]) for arm in OTHERS]
    dropout, weights, erasing, *others = losses
    assert erasing < 0.001 and f"not for channel dropout ({dropout:.2f})" in text
    for loss in (weights, *others):
        assert loss < 0.05 and f"({loss:.3f})" in text


def test_the_page_of_evidence_says_what_the_arms_with_trivial_augmentation_found() -> None:
    """And README.md that none of them gained."""
    found = pooled_over_all("trivial")
    heading, _, compared = LEFT["trivial"]
    text = words(page_of("docs/evidence.md").partition(heading)[2].partition("\n##")[0])
    rows = [found[(*pair, *MEASURES[0])] for pair in compared]
    assert all(float(row["low"]) < 0 < float(row["high"]) for row in rows)
    highest = max(rows, key=lambda row: float(row["mean"]))
    assert highest["arm"] == "random erasing" and f"{float(highest['mean']):+.3f}." in text
    lost = [found[(arm, "plain", *MEASURES[2])] for arm in CHANNELS]
    assert all(float(row["high"]) < 0 for row in lost)
    noise, dropout = (-float(row["mean"]) for row in lost)
    assert f"channel noise and channel dropout lost {noise:.3f} and {dropout:.3f} of" in text
    kept = sorted(float(found[(arm, "plain", *MEASURES[2])]["mean"]) for arm in OTHER_ARMS)
    assert f"other four changed it by {kept[0]:.3f} to {kept[-1]:+.3f}." in text


def test_the_page_of_evidence_says_what_a_better_rate_and_more_steps_gave() -> None:
    text = words(page_of("docs/evidence.md"))
    wanted = ("breastmnist", "chest", "pneumoniamnist")
    tried = {g.cell.dataset: arms for g, arms in third_groups().items() if g.lr == 0.04}
    assert tried.keys() == {"bloodmnist", *wanted}
    levels = []
    for name in wanted:
        scores = [
            ANALYSIS.score(run, "test", *MEASURES[0]) for run in tried[name]["plain"].values()
        ]
        levels.append(f"{np.mean(scores):.3f}")
    assert "reached {} (Breast), {} (Chest) and {} (Pneumonia)".format(*levels) in text
    rows = {
        row["dataset"]: row
        for row in third_study("differences")
        if (float(row["lr"]), row["confirmation"]) == (0.04, "True")
        and (row["measure"], row["tested_on"]) == MEASURES[0]
    }
    assert {row["pairs"] for row in rows.values()} == {"2"}
    assert all(float(row["low"]) < 0 < float(row["high"]) for row in rows.values())
    found = [f"{float(rows[name]['mean']):+.3f}" for name in wanted]
    assert "merging differed from it by {}, {} and {}.".format(*found) in text
    steps = {
        (row["augmentation"], row["steps"]): [float(row[f"AUROC, {on}"]) for on in HOW]
        for row in table_of("3", "training")
        if (row["dataset"], row["images"], row["arch"]) == ("bloodmnist", "600", LITE0)
        and float(row["lr"]) == FROZEN_RATE
    }
    longer = [
        after - before
        for (augmentation, length), scores in steps.items()
        if length == str(ANALYSIS.TRAINING[augmentation].steps) != "1500"
        for before, after in zip(scores, steps[augmentation, "1500"], strict=True)
    ]
    assert len(longer) == 10
    assert f"clean and corrupted, by {min(longer):+.3f} to {max(longer):+.3f} (" in text


def test_plain_training_with_strong_augmentation_is_above_merging_with_flips() -> None:
    """As the page says, on each data set of the confirmation."""
    means: dict[tuple[str, str, str], float] = {}
    for group, arms in third_groups().items():
        for arm, runs in arms.items() if group.confirming and group.lr == FROZEN_RATE else ():
            scores = [ANALYSIS.score(run, "test", *MEASURES[0]) for run in runs.values()]
            means[group.cell.dataset, group.cell.augmentation, arm] = float(np.mean(scores))
    for name in ("breastmnist", "chest", "pneumoniamnist"):
        assert means[name, "trivial", "plain"] > means[name, "flips", "merging per image"]


def test_the_page_of_evidence_shows_the_map_as_it_was_measured() -> None:
    rows = [row for row in table_of("3", "map") if row["arch"] == "tf_efficientnet_lite0"]
    made = [row for row in ANALYSIS.chart(third_groups()) if row["arch"] == rows[0]["arch"]]
    for row, again in zip(rows, made, strict=True):
        for name in ("plain", "merging", "difference"):
            assert float(row[name]) == pytest.approx(again[name], abs=1e-5)
    cells = {
        (row["dataset"], row["augmentation"], int(row["images"]), row["measure"]): [
            float(row[name]) for name in ("plain", "merging", "difference")
        ]
        for row in rows
    }
    names = runpy.run_path(str(ROOT / "docs" / ".diagram.py"))["AUGMENTATIONS"]
    page = page_of("docs/evidence.md").partition("## On top of which")[2]
    page = page.partition("\n## ")[0]
    shown = [line for line in page.splitlines() if line.startswith("|")][2:]

    def in_order(of: str, augmentation: str, place: int, sign: str) -> str:
        every = [cells[of, augmentation, n, "AUROC"] for n in (150, 600, 2400)]
        return ", ".join(f"{cell[place]:{sign}.3f}" for cell in every)

    for line, (augmentation, named) in zip(shown, names.items(), strict=True):
        both = [
            in_order(of, augmentation, place, sign)
            for of in ("bloodmnist", "dermamnist")
            for place, sign in ((0, ""), (2, "+"))
        ]
        assert line == f"| {named} | {' | '.join(both)} |"

    def gains(
        *augmentations: str, on: str = "blood", measure: str = "AUROC", images: int | None = None
    ) -> list[float]:
        return sorted(
            gain
            for (of, augmentation, n, of_measure), (*_, gain) in cells.items()
            if of.startswith(on) and augmentation in augmentations and of_measure == measure
            if images in (None, n)
        )

    said = words(page)
    *most, second, first = gains("trivial", "trivial and jitter", on="")
    assert [second, first] == gains("trivial", "trivial and jitter", on="derma", images=150)
    ends = f"{most[0]:.3f} and {most[-1]:+.3f}. The other two, {second:+.3f} and {first:+.3f}"
    assert len(most) == 10 and f"ten of the twelve differences lie between {ends}," in said
    low, *_, high = gains("flips")
    assert f"{low:.3f} to {high:.3f} with flips" in said
    low, *_, high = gains("noise and blur")
    assert f"{low:.3f} to {high:.3f} with noise and blur" in said
    low, *_, high = gains("augmix")
    assert f"{low:.3f} to {high:.3f} with AugMix" in said
    low, middle, high = gains("none")
    assert f"{high:.3f} with 150 images, but {low:.3f} and {middle:.3f} with more" in said
    assert cells["bloodmnist", "none", 150, "AUROC"][2] == high
    weak = gains("none", "flips", "noise and blur", "augmix", on="derma")
    gained = [gain for gain in weak if gain > 0]
    assert (len(gained), len(weak)) == (8, 12)
    assert f"on top of weaker augmentation, by {gained[0]:.3f} to {gained[-1]:.3f}." in said
    lost = gains("flips", on="derma")
    assert f"**lost {-lost[0]:.3f} and {-lost[1]:.3f} with flips** and 600 or 2,400" in said
    ends = (-gains(one, on="derma")[0] for one in ("augmix", "noise and blur"))
    assert (
        "{:.3f} with AugMix and 2,400, and {:.3f} with noise and blur and 150".format(*ends) in said
    )
    pairs = {name: {row["pairs"] for row in rows if row["augmentation"] == name} for name in names}
    assert pairs.pop("flips") == {"2", "5"} and pairs.pop("augmix") == {"1"}
    assert pairs.pop("trivial and jitter") == {"1"} and [*pairs.values()] == [{"2"}] * 3
    for (of, augmentation, images, measure), (plain, *_) in cells.items():
        if measure == "AUROC" and augmentation in ("noise and blur", "augmix", "trivial"):
            assert plain > cells[of, "flips", images, "AUROC"][1]
    many = gains(*names, on="", measure="balanced accuracy", images=2400)
    fell = f"fell in each of twelve cells, by {-many[-1]:.3f} to {-many[0]:.3f}."
    assert len(many) == 12 and many[-1] < 0 and fell in said
    clean = gains(*names, on="", measure="balanced accuracy")
    below = sum(gain < 0 for gain in clean)
    assert f"below plain training in {below} of {len(clean)}, and changed by" in said
    assert f"changed by {clean[0]:.3f} to {clean[-1]:+.3f}." in said
    front = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", page_of("README.md"))
    assert f"corruption changed by {most[0]:.3f} to {first:+.3f} in twelve cells" in front
    assert fell.replace("cells", "cells of the map").rstrip(".") in front


def test_the_second_pairs_of_the_map_agree_where_the_page_says_so() -> None:
    found = {}
    for group, arms in third_groups().items():
        cell, length = group.cell, ANALYSIS.TRAINING[group.cell.augmentation]
        is_usual = (group.steps, group.lr) == (length.steps, length.lr) and not group.confirming
        merged, plain = (arms.get(arm, {}) for arm in ("merging per image", "plain"))
        if is_usual and cell.arch == "tf_efficientnet_lite0" and len(merged) > 1:
            gains = (
                ANALYSIS.score(merged[seed], "test", *MEASURES[0])
                - ANALYSIS.score(plain[seed], "test", *MEASURES[0])
                for seed in merged
            )
            found[cell.augmentation, cell.dataset, cell.images] = np.sign([*gains])
    for data in ("bloodmnist", "dermamnist"):
        for count in (150, 600, 2400):
            assert (found["none", data, count] > 0).all()
            lost = data == "dermamnist" and count != 150
            assert (found["flips", data, count] == (-1 if lost else 1)).all()


def test_the_page_of_evidence_shows_the_pairs_of_larger_networks() -> None:
    gains = []
    for arch, pairs in (("tf_efficientnet_lite1", 2), ("tf_efficientnet_lite2", 1)):
        (arms,) = [a for g, a in third_groups().items() if g.cell.arch == arch]
        assert {len(runs) for runs in arms.values()} == {pairs}
        means = {
            arm: np.mean([ANALYSIS.score(run, "test", *MEASURES[0]) for run in runs.values()])
            for arm, runs in arms.items()
        }
        gains += [means[arm] - means["plain"] for arm in ("merging per image", "channel noise")]
    said = (
        "in two pairs, merging gained {:.3f} and channel noise {:.3f}; with EfficientNet-lite2, in"
    )
    said += " one pair, {:.3f} and {:.3f}."
    assert said.format(*gains) in words(page_of("docs/evidence.md"))
    of_two = [row for row in third_study("differences") if row["arch"] == "tf_efficientnet_lite1"]
    found = [row for row in of_two if (row["baseline"], row["tested_on"]) == ("plain", "corrupted")]
    assert all(
        float(row["low"]) < 0 < float(row["high"]) for row in found if row["measure"] == "AUROC"
    )


def test_the_page_of_evidence_shows_the_other_laboratories_as_they_were_analysed() -> None:
    rows = third_study("laboratories")
    names = ("measure", "arm", "baseline", "laboratory", "way")
    found = {tuple(row[name] for name in names): row for row in rows}
    assert {row["runs"] for row in rows if row["arm"] not in OTHER_ARMS} == {"10"}
    places = [(place, way) for place in PLACES for way in ("as trained", "adapted")]
    page = page_of("docs/evidence.md").partition("## In another laboratory")[2]
    page = page.partition("\n## ")[0]
    parts = page.partition("\n### ")[0].split("\n\n")
    tables = [part.splitlines()[2:] for part in parts if part.startswith("|")]
    for measure, table in zip(("balanced accuracy", "AUROC"), tables, strict=True):
        means = [float(found[(measure, "plain", "", *place)]["mean"]) for place in places]
        assert table[0] == f"| plain | {' | '.join(f'{mean:.3f}' for mean in means)} |"
        wanted = [(arm, "plain") for arm in ("merging per image", *CHANNELS)]
        wanted += [("merging per image", arm) for arm in CHANNELS]
        for line, pair in zip(table[1:], wanted, strict=True):
            cells = [interval(found[(measure, *pair, *place)]) for place in places]
            name = " − ".join(pair).replace("per image", "for each image")
            assert line == f"| {name} | {' | '.join(cells)} |"
    merging, noise = (
        [
            interval(found["balanced accuracy", arm, "plain", place, "as trained"])
            for place in PLACES
        ]
        for arm in ("merging per image", "channel noise")
    )
    adapting = [
        interval(found["balanced accuracy", "plain", "", place, "adapted - as trained"])
        for place in PLACES
    ]
    text = words(page)
    assert f"{adapting[0]} of plain training" in text and f"it gave {adapting[1]}, which" in text
    first, second = (gain.split()[0] for gain in noise)
    gain, auroc = (
        found[measure, "merging per image", "plain", "Jiangxi", "as trained"]
        for measure in ("balanced accuracy", "AUROC")
    )
    assert f"by {float(gain['mean']):.3f} and {float(auroc['mean']):.3f}" in text
    text = words(page_of("README.md")).replace("95% interval ", "")
    assert f"{merging[0]} and {merging[1]}. Channel noise: {first} and {second} (" in text
    plain = found["balanced accuracy", "plain", "", "Jiangxi", "as trained"]
    gain = merging[0].replace("+", "").rstrip(")")
    lead = f"from {float(plain['mean']):.3f}, where chance is 0.25, by {gain}, one of several"
    assert f"{lead} comparisons), and channel noise by {first[1:]};" in text
    assert f"raised the balanced accuracy of plain training by {adapting[0].split()[0][1:]}" in text


def test_the_page_of_evidence_shows_the_other_arms_in_the_laboratories() -> None:
    rows = [row for row in third_study("laboratories") if row["arm"] in OTHER_ARMS]
    assert {row["runs"] for row in rows} == {"5"}
    names = ("measure", "arm", "baseline", "laboratory", "way")
    found = {tuple(row[name] for name in names): row for row in rows}
    page = page_of("docs/evidence.md")
    page = page.partition("### The other arms in the laboratories")[2].partition("\n### ")[0]
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]
    for table, measure in zip(tables, ("balanced accuracy", "AUROC"), strict=True):
        assert table[0].startswith(f"| {measure} | Jiangxi, as trained |")
        for line, arm in zip(table[2:], OTHER_ARMS, strict=True):
            shown = [
                found[measure, arm, "plain", place, way]
                for place in PLACES
                for way in ("as trained", "adapted")
            ]
            assert all(float(row["low"]) < 0 < float(row["high"]) for row in shown)
            name = "merging in the weights" if arm == "merging per step" else arm
            assert line == f"| {name} − plain | {' | '.join(map(interval, shown))} |"
            if measure == "balanced accuracy":
                assert float(shown[0]["high"]) > 0.1
    adapting = sorted(
        float(found["balanced accuracy", arm, "", "Jiangxi", "adapted - as trained"]["mean"])
        for arm in OTHER_ARMS
    )
    said = f"Adapting gave them {adapting[0]:.3f} to {adapting[-1]:.3f} of balanced accuracy there"
    assert said in words(page)


def test_the_means_inside_the_networks_are_those_of_the_table() -> None:
    rows = table_of("3", "mechanism")
    columns = ("moved_by_mixing", "channel_correlation", "cka_under_noise")
    for row, again in zip(rows, ANALYSIS.inside(third_groups()), strict=True):
        for name in (*columns, "AUROC, corrupted"):
            assert float(row[name]) == pytest.approx(again[name], abs=1e-5)
    pilot = [row for row in rows if in_pilot(row)]
    runs = [row for row in pilot if (row["augmentation"], row["steps"]) == ("flips", "600")]
    page = page_of("docs/evidence-negative.md").partition("### Inside")[2]
    lines = page.partition("|---")[2].partition("\n\n")[0].splitlines()[1:]
    arms = ("plain", "merging per image", "channel noise", "channel dropout")
    for line, column in zip(lines, columns, strict=True):
        values = [[float(row[column]) for row in runs if row["arm"] == arm] for arm in arms]
        assert {len(of) for of in values} == {5}
        means = [f"{np.mean(of):.3f}" for of in values]
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == means


def test_the_page_of_evidence_shows_the_second_study_as_it_was_analysed() -> None:
    study = STUDIES / "2"
    rows = [row for row in table_of("2", "reanalysis") if row["data"] == "all"]
    found = {
        (row["arm"], row["baseline"], row["measure"], row["images"]): interval(row) for row in rows
    }
    page = page_of("docs/evidence.md")
    for label, *arms in (
        ("merging in the weights − plain", "transient, signed 0.3", "plain"),
        ("Gaussian noise − plain", "Gaussian noise 0.3", "plain"),
        ("weight averaging (EMA) − plain", "EMA .98", "plain"),
        ("merging in the weights − Gaussian noise", "transient, signed 0.3", "Gaussian noise 0.3"),
    ):
        cells = [found[(*arms, *measure)] for measure in MEASURES]
        assert f"| {label} | {' | '.join(cells)} |" in page
    wide = {
        row["arm"]: "{:+.3f} to {:+.3f}".format(*(float(row[x]) for x in ("wide_low", "wide_high")))
        for row in rows
        if (row["baseline"], row["measure"], row["images"]) == ("plain", *MEASURES[0])
    }
    limits = words(page.partition("## Limits")[2])
    assert (
        f"{wide['transient, signed 0.3']} for merging minus plain, and"
        f" {wide['Gaussian noise 0.3']} for Gaussian noise minus plain"
    ) in limits
    assert f"last row, {cells[1]}, says little" in limits
    table = (study / "table.md").read_text()
    for name in ("Breast", "Chest", "Pneumonia"):
        section = table.partition(f"### {name}, from ImageNet\n")[2].partition("### ")[0]
        cell = r"(\S+ ± \S+)"
        (clean, corrupted), (auroc, _) = re.findall(
            rf"^\| plain training \| {cell} \| {cell} \|", section, re.MULTILINE
        )[:2]
        assert f"| plain, {name} | {auroc} | {corrupted} | {clean} |" in page
    said = [found[(arm, "plain", "AUROC", "corrupted")] for arm in ("transient, signed 0.3",
        "Gaussian noise 0.3")]  # fmt: skip
    gain = said[0].replace("+", "").rstrip(")")
    adjusted = f"p = {re.findall('p is ([0-9.]+[0-9])', page)[-1]} after adjustment"
    for front_page in ("README.md", "docs/evidence.md"):
        text = words(page_of(front_page)).replace("95% interval ", "")
        assert adjusted in text
        assert f"by {gain}" in text and f"size gave {said[1].split()[0].replace('+', '')}" in text
