"""The wrapper: the one stateful object of the library."""

from __future__ import annotations

import math
import re
import sys
import warnings
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from inmerge_wrap.discovery import ConvSite, MergePlan, Pattern, plan_merging
from inmerge_wrap.kernels import kernel_parameters, open_kernels
from inmerge_wrap.merging import blend_kernels, check_range, draw_pairs, pair_cosines
from inmerge_wrap.replicas import check_replicas
from inmerge_wrap.report import MergeReport, Tally

__all__ = ["InMergeWrapper", "NoEffectWarning"]

_STATE_FORMAT = 1
_PATIENCE = 100  # passes after which a run without effect is told so
_NEGLIGIBLE = 1e-3  # share of merged pairs below which a run is called a plain run
_IDLE_FORWARDS = {False: 10, True: 1000}  # attached -> training forwards without any merge pass


class NoEffectWarning(UserWarning):
    """Merging was asked for and does not happen."""


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
        similarity_threshold: tau in [-1, 1]; pairs merge where their cosine is above it.
        merge_probability: p in [0, 1], per kernel and step.
        shallow_layers: L_s, first convolutions left alone; see :func:`plan_merging`.
        example_input: See :func:`plan_merging`, as are ``include``, ``exclude``, ``also_merge``.
        plan: A ready plan, instead of the arguments of :func:`plan_merging`.
        seed: Of the draws, in [0, 2**32); the same on every process. The draws depend on nothing
            but the seed, the step and the layer, and never touch the global generators.
        check_replicas_every: Compare the merged weights of all processes every so many steps, and
            raise where they differ; 0 never does. Each comparison waits for the device.

    Raises:
        ValueError: If an argument is out of range, or there is nothing to merge.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        merge_weight: float = 0.8,
        similarity_threshold: float = 0.3,
        merge_probability: float = 0.3,
        shallow_layers: int | float = 0.625,
        example_input: Any = None,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] = (),
        also_merge: Collection[str] = (),
        plan: MergePlan | None = None,
        seed: int = 0,
        check_replicas_every: int = 0,
    ) -> None:
        super().__init__()
        check_range("merge_weight", merge_weight, 0.0, 1.0)
        check_range("similarity_threshold", similarity_threshold, -1.0, 1.0)
        check_range("merge_probability", merge_probability, 0.0, 1.0)
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
        if not isinstance(check_replicas_every, int) or check_replicas_every < 0:
            raise ValueError(
                f"check_replicas_every must be a count of steps, got {check_replicas_every!r}"
            )
        if plan is None:
            plan = plan_merging(
                module,
                shallow_layers=shallow_layers,
                example_input=example_input,
                include=include,
                exclude=exclude,
                also_merge=also_merge,
            )
        elif (shallow_layers, include) != (0.625, None) or exclude or also_merge:
            raise ValueError("a plan decides what is merged: give either a plan or its arguments")
        _check_plan(module, plan)
        self.module = module
        self.plan = plan
        self.merge_weight = merge_weight
        self.similarity_threshold = similarity_threshold
        self.merge_probability = merge_probability
        self.seed = seed
        self.check_replicas_every = check_replicas_every
        self._tally = Tally(len(plan.merged))
        self._attached: list[tuple[weakref.ref[Optimizer], RemovableHandle]] = []
        self._idle_forwards = 0
        self._warned: set[str] = set()
        self.register_load_state_dict_pre_hook(_allow_missing_counter)

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

    # -- merging ----------------------------------------------------------------------------

    def attach(self, optimizer: Any) -> RemovableHandle:
        """Merges after each step of ``optimizer`` from now on.

        Of the merged layers those are merged that the optimizer trains; parameter groups may be
        added or frozen later. Where two attached optimizers train one layer, the last attached
        one merges it. An optimizer restored by pickle or deepcopy has lost its hooks: attach it.

        Args:
            optimizer: A torch optimizer, or one prepared by Accelerate or Lightning. For a
                SAM-like optimizer its ``base_optimizer`` is the one whose steps count.

        Returns:
            A handle whose ``remove()`` ends the merging. Attaching again returns the same one.

        Raises:
            TypeError: If it is not a torch optimizer.
            ValueError: If it trains none of the merged weights.
            RuntimeError: If its steps do not write the network's own weights (DeepSpeed,
                Megatron-LM, FSDP1, XLA).
        """
        optimizer = _stepping_optimizer(optimizer)
        for reference, handle in self._attached:
            if reference() is optimizer and _is_registered(handle):
                return handle
        if not self._layers_held_by(optimizer):
            raise ValueError(
                f"the optimizer holds none of the {len(self.plan.merged)} weights to merge "
                f"({self.plan.merged[0].name}, ...): build it from the parameters of this model, "
                "after unfreezing them"
            )
        if not getattr(type(optimizer).step, "hooked", False):
            # timm's Lookahead skips Optimizer.__init__, without which step() runs no hooks.
            optimizer._patch_step_function()
        handle = optimizer.register_step_post_hook(self._after_step)
        self._attached.append((weakref.ref(optimizer), handle))
        return handle

    @torch.no_grad()
    def merge_(self) -> None:
        """One pass over all merged layers by hand, for a loop that has no torch optimizer."""
        self._merge(range(len(self.plan.merged)))

    def report(self) -> MergeReport:
        """What merging did so far, layer by layer; waits for the device."""
        return self._tally.report([site.name for site in self.plan.merged])

    @property
    def step(self) -> int:
        """Optimizer steps seen so far."""
        return max(self._tally.steps)

    @torch.compiler.disable
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _is_nested_step(optimizer):
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph would repeat the pairs drawn at capture in every replay; capture "
                "forward and backward only, and call optimizer.step() outside of the graph"
            )
        layers = self._layers_held_by(optimizer)
        if not layers:
            raise RuntimeError(
                "the attached optimizer no longer holds any weight to merge. Prepare model and "
                "optimizer in one call, and attach an optimizer made after the weights were changed"
            )
        # A fused optimizer runs its hooks even on a step that the scaler skips for overflow.
        self._merge(layers, skip=getattr(optimizer, "found_inf", None))

    def _layers_held_by(self, optimizer: Optimizer) -> list[int]:
        """Merged layers that the optimizer trains and no optimizer attached after it does."""
        live = [
            other
            for reference, handle in self._attached
            if (other := reference()) is not None and _is_registered(handle)
        ]
        later = live[live.index(optimizer) + 1 :] if optimizer in live else []
        held = _trained(optimizer).difference(*map(_trained, later))
        layers = []
        for index, site in enumerate(self.plan.merged):
            parameters = kernel_parameters(self._conv(site))
            if parameters and all(id(p) in held for p in parameters):
                layers.append(index)
        return layers

    def _conv(self, site: ConvSite) -> nn.Conv2d:
        return self.module.get_submodule(site.name)  # type: ignore[return-value]

    def _merge(self, layers: Sequence[int], skip: Tensor | None = None) -> None:
        """One pass over some layers; ``skip`` is a scalar on the device, non-zero for no merge."""
        draws = [self._draw(layer) for layer in layers]
        layer_of_pair = torch.cat(
            [
                torch.full_like(targets, layer)
                for layer, (targets, _) in zip(layers, draws, strict=True)
            ]
        )
        sizes = [2 * len(targets) for targets, _ in draws]
        drawn = torch.cat([layer_of_pair, *(part for pair in draws for part in pair)])
        on_device: dict[torch.device, tuple[Tensor, ...]] = {}
        cosines, merged = [], []
        for position, layer in enumerate(layers):
            site = self.plan.merged[layer]
            with open_kernels(self._conv(site)) as kernels:
                device = kernels.weight.device
                if device not in on_device:
                    on_device[device] = _send(drawn, device).split([len(layer_of_pair), *sizes])
                pairs = on_device[device][1 + position]
                rows, partners = kernels.read(pairs).chunk(2)
                cosine = _compare(rows, partners, site)
                passed = cosine > self.similarity_threshold
                if skip is not None:
                    passed &= skip.to(device) == 0
                blended = blend_kernels(rows, partners, passed, self.merge_weight)
                kernels.write_(pairs.chunk(2)[0], blended, passed)
            cosines.append(cosine)
            merged.append(passed)
            self._tally.steps[layer] += 1
            self._tally.passes[layer] += 1
            self._tally.drawn[layer] += len(cosine)
        device = cosines[0].device
        self._tally.add(
            on_device[device][0],
            torch.cat([cosine.to(device) for cosine in cosines]),
            torch.cat([mask.to(device) for mask in merged]),
        )
        self._idle_forwards = 0
        if max(self._tally.passes[layer] for layer in layers) == _PATIENCE:
            self._warn_if_without_effect()
        if self.check_replicas_every and self.step % self.check_replicas_every == 0:
            check_replicas(
                {
                    f"{site.name}.weight": parameter
                    for site in self.plan.merged
                    for parameter in kernel_parameters(self._conv(site))[:1]
                }
            )

    def _draw(self, layer: int) -> tuple[Tensor, Tensor]:
        site = self.plan.merged[layer]
        # The depth, not the place in the plan: other layers do not change this layer's draws.
        key = (self.seed, self._tally.steps[layer], site.depth or 0)
        generator = torch.Generator().manual_seed(_mix(*key))
        return draw_pairs(site.shape[0], self.merge_probability, generator, site.pair_groups)

    # -- nothing happens silently -------------------------------------------------------------

    @torch.compiler.disable
    def _expect_a_merge(self) -> None:
        self._idle_forwards += 1
        attached = any(_is_registered(handle) for _, handle in self._attached)
        if self._idle_forwards < _IDLE_FORWARDS[attached] or "idle" in self._warned:
            return
        self._warned.add("idle")
        remedy = (
            "the attached optimizer never finished a step. Attach the optimizer whose step() your "
            "loop calls"
            if attached
            else "no optimizer is attached. Call model.attach(optimizer)"
        )
        warnings.warn(
            f"{self._idle_forwards} training forward passes without merging: {remedy}",
            NoEffectWarning,
            stacklevel=3,
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
                f"similarity_threshold={self.similarity_threshold:g} in {_PATIENCE} steps"
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
        header = torch.tensor([_STATE_FORMAT, self.seed, len(self.plan.merged)], dtype=torch.double)
        return torch.cat([header, self._tally.to_tensor().flatten()])

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

    def __getstate__(self) -> dict[str, Any]:
        # A copy is driven by no optimizer, and must not drag the original's along.
        return {**super().__getstate__(), "_attached": []}


def _allow_missing_counter(
    wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    key = f"{prefix}_extra_state"
    if key not in state_dict and any(name.startswith(prefix) for name in state_dict):
        warnings.warn(
            f"the state dict has no {key!r}: the weights are loaded, and merging counts its steps "
            f"from {wrapper.step}",
            stacklevel=2,
        )
        state_dict[key] = None


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


def _stepping_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer whose step() writes the weights, behind the wrappers of others."""
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    foreign = {"DeepSpeedOptimizerWrapper", "MegatronLMOptimizerWrapper"} & names
    if foreign:
        raise RuntimeError(
            f"{foreign.pop()} steps copies of the weights and overwrites what is merged; train "
            "with DDP or FSDP2 (fully_shard) instead, a CNN fits both"
        )
    if names & {"AcceleratedOptimizer", "LightningOptimizer"}:
        return _stepping_optimizer(optimizer.optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}; where another "
            "object wraps the optimizer, attach the wrapped one, or call model.merge_() after "
            "each step"
        )
    inner = getattr(optimizer, "base_optimizer", None)
    if isinstance(inner, Optimizer):
        return _stepping_optimizer(inner)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(type(p).__name__ == "FlatParameter" or hasattr(p, "_is_flat_param") for p in parameters):
        raise RuntimeError(
            "FSDP1 flattens the weights, so that no kernel can be found in them; use FSDP2 "
            "(fully_shard, or fsdp_version: 2 in Accelerate) or DDP"
        )
    if any(p.device.type == "xla" for p in parameters):
        raise RuntimeError("XLA devices swap parameters behind torch; use CUDA or CPU")
    return optimizer


def _trained(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}


def _is_registered(handle: RemovableHandle) -> bool:
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def _is_nested_step(optimizer: Optimizer) -> bool:
    """Whether this hook runs inside of another step() of the same optimizer.

    Where a subclass calls super().step(), torch runs the hooks in both. The stack tells, and
    unlike a counter it stays right when a step raises.
    """
    steps = [vars(kind)["step"] for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    patched = [step.__code__ for step in steps if hasattr(step, "hooked")]
    if len(patched) < 2:
        return False
    frame, depth = sys._getframe(), 0
    while frame is not None:
        if frame.f_code in patched and frame.f_locals.get("self") is optimizer:
            depth += 1
        frame = frame.f_back  # type: ignore[assignment]
    return depth > 1


def _compare(rows: Tensor, partners: Tensor, site: ConvSite) -> Tensor:
    if site.centred:
        rows = rows - rows.mean(dim=1, keepdim=True)
        partners = partners - partners.mean(dim=1, keepdim=True)
    return pair_cosines(rows, partners)


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
