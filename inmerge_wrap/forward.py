"""Merging in the forward pass: hooks on the merged convolutions, and no weight is written.

On the *outputs*, a convolution being linear in its kernels, each image can have its own pairs, and
the gradient is the exact one::

    y_i <- y_i + c_i (y_j - y_i)   is the output of   K_i + c_i (K_j - K_i)          (eq. 3)

In the *weights*, the merged weight stands in for the parameter while its convolution runs, and the
gradient goes to the parameter as it falls (straight through).

All numbers that change from step to step are tensors, so that a compiled network does not compile
again, and draws are functions of the seed, the step, the content of the batch, the layer, the image
and the channel: a pass that is run again in the backward pass finds the draws of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from inmerge_wrap.counts import Counts
from inmerge_wrap.inputs import tensors_of
from inmerge_wrap.kernels import deciding_parameter, layout_of, modules_of, rows_of, stream_of
from inmerge_wrap.merging import (
    cyclic_sources,
    draw_bits,
    draw_ways,
    fingerprint,
    mix,
    mix_channels,
)
from inmerge_wrap.pairs import (
    choose_sources,
    compare,
    draw_layer,
    draw_noise,
    draw_signs,
    move,
    shared_shift,
    weight_of,
    without_autocast,
)
from inmerge_wrap.plan import ConvSite
from inmerge_wrap.settings import NOISE, MergeSettings, Strength

_NOTHING = object()

_BLOCK = 8  # channels whose signs are drawn together
# Odd factors that set the images of a batch apart, and the arguments of a call.
_IMAGES, _ARGUMENTS = 0x3C6EF35F, 0x7FEB352D


@dataclass(frozen=True)
class _Draw:
    """What one forward pass drew on the outputs.

    Attributes:
        key: Of the step and the content of the batch, int64, a scalar.
        rows: Images of the batch.
        shares: ``c`` at full size, of all layers, shape (images or 1, channels of all layers).
        shifts: The shared shift of each layer.
    """

    key: Tensor
    rows: int
    shares: Tensor
    shifts: Sequence[int]
    _converted: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def shares_as(self, output: Tensor) -> Tensor:
        """Returns the shares in the dtype and on the device of an output; converted once a pass."""
        kind = output.dtype, output.device
        if kind not in self._converted:
            self._converted[kind] = self.shares.to(output)
        return self._converted[kind]


class _State:
    """The numbers of a step, on the device of the network; their content changes in place."""

    def __init__(self, sites: Sequence[ConvSite], device: torch.device) -> None:
        self.device = device
        keys = [mix(stream_of(site), number) for site in sites for number in range(_width(site))]
        channels = len(keys)
        with torch.device(device):
            self.columns = torch.tensor(keys, dtype=torch.int64)
            self.clock = torch.zeros((), dtype=torch.int64)
            self.size = torch.zeros((), dtype=torch.float32)
            self.probability = torch.zeros((), dtype=torch.float32)
            self.shifts = torch.zeros(len(sites), dtype=torch.int64)
            # The partner of each channel or kernel; on the outputs, whose partner it is; in the
            # weights, whether it was drawn, and its sign.
            self.sources = torch.zeros(channels, dtype=torch.int64)
            self.givers = torch.zeros(channels, dtype=torch.int64)
            self.drawn = torch.zeros(channels, dtype=torch.bool)
            self.signs = torch.ones((channels, 1), dtype=torch.int64)
            self.noise: list[Tensor] = []
        # On the host, of each channel: its layer, its place there and the channels of a group.
        layers = [number for number, site in enumerate(sites) for _ in range(_width(site))]
        places = [place for site in sites for place in range(_width(site))]
        sizes = [sites[number].shape[0] // sites[number].pair_groups for number in layers]
        self.layers, self.places, self.sizes = torch.tensor([layers, places, sizes], device="cpu")
        self.counts = Counts(len(sites), device)


class ForwardMerge:
    """Merges in the forward pass of one network."""

    def __init__(self, sites: Sequence[ConvSite]) -> None:
        self.is_on = False  # whether the current step merges
        self._sites = sites
        # Where each layer has its channels in tables of all layers, each filled up to whole blocks.
        self._spans, begin = [], 0
        for site in sites:
            self._spans.append(slice(begin, begin + site.shape[0]))
            begin += _width(site)
        self._settings = MergeSettings()
        self._modules: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []
        self._chains: dict[int, nn.Module] = {}  # of parametrizations, which compute a weight
        self._state: _State | None = None
        self._shifts: list[int] = []
        self._draw: _Draw | None = None  # of the forward pass that runs
        self._replayed: _Draw | None = None  # of the one whose backward pass runs
        self._is_lost = False  # whether the last pass returned nothing that leads to its backward
        # Of a layer, from before its convolution to after it.
        self._shares: dict[int, Tensor] = {}
        self._biases: dict[int, Tensor] = {}
        self._shadowed: dict[int, tuple[Any, Any]] = {}  # what a stand-in hides, and the stand-in

    def __getstate__(self) -> dict[str, Any]:
        # A copy is driven by no optimizer, for which a compiled forward pass does not look.
        return vars(self) | {"is_on": False}

    def install(self, network: nn.Module) -> None:
        """Puts the hooks on the convolutions of the plan, behind all others that are there."""
        self.uninstall()
        self._modules = modules_of(network, self._sites)
        for number, module in enumerate(self._modules):
            self._hooks += [
                module.register_forward_pre_hook(partial(self._before, number)),
                module.register_forward_hook(partial(self._after, number), always_call=True),
            ]
            if (chain := _chain_of(module)) is not None:
                self._chains[number] = chain
                self._hooks.append(chain.register_forward_hook(partial(self._computed, number)))

    def uninstall(self) -> None:
        """Takes the hooks off the network, when no optimizer drives the merging any more."""
        self.is_on = False
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._modules, self._chains = [], [], {}

    def replaced(self, network: nn.Module) -> tuple[str, nn.Module] | None:
        """Returns the name of a convolution that another module has replaced, and that module."""
        now = modules_of(network, self._sites) if self._modules else []
        for site, module, current in zip(self._sites, self._modules, now, strict=False):
            if current is not module:
                return site.name, current
        return None

    # -- from step to step ------------------------------------------------------------------------

    def set_step(self, step: int, strength: Strength | None, settings: MergeSettings) -> None:
        """Prepares the next step: draws what does not depend on the images, and sets the strength.

        Without a strength the step does not merge.
        """
        self._settings, self.is_on = settings, strength is not None
        if strength is None:
            return
        device = next(self._modules[0].parameters()).device
        if self._state is None or self._state.device != device:
            before, self._state = self._state, _State(self._sites, device)
            if before is not None:
                self._state.counts = before.counts.moved(device)
        state = self._state
        state.clock.fill_(mix(settings.seed, step))
        state.size.fill_(strength.size)
        state.probability.fill_(strength.probability)
        if settings.mode == "outputs":
            self._shifts = [shared_shift(site, settings.seed, step) for site in self._sites]
            shifts = torch.tensor(self._shifts, device="cpu")
            state.shifts.copy_(shifts)
            shifts = shifts[state.layers]
            state.sources.copy_(cyclic_sources(state.places, shifts, state.sizes))
            state.givers.copy_(cyclic_sources(state.places, -shifts, state.sizes))
        else:
            self._draw_kernels(step, strength, settings, state)

    def _draw_kernels(
        self, step: int, strength: Strength, settings: MergeSettings, state: _State
    ) -> None:
        """Draws the pairs of a step in the weights, as merging after that step would."""
        sources = torch.zeros_like(state.sources, device="cpu")
        drawn = torch.zeros_like(state.drawn, device="cpu")
        signs = torch.ones_like(state.signs, device="cpu")
        for site, span in zip(self._sites, self._spans, strict=True):
            targets, partners = draw_layer(site, strength.probability, settings.seed, step)
            sources[span] = torch.arange(site.shape[0], device="cpu")
            sources[span][targets] = partners
            drawn[span][targets] = True
            if settings.direction == "signed":
                signs[span][targets] = draw_signs(site, len(targets), settings.seed, step)
        state.sources.copy_(sources)
        state.drawn.copy_(drawn)
        state.signs.copy_(signs)
        if settings.direction in NOISE:
            state.noise = [
                draw_noise(site, site.shape[0], settings.seed, step, state.device)
                for site in self._sites
            ]

    # -- one forward pass -------------------------------------------------------------------------

    def begin(self, inputs: Any) -> None:
        """Draws for a forward pass of the network on these inputs."""
        assert self._state is not None, "set_step comes first"
        state = self._state
        if self._settings.mode != "outputs":  # the step has drawn for all batches
            self._draw = _Draw(state.clock, 1, state.size, self._shifts)
            return
        found = [tensor for tensor in tensors_of(inputs) if tensor.ndim]
        content = torch.zeros_like(state.clock)
        for tensor in found:  # of all, because labels may come before the images
            content = content * _ARGUMENTS + fingerprint(tensor.detach()).to(state.device)
            content = content & 0xFFFFFFFF
        rows = len(found[0]) if found else 1
        self._draw = self._drawn(state.clock ^ content, rows, self._shifts)

    def end(self, outputs: Any) -> None:
        """Ends a forward pass; the passes that its backward pass repeats will draw the same."""
        draw, self._draw = self._draw, None
        if self._state is not None:
            self._state.counts.end_pass()
        for number in [*self._shadowed]:  # torch calls no hooks after an interrupt from outside
            self._unshadow(number)
        if draw is None or torch.compiler.is_compiling():  # a compiled graph repeats what it drew
            return
        nodes = [t.grad_fn for t in tensors_of(outputs) if t.grad_fn is not None]
        self._is_lost = not nodes and torch.is_grad_enabled()
        for node in nodes:
            node.register_prehook(partial(self._replay, draw))

    def _replay(self, draw: _Draw, _: Any) -> None:
        self._replayed = draw
        after_backward(self._forget)

    def _forget(self) -> None:
        self._replayed = None

    def _current(self) -> _Draw | None:
        """Returns the draw of the pass that runs, or of the one that a checkpoint repeats."""
        return self._replayed if self._draw is None and _in_backward() else self._draw

    def _drawn(self, key: Tensor, rows: int, shifts: Sequence[int]) -> _Draw:
        """Returns the draw of a batch on the outputs."""
        state, settings = self._state, self._settings
        assert state is not None
        ways = torch.ones((1, len(state.columns)), device=state.device)
        if settings.direction == "signed" or not settings.draws_all:
            images = 1 if settings.shared_sign else rows
            rows_keys = _image_keys(key, images)
            if settings.direction == "signed":
                ways = draw_ways(rows_keys, state.columns[::_BLOCK])
            if not settings.draws_all:
                chances = draw_bits(rows_keys, state.columns) >> 8
                ways = ways * (chances < state.probability * 2**24)
        shares = ways * (1.0 - state.size if settings.size == "merge_weight" else 1.0)
        if torch.compiler.is_compiling():
            shares = _opaque(shares)
        return _Draw(key, rows, shares, shifts)

    # -- the hooks of a convolution ---------------------------------------------------------------

    def _before(self, number: int, module: nn.Module, _: Any) -> None:
        """Does what needs the parameters, where they are whole.

        FSDP2 gathers them for the module alone, and frees them before the hook that comes after it.
        """
        if self._is_lost and self._current() is None and _in_backward():
            raise RuntimeError(
                "activation checkpointing repeats a forward pass whose outputs hold no tensor that "
                "can be found, so that it would draw other pairs: return tensors, tuples, lists, "
                "dicts or objects with tensors as attributes"
            )
        if self._acting(module) is None:
            return
        settings = self._settings
        if settings.mode == "weights":
            held, stand_in = vars(module), None
            if _chain_of(module) is None:
                stand_in = self._stand_in(number, module.weight, module)
            self._shadowed[number] = held.get("weight", _NOTHING), stand_in
            if stand_in is not None:
                held["weight"] = stand_in
            return
        if settings.compares or settings.size != "merge_weight":
            self._shares[number] = self._shares_of(number, module)
        if isinstance(bias := module.bias, Tensor):
            self._biases[number] = bias.clone()

    def _after(self, number: int, module: nn.Module, _: Any, output: Any) -> Tensor | None:
        """Removes the stand-in, or blends the channels of the output."""
        if number in self._shadowed:
            hooked = (None, self._chains.get(number))
            if not self._unshadow(number) or _chain_of(module) not in hooked:
                raise RuntimeError(
                    f"{self._sites[number].name}: a parametrization, weight_norm or pruning that "
                    "came after attach() computes the weight, which would not be merged: call "
                    "model.attach(optimizer) again after such a change"
                )
            return None
        draw = self._acting(module)
        if draw is None or self._settings.mode != "outputs" or not isinstance(output, Tensor):
            return None  # no tensor, for instance because the convolution raised
        dims = len(self._sites[number].shape) - 2
        batched = output if output.ndim == dims + 2 else output.unsqueeze(0)
        mixed = self._mixed(number, draw, batched)
        return mixed.reshape(output.shape) if batched is not output else mixed

    def _acting(self, module: nn.Module) -> _Draw | None:
        """Returns the draw that acts on a convolution; none in eval mode and on a frozen one."""
        draw = self._current()
        if draw is None or not module.training or not deciding_parameter(module).requires_grad:
            return None
        return draw

    def _unshadow(self, number: int) -> bool:
        """Takes the stand-in away, and returns whether it was still in its place."""
        (before, stand_in), held = self._shadowed.pop(number), vars(self._modules[number])
        found = held.pop("weight", None)
        if before is not _NOTHING:
            held["weight"] = before
        return found is stand_in

    def _mixed(self, number: int, draw: _Draw, output: Tensor) -> Tensor:
        """Blends the channels of a layer's output, (N, C, *map)."""
        site, state = self._sites[number], self._state
        assert state is not None
        rows = len(output)
        if draw.rows != rows:  # a network that folds time or views into the batch
            draw = self._drawn(draw.key, rows, draw.shifts)
        local, span = self._shares.pop(number, None), self._spans[number]
        if local is None:
            shares = draw.shares_as(output)[:, span]
        else:
            shares = draw.shares[:, span].to(output.device) * local
        size = site.shape[0] // site.pair_groups
        if not self._settings.shared_partner:
            own = _image_keys(draw.key + 1, rows)
            bits = draw_bits(own, state.columns[span][:1])
            shift: Any = 1 + (bits >> 8).to(output.device) % (size - 1)
        elif not torch.compiler.is_compiling():
            shift = draw.shifts[number]
        else:
            shift = tuple(x[span].to(output.device) for x in (state.sources, state.givers))
        self._count(number, rows, shares)
        bias = self._biases.pop(number, None)
        return mix_channels(output, shares, shift, site.pair_groups, bias)

    def _shares_of(self, number: int, module: nn.Module) -> Tensor:
        """Returns what the weights say of the shares of a layer, float32, shape (C,)."""
        site, settings, state = self._sites[number], self._settings, self._state
        assert state is not None
        with torch.no_grad(), without_autocast(state.device):
            kernels = rows_of(module, module.weight)
            everyone = torch.arange(len(kernels), device=kernels.device)
            shift = state.shifts[number].to(kernels.device)
            partners = kernels[cyclic_sources(everyone, shift, len(kernels) // site.pair_groups)]
            shares = torch.ones_like(kernels[:, 0])
            if settings.size != "merge_weight":
                weight = weight_of(kernels, partners, None, state.size.to(kernels), settings)
                shares = 1.0 - torch.as_tensor(weight).to(kernels).expand(len(kernels), 1)[:, 0]
            if settings.compares:
                cosines, similar = compare(kernels, partners, settings, centred=site.centred)
                if not _in_backward():
                    draw = self._current()
                    images = 1 if draw is None else draw.rows
                    state.counts.add_cosines(number, cosines, images)
                shares = shares * similar
        return shares

    def _stand_in(self, number: int, weight: Any, module: nn.Module) -> Tensor:
        """Returns the merged weight of a layer, whose gradient goes to ``weight`` as it falls."""
        site, settings, state = self._sites[number], self._settings, self._state
        assert state is not None
        span = self._spans[number]
        with torch.no_grad(), without_autocast(state.device):
            kernels = rows_of(module, weight)
            device = kernels.device
            sources, drawn, signs = (
                values[span].to(device) for values in (state.sources, state.drawn, state.signs)
            )
            everyone = torch.arange(len(kernels), device=device)
            sources = choose_sources(kernels, everyone, sources, site, settings)
            partners = kernels[sources]
            cosines, similar = compare(
                kernels, partners, settings, centred=site.centred, drawn=drawn
            )
            merged = similar & drawn
            noise = state.noise[number] if settings.direction in NOISE else None
            ways = signs if settings.direction == "signed" else None
            size = state.size.to(kernels)
            rows = move(kernels, partners, ways, noise, size, settings).rows
            rows = torch.where(merged.unsqueeze(1), rows, kernels)
            new = weight.detach().clone()
            layout_of(module).put_rows_(new, everyone, rows)
            if not _in_backward():
                state.counts.add(number, drawn.sum(), merged.sum())
                state.counts.add_cosines(number, cosines, 1, drawn)
        stand_in: Tensor = _StraightThrough.apply(weight, new)
        return stand_in

    def _computed(self, number: int, module: nn.Module, _: Any, weight: Tensor) -> Tensor | None:
        """Returns the stand-in of a weight that a parametrization computes."""
        if number not in self._shadowed:  # somebody reads the weight, no convolution runs
            return None
        return self._stand_in(number, weight, self._modules[number])

    # -- what acted -------------------------------------------------------------------------------

    def _count(self, number: int, rows: int, shares: Tensor) -> None:
        """Counts images x channels of a layer that acted, and those whose channel moved."""
        if _in_backward() or not rows:  # a pass that is repeated has been counted
            return
        settings, drawn = self._settings, rows * self._sites[number].shape[0]
        assert self._state is not None
        counts = self._state.counts
        if settings.compares or not settings.draws_all:
            counts.add(number, drawn, (shares != 0).sum() * (rows // len(shares)))
        else:
            counts.add_all(number, drawn)

    def take_counts(self) -> tuple[Tensor, Tensor] | None:
        """Returns what acted since the last call, see :meth:`Counts.take`; None if nothing ran."""
        return None if self._state is None else self._state.counts.take()


class _StraightThrough(torch.autograd.Function):
    """Another tensor in the place of a weight, with the gradient to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, stand_in: Tensor) -> Tensor:
        return stand_in.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@torch.library.custom_op("inmerge_wrap::opaque", mutates_args=())
def _opaque(values: Tensor) -> Tensor:
    """Returns a copy of small values, through which no compiler looks.

    It would draw them again in the backward pass, not once but for every pixel.
    """
    return values.clone()


@_opaque.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def _chain_of(module: nn.Module) -> nn.Module | None:
    """Returns the chain of parametrizations that computes the weight of a convolution, if any."""
    chains: Any = module.parametrizations if parametrize.is_parametrized(module, "weight") else {}
    return chains["weight"] if chains else None


def _width(site: ConvSite) -> int:
    """Returns the channels of a layer, filled up to whole blocks."""
    return _BLOCK * -(-site.shape[0] // _BLOCK)


def _image_keys(key: Tensor, images: int) -> Tensor:
    """Returns a key for each image of a batch, int64, shape (images,)."""
    return (key + torch.arange(images, device=key.device) * _IMAGES) & 0xFFFFFFFF


def _in_backward() -> bool:
    """Returns whether autograd runs a backward pass, in which checkpoints repeat forward passes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def after_backward(call: Callable[[], None]) -> None:
    """Calls a function when the backward pass that runs is over; at once if none does."""
    if _in_backward():
        torch.autograd.Variable._execution_engine.queue_callback(call)
    else:
        call()
