"""The wrapper: the one stateful object of the library."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from inmerge_wrap._constants import DEFAULT_SHALLOW_SHARE
from inmerge_wrap.discovery import Pattern, plan_merging
from inmerge_wrap.driver import Driver
from inmerge_wrap.optimizers import Attachment
from inmerge_wrap.pairs import pairs_of_step
from inmerge_wrap.plan import MergePlan
from inmerge_wrap.proxy import NetworkProxy
from inmerge_wrap.recalibration import recalibrate
from inmerge_wrap.report import LayerSnapshot, MergeReport
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.settings import (
    Direction,
    MergeSettings,
    Mode,
    Partner,
    explains_symbols,
    recommended_settings,
)
from inmerge_wrap.thresholds import Threshold
from inmerge_wrap.unwrapping import check_network, refuse_wrapped

__all__ = ["InMergeWrapper"]


class InMergeWrapper(NetworkProxy):
    """Merges kernels inside a CNN while it trains (arXiv 2502.20516).

    By default as in the paper: :meth:`attach` makes an optimizer merge similar kernels after each
    of its steps. With ``mode="outputs"`` it merges inside the forward pass, with pairs of its own
    for each image, and writes no weight. The wrapper has no parameters of its own and copies none.

    >>> import timm, torch
    >>> from inmerge_wrap import InMergeWrapper
    >>> model = InMergeWrapper(timm.create_model("resnet18", num_classes=7))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = model.attach(optimizer)

    The network's attributes are read and set through the wrapper, for timm's optimizer factory and
    training code. The settings below are attributes too, checked when they are set.

    Args:
        module: The network, on any device, before it is parallelised.
        mode: Where merging happens: after each optimizer ``"step"``, written to the weights (the
            paper); in the forward pass on the ``"outputs"`` of the convolutions, where each image
            has its own pairs and the gradient is exact; or in the forward pass in the
            ``"weights"``, where the merged weight stands in for the parameter while its
            convolution runs, and the gradient goes straight through to the parameter.
        merge_weight: alpha in [0, 2], the weight of the kernel itself in a blend; above 1 it moves
            away from its partner.
        radius: r in [0, 2], the length of the move relative to the kernel's norm, in place of the
            constant share ``1 - merge_weight``.
        similarity_threshold: tau in [-1, 1]: pairs merge where their cosine is above it; or a
            rule that adapts to the layer, :class:`ZScore` or :class:`Quantile`. In the forward
            pass on the outputs, -1 compares nothing.
        merge_probability: p in [0, 1], the probability that a kernel is drawn in a step; on the
            outputs, in an image.
        schedule: When merging runs and how strongly; by default every step, at full strength.
        partner: ``"random"``, any other kernel of the group (the paper); ``"most_similar"``; or
            your own rule, see :class:`PartnerRule`.
        direction: How a kernel moves whose pair passes the threshold: toward its ``"partner"``
            (the paper's blend); ``"signed"``, toward it or away from it at random; your own rule,
            see :class:`DirectionRule`; or, as controls that need no partner, by filter-wise
            ``"gaussian"`` noise or ``"multiplicative"`` noise of a ``radius``.
        shared_partner: On the outputs, all images of a batch have the same partners; False draws
            them for each image.
        shared_sign: On the outputs, all images of a batch have the same signs and drawn kernels.
        keep_norm: Rescale each changed kernel to the norm it had before. The paper does not.
        merge_momentum: Blend the first moments of the optimizer (SGD's momentum, Adam's
            ``exp_avg``) like the weights, so that the next step continues from the merged point.
        compiled: Whether ``torch.compile`` compiles the pass after a step; None does so on a GPU
            with Triton. Results are equal up to rounding.
        shallow_layers: L_s, the first convolutions, which are not merged; see :func:`plan_merging`.
        example_input: An input of the network; see :func:`plan_merging`.
        include: Merge exactly the convolutions that match; see :func:`plan_merging`.
        exclude: Leave out the convolutions that match; see :func:`plan_merging`.
        also_merge: Kinds of convolutions to merge as well; see :func:`plan_merging`.
        plan: A plan made before, instead of the arguments of :func:`plan_merging`.
        seed: Seed of the draws, in [0, 2**32); the same on every process. The draws depend on
            it, the step, the layer and, on the outputs, the images, and on no global generator.
        inspect_every: Interval, in passes, at which similarity and effective rank of each layer
            are recorded in :attr:`history`, with a warning before a layer collapses; 0 disables it.
        check_replicas_every: Interval, in steps, at which the merged weights of all processes are
            compared, from the first step on; raises if they differ. 0 disables it.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, two contradict each other, the network is
            wrapped already, or there is nothing to merge.
    """

    @explains_symbols
    def __init__(
        self,
        module: nn.Module,
        *,
        mode: Mode = "step",
        merge_weight: float = 0.8,
        radius: float | None = None,
        similarity_threshold: float | Threshold = 0.3,
        merge_probability: float = 0.3,
        schedule: Schedule | None = None,
        partner: Partner = "random",
        direction: Direction = "partner",
        shared_partner: bool = True,
        shared_sign: bool = False,
        keep_norm: bool = False,
        merge_momentum: bool = False,
        compiled: bool | None = None,
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
            mode=mode,
            merge_weight=merge_weight,
            radius=radius,
            similarity_threshold=similarity_threshold,  # type: ignore[arg-type]
            merge_probability=merge_probability,
            schedule=Schedule() if schedule is None else schedule,
            partner=partner,
            direction=direction,
            shared_partner=shared_partner,
            shared_sign=shared_sign,
            keep_norm=keep_norm,
            merge_momentum=merge_momentum,
            compiled=compiled,
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
                mode=mode,
            )
        elif (
            shallow_layers != DEFAULT_SHALLOW_SHARE
            or example_input is not None
            or include is not None
            or exclude
            or also_merge
        ):
            raise ValueError("a plan decides what is merged: pass either a plan or its arguments")
        super().__init__(module)
        self._driver = Driver(module, plan, settings)

    @classmethod
    def recommended(
        cls, module: nn.Module, *, total_steps: int, mode: Mode = "outputs", **settings: Any
    ) -> InMergeWrapper:
        """Wraps a module with the recommended settings: inside the forward pass, for each image.

        Args:
            module: See the constructor.
            total_steps: Optimizer steps of the whole training run.
            mode: See :func:`recommended_settings`, and docs/evidence.md for what is known of each.
            **settings: Any argument of the constructor; overrides the recommended value.

        Raises:
            ValueError: If ``total_steps`` is not positive, or as the constructor does.
        """
        chosen = recommended_settings(total_steps, mode=mode)
        if settings.get("plan") is not None:  # it has decided on the layers
            chosen.pop("shallow_layers", None)
        return cls(module, **{**chosen, **settings})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network; merges on the way if the mode is one of the forward pass."""
        return self._driver.forward(self, args, kwargs)

    def attach(self, optimizer: Any) -> Attachment:
        """Merges with each step of ``optimizer`` from now on.

        Its steps drive the schedule. After each of them, with ``mode="step"``, the layers of the
        plan that it trains are merged; of two optimizers that train the same layer, the one
        attached last merges it. A copy of an optimizer has lost its hooks: attach it again. From
        now on the optimizer's state dict carries the step counter: attach before loading one.

        Args:
            optimizer: A torch optimizer, or one prepared by Accelerate or Lightning. Of a
                SAM-like optimizer, the steps of its ``base_optimizer`` count.

        Returns:
            A handle whose ``remove()`` stops merging. Attaching again returns the same handle.

        Raises:
            TypeError: If it is not a torch optimizer.
            ValueError: If it holds none of the merged weights (in the forward pass: no parameter
                of the network), or merges for another wrapper of this network.
            RuntimeError: With ``mode="step"``, if its steps write the weights from copies of their
                own (DeepSpeed, FSDP1, other schedule-free optimizers), if they undo what is merged
                (Lookahead, MADGRAD; found by a trial on a throwaway), or a setting does not fit.
        """
        return self._driver.attach(optimizer, self._after_step, self)

    def merge_(self) -> None:
        """Runs one pass over all merged layers, for a loop without a torch optimizer.

        Raises:
            RuntimeError: If the mode is one of the forward pass, which writes no weight.
        """
        self._driver.merge_(self)

    def paused(self) -> AbstractContextManager[None]:
        """Trains without merging inside a ``with`` block; the schedule waits meanwhile."""
        return self._driver.paused()

    def restart(self) -> None:
        """Begins again: step 0 of the schedule, no statistics, as for another training run."""
        self._driver.restart()

    def next_pairs(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Returns the pairs that the next step draws, before any threshold.

        Returns:
            Name of each merged layer -> (targets, sources), int64, shape (pairs,) each; empty
            if the schedule skips the step. Sources that depend on the weights are None.

        Raises:
            RuntimeError: With ``shared_partner=False``, where each image draws for itself.
        """
        return pairs_of_step(self.plan.merged, self.settings, self.step)

    def recalibrate(self, loader: Iterable[Any], *, prior: float = 0.0) -> int:
        """Measures BatchNorm's statistics again, before evaluation; see :func:`recalibrate`.

        Args:
            loader: Batches of images, or tuples that begin with them, preprocessed as in training.
            prior: Number of images that the old statistics count as; 0 forgets them.
        """
        return recalibrate(self, loader, prior=prior)

    def statistics_measured(self) -> None:
        """Records that BatchNorm was recalibrated after the last step by other means."""
        self._driver.statistics_measured()

    @property
    def statistics_lag(self) -> bool:
        """Whether BatchNorm statistics do not fit the weights as they are; waits for the device."""
        return self._driver.statistics_lag

    def report(self) -> MergeReport:
        """Returns what merging did so far, layer by layer; waits for the device."""
        return self._driver.report()

    @property
    def plan(self) -> MergePlan:
        """Which convolutions are merged, and why the others are not."""
        return self._driver.plan

    @plan.setter
    def plan(self, _: MergePlan) -> None:
        raise AttributeError(
            "the plan cannot change, its layers have the statistics: wrap the network again"
        )

    @property
    def history(self) -> list[LayerSnapshot]:
        """Snapshots of the merged layers, taken every ``inspect_every`` passes."""
        return self._driver.watch.history

    @property
    def step(self) -> int:
        """Optimizer steps seen so far; with several optimizers, those of the one with most."""
        return self._driver.tally.step

    @property
    def settings(self) -> MergeSettings:
        """All settings as one frozen object; set it, or attributes of it, to change them.

        Raises:
            RuntimeError: If the new ones do not work with an attached optimizer.
            ValueError: If the mode changes, on which the plan depends.
        """
        return self._driver.settings

    @settings.setter
    def settings(self, settings: MergeSettings) -> None:
        self._driver.change(settings)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._driver.after_step(optimizer, self)

    def get_extra_state(self) -> Tensor:
        """Returns the step counter and the statistics as a tensor, which safetensors can store."""
        return self._driver.state()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Continues from the step counter and statistics of a checkpoint.

        Raises:
            ValueError: If the state was not written by an InMergeWrapper.
        """
        self._driver.load(state)
