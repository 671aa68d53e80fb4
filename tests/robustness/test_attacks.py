"""FGSM and PGD against literal loops with the gradient of a linear model written out."""

import numpy as np
import pytest
import torch

from inmerge_wrap.robustness.attacks import Attack, attack_batch
from inmerge_wrap.robustness.effects import Draws

MEAN, STD = 0.4, 0.25
EPS = 6 / 255


def example(outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (N, C, H, W), some of them at the ends of the range; weights and biases."""
    drawn = np.random.default_rng(outputs)
    pixels = drawn.uniform(-0.2, 1.2, (6, 2, 4, 5)).clip(0, 1)
    return pixels, drawn.normal(size=(outputs, 40)), drawn.normal(size=outputs)


def ascent(pixels: np.ndarray, weights: np.ndarray, biases: np.ndarray, labels, task: str):
    """Gradient of the loss with respect to one image's pixels, by hand."""
    logits = weights @ ((pixels.ravel() - MEAN) / STD) + biases
    if task == "multiclass":
        errors = np.exp(logits - logits.max())
        errors /= errors.sum()
        errors[labels] -= 1
    else:
        errors = 1 / (1 + np.exp(-logits)) - labels
        errors[np.isnan(labels)] = 0
    return (errors @ weights / STD).reshape(pixels.shape)


def attacked_by_hand(attack: Attack, start: np.ndarray, pixels: np.ndarray, *rest):
    steps = 1 if attack.name == "fgsm" else attack.steps
    size = attack.eps if attack.name == "fgsm" else attack.step_size or 2.5 * attack.eps / steps
    moved = start
    for _ in range(steps):
        moved = moved + size * np.sign(ascent(moved, *rest))
        moved = np.clip(np.clip(moved, pixels - attack.eps, pixels + attack.eps), 0, 1)
    return moved


@pytest.mark.parametrize(
    "attack",
    [
        Attack("fgsm", EPS),
        Attack("pgd", EPS, steps=4),
        Attack("pgd", EPS, steps=3, step_size=2 * EPS),
    ],
    ids=["fgsm", "pgd", "pgd, large steps"],
)
@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("multiclass", np.array([0, 1, 2, 2, 1, 0])),
        ("binary", np.array([[0.0], [1], [1], [0], [1], [0]])),
        ("multilabel", np.array([[0, 1, np.nan], [1, 1, 0], [0, 0, 0]] * 2, dtype=float)),
    ],
)
def test_attacks_are_what_their_papers_say(attack: Attack, task: str, labels: np.ndarray) -> None:
    pixels, weights, biases = example(1 if task == "binary" else 3)
    images, matrix = torch.from_numpy(pixels), torch.from_numpy(weights)

    def model(given: torch.Tensor) -> torch.Tensor:
        return ((given - MEAN) / STD).flatten(1) @ matrix.T + torch.from_numpy(biases)

    found = attack_batch(
        attack,
        model,
        images,
        torch.from_numpy(labels),
        task=task,
        draws=Draws(attack.name, range(6), seed=3),
    )
    for index, image in enumerate(pixels):
        start = image
        if attack.name == "pgd":  # anywhere within the bound, by the image's own stream
            lot = Draws("pgd", [index], seed=3).uniform(*image.shape, like=images)[0].numpy()
            start = np.clip(image + attack.eps * (2 * lot - 1), 0, 1)
        expected = attacked_by_hand(attack, start, image, weights, biases, labels[index], task)
        np.testing.assert_allclose(found[index].numpy(), expected, rtol=0, atol=1e-12)
    assert (found - images).abs().max() <= EPS + 1e-12
    assert 0 <= found.min() and found.max() <= 1


def test_pgd_starts_anywhere_within_the_bound() -> None:
    images = torch.full((1, 1, 100, 100), 0.5)
    still = Attack("pgd", 0.1, steps=1, step_size=1e-9)
    draws = Draws("pgd", [0], seed=0)
    moved = attack_batch(
        still,
        lambda given: given.mean((2, 3)),
        images,
        torch.zeros(1, 1),
        task="binary",
        draws=draws,
    )
    change = (moved - images).flatten()
    assert change.abs().max() <= 0.1 and change.min() < -0.099 and change.max() > 0.099
    assert abs(change.mean()) < 0.003 and abs(change.std() - 0.1 / 3**0.5) < 0.002


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cw"}, "choose fgsm or pgd"),
        ({"name": "pgd", "eps": 2.0}, "2/255"),
        ({"name": "pgd", "eps": 0.0}, "eps"),
        ({"name": "pgd", "steps": 0}, "steps"),
        ({"name": "pgd", "step_size": 0.0}, "step_size"),
    ],
)
def test_attacks_out_of_range_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Attack(**arguments)
