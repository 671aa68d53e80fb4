"""Adversarial attacks on pixels: FGSM and PGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inmerge_wrap.robustness.effects import Draws

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


def attack_batch(
    attack: Attack,
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    *,
    task: str,
    draws: Draws,
) -> Tensor:
    """Returns pixels in [0, 1] within ``attack.eps`` of the images.

    The model maps pixels to checked logits, with the normalisation inside, so that the bound is in
    pixel units; the targets are what ``check_targets`` returns.
    """
    low, high = (images - attack.eps).clamp_min(0), (images + attack.eps).clamp_max(1)
    moved, steps, size = images.detach(), attack.steps, attack.step_size
    if attack.name == "fgsm":
        steps, size = 1, attack.eps
    else:
        start = draws.uniform(*images.shape[1:], like=images)
        moved = (images + attack.eps * (2 * start - 1)).clamp(low, high)
    size = 2.5 * attack.eps / steps if size is None else size
    for _ in range(steps):
        with torch.enable_grad():
            pixels = moved.requires_grad_()
            (gradient,) = torch.autograd.grad(_loss(model(pixels), targets, task), pixels)
        moved = (moved.detach() + size * gradient.sign()).clamp(low, high)
    return moved


def _loss(logits: Tensor, targets: Tensor, task: str) -> Tensor:
    """Returns the summed cross-entropy of a batch; unknown labels (NaN) do not count."""
    if task == "multiclass":
        return F.cross_entropy(logits, targets, reduction="sum")
    known = (~targets.isnan()).to(logits)
    return F.binary_cross_entropy_with_logits(
        logits, targets.nan_to_num().to(logits), weight=known, reduction="sum"
    )


def worst_case(
    clean: Tensor, attacked: Tensor, targets: Tensor, task: str, threshold: float | Sequence[float]
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
