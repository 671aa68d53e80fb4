"""Merging on the outputs of the convolutions, where each image can have its own pairs.

A convolution being linear in its kernels, the gradient is the exact one::

    y_i <- y_i + c_i (y_j - y_i)   is the output of   K_i + c_i (K_j - K_i)          (eq. 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inmerge_wrap.counts import Counts
from inmerge_wrap.inputs import tensors_of
from inmerge_wrap.kernels import rows_of, stream_of
from inmerge_wrap.merging import (
    cyclic_sources,
    draw_bits,
    draw_ways,
    fingerprint,
    mix,
    mix_channels,
)
from inmerge_wrap.pairs import compare, sent, shared_shift, weight_of, without_autocast
from inmerge_wrap.plan import ConvSite
from inmerge_wrap.settings import MergeSettings, Strength
from inmerge_wrap.steps import is_captured

_BLOCK = 8  # channels whose signs are drawn together
# Odd factors that set the images of a batch apart, and the arguments of a call.
_IMAGES, _ARGUMENTS = 0x3C6EF35F, 0x7FEB352D


@dataclass(frozen=True)
class Draw:
    """What one forward pass drew.

    Attributes:
        key: Of the step and the content of the batch, int64, a scalar.
        rows: Images of the batch.
        shares: ``c`` at full size, of all layers, shape (images or 1, channels of all layers).
        shifts: The shared shift of each layer; None in a CUDA graph, which would repeat it.
    """

    key: Tensor
    rows: int
    shares: Tensor
    shifts: Sequence[int] | None
    _converted: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def shares_as(self, output: Tensor) -> Tensor:
        """Returns the shares in the dtype and on the device of an output; converted once a pass."""
        kind = output.dtype, output.device
        if kind not in self._converted:
            self._converted[kind] = self.shares.to(output)
        return self._converted[kind]


class Outputs:
    """Blends the channels; the numbers of a step change in place, on the network's device."""

    def __init__(self, sites: Sequence[ConvSite], device: torch.device) -> None:
        self.device = device
        self._sites, self._settings = sites, MergeSettings()
        # Where each layer has its channels in tables of all layers, filled up to whole blocks.
        widths = [_BLOCK * -(-site.shape[0] // _BLOCK) for site in sites]
        begins = [sum(widths[:number]) for number in range(len(sites))]
        self._spans = [
            slice(begin, begin + site.shape[0]) for begin, site in zip(begins, sites, strict=True)
        ]
        every = [
            (number, place, site.shape[0] // site.pair_groups, mix(stream_of(site), place))
            for number, site in enumerate(sites)
            for place in range(widths[number])
        ]
        # On the host, of each channel: its layer, its place there and the channels of a group.
        host = torch.tensor([*zip(*every, strict=True)], device="cpu")
        self._layers, self._places, self._sizes, keys = host
        self._columns = keys.to(device)
        self._shifts: list[int] = []
        with torch.device(device):
            self._clock = torch.zeros((), dtype=torch.int64)
            self._size = torch.zeros((), dtype=torch.float32)
            self._probability = torch.zeros((), dtype=torch.float32)
            # The partner of each channel, and whose partner it is.
            self._partners = torch.zeros((2, len(every)), dtype=torch.int64)
        # What a layer keeps from before its convolution to after it.
        self._shares: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._biases: dict[int, Tensor] = {}

    def set_step(self, step: int, strength: Strength, settings: MergeSettings) -> None:
        """Draws the shared partners of a step, and sets its strength."""
        self._settings = settings
        self._clock.fill_(mix(settings.seed, step))
        self._size.fill_(strength.size)
        self._probability.fill_(strength.probability)
        self._shifts = [shared_shift(site, settings.seed, step) for site in self._sites]
        shifts = torch.tensor(self._shifts, device="cpu")[self._layers]
        both = torch.stack([shifts, -shifts])
        partners = cyclic_sources(self._places, both, self._sizes)
        self._partners.copy_(sent(partners, self.device))

    def draw(self, inputs: Any) -> Draw:
        """Draws for a forward pass on these inputs."""
        found = [tensor for tensor in tensors_of(inputs) if tensor.ndim]
        content = torch.zeros_like(self._clock)
        for tensor in found:  # of all, because labels may come before the images
            content = content * _ARGUMENTS + fingerprint(tensor.detach()).to(self.device)
            content = content & 0xFFFFFFFF
        rows = len(found[0]) if found else 1
        shifts = None if is_captured() else self._shifts
        return self._drawn(self._clock ^ content, rows, shifts)

    def _drawn(self, key: Tensor, rows: int, shifts: Sequence[int] | None) -> Draw:
        settings = self._settings
        ways = torch.ones((1, len(self._columns)), device=self.device)
        if settings.direction == "signed" or not settings.draws_all:
            images = 1 if settings.shared_sign else rows
            rows_keys = _image_keys(key, images)
            if settings.direction == "signed":
                ways = draw_ways(rows_keys, self._columns[::_BLOCK])
            if not settings.draws_all:
                chances = draw_bits(rows_keys, self._columns) >> 8
                ways = ways * (chances < self._probability * 2**24)
        shares = ways * (1.0 - self._size if settings.size == "merge_weight" else 1.0)
        if torch.compiler.is_compiling():
            shares = _opaque(shares)
        return Draw(key, rows, shares, shifts)

    def before(self, number: int, module: nn.Module, _: Counts | None) -> None:
        """Keeps what the blend needs of the parameters of a convolution."""
        if self._settings.compares or self._settings.size != "merge_weight":
            self._shares[number] = self._shares_of(number, module)
        if isinstance(bias := module.bias, Tensor):
            self._biases[number] = bias.clone()

    def after(
        self, number: int, draw: Draw | None, output: Any, counts: Counts | None
    ) -> Tensor | None:
        """Returns the output of a convolution with its channels blended."""
        if draw is None or not isinstance(output, Tensor):
            return None  # no tensor, for instance because the convolution raised
        dims = len(self._sites[number].shape) - 2
        batched = output if output.ndim == dims + 2 else output.unsqueeze(0)
        mixed = self._mixed(number, draw, batched, counts)
        return mixed.reshape(output.shape) if batched is not output else mixed

    def end_pass(self) -> None:
        """Forgets what a convolution that raised has left."""
        self._shares.clear()
        self._biases.clear()

    def _mixed(self, number: int, draw: Draw, output: Tensor, counts: Counts | None) -> Tensor:
        """Blends the channels of a layer's output, (N, C, *map)."""
        site, rows = self._sites[number], len(output)
        if draw.rows != rows:  # a network that folds time or views into the batch
            draw = self._drawn(draw.key, rows, draw.shifts)
        local, cosines = self._shares.pop(number, (None, None))
        span = self._spans[number]
        if local is None:
            shares = draw.shares_as(output)[:, span]
        else:
            shares = draw.shares[:, span].to(output.device) * local
        size = site.shape[0] // site.pair_groups
        if not self._settings.shared_partner:
            own = _image_keys(draw.key + 1, rows)
            bits = draw_bits(own, self._columns[span][:1])
            shift: Any = 1 + (bits >> 8).to(output.device) % (size - 1)
        elif draw.shifts is not None and not torch.compiler.is_compiling():
            shift = draw.shifts[number]
        else:
            shift = tuple(self._partners[:, span].to(output.device))
        if counts is not None and rows:
            self._count(number, rows, shares, counts)
            if cosines is not None:
                counts.add_cosines(number, cosines, rows)
        bias = self._biases.pop(number, None)
        return mix_channels(output, shares, shift, site.pair_groups, bias)

    def _shares_of(self, number: int, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Returns what the weights say of the shares of a layer, and the cosines that it compared.

        Both float32, shape (C,).
        """
        site, settings = self._sites[number], self._settings
        with torch.no_grad(), without_autocast(self.device):
            kernels = rows_of(module, module.weight)
            partners = kernels[self._partners[0, self._spans[number]].to(kernels.device)]
            shares, cosines = torch.ones_like(kernels[:, 0]), None
            if settings.size != "merge_weight":
                weight = weight_of(kernels, partners, None, self._size.to(kernels), settings)
                shares = 1.0 - torch.as_tensor(weight).to(kernels).expand(len(kernels), 1)[:, 0]
            if settings.compares:
                cosines, similar = compare(kernels, partners, settings, centred=site.centred)
                shares = shares * similar
        return shares, cosines

    def _count(self, number: int, rows: int, shares: Tensor, counts: Counts) -> None:
        """Counts images x channels of a layer that acted, and those whose channel moved."""
        settings, drawn = self._settings, rows * self._sites[number].shape[0]
        if settings.compares or not settings.draws_all:
            counts.add(number, drawn, (shares != 0).sum() * (rows // len(shares)))
        else:
            counts.add_all(number, drawn)


@torch.library.custom_op("inmerge_wrap::opaque", mutates_args=())
def _opaque(values: Tensor) -> Tensor:
    """Returns a copy of small values, through which no compiler looks.

    It would draw them again in the backward pass, not once but for every pixel.
    """
    return values.clone()


@_opaque.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def _image_keys(key: Tensor, images: int) -> Tensor:
    """Returns a key for each image of a batch, int64, shape (images,)."""
    return (key + torch.arange(images, device=key.device) * _IMAGES) & 0xFFFFFFFF
