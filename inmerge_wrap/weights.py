"""Merging in the weights: a merged one stands in for the parameter while its convolution runs.

The pairs are those that merging after the step would draw, the same for all images. The gradient
goes to the parameter as it falls (straight through).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from inmerge_wrap.counts import Counts
from inmerge_wrap.kernels import layout_of, rows_of
from inmerge_wrap.pairs import (
    choose_sources,
    compare,
    draw_layer,
    draw_noise,
    draw_signs,
    move,
    sent,
    without_autocast,
)
from inmerge_wrap.plan import ConvSite
from inmerge_wrap.settings import NOISE, MergeSettings, Strength

_NOTHING = object()


class Weights:
    """Makes the stand-ins; the numbers of a step change in place, on the network's device."""

    def __init__(
        self, sites: Sequence[ConvSite], device: torch.device, chains: Mapping[int, nn.Module]
    ) -> None:
        """Takes the chains of parametrizations whose hook calls :meth:`computed`, by layer."""
        self.device = device
        self._sites, self._settings, self._chains = sites, MergeSettings(), chains
        # Where each layer has its kernels in tables of all layers.
        ends = accumulate(site.shape[0] for site in sites)
        self._spans = [
            slice(end - site.shape[0], end) for end, site in zip(ends, sites, strict=True)
        ]
        kernels = self._spans[-1].stop
        with torch.device(device):
            self._size = torch.zeros((), dtype=torch.float32)
            # The partner of each kernel, and its sign, which is 0 where it was not drawn.
            self._sources = torch.zeros(kernels, dtype=torch.int64)
            self._signs = torch.zeros((kernels, 1), dtype=torch.int64)
        self._noise: list[Tensor] = []
        # While a convolution runs: its module, what the stand-in hides, and the stand-in.
        self._shadowed: dict[int, tuple[nn.Module, Any, Tensor | None]] = {}
        self._counted: set[int] = set()  # of these, the ones whose computed weight was read

    def set_step(self, step: int, strength: Strength, settings: MergeSettings) -> None:
        """Draws the pairs of a step, as merging after that step would, and sets its strength."""
        self._settings = settings
        self._size.fill_(strength.size)
        seed = settings.seed
        is_signed = settings.direction == "signed"
        # On the host, because a GPU would wait for a launch in every layer.
        sources = torch.zeros_like(self._sources, device="cpu")
        signs = torch.zeros_like(self._signs, device="cpu")
        for site, span in zip(self._sites, self._spans, strict=True):
            targets, partners = draw_layer(site, strength.probability, seed, step)
            sources[span] = torch.arange(site.shape[0], device="cpu")
            sources[span][targets] = partners
            signs[span][targets] = draw_signs(site, len(targets), seed, step) if is_signed else 1
        self._sources.copy_(sent(sources, self.device))
        self._signs.copy_(sent(signs, self.device))
        if settings.direction in NOISE:
            noise = [
                draw_noise(site, site.shape[0], seed, step, self.device) for site in self._sites
            ]
            self._noise = self._noise or noise
            torch._foreach_copy_(self._noise, noise)  # in place, for a graph that repeats the pass

    def draw(self, _: Any) -> Any:
        """Returns a sign that a pass merges: the step has drawn for all batches."""
        return self

    def before(self, number: int, module: nn.Module, counts: Counts | None) -> None:
        """Puts the merged weight before the parameter.

        Raises:
            RuntimeError: If a chain of parametrizations without our hook computes the weight.
        """
        hidden, stand_in = vars(module).get("weight", _NOTHING), None
        chain = chain_of(module)
        if chain is None:
            stand_in = self._stand_in(number, module, module.weight, counts)
            vars(module)["weight"] = stand_in
        elif chain is not self._chains.get(number):  # else ``computed`` follows, when it is read
            raise RuntimeError(bypassed(self._sites[number]))
        self._shadowed[number] = module, hidden, stand_in

    def computed(self, number: int, weight: Tensor, counts: Counts | None) -> Tensor | None:
        """Returns the stand-in of a weight that a parametrization computes."""
        if number not in self._shadowed:  # somebody reads the weight, no convolution runs
            return None
        if number in self._counted:  # a convolution may read its weight several times
            counts = None
        self._counted.add(number)
        return self._stand_in(number, self._shadowed[number][0], weight, counts)

    def after(self, number: int, *_: Any) -> None:
        """Takes the stand-in away, whether the convolution ran or raised.

        Raises:
            RuntimeError: If something else was in its place.
        """
        if number in self._shadowed and not self._taken_away(number):
            raise RuntimeError(bypassed(self._sites[number]))

    def _taken_away(self, number: int) -> bool:
        """Takes a stand-in away, and returns whether it was still in its place."""
        module, hidden, stand_in = self._shadowed.pop(number)
        self._counted.discard(number)
        found = vars(module).pop("weight", None)
        if hidden is not _NOTHING:
            vars(module)["weight"] = hidden
        return found is stand_in

    def end_pass(self) -> None:
        """Takes away what is left: torch calls no hooks after an interrupt from outside."""
        for number in [*self._shadowed]:
            self._taken_away(number)

    def _stand_in(
        self, number: int, module: nn.Module, weight: Any, counts: Counts | None
    ) -> Tensor:
        """Returns the merged weight of a layer, whose gradient goes to ``weight`` as it falls."""
        site, settings = self._sites[number], self._settings
        with torch.no_grad(), without_autocast(self.device):
            kernels = rows_of(module, weight)
            sources, signs = (
                table[self._spans[number]].to(kernels.device)
                for table in (self._sources, self._signs)
            )
            drawn = signs.squeeze(1) != 0
            everyone = torch.arange(len(kernels), device=kernels.device)
            sources = choose_sources(kernels, everyone, sources, site, settings)
            partners = kernels[sources]
            cosines, similar = compare(
                kernels, partners, settings, centred=site.centred, drawn=drawn
            )
            merged = similar & drawn
            noise = self._noise[number] if settings.direction in NOISE else None
            ways = signs if settings.direction == "signed" else None
            size = self._size.to(kernels)
            rows = move(kernels, partners, ways, noise, size, settings).rows
            rows = torch.where(merged.unsqueeze(1), rows, kernels)
            new = weight.detach().clone()
            layout_of(module).put_rows_(new, everyone, rows)
            if counts is not None:
                counts.add(number, drawn.sum(), merged.sum())
                counts.add_cosines(number, cosines, 1, drawn)
        stand_in: Tensor = _StraightThrough.apply(weight, new)
        return stand_in


def chain_of(module: nn.Module) -> nn.Module | None:
    """Returns the chain of parametrizations that computes the weight of a convolution, if any."""
    chains: Any = module.parametrizations if parametrize.is_parametrized(module, "weight") else {}
    return chains["weight"] if chains else None


def bypassed(site: ConvSite) -> str:
    """Returns the message for a weight that is computed where no hook saw it."""
    return (
        f"{site.name}: a parametrization, weight_norm or pruning that came after attach() computes "
        "the weight, which would not be merged: call model.attach(optimizer) again after such a "
        "change"
    )


class _StraightThrough(torch.autograd.Function):
    """Another tensor in the place of a weight, with the gradient to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, stand_in: Tensor) -> Tensor:
        return stand_in.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
