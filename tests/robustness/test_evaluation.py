"""The evaluation loop: rows, ratios, attacks, and what it leaves untouched."""

import errno
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from inmerge_wrap.robustness import (
    Attack,
    RobustnessResult,
    compare_results,
    evaluate_robustness,
)
from inmerge_wrap.robustness.corruptions import PRESETS, corrupt
from tests.robustness.examples import data

sklearn_metrics = pytest.importorskip("sklearn.metrics")

FEW = ["gaussian_noise", "bars"]


class SmallNet(nn.Module):
    """Two convolutions with BatchNorm and dropout: what train mode would give away."""

    def __init__(self, outputs: int, channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(3),
        )
        self.head = nn.Linear(72, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).flatten(1))


def network(outputs: int, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = SmallNet(outputs, channels)
    # Weights large enough that predictions differ and an attack of 2/255 changes some.
    model.head.weight.data.mul_(20)
    return model


def batches(images, labels, size=25):
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]


def test_rows_equal_a_computation_by_hand():
    images, labels = data("multiclass")
    model = network(4)
    result = evaluate_robustness(
        model, batches(images, labels), preset=FEW, mean=0.4, std=0.2, seed=7, bootstrap=0
    )
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(result.logits, model((images - 0.4) / 0.2))
    seen = []
    for name in FEW:
        errors = []
        for severity in range(1, 6):
            damaged = corrupt(images, name, severity, seed=7)
            with torch.no_grad():
                predicted = model((damaged - 0.4) / 0.2).argmax(1)
            score = sklearn_metrics.balanced_accuracy_score(labels.flatten(), predicted)
            errors.append(1 - score)
            row = result.row(name, severity)
            assert row["balanced_error"] == pytest.approx(errors[-1], abs=1e-6)
            assert row["n"] == 60 and row["kind"] == ("noise" if name != "bars" else "artefact")
            assert "balanced_error_low" not in row
        assert result.value("balanced_error", name) == pytest.approx(np.mean(errors), abs=1e-6)
        seen.append(np.mean(errors))
    assert result.value("balanced_error", "all") == pytest.approx(np.mean(seen), abs=1e-6)
    assert len(result.rows) == 1 + 2 * 6 + 1
    assert not any(name in row for row in result.rows for name in ("be", "rbe"))


def test_batch_size_and_global_generators_do_not_matter():
    images, labels = data("multiclass")
    model = network(4)
    settings = {"preset": FEW, "mean": 0.5, "std": 0.2, "bootstrap": 20}
    torch.manual_seed(1)
    first = evaluate_robustness(model, batches(images, labels, 60), **settings)
    torch.manual_seed(2)
    loader = DataLoader(TensorDataset(images, labels), batch_size=7)
    second = evaluate_robustness(model, loader, **settings)
    assert first.settings == second.settings
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    other = evaluate_robustness(model, batches(images, labels, 60), seed=1, **settings)
    assert other.rows[0]["accuracy"] == first.rows[0]["accuracy"]
    assert other.row("gaussian_noise", 5)["brier"] != first.row("gaussian_noise", 5)["brier"]


def test_nothing_of_the_model_or_the_generators_is_disturbed():
    images, labels = data("multiclass")
    model = network(4)
    model.train()
    model.features[1].eval()  # frozen BatchNorm in a model that is being trained
    model.features[0].weight.requires_grad_(False)
    model(images).sum().backward()
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    needs = [p.requires_grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    loader = DataLoader(TensorDataset(images, labels), batch_size=32)
    evaluate_robustness(model, loader, preset=FEW, bootstrap=5, attacks=("fgsm", "pgd"))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert random.getstate() == state[2]
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    for p, gradient in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) if gradient is None else torch.equal(p.grad, gradient)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_mode_is_given_back_after_an_error():
    images, labels = data("multiclass")
    model = network(4).train()
    with pytest.raises(ValueError, match="check num_classes"):
        evaluate_robustness(model, [(images, labels + 1)], preset=FEW)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_train_mode_cannot_be_evaluated():
    images, labels = data("multiclass")
    model = network(4)
    in_eval = evaluate_robustness(model.eval(), [(images, labels)], preset=FEW, bootstrap=0)
    in_train = evaluate_robustness(model.train(), [(images, labels)], preset=FEW, bootstrap=0)
    assert in_train.rows == in_eval.rows

    class Stubborn(SmallNet):
        def forward(self, images):
            self.train()
            return super().forward(images)

    with pytest.raises(RuntimeError, match="train mode"):
        evaluate_robustness(Stubborn(4), [(images, labels)], preset=FEW)


