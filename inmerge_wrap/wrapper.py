"""The wrapper: the one stateful object of the library."""

from __future__ import annotations

import inspect
import math
import re
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, cast
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from inmerge_wrap import native
from inmerge_wrap.discovery import ConvSite, MergePlan, Pattern, plan_merging
from inmerge_wrap.kernels import (
    Blend,
    Kernels,
    all_native,
    check_compiler,
    gathered,
    kernel_parameters,
    stored_kernels,
)
from inmerge_wrap.merging import check_range, draw_layers, nearest_kernels
from inmerge_wrap.optimizers import (
    Attachment,
    averaged_sequences,
    first_moments,
    held_parameters,
    is_nested_step,
    is_registered,
    reshard,
    stepping_optimizer,
)
from inmerge_wrap.recalibration import recalibrate
from inmerge_wrap.replicas import check_replicas
from inmerge_wrap.report import LayerSnapshot, MergeReport, Tally
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.similarity import effective_rank, read_kernels
from inmerge_wrap.thresholds import Fixed, Threshold, ZScore, as_threshold

__all__ = ["CollapseWarning", "InMergeWrapper", "NoEffectWarning"]

_STATE_FORMAT = 1
_PATIENCE = 100  # passes after which a run without effect is told so
_NEGLIGIBLE = 1e-3  # share of merged pairs below which a run is called a plain run
_COLLAPSED = 0.5  # of its first effective rank, below which a layer is called collapsing
_IDLE_FORWARDS = {False: 10, True: 1000}  # merged before or attached -> forwards without a pass


class NoEffectWarning(UserWarning):
    """Merging was asked for and does not happen."""


class CollapseWarning(UserWarning):
    """Merging is making the kernels of a layer copies of each other."""


class _Work(NamedTuple):
    """What one step of some layers merges, and with what."""

    sites: Sequence[ConvSite]
    stored: Sequence[Kernels]
    drawn: Tensor  # as of draw_layers, but with the number of the layer
    pairs: list[int]
    alpha: float
    optimizer: Optimizer | None
    skip: Tensor | None  # a scalar on the device, non-zero for no merge


