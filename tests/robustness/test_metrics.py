"""Metrics against torchmetrics and scikit-learn; the uncertainty of a figure."""

import math
import warnings

import numpy as np
import pytest
import torch

from inmerge_wrap.robustness import (
    bootstrap_weights,
    classification_metrics,
    paired_difference,
    percentile_interval,
)
from tests.robustness.examples import data

sklearn_metrics = pytest.importorskip("sklearn.metrics")
torchmetrics = pytest.importorskip("torchmetrics.functional.classification")


def point(values):
    return {name: float(value) for name, value in values.items()}


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_multiclass_metrics_agree_with_torchmetrics_and_sklearn(seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (2 * torch.randn(300, 5, generator=generator)).softmax(1).double()
    targets = torch.randint(0, 5, (300,), generator=generator)
    found = point(classification_metrics(probabilities, targets)[0])
    predicted = probabilities.argmax(1)
    p, y = probabilities.numpy(), targets.numpy()
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(y, predicted),
        "error": 1 - sklearn_metrics.accuracy_score(y, predicted),
        "balanced_error": 1 - sklearn_metrics.balanced_accuracy_score(y, predicted),
        "auroc": sklearn_metrics.roc_auc_score(y, p, multi_class="ovr"),
        "ece": float(torchmetrics.multiclass_calibration_error(probabilities, targets, 5, 15)),
        "brier": ((p - np.eye(5)[y]) ** 2).sum(1).mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    macro = torchmetrics.multiclass_auroc(probabilities, targets, 5)
    assert found["auroc"] == pytest.approx(float(macro), abs=1e-6)


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_binary_metrics_agree_with_torchmetrics_and_sklearn(threshold):
    generator = torch.Generator().manual_seed(0)
    # Rounded scores: ties must count half.
    scores = torch.rand(400, generator=generator).mul(20).round().div(20).double()
    targets = (torch.rand(400, generator=generator) < scores).long()
    found = point(classification_metrics(scores, targets, task="binary", threshold=threshold)[0])
    y, p = targets.numpy(), scores.numpy()
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(y, p > threshold),
        "balanced_error": 1 - sklearn_metrics.balanced_accuracy_score(y, p > threshold),
        "auroc": sklearn_metrics.roc_auc_score(y, p),
        "brier": sklearn_metrics.brier_score_loss(y, p),
        "ece": float(torchmetrics.binary_calibration_error(scores, targets, 15)),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_a_multilabel_class_without_positives_is_left_out_and_named():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(200, 4, generator=generator).double()
    targets = torch.randint(0, 2, (200, 4), generator=generator)
    targets[:, 2] = 0
    values, left_out = classification_metrics(probabilities, targets, task="multilabel")
    kept = [0, 1, 3]
    y, p = targets[:, kept].numpy(), probabilities[:, kept].numpy()
    assert float(values["auroc"]) == pytest.approx(sklearn_metrics.roc_auc_score(y, p), abs=1e-9)
    balanced = [sklearn_metrics.balanced_accuracy_score(y[:, i], p[:, i] > 0.5) for i in range(3)]
    assert float(values["balanced_error"]) == pytest.approx(1 - np.mean(balanced), abs=1e-9)
    assert "[2]" in left_out["auroc"] and "[2]" in left_out["balanced_error"]
    # The trap: torchmetrics counts that class as 0.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trapped = torchmetrics.multilabel_auroc(probabilities.float(), targets, 4)
    assert float(trapped) < float(values["auroc"]) - 0.1
    # What does not need both classes still counts all labels.
    assert float(values["brier"]) == pytest.approx(
        float((probabilities - targets).square().mean()), abs=1e-9
    )
    assert "brier" not in left_out


def test_unknown_labels_do_not_count():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(80, 2, generator=generator).double()
    targets = torch.randint(0, 2, (80, 2), generator=generator).float()
    targets[50:, 1] = math.nan
    values = point(classification_metrics(probabilities, targets, task="multilabel")[0])
    areas = [
        sklearn_metrics.roc_auc_score(targets[:n, i], probabilities[:n, i])
        for i, n in ((0, 80), (1, 50))
    ]
    assert values["auroc"] == pytest.approx(np.mean(areas), abs=1e-9)


def test_a_label_of_which_nothing_is_known_is_left_out_and_named():
    probabilities = torch.tensor([[0.2, 0.9], [0.8, 0.4], [0.6, 0.1]])
    targets = torch.tensor([[0.0, math.nan], [1.0, math.nan], [1.0, math.nan]])
    metrics, left_out = classification_metrics(probabilities, targets, task="multilabel")
    alone, _ = classification_metrics(probabilities[:, :1], targets[:, :1], task="multilabel")
    assert {name: value.item() for name, value in metrics.items()} == {
        name: value.item() for name, value in alone.items()
    }
    assert set(left_out.values()) == {"no known values of labels [1]"}


def test_a_class_without_images_is_left_out_and_named():
    probabilities = torch.eye(4).repeat(10, 1)[:, [0, 1, 2, 3]] * 0.6 + 0.1
    targets = torch.arange(40) % 4
    kept = targets != 3
    values, left_out = classification_metrics(probabilities[kept], targets[kept])
    assert float(values["auroc"]) == 1 and float(values["balanced_error"]) == 0
    assert left_out == dict.fromkeys(("auroc", "balanced_error"), "no images of classes [3]")


def test_metrics_of_one_class_are_undefined_not_zero():
    values, left_out = classification_metrics(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 0]))
    assert values["auroc"].isnan().all() and values["balanced_error"].isnan().all()
    assert float(values["accuracy"]) == pytest.approx(2 / 3)
    assert set(left_out) == {"auroc", "balanced_error"}
    values, left_out = classification_metrics(
        torch.tensor([0.2, 0.9]), torch.tensor([1, 1]), task="binary"
    )
    assert values["auroc"].isnan().all() and values["balanced_error"].isnan().all()
    assert set(left_out) == {"auroc", "balanced_error"}
    # Nor is anything known in a resample that drew one class alone.
    draws = torch.tensor([[1, 0], [1, 3], [1, 0]])
    values, left_out = classification_metrics(torch.eye(3), torch.arange(3), weights=draws)
    assert values["balanced_error"][0] == 0 and values["balanced_error"][1].isnan()
    assert not left_out


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_weights_equal_repeated_images(task):
    _, targets = data(task, 60)
    generator = torch.Generator().manual_seed(5)
    outputs = {"multiclass": 4, "binary": 1, "multilabel": 3}[task]
    raw = torch.rand(60, outputs, generator=generator).double()
    probabilities = raw.softmax(1) if task == "multiclass" else raw
    weights = torch.from_numpy(bootstrap_weights(60, 8, seed=2))
    together = classification_metrics(probabilities, targets, task=task, weights=weights)[0]
    for column in range(8):
        index = torch.arange(60).repeat_interleave(weights[:, column].long())
        alone = classification_metrics(probabilities[index], targets[index], task=task)[0]
        for name, values in together.items():
            assert float(values[column]) == pytest.approx(float(alone[name]), abs=1e-5), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": torch.tensor([0, 5])}, "check num_classes"),
        ({"targets": torch.tensor([0.5, 1])}, "whole numbers"),
        ({"targets": torch.tensor([0, 1, 2])}, "shape"),
        ({"targets": torch.zeros(2, 3)}, "shape"),
        ({"task": "multilabel", "targets": torch.tensor([0, 1])}, "shape"),
        ({"task": "multilabel", "targets": torch.full((2, 3), 2)}, "hold 2"),
        ({"task": "regression"}, "choose one of"),
        ({"weights": torch.ones(3, 1)}, "weights have shape"),
        ({"task": "multilabel", "targets": torch.ones(2, 3), "threshold": 2.0}, "threshold"),
        ({"task": "multilabel", "targets": torch.ones(2, 3), "threshold": (0.5,)}, "3 labels"),
    ],
)
def test_metrics_refuse_what_does_not_fit(arguments, message):
    given = {"probabilities": torch.eye(3)[:2], "targets": torch.tensor([0, 1])} | arguments
    with pytest.raises(ValueError, match=message):
        classification_metrics(given.pop("probabilities"), given.pop("targets"), **given)