def test_be_and_rbe_follow_their_formula_and_the_baseline_is_one():
    images, labels = data("multiclass")
    settings = {"preset": FEW, "bootstrap": 50, "std": 0.3, "mean": 0.5}
    model = network(4)
    # Labels that the model itself gives: it makes no clean error and loses under corruption.
    model.eval()
    labels = model((images - 0.5) / 0.3).argmax(1)
    base = evaluate_robustness(model, batches(images, labels), **settings)
    assert base.value("error") == 0
    itself = evaluate_robustness(model, batches(images, labels), baseline=base, **settings)
    for name in (*FEW, "all"):
        assert itself.value("be", name) == itself.value("rbe", name) == 1
    assert "be_low" not in itself.row("bars"), "without width it would look like certainty"
    torch.manual_seed(5)
    other = SmallNet(4)
    result = evaluate_robustness(other, batches(images, labels), baseline=base, **settings)
    clean, base_clean = result.value("balanced_error"), base.value("balanced_error")
    ratios = []
    for name in FEW:
        error = np.mean([result.value("balanced_error", name, s) for s in range(1, 6)])
        base_error = np.mean([base.value("balanced_error", name, s) for s in range(1, 6)])
        assert result.value("be", name) == pytest.approx(error / base_error)
        ratios.append((error - clean) / (base_error - base_clean))
        assert result.value("rbe", name) == pytest.approx(ratios[-1])
        row = result.row(name)
        assert row["be_low"] < row["be"] < row["be_high"]
    assert result.value("rbe", "all") == pytest.approx(np.mean(ratios))
    assert result.value("be", "bars", 3) is None


def test_ratios_without_a_denominator_are_absent():
    images, labels = data("multiclass")

    class Constant(nn.Module):
        """Always the first class: its balanced error is 1 - 1/K and corruption costs nothing."""

        def forward(self, images):
            return torch.eye(4)[:1].repeat(len(images), 1)

    base = evaluate_robustness(Constant(), [(images, labels)], preset=FEW, bootstrap=10)
    result = evaluate_robustness(
        network(4), [(images, labels)], preset=FEW, bootstrap=10, baseline=base
    )
    assert "rbe" not in result.row("bars") and "rbe" not in result.row("all")
    assert "loses nothing to bars" in result.row("bars")["left_out"]["rbe"]
    assert result.value("be", "bars") > 0

    # A model that knows every label even in damaged pictures: nothing to divide by.
    perfect = evaluate_robustness(
        Constant(), [(images, labels * 0)], preset=FEW, task="multiclass", bootstrap=10
    )
    assert perfect.value("accuracy") == 1
    assert "accuracy_low" not in perfect.row()
    assert "balanced_error" not in perfect.row() and "auroc" not in perfect.row()
    against = evaluate_robustness(
        network(4), [(images, labels * 0)], preset=FEW, bootstrap=0, baseline=perfect
    )
    assert "be" not in against.row("bars")