class InMergeWrapper(nn.Module):
    """Merges similar kernels inside a CNN after each optimizer step (arXiv 2502.20516).

    The wrapped network computes what it computed before; :meth:`attach` makes an optimizer merge
    after each of its steps. The wrapper holds no parameter and no copy of one.

    >>> import timm, torch
    >>> from inmerge_wrap import InMergeWrapper
    >>> model = InMergeWrapper(timm.create_model("resnet18", num_classes=7))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = model.attach(optimizer)

    Unknown attributes are those of the network, so that timm's optimizer factory and training
    code see its configuration. ``no_weight_decay`` and ``group_matcher`` answer in the names of
    the wrapper's own parameters.

    Args:
        module: The network, on any device, before it is parallelised.
        merge_weight: alpha in [0, 1], the share of a kernel that stays.
        similarity_threshold: tau in [-1, 1]: pairs merge where their cosine is above it; or a
            rule that adapts to the layer, :class:`ZScore` or :class:`Quantile`.
        merge_probability: p in [0, 1], per kernel and step.
        schedule: When merging runs and how strongly; the default is every step alike.
        partner: ``"random"``, any other kernel of the group (the paper), or ``"most_similar"``.
        keep_norm: Scale each blended kernel to its norm before the blend. The paper does not.
        merge_momentum: Blend the first moments of the optimizer (SGD's momentum, Adam's
            ``exp_avg``) like the weights, so that the next step continues from the merged point.
            Second moments stay: they scale the steps of an entry and say nothing of its direction.
        compiled: Compile what a pass does, native code for a CPU, torch.compile for a GPU; the
            results are equal up to rounding. Needs a C++ compiler and a second here on a CPU, on
            a GPU Triton and some seconds here and in the first pass.
        shallow_layers: L_s, first convolutions left alone; see :func:`plan_merging`.
        example_input: See :func:`plan_merging`, as are ``include``, ``exclude``, ``also_merge``.
        plan: A ready plan, instead of the arguments of :func:`plan_merging`.
        seed: Of the draws, in [0, 2**32); the same on every process. The draws depend on nothing
            but the seed, the step and the layer, and never touch the global generators.
        inspect_every: Record similarity and effective rank of each layer in :attr:`history` every
            so many passes, and warn before a layer collapses; 0 never does. Each inspection waits
            for the device.
        check_replicas_every: Compare the merged weights of all processes at the first step and
            every so many steps after it, and raise where they differ; 0 never does. Each
            comparison waits for the device.

    Raises:
        ValueError: If an argument is out of range, or there is nothing to merge.
        RuntimeError: If ``compiled`` is asked for and can not be had here.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        merge_weight: float = 0.8,
        similarity_threshold: float | Threshold = 0.3,
        merge_probability: float = 0.3,
        schedule: Schedule | None = None,
        partner: Literal["random", "most_similar"] = "random",
        keep_norm: bool = False,
        merge_momentum: bool = False,
        compiled: bool = False,
        shallow_layers: int | float = 0.625,
        example_input: Any = None,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] = (),
        also_merge: Collection[str] = (),
        plan: MergePlan | None = None,
        seed: int = 0,
        inspect_every: int = 100,
        check_replicas_every: int = 0,
    ) -> None:
        super().__init__()
        self.merge_weight = merge_weight
        self.similarity_threshold: Threshold = similarity_threshold  # type: ignore[assignment]
        self.merge_probability = merge_probability
        self.schedule = schedule or Schedule()
        self.partner = partner
        self.keep_norm = keep_norm
        self.merge_momentum = merge_momentum
        self.seed = seed
        self.inspect_every = inspect_every
        self.check_replicas_every = check_replicas_every
        if plan is None:
            plan = plan_merging(
                module,
                shallow_layers=shallow_layers,
                example_input=example_input,
                include=include,
                exclude=exclude,
                also_merge=also_merge,
            )
        elif (
            (shallow_layers, include) != (0.625, None)
            or example_input is not None
            or exclude
            or also_merge
        ):
            raise ValueError("a plan decides what is merged: give either a plan or its arguments")
        _check_plan(module, plan)
        self.module = module
        self.plan = plan
        self.compiled = compiled
        self.history: list[LayerSnapshot] = []
        self._snapshots: dict[str, tuple[LayerSnapshot, LayerSnapshot]] = {}  # first, last
        self._last_merged: dict[int, Tensor] = {}  # layer -> which pairs of its last step merged
        self._tally = Tally(len(plan.merged))
        self._attached: list[Attachment] = []
        # Of this process, whatever a checkpoint says.
        self._steps_here, self._passes_here = 0, [0] * len(plan.merged)
        self._idle_forwards = 0
        self._warned: set[str] = set()
        self.register_state_dict_post_hook(_put_counter_last)
        self.register_load_state_dict_pre_hook(_adapt_state_dict)

    @classmethod
    def recommended(cls, module: nn.Module, *, total_steps: int, **settings: Any) -> InMergeWrapper:
        """A setting that merges and was level with plain training in docs/evidence.md.

        Pairs merge that are more alike than chance, in layers of any width (:class:`ZScore` of 2),
        and p fades out over the training, so that BatchNorm's statistics fit the weights at its
        end. The constructor's own defaults are the paper's.

        Args:
            module: As of the constructor.
            total_steps: Optimizer steps of the whole training.
            **settings: Any argument of the constructor, instead of what is recommended.

        Raises:
            ValueError: If ``total_steps`` is not positive, and as of the constructor.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps must be a count of steps >= 1, got {total_steps}")
        chosen: dict[str, Any] = {
            "similarity_threshold": ZScore(2.0),
            "schedule": Schedule(end=total_steps, decay="cosine"),
        }
        return cls(module, **{**chosen, **settings})

    # -- the network ------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network."""
        if self.training and torch.is_grad_enabled():
            # A counter would make torch.compile specialise on its value and compile every step.
            if not (self._attached and torch.compiler.is_compiling()):
                self._expect_a_merge()
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("module"), name)
        if name == "no_weight_decay":
            return lambda: {f"module.{parameter}" for parameter in value()}
        if name == "group_matcher":
            return lambda *args, **kwargs: _prefixed_matcher(value(*args, **kwargs))
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        network = vars(self).get("_modules", {}).get("module")
        part = isinstance(value, nn.Module | nn.Parameter) and name != "module"
        if part and hasattr(network, name):
            raise AttributeError(
                f"the network has a {name} of its own, which its forward pass would go on using: "
                f"set it there, model.module.{name} = ..., and before wrapping if it is to merge"
            )
        if name == "plan" and "plan" in vars(self):
            raise AttributeError(
                "the plan stays, for the statistics are those of its layers: wrap the network anew"
            )
        if name == "compiled" and value:
            self._check_compiler()
        super().__setattr__(name, _checked(name, value))

    def _check_compiler(self) -> None:
        check_compiler(self._parameters_of(self.plan.merged[0])[0].device)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the network takes any keyword: Hugging Face's Trainer would ask the wrapper's."""
        own = getattr(self.module, "accepts_loss_kwargs", None)
        parameters = inspect.signature(self.module.forward).parameters.values()
        return any(p.kind is p.VAR_KEYWORD for p in parameters) if own is None else own

    # -- merging ----------------------------------------------------------------------------

    def attach(self, optimizer: Any) -> RemovableHandle:
        """Merges after each step of ``optimizer`` from now on.

        Of the merged layers those are merged that the optimizer trains; parameter groups may be
        added or frozen later. Where two attached optimizers train one layer, the last attached
        one merges it. An optimizer restored by pickle or deepcopy has lost its hooks: attach it.
        Schedule-free optimizers of the ``schedulefree`` package keep two sequences of weights,
        and both are merged alike.

        Args:
            optimizer: A torch optimizer, or one prepared by Accelerate or Lightning. For a
                SAM-like optimizer its ``base_optimizer`` is the one whose steps count.

        Returns:
            A handle whose ``remove()`` ends the merging. Attaching again returns the same one.

        Raises:
            TypeError: If it is not a torch optimizer.
            ValueError: If it trains none of the merged weights.
            RuntimeError: If its steps do not write the network's own weights (DeepSpeed,
                Megatron-LM, FSDP1, XLA, other schedule-free optimizers).
        """
        optimizer = stepping_optimizer(optimizer)
        for other in self._attached:
            if other.optimizer() is optimizer and is_registered(other.handle):
                return other.handle
        _, layers = self._layers_held_by(optimizer)
        if not layers:
            raise ValueError(
                f"the optimizer holds none of the {len(self.plan.merged)} weights to merge "
                f"({self.plan.merged[0].name}, ...): build it from the parameters of this model, "
                "after unfreezing them"
            )
        if self.compiled:  # the network may have moved to another device since it was wrapped
            self._check_compiler()
        if not getattr(type(optimizer).step, "hooked", False):
            # timm's Lookahead skips Optimizer.__init__, without which step() runs no hooks.
            optimizer._patch_step_function()
        handle = optimizer.register_step_post_hook(self._after_step)
        self._attached.append(Attachment(weakref.ref(optimizer), handle, set(layers)))
        now = self.step
        for layer in layers:  # a training that goes on with another optimizer keeps its schedule
            self._tally.steps[layer] = now
        return handle

    @torch.no_grad()
    def merge_(self) -> None:
        """One pass over all merged layers by hand, for a loop that has no torch optimizer."""
        reshard(self)
        layers = range(len(self.plan.merged))
        self._pass(layers, self._count_step(layers))

    def recalibrate(self, loader: Iterable[Any], *, max_batches: int | None = None) -> int:
        """Measures BatchNorm's running statistics anew; see :func:`recalibrate`.

        Needed before evaluation or export where merging runs until the last step.
        """
        return recalibrate(self, loader, max_batches=max_batches)

    def statistics_measured(self) -> None:
        """Says that BatchNorm was measured after the last step, by other means than ours."""
        self._last_merged.clear()

    @property
    def statistics_lag(self) -> bool:
        """Whether the last step moved kernels after BatchNorm measured; waits for the device."""
        return any(bool(merged.any()) for merged in self._last_merged.values())

    def report(self) -> MergeReport:
        """What merging did so far, layer by layer; waits for the device."""
        return self._tally.report([site.name for site in self.plan.merged])

    @property
    def step(self) -> int:
        """Optimizer steps seen so far; of several optimizers, of the one that made most."""
        return max(self._tally.steps)

    @torch.compiler.disable
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_nested_step(optimizer):
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph would repeat the pairs drawn at capture in every replay; capture "
                "forward and backward only, and call optimizer.step() outside of the graph"
            )
        reshard(self)
        held, layers = self._layers_held_by(optimizer)
        self._check_still_held(optimizer, layers)
        step = self._count_step(held) if held else 0
        if layers:
            # A fused optimizer runs its hooks even on a step that the scaler skips for overflow.
            self._pass(layers, step, optimizer, skip=getattr(optimizer, "found_inf", None))
        else:  # all frozen, or taken over by an optimizer attached later
            self._warn_if_frozen()

    def _count_step(self, layers: Sequence[int]) -> int:
        """Begins a step of some layers, which share one clock; returns the number before it.

        A layer that was frozen or joined later takes over the count of the others: the schedule
        follows the training, not the layer.
        """
        step = max(self._tally.steps[layer] for layer in layers)
        for layer in layers:
            self._tally.steps[layer] = step + 1
            self._last_merged.pop(layer, None)
        self._idle_forwards = 0
        return step

    def _layers_held_by(self, optimizer: Optimizer) -> tuple[list[int], list[int]]:
        """Merged layers in the optimizer's groups and in none of an optimizer attached later.

        Returns:
            All of them, and those that are not frozen.
        """
        live = [
            other
            for attachment in self._attached
            if (other := attachment.optimizer()) is not None and is_registered(attachment.handle)
        ]
        later = live[live.index(optimizer) + 1 :] if optimizer in live else []
        held = held_parameters(optimizer).difference(*map(held_parameters, later))
        layers, trained = [], []
        for index, site in enumerate(self.plan.merged):
            parameters = self._parameters_of(site)
            if parameters and all(id(p) in held for p in parameters):
                layers.append(index)
                if all(p.requires_grad for p in parameters):
                    trained.append(index)
        return layers, trained

    def _check_still_held(self, optimizer: Optimizer, layers: Sequence[int]) -> None:
        """Raises where an attached optimizer lost weights: whatever it steps, it is not those."""
        attachment = next(known for known in self._attached if known.optimizer() is optimizer)
        attachment.layers.update(layers)
        if len(attachment.layers) == len(layers):
            return
        held = held_parameters(optimizer)
        lost = []
        for layer in sorted(attachment.layers):
            site = self.plan.merged[layer]
            parameters = self._parameters_of(site)
            if not parameters or any(p.requires_grad and id(p) not in held for p in parameters):
                lost.append(site.name)
        if lost:
            raise RuntimeError(
                f"the attached optimizer no longer holds the weights of {', '.join(lost)}: they "
                "were replaced after attach(). With FSDP2 (fully_shard) make the optimizer after "
                "sharding; with Accelerate prepare model and optimizer in one call. DeepSpeed, "
                "Megatron-LM and FSDP1 step copies of the weights: train with DDP or FSDP2 instead"
            )

    def _conv(self, site: ConvSite) -> nn.Conv2d:
        found: Any = self.module
        try:
            for part in site.name.split("."):
                found = found._modules[part]  # a fifth of the time that get_submodule takes
        except KeyError:
            return self.module.get_submodule(site.name)  # type: ignore[return-value]
        return found

    def _parameters_of(self, site: ConvSite) -> list[nn.Parameter]:
        parameters = kernel_parameters(self._conv(site))
        if parameters:
            _check_shape(site, parameters[0])
        if parameters and parameters[0].device.type == "xla":
            raise RuntimeError(
                "on XLA devices parameters are swapped behind torch, and what is merged is lost; "
                "train on CUDA or CPU"
            )
        return parameters

    def _pass(
        self,
        layers: Sequence[int],
        step: int,
        optimizer: Optimizer | None = None,
        skip: Tensor | None = None,
    ) -> None:
        device = self._parameters_of(self.plan.merged[layers[0]])[0].device.type
        # A step inside of an autocast region would compare kernels in half precision.
        with (
            torch.autocast(device, enabled=False)
            if torch.amp.is_autocast_available(device)
            else nullcontext()
        ):
            self._merge(layers, step, optimizer, skip)
        # Counted here and not by the schedule or a checkpoint, so that all replicas get here even
        # if their step counters are what differs.
        if self.check_replicas_every and self._steps_here % self.check_replicas_every == 0:
            check_replicas(
                {
                    f"{site.name}.weight": parameter
                    for site in self.plan.merged
                    for parameter in kernel_parameters(self._conv(site))[:1]
                },
                {"the seed": self.seed, "the step counter of merging": self.step},
            )
        self._steps_here += 1

    def _merge(
        self,
        layers: Sequence[int],
        step: int,
        optimizer: Optimizer | None,
        skip: Tensor | None,
    ) -> None:
        """One step of some layers; ``skip`` is a scalar on the device, non-zero for no merge."""
        if self.schedule.level(step) == 0.0:
            return
        probability, alpha = self.schedule.apply(step, self.merge_probability, self.merge_weight)
        sites = [self.plan.merged[layer] for layer in layers]
        stored = [stored_kernels(self._conv(site), compiled=self.compiled) for site in sites]
        for site, kernels in zip(sites, stored, strict=True):
            _check_shape(site, kernels.weight)
        at_once = not self.keep_norm and all_native(stored)
        draw = native.draw_layers if at_once else draw_layers
        drawn, pairs = self._draw(sites, step, probability, draw)
        if len(layers) < len(self.plan.merged):
            drawn[0] = torch.tensor(layers, device="cpu")[drawn[0]]
        way = self._merge_at_once if at_once else self._merge_one_by_one
        of_layer, cosines, merged = way(_Work(sites, stored, drawn, pairs, alpha, optimizer, skip))
        self._tally.add(of_layer, cosines, merged)
        for layer, number, mask in zip(layers, pairs, merged.split(pairs), strict=True):
            self._last_merged[layer] = mask
            self._tally.passes[layer] += 1
            self._tally.drawn[layer] += number
        every = self.inspect_every
        due = [layer for layer in layers if every and self._passes_here[layer] % every == 0]
        if due:
            self._inspect(due)
        if max(self._tally.passes[layer] for layer in layers) == _PATIENCE:
            self._warn_if_without_effect()
        for layer in layers:
            self._passes_here[layer] += 1

    def _merge_one_by_one(self, work: _Work) -> tuple[Tensor, Tensor, Tensor]:
        """Merges the drawn pairs of some layers; of weights in shards one is whole at a time.

        Returns:
            Of each pair its layer, its cosine and whether it merged, on one device.
        """
        on_device: dict[torch.device, Tensor] = {}
        cosines, merged, end = [], [], 0
        for site, shards, number in zip(work.sites, work.stored, work.pairs, strict=True):
            with shards.whole() as kernels:
                device = kernels.weight.device
                if device not in on_device:
                    on_device[device] = _send(work.drawn, device)
                _, targets, sources = on_device[device][:, end : (end := end + number)]
                if self.partner == "most_similar":
                    sources = _nearest(site, kernels, targets)
                cosine = kernels.cosines(targets, sources, centred=site.centred)
                passed = self._passes(cosine, site.fan_in)
                if work.skip is not None:
                    passed &= work.skip.to(device) == 0
                blend = Blend(targets, sources, passed, work.alpha)
                if self.keep_norm:
                    blend = kernels.keeping_norms(blend)
                kernels.blend_(blend)
            for companion in self._companions(work.optimizer, site):
                with gathered(companion) as whole:
                    Kernels(whole, compiled=self.compiled).blend_(blend)
            cosines.append(cosine)
            merged.append(passed)
        device = cosines[0].device
        return (
            on_device[device][0],
            torch.cat([cosine.to(device) for cosine in cosines]),
            torch.cat([passed.to(device) for passed in merged]),
        )

    def _merge_at_once(self, work: _Work) -> tuple[Tensor, Tensor, Tensor]:
        """The same in native code, which takes all layers in one call."""
        (of_layer, targets, sources), pairs, alpha = work.drawn, work.pairs, work.alpha
        weights = [kernels.weight for kernels in work.stored]
        if self.partner == "most_similar":
            sources = torch.cat([*map(_nearest, work.sites, work.stored, targets.split(pairs))])
        centred = [site.centred for site in work.sites]
        cosines = native.compare(weights, pairs, targets, sources, centred)
        fan_ins = [site.fan_in for site in work.sites]
        if type(self.similarity_threshold) is Fixed:  # the same in all layers
            merged = self._passes(cosines, max(fan_ins))
        else:
            merged = torch.cat([*map(self._passes, cosines.split(pairs), fan_ins)])
        if work.skip is not None:
            merged &= work.skip.to(merged.device) == 0
        native.blend_(weights, pairs, targets, sources, merged, alpha)
        companions = [self._companions(work.optimizer, site) for site in work.sites]
        if any(companions):
            of_layers = (part.split(pairs) for part in (targets, sources, merged))
            for tensors, ours, theirs, passed in zip(companions, *of_layers, strict=True):
                for tensor in tensors:
                    Kernels(tensor, compiled=True).blend_(Blend(ours, theirs, passed, alpha))
        return of_layer, cosines, merged

    def _passes(self, cosines: Tensor, fan_in: int) -> Tensor:
        passed = self.similarity_threshold.passes(cosines, fan_in)
        if passed.shape != cosines.shape or passed.dtype != torch.bool:
            raise TypeError(
                f"similarity_threshold={self.similarity_threshold} must decide on each pair: its "
                f"passes() gave a {passed.dtype} of shape {tuple(passed.shape)} for "
                f"{len(cosines)} cosines instead of as many booleans"
            )
        return passed

    def _companions(self, optimizer: Optimizer | None, site: ConvSite) -> list[Tensor]:
        """The tensors of an optimizer that are blended like the weight."""
        if optimizer is None:
            return []
        moments: list[Tensor] = []
        if self.merge_momentum:
            weight, *magnitude = self._parameters_of(site)
            moments = [] if magnitude else first_moments(optimizer, weight)
            if not moments and "momentum" not in self._warned:
                self._warned.add("momentum")
                why = (
                    f"the weight of {site.name} is computed from a direction and a magnitude, "
                    "whose moments are no kernels"
                    if magnitude
                    else f"{type(optimizer).__name__} keeps no momentum_buffer and no exp_avg of "
                    f"the shape of {site.name}.weight"
                )
                warnings.warn(f"merge_momentum has no effect: {why}", NoEffectWarning, stacklevel=2)
        return moments + averaged_sequences(optimizer, self._conv(site))

    def _draw(
        self,
        sites: Sequence[ConvSite],
        step: int,
        probability: float,
        draw: Callable[..., tuple[Tensor, list[int]]] = draw_layers,
    ) -> tuple[Tensor, list[int]]:
        """What :func:`draw_layers` draws for some layers in a step."""
        counts = [site.shape[0] for site in sites]
        group_sizes = [site.shape[0] // site.pair_groups for site in sites]
        seeds = [_mix(self.seed, step, _number_of(site)) for site in sites]
        return draw(counts, group_sizes, probability, seeds)

    def _inspect(self, layers: Sequence[int]) -> None:
        """Records the state of some layers, and warns of those whose kernels grow alike."""
        report = self.report()
        for layer in layers:
            site = self.plan.merged[layer]
            kernels = read_kernels(self._conv(site), centred=site.centred)
            rank = float(effective_rank(kernels, site.pair_groups))
            first, last = self._snapshots.get(site.name, (None, None))
            now = LayerSnapshot.since(last, report[site.name], rank)
            self._snapshots[site.name] = (first or now, now)
            self.history.append(now)
            # Training alone may lower the rank as well; that is not for merging to warn of.
            if first and now.share > 0.1 and rank < _COLLAPSED * first.effective_rank:
                self._warn_of_collapse(first, now)

    def _warn_of_collapse(self, first: LayerSnapshot, now: LayerSnapshot) -> None:
        if now.name in self._warned:
            return
        self._warned.add(now.name)
        warnings.warn(
            f"the kernels of {now.name} are becoming copies of each other: their effective rank "
            f"fell from {first.effective_rank:.2f} to {now.effective_rank:.2f} by step {now.step}, "
            f"{now.share:.0%} of the drawn pairs merge. Raise similarity_threshold, lower "
            "merge_probability, or let merging end earlier (schedule)",
            CollapseWarning,
            stacklevel=2,
        )

    # -- nothing happens silently -------------------------------------------------------------

    @torch.compiler.disable
    def _expect_a_merge(self) -> None:
        self._idle_forwards += 1
        attached = any(is_registered(known.handle) for known in self._attached)
        patience = _IDLE_FORWARDS[attached or self._steps_here > 0]
        if self._idle_forwards < patience or "idle" in self._warned:
            return
        self._warned.add("idle")
        if attached:
            remedy = "the attached optimizer never finished a step. Attach the optimizer whose "
            remedy += "step() your loop calls"
        elif self._steps_here:
            remedy = "merge_() is no longer called, and no optimizer is attached"
        else:
            remedy = "no optimizer is attached. Call model.attach(optimizer)"
        warnings.warn(
            f"{self._idle_forwards} training forward passes without merging: {remedy}",
            NoEffectWarning,
            stacklevel=3,
        )

    def _warn_if_frozen(self) -> None:
        parameters = [p for site in self.plan.merged for p in self._parameters_of(site)]
        if "frozen" in self._warned or any(p.requires_grad for p in parameters):
            return
        self._warned.add("frozen")
        warnings.warn(
            "all weights to merge are frozen: nothing is merged until requires_grad is True again",
            NoEffectWarning,
            stacklevel=2,
        )

    def _warn_if_without_effect(self) -> None:
        report = self.report()
        if report.merged >= _NEGLIGIBLE * report.drawn and report.drawn:
            return
        if not report.drawn:
            found = f"no pair was drawn in {_PATIENCE} steps"
            remedy = "raise merge_probability"
        else:
            found = (
                f"{report.merged or 'none'} of {report.drawn:,} drawn pairs passed "
                f"similarity_threshold={self.similarity_threshold} in {_PATIENCE} steps"
            )
            known = [layer for layer in report if layer.max_cosine is not None]
            best = max(known, key=lambda layer: layer.max_cosine or 0.0, default=None)
            remedy = (
                "all kernels are zero or hold NaN or Inf"
                if best is None
                else f"the largest cosine was {best.max_cosine:.4f}, in {best.name}: a "
                f"similarity_threshold of {_just_below(best.max_cosine or 0.0):g} would have "
                "merged it"
            )
        warnings.warn(
            f"merging has no effect, this is a plain training run: {found}; {remedy}",
            NoEffectWarning,
            stacklevel=2,
        )

    # -- state --------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The step counter and the statistics, as a tensor (safetensors stores nothing else)."""
        header = [_STATE_FORMAT, self.seed, len(self.plan.merged)]
        with torch.device("cpu"):
            table = self._tally.to_tensor().flatten()
            return torch.cat([table.new_tensor(header), table])

    def set_extra_state(self, state: Tensor | None) -> None:
        """Continues from the step counter and statistics of a checkpoint.

        Raises:
            ValueError: If the state was not written by an InMergeWrapper.
        """
        if state is None:
            return
        if not isinstance(state, Tensor) or state.numel() < 3 or state[0].item() != _STATE_FORMAT:
            raise ValueError(
                "_extra_state of the checkpoint is not that of an InMergeWrapper (format "
                f"{_STATE_FORMAT}); load a checkpoint of this model, or drop its _extra_state"
            )
        seed, layers = int(state[1]), int(state[2])
        if state.numel() != 3 + 7 * layers:
            raise ValueError(
                f"_extra_state holds {state.numel()} numbers where {layers} merged layers need "
                f"{3 + 7 * layers}: the checkpoint is truncated"
            )
        if state.dtype != torch.float64:
            raise ValueError(
                f"_extra_state was converted to {state.dtype}, which rounds its counters; convert "
                "the weights of a checkpoint only, or drop its _extra_state"
            )
        tally = Tally.from_tensor(state[3:].detach().cpu().reshape(layers, 7))
        if seed != self.seed:
            warnings.warn(
                f"the checkpoint was trained with seed={seed}, this wrapper draws with "
                f"seed={self.seed}: the run will not continue as it began",
                stacklevel=2,
            )
        if layers != len(self.plan.merged):
            warnings.warn(
                f"the checkpoint merged {layers} layers and this plan {len(self.plan.merged)}: the "
                "step counter continues, the statistics start anew",
                stacklevel=2,
            )
            step = max(tally.steps)
            tally = Tally(len(self.plan.merged))
            tally.steps = [step] * len(tally.steps)
        self._tally = tally
        # The totals may have gone back: what came after them is not of this run any more.
        self.history = [entry for entry in self.history if entry.step <= self.step]
        self._snapshots.clear()
        self._last_merged.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is driven by no optimizer, and must not drag the original's along.
        return {**super().__getstate__(), "_attached": []}