# --- uncertainty ----------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_has_the_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    weights = bootstrap_weights(400, 4000, seed=1)
    assert (weights.sum(0) == 400).all()
    assert np.array_equal(weights, bootstrap_weights(400, 4000, seed=1))
    assert not np.array_equal(weights, bootstrap_weights(400, 4000, seed=2))
    means = values @ weights / 400
    assert means.std() == pytest.approx(values.std() / 20, rel=0.05)
    low, high = percentile_interval(means)
    assert low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.006)
    assert high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.006)


def test_percentile_interval_of_nothing_is_none():
    assert percentile_interval([]) is None
    assert percentile_interval([math.nan, math.inf]) is None
    assert percentile_interval([math.nan, 1.0, 2.0]) == pytest.approx((1.025, 1.975))
    assert percentile_interval([0.9] * 20) is None, "without width it would look like certainty"


def test_paired_difference_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.3, 1, 8), generator.normal(0, 1, 8)
    found = paired_difference(a, b)
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert found["n"] == 8
    assert found["mean"] == pytest.approx((a - b).mean())
    assert found["p_t"] == pytest.approx(test.pvalue)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    flips = stats.permutation_test((a - b,), np.mean, permutation_type="samples")
    assert found["p_sign_flip"] == pytest.approx(flips.pvalue)
    # The difference matters, not the common part of a pair.
    shifted = paired_difference(a + 100 * np.arange(8), b + 100 * np.arange(8))
    assert shifted["p_t"] == pytest.approx(found["p_t"], rel=1e-6)


def test_paired_difference_at_the_edges():
    assert paired_difference([0.5], [0.25]) == {"n": 1, "mean": 0.25}
    same = paired_difference([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    assert (same["low"], same["high"]) == (1, 1) and "p_t" not in same
    assert same["p_sign_flip"] == 0.25
    many = paired_difference(np.arange(20.0), np.zeros(20))
    assert many["p_sign_flip"] < 0.001
    with pytest.raises(ValueError, match="same seeds"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        paired_difference([math.nan], [1.0])


def test_whole_weights_are_weights_and_what_is_no_probability_is_refused():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(30, 4, generator=generator).softmax(1)
    targets = torch.randint(4, (30,), generator=generator)
    plain, _ = classification_metrics(probabilities, targets)
    whole, _ = classification_metrics(
        probabilities, targets, weights=torch.ones(30, 1, dtype=torch.long)
    )
    assert {name: float(value) for name, value in whole.items()} == pytest.approx(
        {name: float(value) for name, value in plain.items()}
    )
    with pytest.raises(ValueError, match="weights must not be negative, the smallest is -1"):
        classification_metrics(probabilities, targets, weights=-torch.ones(30, 1))
    for wrong in (probabilities * 10 - 5, probabilities.clone().index_fill_(0, torch.tensor(3),
                                                                           torch.nan)):  # fmt: skip
        with pytest.raises(ValueError, match="apply softmax or sigmoid to logits"):
            classification_metrics(wrong, targets)