def test_a_baseline_of_other_data_or_settings_is_refused():
    images, labels = data("multiclass")
    model, settings = network(4), {"preset": FEW, "bootstrap": 5}
    base = evaluate_robustness(model, [(images, labels)], **settings)
    changes = [
        ({"loader": [(images.flip(3), labels)]}, "data_sha256"),
        ({"loader": [(images, labels.flip(0))]}, "data_sha256"),
        ({"seed": 1}, "seed"),
        ({"severities": (1, 2)}, "severities"),
        ({"bootstrap": 6}, "bootstrap"),
        ({"groups": [n // 4 for n in range(len(images))]}, "resamples_sha256"),
        ({"preset": "quick"}, "not measured under brightness_up"),
    ]
    for change, message in changes:
        given = {"loader": [(images, labels)], **settings, **change}
        with pytest.raises(ValueError, match=message):
            evaluate_robustness(model, given.pop("loader"), baseline=base, **given)
    weak, strong = (Attack("pgd", eps=0.02, steps=steps) for steps in (1, 2))
    base = evaluate_robustness(model, [(images, labels)], attacks=[weak], **settings)
    with pytest.raises(ValueError, match=r"was measured under .*'steps': 1.*, not .*'steps': 2"):
        evaluate_robustness(model, [(images, labels)], attacks=[strong], baseline=base, **settings)


def test_networks_are_compared_each_at_its_own_threshold():
    images, labels = data("multilabel")
    model = network(labels.shape[1])
    settings = {"preset": FEW, "bootstrap": 5, "task": "multilabel"}
    base = evaluate_robustness(model, [(images, labels)], threshold=0.4, **settings)
    other = evaluate_robustness(model, [(images, labels)], threshold=0.6, baseline=base, **settings)
    (clean, *_) = compare_results(other, base)
    values = [each.value("balanced_error") for each in (other, base)]
    assert clean["difference"] == values[0] - values[1]


def test_differences_are_paired_over_the_images():
    images, labels = data("multiclass")
    first, second = network(4), network(4)
    with torch.no_grad():
        second.head.bias[0] += 3.0
    a, b = (
        evaluate_robustness(
            model, batches(images, labels), preset=FEW, severities=[2, 5], bootstrap=200
        )
        for model in (first, second)
    )
    found = {(row["corruption"], row["severity"]): row for row in compare_results(b, a)}
    assert found.keys() == {(row["corruption"], row["severity"]) for row in b.rows}
    for (corruption, severity), entry in found.items():
        values = [result.value("balanced_error", corruption, severity) for result in (b, a)]
        assert entry["difference"] == values[0] - values[1]
    drawn = [
        np.mean([r.replicates[name, level] for name in FEW for level in (2, 5)], axis=0)
        for r in (b, a)
    ]
    low, high = np.nanquantile(drawn[0] - drawn[1], [0.025, 0.975])
    entry = found["all", "mean"]
    assert (entry["difference_low"], entry["difference_high"]) == pytest.approx((low, high))
    # Of a model with itself nothing is left, though its own interval is wide.
    for entry in compare_results(a, a):
        assert entry["difference"] == 0.0 and "difference_low" not in entry


def test_differences_need_the_same_pictures_and_know_their_limits(tmp_path):
    images, labels = data("multiclass")
    settings = {"preset": FEW, "severities": [3], "bootstrap": 20}
    result = evaluate_robustness(network(4), batches(images, labels), **settings)
    other = evaluate_robustness(network(4), batches(images[:50], labels[:50]), **settings)
    with pytest.raises(ValueError, match="data_sha256"):
        compare_results(result, other)
    fewer = evaluate_robustness(
        network(4), batches(images, labels), **settings | {"preset": FEW[:1]}
    )
    with pytest.raises(ValueError, match=f"also measured under {FEW[1]}, so its mean of all"):
        compare_results(fewer, result)
    attacked = evaluate_robustness(
        network(4), batches(images, labels), **settings, attacks=["fgsm"]
    )
    with pytest.raises(ValueError, match="the baseline was not measured under fgsm"):
        compare_results(attacked, result)
    result.to_json(tmp_path / "stored.json")
    stored = RobustnessResult.from_json(tmp_path / "stored.json")
    for entry in compare_results(result, stored):  # no resamples are stored: no interval
        assert entry["difference"] == 0.0 and "difference_low" not in entry


def test_progress_counts_every_image_of_every_condition():
    images, labels = data("multiclass")
    seen: list[int] = []
    scored: list[int] = []
    evaluate_robustness(
        network(4),
        batches(images, labels),
        preset=FEW,
        severities=[1, 3],
        attacks=["fgsm"],
        bootstrap=0,
        progress=seen.append,
        scored=lambda: scored.append(sum(seen)),
    )
    conditions = 1 + len(FEW) * 2 + 1
    assert sum(seen) == len(images) * conditions
    assert scored == [sum(seen)] * conditions, "after all images"


def test_json_round_trip_serves_as_a_baseline(tmp_path):
    images, labels = data("multilabel")
    model = network(3)
    settings = {"preset": FEW, "task": "multilabel", "bootstrap": 5, "severities": (2, 4)}
    result = evaluate_robustness(model, batches(images, labels), **settings)
    result.to_json(tmp_path / "result.json")
    read = RobustnessResult.from_json(tmp_path / "result.json")
    assert read.rows == result.rows == json.loads(result.to_json())["rows"]
    again = evaluate_robustness(model, batches(images, labels), baseline=read, **settings)
    assert again.value("be", "bars") == pytest.approx(1)
    assert "be_low" not in again.row("bars")
    assert [row["severity"] for row in result.rows[:4]] == [0, 2, 4, "mean"]


def test_settings_may_be_arrays():
    images, labels = data("multilabel")
    given = {
        "threshold": [0.25, 0.5, 0.75],
        "severities": [1, 3],
        "groups": [n // 4 for n in range(len(images))],
    }
    arrays = {
        "threshold": torch.tensor(given["threshold"]),
        "severities": np.array(given["severities"]),
        "groups": torch.tensor(given["groups"]),
    }
    about = {"preset": FEW, "task": "multilabel", "bootstrap": 5}
    one, other = (
        evaluate_robustness(network(3), [(images, labels)], **about, **settings)
        for settings in (given, arrays)
    )
    contents = [json.loads(result.to_json()) for result in (one, other)]
    assert contents[0]["settings"] == contents[1]["settings"]
    assert contents[0]["rows"] == contents[1]["rows"]
    single = evaluate_robustness(
        network(1), [data("binary")], preset=FEW, task="binary", threshold=np.float32(0.25)
    )
    assert single.settings["threshold"] == 0.25


@pytest.mark.parametrize(
    ("task", "outputs"), [("multiclass", 4), ("binary", 1), ("binary", 2), ("multilabel", 3)]
)
def test_an_attacked_model_never_gains(task, outputs):
    images, labels = data(task, n=48)
    if task == "multilabel":
        labels[:, 1] = 0
        labels[5] = 0  # an image without any label
    model = network(outputs)
    strengths = (1 / 255, 4 / 255, 16 / 255)
    result = evaluate_robustness(
        model,
        batches(images, labels),
        preset=["bars"],
        severities=(1,),
        task=task,
        mean=0.5,
        std=0.2,
        attacks=[Attack(name, eps) for name in ("fgsm", "pgd") for eps in strengths],
        threshold=0.5 if task == "multiclass" else 0.4,
        bootstrap=0,
    )
    clean = result.value("accuracy")
    for name in ("fgsm", "pgd"):
        attacked = [result.value("accuracy", name, eps) for eps in strengths]
        assert all(value <= clean + 1e-9 for value in attacked)
        # And it does attack: the strongest costs something.
        assert attacked[-1] < clean - 0.05
    assert result.value("accuracy", "pgd", 16 / 255) <= result.value("accuracy", "fgsm", 16 / 255)


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_a_step_that_helps_the_model_is_not_taken(task):

    class Wave(nn.Module):
        """So steep and wavy that a step along the gradient lands anywhere: often on the truth."""

        def forward(self, images):
            margin = (400 * images.mean((1, 2, 3))).sin()
            return margin[:, None] * torch.tensor([[1.0]] if task == "binary" else [[1.0, -1.0]])

    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    logits = Wave()(images)
    wrong = logits.argmin(1) if task == "multiclass" else (logits < 0).long()
    result = evaluate_robustness(
        Wave(), [(images, wrong)], preset=["bars"], severities=(1,), task=task, bootstrap=0,
        attacks=[Attack("fgsm", 8 / 255), Attack("pgd", 8 / 255)],
    )  # fmt: skip
    assert result.value("accuracy") == 0
    assert result.value("accuracy", "fgsm") == result.value("accuracy", "pgd") == 0


def moved_by_fgsm(logits, images, labels, task):
    """What FGSM with eps 0.02 adds to the pixels of a model given as a function of their mean."""
    seen = []

    class Recorder(nn.Module):
        def forward(self, normalised):
            seen.append((normalised * 0.25 + 0.5).detach())
            return logits(normalised.mean((1, 2, 3)))

    evaluate_robustness(
        Recorder(), [(images, labels)], preset=["bars"], severities=(1,), task=task, mean=0.5,
        std=0.25, attacks=[Attack("fgsm", eps=0.02)], bootstrap=0,
    )  # fmt: skip
    return (seen[-1] - images).mean((1, 2, 3))


def test_eps_is_in_pixels_and_the_normalisation_is_inside_the_attacked_model():
    # Class 0 is "far from middle grey", which pixels are only after the normalisation: the attack
    # on it brightens a dark picture and darkens a bright one, by eps; on class 1 the other way.
    grey = torch.tensor([0.35, 0.65, 0.35, 0.65])[:, None, None, None].expand(-1, 3, 8, 8)
    moved = moved_by_fgsm(
        lambda m: torch.stack([m.square(), -m.square()], 1),
        grey,
        torch.tensor([0, 0, 1, 1]),
        "multiclass",
    )
    torch.testing.assert_close(moved, torch.tensor([0.02, -0.02, -0.02, 0.02]), rtol=0, atol=1e-6)


def test_unknown_labels_do_not_steer_an_attack():
    images = torch.full((2, 3, 8, 8), 0.5)
    labels = torch.tensor([[1.0, math.nan], [math.nan, 0.0]])
    moved = moved_by_fgsm(lambda m: torch.stack([m, 10 * m], 1), images, labels, "multilabel")
    torch.testing.assert_close(moved, torch.tensor([-0.02, 0.02]), rtol=0, atol=1e-6)


def test_the_interval_of_the_ece_is_not_carried_away_by_its_bias():
    # Nine groups of ten pictures, each as often positive as its probability says: the ECE is 0,
    # and every resample's is above that.
    chances = torch.arange(1, 10).repeat_interleave(10) / 10
    labels = (torch.arange(90) % 10 < (10 * chances).round()).long()

    class Honest(nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3)).logit()

    images = chances[:, None, None, None].expand(-1, 1, 8, 8)
    result = evaluate_robustness(
        Honest(), [(images, labels)], preset=["bars"], task="binary", bootstrap=200
    )
    row = result.row()
    assert row["ece"] == pytest.approx(0, abs=1e-6)
    assert row["ece_low"] <= row["ece"] < row["ece_high"]


def test_the_ece_has_an_interval_though_some_resamples_hold_no_known_label():
    images, labels = data("multilabel", n=20)
    labels = labels.float()
    labels[:4], labels[4:] = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None], math.nan
    row = evaluate_robustness(
        network(3), [(images, labels)], preset=["bars"], task="multilabel", bootstrap=400
    ).row()
    assert row["accuracy_low"] < row["accuracy_high"] and row["ece_low"] < row["ece_high"]


@pytest.mark.parametrize("outputs", [1, 2])
def test_binary_outputs_of_one_or_two_give_the_same(outputs):
    images, labels = data("binary")

    class Margin(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.outputs = outputs

        def forward(self, images):
            margin = 30 * (images.mean((1, 2, 3)) - 0.5)
            return margin if self.outputs == 1 else torch.stack([-margin / 2, margin / 2], 1)

    result = evaluate_robustness(
        Margin(outputs), batches(images, labels), preset=FEW, task="binary-class", bootstrap=0
    )
    scores = (30 * (images.mean((1, 2, 3)) - 0.5)).sigmoid()
    assert result.value("auroc") == pytest.approx(
        sklearn_metrics.roc_auc_score(labels, scores), abs=1e-6
    )
    assert result.value("brier") == pytest.approx(
        sklearn_metrics.brier_score_loss(labels, scores), abs=1e-6
    )


def test_grey_images_with_a_normaliser_of_ones_own():
    images, labels = data("multiclass", channels=1)

    def to_colour(pixels):
        return (pixels.expand(-1, 3, -1, -1) - 0.5) / 0.2

    result = evaluate_robustness(
        network(4), batches(images, labels), preset="oct", normalize=to_colour, bootstrap=0
    )
    assert result.settings["corruptions"] == list(PRESETS["oct"])
    with pytest.raises(ValueError, match="needs colour"):
        evaluate_robustness(network(4, 1), batches(images, labels), preset="blood")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loader": []}, "loader is empty"),
        ({"loader": [torch.zeros(2, 3, 8, 8)]}, r"batches \(images, labels\)"),
        ({"loader": [(torch.full((2, 3, 8, 8), 2.0), torch.zeros(2))]}, r"\[2, 2\]"),
        ({"loader": [(torch.zeros(2, 3, 8, 8), torch.zeros(3))]}, "labels have shape"),
        ({"preset": "qick"}, "did you mean quick"),
        ({"task": "multi"}, "task is 'multi'"),
        ({"task": "binary"}, "needs 1 or 2"),
        ({"severities": ()}, "severities"),
        ({"severities": (1, 1)}, "severities"),
        ({"severities": (0,)}, "severities"),
        ({"mean": 0.5}, "give both"),
        ({"mean": 0.5, "std": 0.0}, "positive"),
        ({"mean": (0.5, 0.5), "std": (1, 1)}, "2 entries for 3 channels"),
        ({"mean": 0.5, "std": 1, "normalize": lambda x: x}, "not both"),
        ({"bootstrap": -1}, "bootstrap is -1"),
        ({"attacks": ("fgsm", "fgsm")}, "repeat"),
        ({"attacks": ("cw",)}, "unknown"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    images, labels = data("multiclass", n=4)
    given = {"loader": [(images, labels)], "preset": FEW, "bootstrap": 2} | change
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(network(4), given.pop("loader"), **given)


def test_a_shuffling_loader_is_refused():
    loader = DataLoader(TensorDataset(*data("multiclass")), batch_size=8, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        evaluate_robustness(network(4), loader, preset=FEW)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda images: torch.full((len(images), 4), math.nan), "not finite"),
        (lambda images: torch.zeros(len(images), 4, 2, 2), "shape"),
        (lambda images: torch.zeros(1, 4), "shape"),
        (lambda images: [1, 2], "list"),
    ],
)
def test_answers_that_are_no_logits_are_refused(answer, message):
    class Odd(nn.Module):
        def forward(self, images):
            return answer(images)

    with pytest.raises(ValueError, match=message):
        evaluate_robustness(Odd(), batches(*data("multiclass")), preset=FEW)


def test_rows_are_found_by_name():
    images, labels = data("multiclass", n=20)
    result = evaluate_robustness(network(4), [(images, labels)], preset=FEW, bootstrap=0)
    assert result.row("bars")["severity"] == "mean"
    assert result.row("bars", 2)["severity"] == 2
    with pytest.raises(ValueError, match="choose from clean, gaussian_noise"):
        result.row("fog")
    with pytest.raises(ValueError, match="choose one of"):
        result.row("bars", 7)


def test_intervals_hold_the_value_and_narrow_with_more_images():
    model = network(4)
    widths = []
    for n in (40, 400):
        images, labels = data("multiclass", n=n, side=8)
        row = evaluate_robustness(
            model, [(images, labels)], preset=["bars"], severities=(3,), bootstrap=300
        ).row("bars", 3)
        for metric in ("accuracy", "balanced_error", "auroc", "brier", "ece"):
            assert row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"], metric
        widths.append(row["accuracy_high"] - row["accuracy_low"])
    assert widths[1] < widths[0] / 2


def test_a_result_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    RobustnessResult([], {"n": 1}, 0.0).to_json(path)

    def full(self: Path, text: str, **_: object) -> None:
        with open(self, "w") as file:
            file.write(text[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"result\.json was not written"):
        RobustnessResult([], {"n": 2}, 0.0).to_json(path)
    assert RobustnessResult.from_json(path).settings == {"n": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
