"""What happens in each step: counts it, merges after it or prepares the next forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from inmerge_wrap.forward import ForwardMerge, after_backward
from inmerge_wrap.kernels import MergedLayer, check_layers, check_sites, find_layers, modules_of
from inmerge_wrap.optimizers import (
    Attachment,
    Attachments,
    carry_counter,
    check_held,
    check_settings,
    check_still_held,
    companions,
    fsdp_modules,
    ids_of,
    is_schedule_free,
    refuse_per_image_gradients,
    refuse_second,
    stepped_of,
    stepping_optimizer,
    trained_by,
    trained_of,
    unprepared,
)
from inmerge_wrap.pairs import Outcome
from inmerge_wrap.persistent import merge_step
from inmerge_wrap.plan import MergePlan
from inmerge_wrap.replicas import Replicas, check_replicas, compared_weights
from inmerge_wrap.report import MergeReport
from inmerge_wrap.settings import MergeSettings, Strength
from inmerge_wrap.steps import (
    is_nested_step,
    is_no_training_step,
    notice_every_step,
    refuse_capture,
    refuse_recording,
)
from inmerge_wrap.tally import Tally
from inmerge_wrap.trial import refuse_undone
from inmerge_wrap.watch import Watch

_OVER = 1.05  # the end of a training run, where the schedule ends 5% before it


class Driver:
    """Drives the merging of one network from the steps of its optimizers."""

    def __init__(self, network: nn.Module, plan: MergePlan, settings: MergeSettings) -> None:
        check_sites(network, plan.merged)
        if plan.mode != settings.mode:
            raise ValueError(
                f"the plan was made for mode={plan.mode!r}, which can merge other convolutions: "
                f"make it with plan_merging(network, mode={settings.mode!r})"
            )
        self._network, self.plan, self.settings = network, plan, settings
        self.tally = Tally(
            len(plan.merged),
            per_image=settings.mode == "outputs",
            key=crc32("\n".join(site.name for site in plan.merged).encode()),
        )
        self.watch = Watch()
        self._pauses = 0
        # How each layer merged in the last step of its optimizer, for those that did.
        self._last: dict[int, Outcome | Strength] = {}
        self._attachments = Attachments()
        self._forward = ForwardMerge(plan.merged, network)
        self._passes = 0  # steps that merged
        # Steps of each layer that merged and whose counts have not been read; -1: one more has.
        self._uncounted = [0] * len(plan.merged)
        self._ran = False  # whether a forward pass merged since the last step
        self._sharded: list[Any] | None = None  # modules of FSDP2
        self._replicas = Replicas()
        notice_every_step(self._after_any_step)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is driven by no optimizer, and must not drag the original's along. It may be an
        # average of weights, whose original merges: what it missed is counted from now on.
        watch = copy.copy(self.watch)
        watch.steps = watch.idle_forwards = watch.missed_steps = 0
        self._read_counts()  # into the tally, which is copied
        return vars(self) | {
            "_attachments": Attachments(),
            "_pauses": 0,
            "_replicas": Replicas(),
            "_sharded": None,
            "watch": watch,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        notice_every_step(self._after_any_step)

    @property
    def _in_step(self) -> bool:
        """Whether merging happens after each step and not in the forward pass."""
        return self.settings.mode == "step"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Merges nothing inside a ``with`` block."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    # -- the forward pass -------------------------------------------------------------------------

    def forward(self, wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the network of the wrapper, and merges on the way where the mode says so."""
        network: Any = wrapper.module
        compiling = torch.compiler.is_compiling()
        # A counter would make torch.compile specialise on its value and compile every step; once an
        # optimizer is attached, its steps say what a compiled pass would.
        counted_by_steps = compiling and not self._in_step and len(self._attachments)
        if wrapper.training and torch.is_grad_enabled() and not counted_by_steps:
            self._watch_forward(wrapper, network)
        merges = self._forward.is_on and not self._pauses and (wrapper.training or network.training)
        if not merges or self._forward.repeats_plain or not (compiling or self._attachments.live):
            return network(*args, **kwargs)
        if not compiling and vars(wrapper).get("_is_replica"):
            raise RuntimeError(
                "nn.DataParallel runs copies of the network in threads, which would share one "
                "draw: train with DistributedDataParallel"
            )
        refuse_recording()
        self._ran = True
        self._forward.begin((args, kwargs))
        outputs = None
        try:
            outputs = network(*args, **kwargs)
        finally:
            self._forward.end(outputs)
        return outputs

    @torch.compiler.disable
    def _watch_forward(self, wrapper: nn.Module, network: nn.Module) -> None:
        trains = any(parameter.requires_grad for parameter in network.parameters())
        if trains and not self._pauses:  # averages of weights need no gradient
            self.watch.before_forward(attached=bool(self._attachments.live))
            if self._in_step:
                self._replicas.tell(self.settings, self.plan, wrapper)
            if (step := self._replicas.follow(self.tally.step)) > self.tally.step:
                self.tally.catch_up(step)
                self._prepare()

    def _prepare(self) -> None:
        """Prepares the next forward pass, if it is to merge."""
        if self._in_step:
            return
        if self._attachments.live:
            step = self.tally.step
            self._forward.set_step(step, self.settings.strength(step), self.settings)
        else:
            self._forward.uninstall()

    # -- the optimizers ---------------------------------------------------------------------------

    def attach(self, given: Any, hook: Callable[..., None], wrapper: Any) -> Attachment:
        """Makes an optimizer drive the merging; see :meth:`InMergeWrapper.attach`."""
        optimizer = stepping_optimizer(given, to_write=self._in_step)
        if not self._in_step:
            check_sites(self._network, self.plan.merged)  # it may have changed since
            self._check_forward(self._layers())
        known = self._attachments.of(optimizer)
        attachment = self._attached(optimizer, given, hook, wrapper) if known is None else known
        if not self._in_step:
            self._forward.install(self._network)
            self._prepare()
        return attachment

    def _attached(
        self, optimizer: Optimizer, given: Any, hook: Callable[..., None], wrapper: Any
    ) -> Attachment:
        layers = self._layers()
        held = self._held_by(optimizer, layers)
        check_held(optimizer, held, layers, self._network, to_write=self._in_step)
        if not trained_of(held if self._in_step else layers):
            self._warn_of_frozen_weights()
        if self._in_step:
            check_layers(held)
        refuse_second(optimizer, wrapper, held)
        check_settings(self.settings, optimizer)
        if self._in_step and not is_schedule_free(optimizer):
            for each in {id(found): found for found in (unprepared(given), optimizer)}.values():
                refuse_undone(each, held[0].parameters[0])
        self._warn_if_over(1.0)
        if not getattr(type(optimizer).step, "hooked", False):
            # timm's Lookahead skips Optimizer.__init__, without which step() runs no hooks.
            optimizer._patch_step_function()
        handles = [
            optimizer.register_step_post_hook(hook),
            *carry_counter([given, optimizer], wrapper),
        ]
        attachment = Attachment(optimizer, handles, self._prepare)
        if self._in_step:  # found again in each step, from the first on
            attachment.merged.update(layer.number for layer in trained_of(held))
        self._attachments.add(attachment)
        now = self.tally.step
        for layer in held:  # a training run that goes on with another optimizer keeps its schedule
            self.tally.steps[layer.number] = now
        return attachment

    def _warn_if_over(self, times: float) -> None:
        """Warns if so many times the steps of the schedule are counted."""
        end = self.settings.schedule.end
        if end is not None and self.tally.step >= times * end:
            self.watch.warn(
                f"the schedule ended at step {end:,} and {self.tally.step:,} steps are counted, so "
                "that nothing merges with this optimizer: call model.restart() to begin again"
            )

    def _held_by(self, optimizer: Optimizer, layers: Sequence[MergedLayer]) -> list[MergedLayer]:
        """Returns the layers that an optimizer's steps merge, or count in the forward pass.

        In the forward pass layers merge whoever trains them: where no optimizer does, as with a
        head that is trained alone, or with DeepSpeed, each counts for all.
        """
        if self._in_step:
            return self._attachments.held_by(optimizer, layers)
        mine = trained_by(optimizer, layers)
        if mine or any(trained_by(other, layers) for other in self._attachments.live):
            return mine
        return list(layers)

    def change(self, new: MergeSettings) -> None:
        """Replaces the settings; see :attr:`InMergeWrapper.settings`."""
        if new.mode != self.settings.mode:
            raise ValueError(
                f"mode={self.settings.mode!r} cannot become {new.mode!r}, because the plan depends "
                "on it: wrap the bare network, model.module, again"
            )
        for optimizer in self._attachments.live:
            check_settings(new, optimizer)
        self.settings = new
        self._prepare()

    # -- one step ---------------------------------------------------------------------------------

    @torch.compiler.disable
    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, wrapper: nn.Module) -> None:
        """Counts a step of an attached optimizer, and merges after it or prepares the next."""
        if is_nested_step(optimizer) or is_no_training_step():
            return
        if self._waits():
            return
        refuse_capture("optimizer.step()")
        if self._in_step:
            self._reshard(wrapper)
        layers = self._layers()
        held = self._held_by(optimizer, layers)
        attachment = self._attachments.of(optimizer)
        if self._in_step and attachment is not None:
            check_layers(layers)
            check_still_held(attachment, trained_of(held), layers)
        elif not self._in_step:
            self._check_forward(layers)
        if held:
            self._step(held, layers, optimizer)
        if not trained_of(layers):
            self._warn_of_frozen_weights()

    def _check_forward(self, layers: Sequence[MergedLayer]) -> None:
        self._forward.refuse_replaced(layers)
        if self.settings.mode == "outputs":
            refuse_per_image_gradients(layers)

    def _waits(self) -> bool:
        """Returns whether merging is paused; what the step leaves is then a plain network."""
        if self._pauses:
            self.watch.idle_forwards = self.watch.missed_steps = 0
            self._last.clear()
        return self._pauses > 0

    def merge_(self, wrapper: nn.Module) -> None:
        """Runs one pass over all merged layers; see :meth:`InMergeWrapper.merge_`."""
        if not self._in_step:
            raise RuntimeError(
                f"merge_() writes merged weights, and mode={self.settings.mode!r} merges in the "
                "forward pass: attach the optimizer, or wrap the network with mode='step'"
            )
        if self._waits():
            return
        refuse_capture("merge_()")
        self._reshard(wrapper)
        layers = self._layers()
        check_layers(layers)
        self._step(layers, layers)

    def _step(
        self,
        held: Sequence[MergedLayer],
        layers: Sequence[MergedLayer],
        optimizer: Optimizer | None = None,
    ) -> None:
        """Counts a step of some layers, and merges those that train."""
        if self._in_step:
            self._replicas.check(self.settings, self.plan)
        seen = self.tally.step
        step = self.tally.begin([layer.number for layer in held])
        self.watch.idle_forwards = self.watch.missed_steps = 0
        # Of several optimizers, one moves the clock; the forward pass before it was theirs too.
        acts = self._in_step or self.tally.step > seen
        if acts:
            for layer in held if self._in_step else layers:
                self._last.pop(layer.number, None)
        strength = self.settings.strength(step)
        trained = trained_of(held if self._in_step else layers)
        if acts and strength is not None and trained:
            self._passes += 1
            if self._in_step:
                self._merge(trained, strength, step, optimizer)
            else:
                self._note_forward(trained, strength)
            passes = self.tally.passes if self._in_step else [self._passes] * len(layers)
            self.watch.after_pass(trained, passes, self.settings, self.report)
        self.watch.after_step(step, self.settings.schedule)
        every = self.settings.check_replicas_every
        # Counted here, not by the schedule or a checkpoint, so that all replicas get here even
        # if their step counters are what differs.
        if every and self.watch.steps % every == 0:
            self._check_replicas()
        self._replicas.counted(self.tally.step)
        self.watch.steps += 1
        if self.tally.step > seen:
            # An optimizer may step in the backward pass, which can still repeat forward passes.
            after_backward(self._prepare)

    def _merge(
        self,
        trained: Sequence[MergedLayer],
        strength: Strength,
        step: int,
        optimizer: Optimizer | None,
    ) -> None:
        """Merges after a step the layers that it moved."""
        if optimizer is not None:
            trained = stepped_of(trained, optimizer)
        if not trained:
            return
        found, problem = companions(optimizer, trained, moments=self.settings.merge_momentum)
        if problem is not None:
            self.watch.warn_once("momentum", f"merge_momentum has no effect: {problem}")
        # A fused optimizer runs its hooks even on a step that the scaler skips for overflow.
        skip = getattr(optimizer, "found_inf", None)
        outcome = merge_step(trained, self.settings, strength, step, found, skip)
        self.tally.add(outcome)
        self._last.update(dict.fromkeys(outcome.numbers, outcome))

    def _note_forward(self, trained: Sequence[MergedLayer], strength: Strength) -> None:
        """Notes that the forward passes before this step merged, or warns that none came."""
        if not (self._ran or self._forward.is_graphed):
            self.watch.warn_once(
                "forward",
                "no forward pass of this model merged before the step, so nothing was merged for "
                "its gradient: call the wrapper itself, in train mode and outside of paused(), and "
                "attach the optimizer before the first pass",
            )
            return
        for layer in trained:
            self._uncounted[layer.number] += 1
            self._last[layer.number] = strength
        self._ran = False

    # -- what is known of it ----------------------------------------------------------------------

    def report(self) -> MergeReport:
        """Returns what merging did so far, layer by layer; waits for the device."""
        self._read_counts()
        end = self.settings.schedule.end
        return replace(
            self.tally.report([site.name for site in self.plan.merged]),
            ended=end if end is not None and self.tally.step > end else None,
            idle=self.watch.why_never(self.tally.step, attached=bool(self._attachments.live)),
        )

    def _read_counts(self) -> None:
        counts = self._forward.take_counts()
        if counts is not None:
            # A pass that came before its step counts now, and not again at the step.
            self.tally.add_totals(*counts, [steps + self._ran for steps in self._uncounted])
            acted, ran = (counts[0][:, 0] > 0).tolist(), int(self._ran)
            known = zip(acted, self._uncounted, strict=True)
            self._uncounted = [-ran if has_acted else min(0, steps) for has_acted, steps in known]

    @property
    def statistics_lag(self) -> bool:
        """Whether BatchNorm statistics do not fit the weights as they are; waits for the device."""
        return any(
            not isinstance(last, Outcome) or bool(last.merged[last.layer == number].any())
            for number, last in self._last.items()
        )

    def statistics_measured(self) -> None:
        """Records that BatchNorm was recalibrated after the last step."""
        self._last.clear()

    def _layers(self) -> list[MergedLayer]:
        return find_layers(self._network, self.plan.merged)

    def _reshard(self, wrapper: nn.Module) -> None:
        if self._sharded is None or not self.watch.steps:
            is_distributed = dist.is_available() and dist.is_initialized()
            self._sharded = fsdp_modules(wrapper) if is_distributed else []
        for module in self._sharded:
            module.reshard()

    def _check_replicas(self) -> None:
        if self._replicas.joins:
            every = self.settings.check_replicas_every
            raise RuntimeError(
                f"check_replicas_every={every} would wait forever inside DDP's join(), where some "
                "processes have no batches left: set it to 0, or give all the same number of "
                "batches (drop_last=True)"
            )
        check_replicas(
            compared_weights(self._layers()),
            {"the seed": self.settings.seed, "the step counter of merging": self.tally.step},
        )

    def _after_any_step(self, optimizer: Optimizer) -> None:
        """Counts steps of optimizers that train the merged weights without being attached."""
        if self._last and not self._attachments.live and self._trains(optimizer):
            self._last.clear()  # a plain step, whose forward pass measured these weights
        end = self.settings.schedule.end
        has_ended = end is not None and self.tally.step >= end
        if has_ended or (self.watch.steps and not len(self._attachments)):  # or merged by hand
            return
        missed = self._attachments.miss(optimizer) and not self._pauses
        if missed and self._trains(optimizer):
            self.watch.after_missed_step(type(optimizer).__name__)

    def _trains(self, optimizer: Optimizer) -> bool:
        """Returns whether an optimizer trains one of the layers to merge."""
        held = ids_of(optimizer)
        try:
            modules = modules_of(self._network, self.plan.merged)
        except RuntimeError:  # reparameterised for inference: the layers of the plan are gone
            return False
        return any(p.requires_grad and id(p) in held for m in modules for p in m.parameters())

    def _warn_of_frozen_weights(self) -> None:
        self.watch.warn_once(
            "frozen",
            "all weights to merge are frozen: nothing is merged until requires_grad is True again",
        )

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> Tensor:
        """Returns the step counter and the statistics as a tensor."""
        self._read_counts()
        return self.tally.to_state(self.settings)

    def load(self, state: Tensor | None) -> None:
        """Continues from a step counter and statistics; None leaves them unchanged."""
        if state is None:
            return
        tally = Tally.from_state(state, now=self.tally, settings=self.settings)
        if tally is None:
            return
        self._begin(tally)
        # The totals may have gone back: what came after them no longer belongs to this run.
        self.watch.rewind(self.tally.step)
        self._prepare()
        if self._attachments.live:  # not of a run that is resumed near its end
            self._warn_if_over(_OVER)

    def restart(self) -> None:
        """Begins again at step 0."""
        self._begin(self.tally.begun_again())
        self.watch = Watch()
        self._prepare()

    def _begin(self, tally: Tally) -> None:
        self._forward.take_counts()
        self._replicas.begin()
        self.tally, self._passes = tally, max(tally.passes)
        self._uncounted = [0] * len(self.plan.merged)
        self._ran = False
        self._last.clear()
