"""Adversarial attacks on pixels with the Adversarial Robustness Toolbox (extra ``attacks``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inmerge_wrap.robustness.metrics import check_logits

__all__ = ["Attack"]


@dataclass(frozen=True)
class Attack:
    """A white-box attack with a bounded change per pixel (L-infinity), on pixels in [0, 1].

    FGSM: one step along the sign of the gradient (I. Goodfellow et al., arXiv 1412.6572). PGD: many
    small steps from a random start inside the bound (A. Madry et al., arXiv 1706.06083).

    Attributes:
        name: "fgsm" or "pgd".
        eps: Largest change of a pixel, in pixel units of the [0, 1] range: 2 grey levels are 2/255.
        steps: Number of PGD steps.
        step_size: Size of one step, in the same unit; 2.5 eps / steps if None.
    """

    name: str
    eps: float = 2 / 255
    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ("fgsm", "pgd"):
            raise ValueError(f"attack {self.name!r} is unknown; choose fgsm or pgd")
        if not 0 < self.eps <= 1:
            raise ValueError(
                f"eps is {self.eps}; it must lie in (0, 1], as a share of the pixel range (2 grey "
                "levels are 2/255)"
            )
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; at least 1 is needed")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size is {self.step_size}; it must be positive")


class PixelClassifier(nn.Module):
    """The attacked network, which takes pixels in [0, 1], so that eps is in pixel units."""

    def __init__(self, model: nn.Module, normalise: Callable[[Tensor], Tensor], task: str) -> None:
        super().__init__()
        self.model = model
        self.normalise = normalise
        self.task = task

    def forward(self, pixels: Tensor) -> Tensor:
        logits = check_logits(self.model(self.normalise(pixels)), pixels, self.task)
        # A single logit z becomes (0, z): the same probability as a two-class softmax.
        return F.pad(logits, (1, 0)) if self.task == "binary" else logits


class _TrueLabels(nn.Module):
    """Cross-entropy against the labels of the current batch, whatever labels ART passes.

    ART assumes one class per image: it divides every row of labels by its sum, which is wrong for
    several labels and NaN for none. Unknown labels (NaN) do not count.
    """

    def __init__(self, targets: Tensor) -> None:
        super().__init__()
        self.targets = targets

    def forward(self, logits: Tensor, _: Tensor) -> Tensor:
        truth = self.targets.to(logits)
        return F.binary_cross_entropy_with_logits(
            logits, truth.nan_to_num(), weight=(~truth.isnan()).to(logits), reduction="sum"
        )


def attack_batch(
    attack: Attack,
    network: PixelClassifier,
    images: Tensor,
    targets: Tensor,
    *,
    outputs: int,
    seed: int,
) -> Tensor:
    """Computes adversarial images for one batch with the Adversarial Robustness Toolbox."""
    try:
        from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier
    except ImportError as error:
        raise ImportError('attacks need ART: pip install "inmerge-wrap[attacks]"') from error
    device = images.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"attacks run on cpu or cuda, not on {device}; move the model")
    size = len(images)
    classes = max(2, outputs)
    loss: nn.Module = nn.CrossEntropyLoss()
    labels = targets.reshape(-1)[:size].long()
    if network.task == "multilabel":
        # One batch per call, so that the labels stay in step with the images.
        loss, labels = _TrueLabels(targets), torch.zeros(size, dtype=torch.long)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        classifier = PyTorchClassifier(
            network,
            loss=loss,
            input_shape=tuple(images.shape[1:]),
            nb_classes=classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )
        if attack.name == "fgsm":
            method = FastGradientMethod(classifier, eps=attack.eps, batch_size=size)
        else:
            method = ProjectedGradientDescent(
                classifier,
                eps=attack.eps,
                eps_step=attack.step_size or 2.5 * attack.eps / attack.steps,
                max_iter=attack.steps,
                num_random_init=1,
                batch_size=size,
                verbose=False,
            )
        # ART starts PGD from numpy's global generator; the caller restores its state.
        np.random.seed(seed % 2**32)
        with torch.enable_grad():
            found = method.generate(
                x=images.detach().float().cpu().numpy(),
                y=F.one_hot(labels, classes).float().cpu().numpy(),
            )
    moved = torch.as_tensor(found).to(images)
    # Rounding must not carry a pixel beyond what eps promises.
    return (images + (moved - images).clamp(-attack.eps, attack.eps)).clamp(0, 1)


def worst_case(
    clean: Tensor,
    attacked: Tensor,
    targets: Tensor,
    task: str,
    threshold: float | Sequence[float],
) -> Tensor:
    """Returns logits of the attacked image, or of the clean one if the attack helped the model.

    An attacker may leave an image unchanged, so an attack never increases accuracy.
    """
    if task == "multiclass":
        better = (attacked.argmax(1) == targets) & (clean.argmax(1) != targets)
    else:
        cuts = torch.as_tensor(threshold).to(clean).logit()
        right, right_clean = (((logits > cuts) == targets).sum(1) for logits in (attacked, clean))
        better = right > right_clean
    return torch.where(better[:, None], clean, attacked)
