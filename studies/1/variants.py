"""Two variants of merging that the first study tried, and that are not part of the library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inmerge_wrap import Schedule, plan_merging
from studies.common.methods import Follower, Method, Training


@dataclass(frozen=True)
class Variant(Method):
    """Merges toward cluster means, or blends directions alone."""

    name: ClassVar[str] = "variant"
    toward: Literal["clusters", "unit"]

    def follow(self, training: Training) -> Follower:
        return _Varying(training, self.toward)


class _Varying(Follower):
    def __init__(self, training: Training, toward: Literal["clusters", "unit"]) -> None:
        plan = plan_merging(training.network)
        self.convolutions = [training.network.get_submodule(site.name) for site in plan.merged]
        self.fade = Schedule(end=training.epochs * training.steps, decay="cosine")
        self.generator = torch.Generator().manual_seed(training.seed)
        self.toward = toward

    def after_step(self, step: int) -> None:
        for convolution in self.convolutions:
            merge_variant_(
                convolution.weight,  # type: ignore[arg-type]
                self.generator,
                probability=0.3 * self.fade.level(step),
                toward=self.toward,
            )


@torch.no_grad()
def merge_variant_(
    weight: Tensor,
    generator: torch.Generator,
    *,
    probability: float,
    merge_weight: float = 0.8,
    toward: str,
) -> None:
    """Merges toward ``clusters`` or ``unit`` kernels, in place.

    ``clusters``: each drawn kernel moves toward the mean of those kernels that share its most
    similar one of C_out / 8 drawn at random. ``unit``: the most similar half of random pairs is
    blended by direction, as BatchNorm sees kernels; each keeps its norm.
    """
    kernels = weight.flatten(1)
    norms = kernels.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = kernels / norms
    drawn = (torch.rand(len(kernels), generator=generator) < probability).nonzero().flatten()
    if toward == "clusters":
        centres = torch.randperm(len(kernels), generator=generator)[: max(1, len(kernels) // 8)]
        cluster = (unit @ unit[centres].T).argmax(dim=1)
        sums = kernels.new_zeros(len(centres), kernels.shape[1]).index_add_(0, cluster, kernels)
        means = sums / cluster.bincount(minlength=len(centres)).clamp_min(1).unsqueeze(1)
        blended = torch.lerp(means[cluster[drawn]], kernels[drawn], merge_weight)
    else:
        partners = torch.randint(len(kernels) - 1, (len(drawn),), generator=generator)
        partners += partners >= drawn  # never the kernel itself
        cosines = (unit[drawn] * unit[partners]).sum(1)
        similar = cosines >= (cosines.median() if len(cosines) else 0.0)
        drawn, partners = drawn[similar], partners[similar]
        mixed = F.normalize(torch.lerp(unit[partners], unit[drawn], merge_weight), dim=1)
        blended = norms[drawn] * mixed
    weight.index_copy_(0, drawn, blended.unflatten(1, weight.shape[1:]))