def _put_counter_last(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    """timm's training tasks pair the values of a wrapper's state with those of its network."""
    key = f"{prefix}_extra_state"
    if key in state_dict:
        state_dict[key] = state_dict.pop(key)


def _adapt_state_dict(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accepts the network's own state dict, and one without the step counter, with a warning."""
    own = [name for name in cast(nn.Module, wrapper.module).state_dict() if name]
    if not any(f"{prefix}module.{name}" in state_dict for name in own):
        for name in own:
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}module.{name}"] = state_dict.pop(f"{prefix}{name}")
    key = f"{prefix}_extra_state"
    if key not in state_dict and any(name.startswith(prefix) for name in state_dict):
        warnings.warn(
            f"the state dict has no {key!r}: the weights are loaded, and merging counts its steps "
            f"from {wrapper.step}",
            stacklevel=2,
        )
        state_dict[key] = None


def _checked(name: str, value: Any) -> Any:
    """A setting of the wrapper; raises where it is none."""
    if name in ("merge_weight", "merge_probability"):
        check_range(name, value, 0.0, 1.0)
    elif name == "similarity_threshold":
        return as_threshold(value)
    elif name == "schedule" and not isinstance(value, Schedule):
        raise TypeError(f"schedule must be a Schedule, got {value!r}")
    elif name == "partner" and value not in ("random", "most_similar"):
        raise ValueError(f"partner must be 'random' or 'most_similar', got {value!r}")
    elif name == "seed" and (not isinstance(value, int) or not 0 <= value < 2**32):
        raise ValueError(f"seed must be an integer in [0, 2**32), got {value!r}")
    elif name in ("inspect_every", "check_replicas_every") and (
        not isinstance(value, int) or value < 0
    ):
        raise ValueError(f"{name} must be a count of steps >= 0, got {value!r}")
    return value


def _check_plan(module: nn.Module, plan: MergePlan) -> None:
    if not plan.merged:
        raise ValueError("the plan merges no convolution")
    modules = dict(module.named_modules())
    for site in plan.merged:
        conv = modules.get(site.name)
        parameters = kernel_parameters(conv) if isinstance(conv, nn.Conv2d) else []
        if not parameters or tuple(parameters[0].shape) != site.shape:
            raise ValueError(
                f"the plan is not of this network: it has no convolution {site.name!r} with a "
                f"weight of shape {site.shape}; make one with plan_merging(network)"
            )


def _check_shape(site: ConvSite, weight: Tensor) -> None:
    if weight.shape != site.shape:
        raise RuntimeError(
            f"the weight of {site.name} has the shape {tuple(weight.shape)} instead of "
            f"{site.shape}. A layer that was replaced needs a new wrapper; FSDP1 and DeepSpeed "
            "ZeRO-3 flatten the weights, so that no kernel can be found in them: use FSDP2 "
            "(fully_shard, or fsdp_version: 2 in Accelerate) or DDP"
        )


def _number_of(site: ConvSite) -> int:
    """What tells a layer's draws from those of others, whichever of them are merged."""
    # The depth, not the place in the plan; a convolution that never ran has none, but a name.
    return site.depth if site.depth is not None else 2**32 + crc32(site.name.encode())


def _nearest(site: ConvSite, kernels: Kernels, targets: Tensor) -> Tensor:
    """The most similar partner of each target of a layer."""
    everyone = torch.arange(site.shape[0], device=targets.device)
    bank = kernels.read(everyone, centred=site.centred)
    return nearest_kernels(bank, targets, site.pair_groups)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to the device without waiting for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _mix(*numbers: int) -> int:
    """Hashes integers to 32 bits, all that torch's CPU generator reads of a seed (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 32


def _just_below(cosine: float) -> float:
    return max(-1.0, math.ceil(cosine * 1000) / 1000 - 0.001)


def _prefixed_matcher(matcher: Any) -> Any:
    """timm's map from parameter names to layers, for names that begin with ``module.``."""
    if callable(matcher):
        return lambda name: matcher(name.removeprefix("module."))

    def prefixed(pattern: str) -> str:
        # timm matches at the start of the name anyway; an anchor would forbid the prefix.
        return r"module\.(?:" + re.sub(r"(?<![\\\[])\^", "", pattern) + ")"

    return {
        layer: (
            [(prefixed(part[0]), *part[1:]) for part in pattern]
            if isinstance(pattern, list | tuple)
            else pattern and prefixed(pattern)
        )
        for layer, pattern in matcher.items()
    }
