"""The wrapper: the one stateful object of the library."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from inmerge_wrap._constants import DEFAULT_SHALLOW_SHARE
from inmerge_wrap.attachment import (
    Attachments,
    carry_counter,
    check_settings,
    companions,
    is_nested_step,
    is_no_training_step,
    notice_every_step,
    refuse_capture,
    refuse_second,
    remedy_for_none_held,
    reshard,
    stepping_optimizer,
    trains_any,
)
from inmerge_wrap.discovery import MergePlan, Pattern, plan_merging
from inmerge_wrap.engines import describe, require
from inmerge_wrap.interlude import BeforeStep, Interlude
from inmerge_wrap.layers import Layers, check_sites, find_layers
from inmerge_wrap.merge_pass import Kept, draw_step, merge_step
from inmerge_wrap.pairs import Outcome, Totals, mix
from inmerge_wrap.proxy import NetworkProxy
from inmerge_wrap.recalibration import recalibrate
from inmerge_wrap.replicas import check_replicas
from inmerge_wrap.report import LayerSnapshot, MergeReport
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.settings import MergeSettings, explains_symbols, recommended_settings
from inmerge_wrap.stores import store_of
from inmerge_wrap.tally import Tally
from inmerge_wrap.thresholds import Threshold
from inmerge_wrap.unwrapping import check_network, refuse_wrapped
from inmerge_wrap.watch import CollapseWarning, NoEffectWarning, Watch

__all__ = ["CollapseWarning", "InMergeWrapper", "NoEffectWarning"]


class InMergeWrapper(NetworkProxy):
    """Merges similar kernels inside a CNN with each optimizer step (arXiv 2502.20516).

    The forward pass of the wrapped network is unchanged; :meth:`attach` makes an optimizer merge
    after each of its steps. The wrapper has no parameters of its own and copies none.

    >>> import timm, torch
    >>> from inmerge_wrap import InMergeWrapper
    >>> model = InMergeWrapper(timm.create_model("resnet18", num_classes=7))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = model.attach(optimizer)

    Unknown attributes are looked up on the network, so that timm's optimizer factory and training
    code see its configuration. ``no_weight_decay`` and ``group_matcher`` use the names of
    the wrapper's own parameters. The settings below are attributes too, checked when they are set.

    Args:
        module: The network, on any device, before it is parallelised.
        merge_weight: alpha in [0, 2], the weight of the kernel itself in a blend; above 1 it moves
            away from its partner.
        similarity_threshold: tau in [-1, 1]: pairs merge where their cosine is above it; or a
            rule that adapts to the layer, :class:`ZScore` or :class:`Quantile`.
        merge_probability: p in [0, 1], the probability that a kernel is drawn in a step.
        schedule: When merging runs and how strongly; by default every step, at full strength.
        partner: ``"random"``, any other kernel of the group (the paper), or ``"most_similar"``.
        direction: How a kernel moves whose pair passes the threshold: toward its ``"partner"``
            (the paper's blend); ``"signed"``, along the difference, with a random sign; or, as
            controls and alternatives that need no partner, by filter-wise ``"gaussian"`` noise or
            ``"multiplicative"`` noise.
        radius: r in [0, 2], the length of the move relative to the kernel's norm, for every
            direction except ``"partner"``.
        keep_norm: Rescale each changed kernel to the norm it had before. The paper does not.
        merge_momentum: Blend the first moments of the optimizer (SGD's momentum, Adam's
            ``exp_avg``) like the weights, so that the next step continues from the merged point.
            Second moments stay: they scale the steps of an entry but carry no direction.
        transient: Merge in the forward pass and restore the kernels before the optimizer steps:
            the gradient is taken at the merged weights, the step starts from the unmerged ones.
        replica_draws: With ``transient``, each process draws its own pairs, so that the gradient
            is averaged over several perturbations.
        engine: What computes a pass: ``"native"`` code on a CPU, compiled on first use in a second
            or two, ``"triton"`` on a GPU, or plain ``"torch"``; ``"auto"`` uses the first two
            where possible. Results are equal up to rounding.
        shallow_layers: L_s, the first convolutions, which are not merged; see :func:`plan_merging`.
        example_input: See :func:`plan_merging`; likewise ``include``, ``exclude``, ``also_merge``.
        plan: A plan made before, instead of the arguments of :func:`plan_merging`.
        seed: Seed of the draws, in [0, 2**32); the same on every process. The draws depend only on
            the seed, the step and the layer, and never touch the global generators.
        inspect_every: Interval, in passes, at which similarity and effective rank of each layer
            are recorded in :attr:`history`, with a warning before a layer collapses; 0 disables
            it. Each inspection waits for the device.
        check_replicas_every: Interval, in steps, at which the merged weights of all processes are
            compared, from the first step on; raises if they differ. 0 disables it. Each
            comparison waits for the device.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, the network is wrapped already, or there is
            nothing to merge.
        RuntimeError: If an engine is requested by name and does not work here.
    """

    @explains_symbols
    def __init__(
        self,
        module: nn.Module,
        *,
        merge_weight: float = 0.8,
        similarity_threshold: float | Threshold = 0.3,
        merge_probability: float = 0.3,
        schedule: Schedule | None = None,
        partner: Literal["random", "most_similar"] = "random",
        direction: Literal["partner", "signed", "gaussian", "multiplicative"] = "partner",
        radius: float = 0.3,
        keep_norm: bool = False,
        merge_momentum: bool = False,
        transient: bool = False,
        replica_draws: bool = False,
        engine: Literal["auto", "torch", "native", "triton"] = "auto",
        shallow_layers: int | float = DEFAULT_SHALLOW_SHARE,
        example_input: Any = None,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] = (),
        also_merge: Collection[str] = (),
        plan: MergePlan | None = None,
        seed: int = 0,
        inspect_every: int = 100,
        check_replicas_every: int = 0,
    ) -> None:
        check_network(module)
        refuse_wrapped(module)
        settings = MergeSettings(
            merge_weight=merge_weight,
            similarity_threshold=similarity_threshold,  # type: ignore[arg-type]
            merge_probability=merge_probability,
            schedule=schedule or Schedule(),
            partner=partner,
            direction=direction,
            radius=radius,
            keep_norm=keep_norm,
            merge_momentum=merge_momentum,
            transient=transient,
            replica_draws=replica_draws,
            engine=engine,
            seed=seed,
            inspect_every=inspect_every,
            check_replicas_every=check_replicas_every,
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
        elif (shallow_layers, include, example_input) != (DEFAULT_SHALLOW_SHARE, None, None) or (
            exclude or also_merge
        ):
            raise ValueError("a plan decides what is merged: pass either a plan or its arguments")
        check_sites(module, plan.merged)
        super().__init__(module, settings)
        self.plan = plan
        self._check_engine(engine)
        self._tally = Tally(len(plan.merged))
        self._watch = Watch()
        self._attachments = Attachments()
        self._found: Layers | None = None  # the layers of the last step, with derived values
        self._last_merged: dict[int, Outcome | Totals] = {}  # layer -> what its last step did
        self._interlude: Interlude | None = None
        self._pending: dict[int, tuple[Layers, Outcome | Totals]] = {}  # of which optimizer
        notice_every_step(self._after_any_step)

    @classmethod
    def recommended(
        cls, module: nn.Module, *, total_steps: int, transient: bool = True, **settings: Any
    ) -> InMergeWrapper:
        """Wraps a module with the recommended settings.

        They are for fine-tuning, where they raised AUROC under corruption with clean balanced
        accuracy level; from scratch they were level with plain training. See
        :func:`recommended_settings`, and docs/evidence.md for the figures and their limits. The
        defaults of the constructor are the paper's.

        Args:
            module: See the constructor.
            total_steps: Optimizer steps of the whole training run.
            transient: False merges for good; see :func:`recommended_settings`.
            **settings: Any argument of the constructor; overrides the recommended value.

        Raises:
            ValueError: If ``total_steps`` is not positive, or as the constructor does.
        """
        chosen = recommended_settings(total_steps, transient=transient)
        return cls(module, **{**chosen, **settings})

    # -- the network ------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network."""
        if self.training and torch.is_grad_enabled():
            if self.settings.transient:
                self._begin_interlude()
            # A counter would make torch.compile specialise on its value and compile every step.
            if not torch.compiler.is_compiling() or not self._attachments.live:
                self._watch_forward()
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> InMergeWrapper:
        """Sets the mode; restores kernels that are merged for a gradient, if any."""
        if not mode:
            self.end_interlude()
        return super().train(mode)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "plan" and "plan" in vars(self):
            raise AttributeError(
                "the plan cannot change, its layers have the statistics: wrap the network again"
            )
        super().__setattr__(name, value)

    def change_settings(self, settings: MergeSettings) -> None:
        """Replaces some settings, as ``model.merge_weight = ...`` does for one.

        Raises:
            RuntimeError: If they do not work with this network or an attached optimizer.
        """
        self.end_interlude()
        self._check_engine(settings.engine)
        layers = self._layers()
        for optimizer in self._attachments.live:
            check_settings(settings, optimizer, self._attachments.held_by(optimizer, layers)[0])
        super().change_settings(settings)

    # -- merging ----------------------------------------------------------------------------

    def attach(self, optimizer: Any) -> RemovableHandle:
        """Merges after each step of ``optimizer`` from now on.

        It merges the layers of the plan that this optimizer trains; parameter groups can be added,
        frozen or unfrozen later. If two attached optimizers train the same layer, the one attached
        last merges it. An optimizer restored by pickle or deepcopy has lost its hooks: attach it
        again. Schedule-free optimizers of the ``schedulefree`` package keep two sequences of
        weights; both are merged in the same way. From now on the state dict of the optimizer
        carries the step counter, as that of the model does: attach before loading one.

        Args:
            optimizer: A torch optimizer, or one prepared by Accelerate or Lightning. Of a
                SAM-like optimizer, the steps of its ``base_optimizer`` count.

        Returns:
            A handle whose ``remove()`` stops merging. Attaching again returns the same handle.

        Raises:
            TypeError: If it is not a torch optimizer.
            ValueError: If it holds none of the merged weights, or merges for another wrapper of
                this network.
            RuntimeError: If its steps do not write the network's own weights (DeepSpeed,
                Megatron-LM, FSDP1, XLA, other schedule-free optimizers), or a setting does not
                work with it.
        """
        given, optimizer = optimizer, stepping_optimizer(optimizer)
        handle = self._attachments.handle_of(optimizer)
        if handle is not None:
            return handle
        layers = self._layers()
        held, trained = self._attachments.held_by(optimizer, layers)
        if not held:
            raise ValueError(
                f"the optimizer holds none of the {len(layers)} weights to merge "
                f"({layers[0].site.name}, ...): {remedy_for_none_held(layers)}"
            )
        if not trained:
            self._warn_of_frozen_weights()
        refuse_second(optimizer, self)
        check_settings(self.settings, optimizer, held)
        self._check_engine(
            self.engine
        )  # the network may have moved to another device since it was wrapped
        if not getattr(type(optimizer).step, "hooked", False):
            # timm's Lookahead skips Optimizer.__init__, without which step() runs no hooks.
            optimizer._patch_step_function()
        optimizer.register_step_pre_hook(BeforeStep(self))
        handle = optimizer.register_step_post_hook(self._after_step)
        self._attachments.add(optimizer, handle, trained)
        carry_counter(self, handle, [given, optimizer])
        now = self.step
        for layer in held:  # a training run that goes on with another optimizer keeps its schedule
            self._tally.steps[layer.number] = now
        return handle

    @torch.no_grad()
    def merge_(self) -> None:
        """Runs one pass over all merged layers, for a loop without a torch optimizer.

        Raises:
            RuntimeError: With ``transient``, where an optimizer's step must find unmerged kernels.
        """
        if self.settings.transient:
            raise RuntimeError(
                "merge_() merges permanently, transient=True only for the gradient: attach the "
                "optimizer, or train with transient=False"
            )
        reshard(self)
        layers = self._layers()
        self._step(layers, layers)

    def next_pairs(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Returns the pairs that the next step draws, before any threshold.

        Returns:
            Name of each merged layer -> (targets, sources), int64, shape (pairs,) each; empty
            if the schedule skips the step. With ``partner="most_similar"`` the sources are
            None: they depend on the weights that the step will find.
        """
        layers = self._layers()
        settings = self._settings_at(self.step)
        if settings is None:
            settings = replace(self.settings, merge_probability=0.0)
        drawn = draw_step(layers, settings, self.step)
        known = settings.partner == "random"
        return {
            layer.site.name: (part.targets, part.sources if known else None)
            for layer, part in zip(layers, drawn.split(), strict=True)
        }

    def recalibrate(self, loader: Iterable[Any], *, max_batches: int | None = None) -> int:
        """Measures BatchNorm's running statistics again; see :func:`recalibrate`.

        Call it before evaluation or export if merging runs until the last step.
        """
        return recalibrate(self, loader, max_batches=max_batches)

    def statistics_measured(self) -> None:
        """Records that BatchNorm was recalibrated after the last step by other means."""
        self._last_merged.clear()

    @property
    def statistics_lag(self) -> bool:
        """Whether BatchNorm statistics predate the last merge; waits for the device."""
        return any(outcome.has_merged(number) for number, outcome in self._last_merged.items())

    def report(self) -> MergeReport:
        """Returns what merging did so far, layer by layer; waits for the device."""
        end = self.settings.schedule.end
        return replace(
            self._tally.report([site.name for site in self.plan.merged]),
            ended=end if end is not None and self.step > end else None,
            idle=self._watch.why_never(self.step, attached=bool(self._attachments.live)),
            engine=self.engine_in_use,
        )

    @property
    def engine_in_use(self) -> str:
        """The engines in use, with their number of layers, and why not all use the fastest."""
        return describe(self._layers(), self.settings.engine)

    @property
    def history(self) -> list[LayerSnapshot]:
        """Snapshots of the merged layers, taken every ``inspect_every`` passes."""
        return self._watch.history

    @property
    def step(self) -> int:
        """Optimizer steps seen so far; with several optimizers, those of the one with most."""
        return self._tally.step

    # -- one step ---------------------------------------------------------------------------

    @torch.compiler.disable
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_nested_step(optimizer) or is_no_training_step():
            return
        refuse_capture("optimizer.step()")
        reshard(self)
        layers = self._layers()
        held, trained = self._attachments.held_by(optimizer, layers)
        self._attachments.check(optimizer, trained, layers)
        if held:
            self._step(held, trained, optimizer)
        if not trained and not any(
            p.requires_grad for layer in layers for p in layer.parameters
        ):  # else another optimizer, attached later, merges them
            self._warn_of_frozen_weights()

    def _step(
        self,
        held: Layers,
        trained: Layers,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Counts a step of some layers, and merges those that train."""
        step = self._tally.begin(held.numbers)
        for number in held.numbers:
            self._last_merged.pop(number, None)
        self._watch.idle_forwards = self._watch.missed_steps = 0
        if not trained:
            return
        if self.settings.transient:
            trained, outcome = self._pending.pop(id(optimizer), (trained, None))
            if outcome is None and self.settings.at(step) is not None:
                self._watch.warn_once(
                    "forward",
                    "no training forward pass of this model came before the step, so nothing was "
                    "merged for its gradient: call the wrapper itself, in train mode, and attach "
                    "the optimizer before the first pass",
                )
        else:
            # A fused optimizer runs its hooks even on a step that the scaler skips for overflow.
            skip = getattr(optimizer, "found_inf", None)
            outcome = self._merge(trained, step, optimizer, skip)
        if outcome is not None:
            self._tally.add(trained.numbers, outcome)
            self._note_merged(trained, outcome)
            self._watch.after_pass(trained, self._tally, self.settings, self.report)
        self._watch.after_step(step, self.settings.schedule)
        every = self.settings.check_replicas_every
        # Counted here, not by the schedule or a checkpoint, so that all replicas get here even
        # if their step counters are what differs.
        if every and self._watch.steps % every == 0:
            self._check_replicas()
        self._watch.steps += 1

    def _merge(
        self,
        layers: Layers,
        step: int,
        optimizer: Optimizer | None = None,
        skip: Tensor | None = None,
        keep: list[Kept] | None = None,
    ) -> Outcome | Totals | None:
        """Draws and merges pairs of some layers; returns None where the schedule skips the step."""
        settings = self._settings_at(step)
        if settings is None:
            return None
        found, problem = companions(optimizer, layers, moments=settings.merge_momentum)
        if problem is not None:
            self._watch.warn_once("momentum", f"merge_momentum has no effect: {problem}")
        return merge_step(layers, settings, step, companions=found, skip=skip, keep=keep)

    def _note_merged(self, layers: Layers, outcome: Outcome | Totals) -> None:
        self._last_merged.update(dict.fromkeys(layers.numbers, outcome))

    def _settings_at(self, step: int) -> MergeSettings | None:
        settings = self.settings.at(step)
        if settings and settings.replica_draws and dist.is_available() and dist.is_initialized():
            return replace(settings, seed=mix(settings.seed, dist.get_rank()))
        return settings

    # -- transient merging --------------------------------------------------------------------

    @torch.compiler.disable
    @torch.no_grad()
    def _begin_interlude(self) -> None:
        """Merges for the gradient, unless kernels are merged already."""
        if self._interlude is not None and not self._interlude.is_over:
            return
        self.end_interlude()
        optimizers = self._attachments.live
        if not optimizers:
            return
        refuse_capture("the forward pass of transient merging")
        layers = self._layers()
        kept: list[Kept] = []
        try:
            for optimizer in optimizers:
                held, trained = self._attachments.held_by(optimizer, layers)
                if not trained:
                    continue
                step = self._tally.next_step(held.numbers)
                outcome = self._merge(trained, step, keep=kept)
                if outcome is not None:
                    self._pending[id(optimizer)] = trained, outcome
                    self._note_merged(trained, outcome)
        finally:  # after an error too, what was merged so far must be restored
            if kept:
                self._interlude = Interlude(self.module, kept)

    def end_interlude(self) -> None:
        """Restores, bit for bit, kernels that are merged for a gradient now.

        An attached optimizer does this in its step, as do evaluation, checkpoints and copies. Call
        it only before you read or write ``weight`` tensors yourself between a forward pass and
        the step.
        """
        interlude = vars(self).get("_interlude")
        if interlude is not None:
            self._interlude = None
            interlude.end()

    # -- checks -------------------------------------------------------------------------------

    def _layers(self) -> Layers:
        found = find_layers(self.module, self.plan.merged, self._found)
        self._found = found
        return found

    def _check_engine(self, engine: str) -> None:
        first = self.module.get_submodule(self.plan.merged[0].name)
        require(engine, store_of(first).weight.device)

    def _check_replicas(self) -> None:
        first = [layer for layer in self._layers() if layer.parameters]
        engine = self.engine_in_use
        check_replicas(
            {f"{layer.site.name}.weight": layer.parameters[0] for layer in first},
            {
                "the seed": self.seed,
                "the step counter of merging": self.step,
                f"the engine ({engine})": crc32(engine.encode()),
            },
        )

    @torch.compiler.disable
    def _watch_forward(self) -> None:
        self._watch.before_forward(attached=bool(self._attachments.live))

    def _after_any_step(self, optimizer: Optimizer) -> None:
        """Counts steps of optimizers that train the merged weights without being attached."""
        by_hand = self._watch.steps and not len(self._attachments)
        end = self.settings.schedule.end
        if (
            not by_hand
            and (end is None or self.step < end)
            and self._attachments.miss(optimizer)
            and trains_any(optimizer, self.module, self.plan.merged)
        ):
            self._watch.after_missed_step(type(optimizer).__name__)

    def _warn_of_frozen_weights(self) -> None:
        self._watch.warn_once(
            "frozen",
            "all weights to merge are frozen: nothing is merged until requires_grad is True again",
        )

    # -- state --------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Returns the step counter and the statistics as a tensor, which safetensors can store."""
        return self._tally.to_state(self.seed)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Continues from the step counter and statistics of a checkpoint.

        Raises:
            ValueError: If the state was not written by an InMergeWrapper.
        """
        if state is None:
            return
        self._tally = Tally.from_state(state, layers=len(self.plan.merged), seed=self.seed)
        # The totals may have gone back: what came after them no longer belongs to this run.
        self._watch.rewind(self.step)
        self._last_merged.clear()
        self._pending.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is driven by no optimizer, and must not drag the original's along. Kernels that
        # are merged for a gradient are restored before they are copied: see Interlude.
        alone = {"_attachments": Attachments(), "_pending": {}, "_interlude": None, "_found": None}
        return vars(self) | alone
