"""Statistics, contributions and records of the studies against scipy, scikit-learn, statsmodels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from statsmodels.stats.meta_analysis import combine_effects

from studies.common.contributions import (
    classes_of,
    contributions,
    of_auroc,
    of_balanced_accuracy,
    unpack,
)
from studies.common.exams import FAMILIES
from studies.common.records import add_runs, name_of, read_runs, write_runs
from studies.common.statistics import (
    Effect,
    Pooled,
    equivalence,
    holm,
    leave_one_out,
    over_seeds,
    over_seeds_and_images,
    random_effects,
)


def effects(means: list[float], error: float = 0.01) -> list[Effect]:
    return [Effect(mean, error**2, 0.0, 0.0, 10) for mean in means]


def test_over_seeds_is_the_paired_t_test() -> None:
    values = np.random.default_rng(0).normal(0.02, 0.03, 9)
    one, test = over_seeds(list(values)), stats.ttest_1samp(values, 0)
    assert [one.low, one.high] == pytest.approx(list(test.confidence_interval(0.95)))
    assert one.variance == pytest.approx(values.var(ddof=1) / 9) and one.pairs == 9
    with pytest.raises(ValueError, match="two pairs or more, got 1"):
        over_seeds([0.1])


def test_seeds_and_images_both_count() -> None:
    """Crossed effects of known size: the variance of the mean is the sum of both parts."""
    generator = np.random.default_rng(1)
    seeds, images = 30, 300
    of_seeds, of_images = generator.normal(0, 1, (seeds, 1)), generator.normal(0, 4, (1, images))
    both = (of_seeds + of_images) / images
    strata = np.zeros(images, dtype=int)
    expected = of_seeds.var(ddof=1) / seeds + of_images.var() / images
    assert over_seeds_and_images(both, strata).variance == pytest.approx(expected, rel=0.08)
    alone = np.repeat(of_seeds, images, 1) / images
    one = over_seeds_and_images(alone, strata)
    assert one.variance == pytest.approx(of_seeds.var(ddof=1) / seeds, rel=0.08)
    assert one.mean == pytest.approx(of_seeds.mean())
    t = stats.ttest_1samp(of_seeds.ravel(), 0).confidence_interval(0.95)
    assert [one.low, one.high] == pytest.approx(list(t), rel=0.08)
    two = over_seeds_and_images(alone[:2], strata)
    assert two.variance == pytest.approx(of_seeds[:2].var(ddof=1) / 2, rel=0.08)
    # Images are drawn within their class: a difference between classes is no noise.
    classes = np.arange(images) % 2
    assert (
        over_seeds_and_images(np.where(classes, 1.0, -1.0)[None].repeat(4, 0), classes).variance
        == 0
    )


def test_random_effects_are_those_of_statsmodels_and_never_below_zero() -> None:
    parts = effects([0.0, 0.05, 0.1, -0.04])
    one = random_effects(parts)
    means = np.array([part.mean for part in parts])
    found = combine_effects(means, np.full(4, 1e-4), method_re="chi2", use_t=True)
    assert found.tau2 > 0
    reach = found.sd_eff_w_re_hksj * stats.t.ppf(0.975, 3)
    assert [one.mean, one.low, one.high] == pytest.approx(
        [found.mean_effect_re, found.mean_effect_re - reach, found.mean_effect_re + reach]
    )
    assert one.i2 == pytest.approx(found.i2)
    same = random_effects(effects([0.011, 0.010, 0.0105]))
    assert same.i2 == 0 and same.mean == pytest.approx(0.0105)
    # By chance the sets agree: the usual error of a mean of three is the wider one.
    assert same.high - same.mean < same.wide_high - same.mean
    assert same.wide_high - same.mean == pytest.approx(stats.t.ppf(0.975, 2) * 0.01 / 3**0.5)
    without = leave_one_out(dict(zip("abcd", parts, strict=True)))
    assert without["c"] == random_effects([parts[0], parts[1], parts[3]])


def test_holm_and_equivalence() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    values = np.random.default_rng(3).normal(0.004, 0.02, 12)
    one = Pooled(values.mean(), 0, 0, 0, 0, float(stats.sem(values)), 11, 0, 0)
    found = equivalence(one, 0.02)
    above = stats.ttest_1samp(values, -0.02, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.02, alternative="less").pvalue
    assert found == pytest.approx({"loss": above, "p": max(above, below)})
    with pytest.raises(ValueError, match="margin must be positive"):
        equivalence(one, 0.0)


# -- contributions ---------------------------------------------------------------------------------


def answers(task: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(120, 4, generator=generator).round(decimals=1)  # with ties
    labels = torch.arange(120) % 3 if task == "multiclass" else (logits + 1 > 0).float()
    if task == "multiclass":
        logits += torch.nn.functional.one_hot(labels, 4)
        logits[:, 3] -= 9  # never said, as no image shows it
    else:
        labels = (logits + torch.randn(120, 4, generator=generator) > 0).float()
    return logits, labels, torch.rand(120, generator=generator) + 0.5


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_contributions_sum_to_the_scores_of_scikit_learn(task: str) -> None:
    logits, labels, weights = answers(task)
    if task == "multiclass":
        truths = np.eye(4)[labels]
        scores = logits.double().softmax(1).numpy()
        expected = balanced_accuracy_score(labels, logits.argmax(1), sample_weight=weights)
    else:
        truths, scores = labels.numpy(), logits.double().sigmoid().numpy()
        expected = np.mean(
            [
                balanced_accuracy_score(t, s > 0.5, sample_weight=weights)
                for t, s in zip(truths.T, scores.T, strict=True)
            ]
        )
    assert of_balanced_accuracy(logits, labels, weights, task).sum() == pytest.approx(expected)
    area = np.mean(
        [
            roc_auc_score(t, s, sample_weight=weights)
            for t, s in zip(truths.T, scores.T, strict=True)
            if 0 < t.sum() < len(t)  # no image shows the fourth class of the first task
        ]
    )
    assert of_auroc(logits, labels, weights, task).sum() == pytest.approx(area)


def test_the_interval_of_an_auroc_is_that_of_a_bootstrap_of_itself() -> None:
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(np.repeat([0, 1], 150))
    logits = torch.zeros(300, 2)
    logits[:, 1] = torch.from_numpy(generator.normal(labels.numpy() * 1.2, 1.0)).float()
    ones = torch.ones(300)
    parts = of_auroc(logits, labels, ones, "multiclass")
    linear = over_seeds_and_images(np.stack([parts] * 50), labels.numpy()).variance ** 0.5
    drawn = []
    for _ in range(600):
        rows = np.concatenate([generator.integers(0, 150, 150), generator.integers(150, 300, 150)])
        drawn.append(roc_auc_score(labels[rows], logits[rows, 1]))
    assert linear == pytest.approx(np.std(drawn), rel=0.1)


def test_contributions_are_packed_with_their_classes() -> None:
    logits, labels, weights = answers("multiclass")
    names = [name for family in FAMILIES.values() for name in family]
    conditions = {
        "clean": logits,
        **{f"{name}/{s}": logits for name in names for s in (1, 3)},
    }
    conditions["gaussian_noise/3"] = torch.zeros_like(logits)  # an AUROC of a half
    found = contributions(conditions, labels, weights, "multiclass")
    assert json.loads(json.dumps(found)) == found
    assert classes_of(found).tolist() == labels.tolist()
    clean, corrupted = (unpack(found["AUROC"][name]).sum() for name in ("clean", "corrupted"))
    assert clean == pytest.approx(of_auroc(logits, labels, weights, "multiclass").sum(), abs=1e-5)
    noise = (clean * 3 + 0.5) / 4  # two severities of two corruptions, one of five families
    assert corrupted == pytest.approx((4 * clean + noise) / 5, abs=1e-5)


# -- records ---------------------------------------------------------------------------------------


def test_runs_are_one_sorted_line_each_and_only_added(tmp_path: Path) -> None:
    folder, path = tmp_path / "raw", tmp_path / "runs.jsonl.gz"
    folder.mkdir()
    runs = [
        {"run": {"dataset": "d", "arm": arm, "seed": seed}, "value": seed}
        for arm in "ba"
        for seed in range(3)
    ]
    assert read_runs(path) == []
    for run in runs[:4]:
        (folder / f"{name_of(run['run'])}.json").write_text(json.dumps(run))
    assert add_runs(path, folder) == 4 and add_runs(path, folder) == 0
    first = path.read_bytes()
    for run in runs:
        changed = {**run, "value": run["value"] if run in runs[4:] else 99}
        (folder / f"{name_of(run['run'])}.json").write_text(json.dumps(changed))
    assert add_runs(path, folder) == 2
    assert sorted(read_runs(path), key=str) == sorted(runs, key=str)  # the old ones stay
    write_runs(tmp_path / "again.jsonl.gz", reversed(runs[:4]))
    assert (tmp_path / "again.jsonl.gz").read_bytes() == first
