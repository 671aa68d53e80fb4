"""One merge per optimizer step, whatever the optimizer is and however it is called."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import timm
import timm.optim
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from inmerge_wrap import InMergeWrapper, NoEffectWarning, Schedule
from inmerge_wrap.trial import share_kept
from tests import reference
from tests.scripts.common import (
    EXAMPLE,
    MERGED,
    SETTINGS,
    Nested,
    attached,
    batch,
    closure_of,
    digest,
    equal,
    loss_of,
    next_pairs,
    sgd,
    tiny_net,
    train,
    weights_of,
    wrapped,
)

ALPHA, TAU = 0.7, 0.0

_NEEDS_A_GPU = ("bnb", "fused")  # bitsandbytes and apex
_KEEPS_A_COPY = ("madgrad", "lookahead")
TIMM_NAMES = [
    name
    for name in timm.optim.list_optimizers()
    if not name.startswith((*_NEEDS_A_GPU, *_KEEPS_A_COPY))
]


def merge_by_the_book(model: nn.Module, pairs: list[list[tuple[int, int]]]) -> int:
    """The paper's loop over the weights of a network that no hook touches."""
    merged = 0
    for name, layer_pairs in zip(MERGED, pairs, strict=True):
        weight = model.get_submodule(name).weight
        merged += sum(
            reference.merge_on(weight, layer_pairs, merge_weight=ALPHA, similarity_threshold=TAU)
        )
    return merged


def step_once(model: nn.Module, optimizer: Any, number: int) -> None:
    """One step as the optimizer wants it, with the same global randomness each time."""
    torch.manual_seed(number)
    model.zero_grad()  # not the optimizer's: it must not be needed (timm's Lookahead)
    if isinstance(optimizer, torch.optim.LBFGS) or "Closure" in type(optimizer).__name__:
        optimizer.step(closure_of(model, optimizer, number))
        return
    loss_of(model, number).backward(create_graph=getattr(optimizer, "is_second_order", False))
    optimizer.step()


def assert_lockstep(
    make: Callable[[nn.Module], Any], steps: int = 3, attach: Callable[[Any], Any] = lambda o: o
) -> None:
    """Attached steps are bare steps followed by the paper's merge: no more, no less, not twice."""
    model = wrapped(merge_weight=ALPHA, similarity_threshold=TAU)
    twin = tiny_net()
    optimizer, twin_optimizer = make(model), make(twin)
    model.attach(attach(optimizer))
    merged = 0
    for number in range(steps):
        pairs = next_pairs(model)
        step_once(model, optimizer, number)
        step_once(twin, twin_optimizer, number)
        merged += merge_by_the_book(twin, pairs)
        for name, expected in twin.named_parameters():
            actual = model.module.get_parameter(name)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=name)
        # A rounding error in a weight must not grow into another sign of an update.
        twin.load_state_dict(model.module.state_dict())
    assert [layer.steps for layer in model.report()] == [steps, steps]
    assert model.report().merged == merged > 0


@pytest.fixture(autouse=True)
def nothing_compiles() -> Iterator[None]:
    """timm's Kron compiles its parts, which takes a minute and is not what is tested here."""
    with torch.compiler.set_stance("force_eager"):
        yield


# -- every optimizer -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum':UserWarning")
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_timm(name: str) -> None:
    assert_lockstep(lambda model: timm.optim.create_optimizer_v2(model, opt=name, lr=1e-2))


def test_most_of_timms_optimizers_were_tried() -> None:
    assert len(TIMM_NAMES) >= 80


def left_of_a_merge(optimizer: Any, model: nn.Module) -> float:
    """The share of a change of ``mid`` that is left after 24 steps of training at almost no rate.

    Independent of the library: the network itself trains, and nothing of it is attached.
    """
    for group in optimizer.param_groups:
        group["lr"] = 1e-7
    for number in range(24):
        step_once(model, optimizer, number)
    before = model.mid.weight.detach().clone()
    change = 0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.mid.weight += change
    for number in range(24):
        step_once(model, optimizer, number)
    moved = model.mid.weight.detach() - before
    return ((moved * change).sum() / change.square().sum()).item()


@pytest.mark.parametrize(
    "name,share",
    [
        ("sgd", 1.0),
        ("adamw", 1.0),
        ("lookahead_sgd", 0.5),
        ("lookahead_lamb", 0.5),
        ("madgrad", 0.08),
        ("madgradw", 0.08),
    ],
)
def test_an_optimizer_that_undoes_merges_is_refused_where_weights_are_written(
    name: str, share: float
) -> None:
    def make(model: nn.Module) -> Any:
        return timm.optim.create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.05)

    network = tiny_net()
    assert left_of_a_merge(make(network), network) == pytest.approx(share, abs=0.05)
    model = wrapped()
    optimizer = make(model)
    if share == 1.0:
        model.attach(optimizer)
        return
    message = rf"{type(optimizer).__name__} keeps a copy .* {share:.0%} are left .*mode='outputs'"
    with pytest.raises(RuntimeError, match=message):
        model.attach(optimizer)
    assert not optimizer._optimizer_step_post_hooks  # nothing half attached
    for mode in ("outputs", "weights"):
        model = wrapped(mode=mode)
        optimizer = make(model)
        model.attach(optimizer)
        train(model, optimizer, 8)
        assert model.step == 8 and model.report().merged


class Lookahead(torch.optim.Optimizer):
    """As other packages have it: around an optimizer of its own, whose steps torch hooks."""

    def __init__(self, base: torch.optim.Optimizer, every: int = 5) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base_optimizer, self.every, self.count = base, every, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base_optimizer.step()
        self.count += 1
        if self.count % self.every == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    slow = self.state[p].setdefault("slow", p.detach().clone())
                    p.copy_(slow.lerp_(p, 0.5))


def test_the_optimizer_around_the_one_that_steps_is_tried_too() -> None:
    model = wrapped()
    with pytest.raises(RuntimeError, match="Lookahead keeps a copy"):
        model.attach(Lookahead(sgd(model)))


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: pytorch_optimizer.TRAC(torch.optim.AdamW(weights)),
        lambda weights: pytorch_optimizer.Lookahead(torch.optim.AdamW(weights)),
        lambda weights: pytorch_optimizer.Ranger21(weights, num_iterations=100),
        pytorch_optimizer.DAdaptSGD,
    ],
    ids=["TRAC", "Lookahead", "Ranger21", "DAdaptSGD"],
)
def test_another_library_s_optimizers_that_undo_merges_are_refused(make: Any) -> None:
    model = wrapped(mode="step")
    optimizer = make(list(model.parameters()))
    with pytest.raises(RuntimeError, match="keeps a copy of the weights"):
        model.attach(optimizer)
    model = wrapped(mode="weights")
    optimizer = make(list(model.parameters()))
    model.attach(optimizer)
    train(model, optimizer, 2)
    assert model.step == 2


def assert_same(first: Any, second: Any) -> None:
    leaves, other = tree_leaves(first), tree_leaves(second)
    assert len(leaves) == len(other)
    for a, b in zip(leaves, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum':UserWarning")
@pytest.mark.parametrize("name", ["sgd", "adamw", "lookahead_adamw", "madgrad", "kron", "muon"])
def test_the_trial_touches_neither_optimizer_nor_weights_nor_generators(name: str) -> None:
    model = wrapped(mode="step")
    optimizer = timm.optim.create_optimizer_v2(model, opt=name, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # patches step
    for number in range(3):
        step_once(model, optimizer, number)
        scheduler.step()
    calls: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    before, weights = vars(optimizer).copy(), weights_of(model)
    state = copy.deepcopy(optimizer.state_dict())
    drawn = torch.get_rng_state(), random.getstate()
    gradients = [p.grad.clone() for p in model.parameters()]
    share_kept(optimizer, model.mid.weight)
    handle.remove()
    assert before.keys() == vars(optimizer).keys()
    assert all(vars(optimizer)[attribute] is value for attribute, value in before.items())
    assert_same(state, optimizer.state_dict())
    assert equal(weights, weights_of(model))
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(drawn[0], torch.get_rng_state()) and drawn[1] == random.getstate()
    assert "lookahead" in name or not calls


def test_a_trial_that_fails_leaves_no_trace_in_the_state() -> None:
    model = wrapped(mode="step")
    optimizer = torch.optim.LBFGS(model.parameters())
    assert share_kept(optimizer, model.mid.weight) is None and not optimizer.state


def test_an_optimizer_that_the_trial_cannot_step_is_not_refused() -> None:
    class Picky(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if self.param_groups[0]["lr"] == 0.0:
                raise ZeroDivisionError
            return super().step(closure)

    model = wrapped()
    optimizer = Picky(model.parameters(), lr=0.1)
    model.attach(optimizer)
    train(model, optimizer, 2)
    assert model.step == 2


TORCH_OPTIMIZERS = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    # abstract; sparse gradients only; matrices only
    and kind.__name__ not in ("Optimizer", "SparseAdam", "Muon")
]


@pytest.mark.parametrize("kind", TORCH_OPTIMIZERS)
def test_torch(kind: Any) -> None:
    assert_lockstep(lambda model: kind(model.parameters(), lr=1e-2))


@pytest.mark.parametrize("variant", ["foreach", "fused"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_torch_variants(name: str, variant: str) -> None:
    kind = getattr(torch.optim, name)
    assert_lockstep(lambda model: kind(model.parameters(), lr=1e-2, **{variant: True}))


def test_lbfgs_merges_once_for_many_evaluations() -> None:
    model = wrapped()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    model.attach(optimizer)
    evaluations = 0
    inner = closure_of(model, optimizer, 0)

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return inner()

    optimizer.step(closure)
    assert evaluations >= 4 and model.step == 1


# -- optimizers that call an optimizer -----------------------------------------------------------


class NestedTwice(Nested):
    """A third level."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [Nested, NestedTwice])
def test_a_step_that_calls_its_parents_step(kind: type[Nested]) -> None:
    for parent in kind.__mro__[1:]:
        if parent is torch.optim.Optimizer:
            break
        parent([nn.Parameter(torch.zeros(1))], lr=0.1)  # only now torch hooks the parent's step
    calls = []
    assert_lockstep(lambda model: kind(model.parameters(), lr=0.05), attach=lambda o: spy(o, calls))
    assert len(calls) == 3 * (2 if kind is Nested else 3), "the trap is no longer there"


def spy(optimizer: torch.optim.Optimizer, calls: list[int]) -> torch.optim.Optimizer:
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    return optimizer


def test_a_step_that_raises_does_not_upset_the_count() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    model = wrapped()
    optimizer = Nested(model.parameters(), lr=0.05)
    model.attach(optimizer)
    train(model, optimizer, 1)
    optimizer.fail = True
    with pytest.raises(FloatingPointError):
        train(model, optimizer, 1)
    optimizer.fail = False
    train(model, optimizer, 2)
    assert model.step == 3  # the failed step never reached its end


def test_two_optimizers_of_one_class_nested_in_a_closure() -> None:
    """One optimizer that steps inside of another's step is no nested step of it."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    outer_model, inner_model = wrapped(), wrapped()
    outer = Nested(outer_model.parameters(), lr=0.05)
    inner = Nested(inner_model.parameters(), lr=0.05)
    outer_model.attach(outer)
    inner_model.attach(inner)
    outer_closure = closure_of(outer_model, outer, 0)

    def closure() -> Tensor:
        train(inner_model, inner, 1)
        return outer_closure()

    outer.step(closure)
    assert (outer_model.step, inner_model.step) == (1, 1)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (arXiv 2010.01412) around a base optimizer of its own."""

    def __init__(self, params: Iterable[Tensor], base: Any, rho: float = 0.05, **options: Any):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        with_grad = [
            p for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in with_grad]))
        for p in with_grad:
            self.state[p]["start"] = p.data.clone()
            p.add_(p.grad, alpha=float(self.param_groups[0]["rho"] / norm))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["start"]  # another storage in each step
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


def sam_step(model: nn.Module, optimizer: SAM, number: int, style: str) -> None:
    if style == "closure":
        loss_of(model, number).backward()
        optimizer.step(closure_of(model, optimizer, number))
        optimizer.zero_grad()
    else:
        loss_of(model, number).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, number).backward()
        optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize("attach_to", ["sam", "base_optimizer"])
@pytest.mark.parametrize("style", ["closure", "two calls"])
def test_sam(style: str, attach_to: str) -> None:
    model = wrapped(merge_weight=ALPHA, similarity_threshold=TAU)
    twin = tiny_net()
    optimizer, twin_optimizer = (
        SAM(m.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9) for m in (model, twin)
    )
    model.attach(optimizer if attach_to == "sam" else optimizer.base_optimizer)
    for number in range(3):
        pairs = next_pairs(model)
        sam_step(model, optimizer, number, style)
        sam_step(twin, twin_optimizer, number, style)
        assert merge_by_the_book(twin, pairs) > 0
        for name, expected in twin.named_parameters():
            actual = model.module.get_parameter(name)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=name)
    assert model.step == 3


# -- schedule-free -------------------------------------------------------------------------------

SCHEDULE_FREE = [
    kind
    for name, kind in vars(schedulefree).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
]


@pytest.mark.parametrize("kind", SCHEDULE_FREE)
def test_schedule_free_merges_the_average_that_is_evaluated(kind: Any) -> None:
    """The weights seen in evaluation, too, are those of a bare step followed by the merge."""
    closure_style = "Closure" in kind.__name__
    model = wrapped(merge_weight=ALPHA, similarity_threshold=TAU)
    twin = tiny_net()
    optimizer, twin_optimizer = (kind(m.parameters(), lr=0.02) for m in (model, twin))
    model.attach(optimizer)
    for number in range(4):
        # What an average is worth shows only after it has come apart from the last iterate.
        if number:
            there_and_back(optimizer)
            twin.load_state_dict(model.module.state_dict())
            twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        pairs = next_pairs(model)
        for m, o in ((model, optimizer), (twin, twin_optimizer)):
            if not closure_style:
                o.train()
            step_once(m, o, number)
    # Both have merged in the first three steps, `model` in the fourth as well.
    similar = {
        name: [(i, j) for i, j in layer_pairs if reference.cosine(weight[i], weight[j]) > TAU]
        for name, layer_pairs in zip(MERGED, pairs, strict=True)
        for weight in [twin.get_submodule(name).weight.detach()]
    }
    assert all(similar.values())
    if not closure_style:
        optimizer.eval()
        twin_optimizer.eval()
    for name, layer_pairs in similar.items():
        weight, expected = model.get_submodule(name).weight, twin.get_submodule(name).weight
        for actual, bare in (
            (weight, expected),
            (optimizer.state[weight]["z"], twin_optimizer.state[expected]["z"]),
        ):
            merged = bare.detach().clone()
            for i, j in layer_pairs:
                merged[i] = ALPHA * bare[i] + (1 - ALPHA) * bare[j]
            torch.testing.assert_close(actual.detach(), merged.detach(), rtol=1e-5, atol=1e-6)


def there_and_back(optimizer: Any) -> None:
    """Where one would evaluate; nothing may be lost on the way."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        optimizer.train()


def test_schedule_free_with_a_computed_weight_is_refused() -> None:
    net = tiny_net()
    nn.utils.parametrizations.weight_norm(net.last)
    model = InMergeWrapper(net, shallow_layers=1, similarity_threshold=0.0)
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.02)
    model.attach(optimizer)
    optimizer.train()
    with pytest.raises(RuntimeError, match="a weight that is computed"):
        train(model, optimizer, 1)


def test_other_schedule_free_optimizers_are_refused_by_name() -> None:
    from schedulefree.wrap_schedulefree import ScheduleFreeWrapper

    class ScheduleFreeAdam(torch.optim.Adam):
        """As other packages name theirs."""

    model = wrapped()
    for optimizer in (ScheduleFreeWrapper(sgd(model)), ScheduleFreeAdam(model.parameters())):
        with pytest.raises(RuntimeError, match=f"{type(optimizer).__name__} keeps.*SGDScheduleFr"):
            model.attach(optimizer)


# -- copies, several optimizers, changing groups -------------------------------------------------


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_copied_optimizer_merges_after_it_was_attached(way: str) -> None:
    model, optimizer = attached()
    train(model, optimizer, 1)
    if way == "pickle":
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, 1)
    assert model.step == 1  # torch's copies of an optimizer have no hooks
    model.attach(optimizer)
    train(model, optimizer, 1)
    assert model.step == 2


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_copied_model_that_trains_without_its_optimizer_is_reported(way: str) -> None:
    model, optimizer = attached()
    train(model, optimizer, 2)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    other = sgd(copied)
    train(model, optimizer, 20)  # the copy is none of its business
    train(copied, other, 9)
    with pytest.warns(NoEffectWarning, match="10 training .* no optimizer is attached"):
        train(copied, other, 1)


def test_a_copied_optimizer_that_was_not_attached_is_reported() -> None:
    model = wrapped()
    model.attach(sgd(model))
    model, optimizer = copy.deepcopy((model, sgd(model)))
    with pytest.warns(NoEffectWarning, match=r"no optimizer is attached\. Call model\.attach"):
        train(model, optimizer, 10)


def test_an_optimizer_is_not_kept_alive() -> None:
    _model, optimizer = attached()
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None


def test_two_optimizers_merge_their_own_layers_in_their_own_time() -> None:
    model = wrapped()
    first = torch.optim.SGD([*model.stem.parameters(), *model.mid.parameters()], lr=0.05)
    second = torch.optim.AdamW([*model.last.parameters(), *model.head.parameters()], lr=1e-3)
    model.attach(first)
    model.attach(second)
    for number in range(4):
        loss_of(model, number).backward()
        first.step()
        if number % 2:
            before = weights_of(model.mid)
            second.step()
            assert equal(before, weights_of(model.mid))
        model.zero_grad()
    assert [layer.steps for layer in model.report()] == [4, 2]


def test_of_two_optimizers_over_one_layer_the_last_attached_merges() -> None:
    model = wrapped(similarity_threshold=-1.0)
    whole, head = sgd(model), torch.optim.SGD([*model.module.last.parameters()], lr=0.05)
    model.attach(whole)
    model.attach(head)
    train(model, whole, 2)
    assert [layer.steps for layer in model.report()] == [2, 0]
    train(model, head, 1)
    assert [layer.steps for layer in model.report()] == [2, 1]


def test_an_optimizer_whose_layers_were_all_taken_over_just_steps() -> None:
    model = wrapped()
    old, new = sgd(model), sgd(model)
    model.attach(old)
    model.attach(new)
    train(model, old, 1)
    assert model.step == 0
    train(model, new, 1)
    assert model.step == 1


def test_a_new_optimizer_for_a_second_phase() -> None:
    model, optimizer = attached()
    train(model, optimizer, 2)
    optimizer = torch.optim.AdamW(model.last.parameters(), lr=1e-3)
    model.attach(optimizer)
    train(model, optimizer, 2, start=2)
    assert [layer.steps for layer in model.report()] == [2, 4]


def test_parameter_groups_added_later_are_merged() -> None:
    model = wrapped()
    optimizer = torch.optim.SGD(model.mid.parameters(), lr=0.05)
    model.attach(optimizer)
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": list(model.last.parameters())})
    train(model, optimizer, 2)
    # The new group takes over the count, so that a schedule ends for it when it ends for all.
    assert [layer.steps for layer in model.report()] == [3, 3]
    assert all(layer.drawn for layer in model.report())


def test_layers_frozen_later_are_left_alone_and_taken_up_again() -> None:
    model, optimizer = attached(similarity_threshold=-1.0, merge_probability=1.0)
    train(model, optimizer, 1)
    model.last.requires_grad_(False)
    frozen = weights_of(model.last)
    train(model, optimizer, 2)
    assert equal(frozen, weights_of(model.last))
    assert [layer.steps for layer in model.report()] == [3, 3]
    assert [layer.passes for layer in model.report()] == [3, 1]
    model.last.requires_grad_(True)
    train(model, optimizer, 1)
    assert [layer.steps for layer in model.report()] == [4, 4]
    assert [layer.passes for layer in model.report()] == [4, 2]


def test_a_layer_unfrozen_late_stops_merging_when_the_schedule_ends() -> None:
    model, optimizer = attached(similarity_threshold=-1.0, schedule=Schedule(end=6, decay="linear"))
    model.last.requires_grad_(False)
    train(model, optimizer, 3)
    model.last.requires_grad_(True)
    train(model, optimizer, 3, start=3)
    merged = [layer.merged for layer in model.report()]
    assert all(merged)
    train(model, optimizer, 2, start=6)
    assert [layer.merged for layer in model.report()] == merged
    assert not model.statistics_lag


def test_statistics_of_layers_that_are_frozen_catch_up() -> None:
    model, optimizer = attached(similarity_threshold=-1.0, merge_probability=1.0)
    train(model, optimizer, 1)
    assert model.statistics_lag
    model.last.requires_grad_(False)
    model.similarity_threshold = 1.0
    train(model, optimizer, 1, start=1)  # nothing was merged in this step, by any layer
    assert not model.statistics_lag


def test_an_optimizer_attached_in_mid_training_continues_the_schedule() -> None:
    model = wrapped(similarity_threshold=-1.0, schedule=Schedule(end=3))
    first = torch.optim.SGD(model.mid.parameters(), lr=0.05)
    model.attach(first)
    train(model, first, 3)
    second = torch.optim.SGD(model.last.parameters(), lr=0.05)
    with pytest.warns(NoEffectWarning, match=r"ended at step 3 and 3 steps .* model\.restart\(\)"):
        model.attach(second)
    train(model, second, 2, start=3)
    assert [layer.drawn > 0 for layer in model.report()] == [True, False]


def test_the_layers_of_two_optimizers_are_both_inspected_and_both_may_lag() -> None:
    model = wrapped(similarity_threshold=-1.0, merge_probability=1.0, inspect_every=2)
    pair = [torch.optim.SGD(part.parameters(), lr=0.05) for part in (model.mid, model.last)]
    for optimizer in pair:
        model.attach(optimizer)
    for step in range(4):
        loss_of(model, step).backward()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    assert [entry.name for entry in model.history] == ["mid", "last"] * 2
    model.similarity_threshold = 1.0  # the last of the two optimizers merges nothing any more
    loss_of(model, 4).backward()
    pair[1].step()
    assert model.statistics_lag
    pair[0].step()
    assert not model.statistics_lag


def test_freezing_all_is_reported_once() -> None:
    model, optimizer = attached()
    model.mid.requires_grad_(False)
    model.last.requires_grad_(False)
    with pytest.warns(NoEffectWarning, match="all weights to merge are frozen"):
        train(model, optimizer, 1)
    train(model, optimizer, 3)  # a second warning would be an error here
    assert model.step == 4 and not model.report().drawn
    for _ in range(1000):  # nor is the optimizer said to make no steps
        model(EXAMPLE)
        optimizer.step()


def freeze(model: InMergeWrapper, frozen: bool = True) -> None:
    """All but the head, as a linear probe does."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen is False or "head" in name)


def test_linear_probe_then_fine_tuning_by_one_optimizer() -> None:
    """fastai's freeze, fit, unfreeze, fit: the optimizer holds everything from the start."""
    model = wrapped(similarity_threshold=-1.0, merge_probability=1.0)
    freeze(model)
    optimizer = sgd(model)
    with pytest.warns(NoEffectWarning, match="all weights to merge are frozen"):
        model.attach(optimizer)
    frozen = weights_of(model.mid)
    train(model, optimizer, 3)  # a second warning would be an error here
    assert equal(weights_of(model.mid), frozen) and not model.report().merged
    freeze(model, frozen=False)
    train(model, optimizer, 2)
    assert model.step == 5
    assert [layer.passes for layer in model.report()] == [2, 2] and model.report().merged


def test_a_network_frozen_before_it_was_wrapped_is_planned_on_demand() -> None:
    """A plan takes frozen layers for such as stay so, unless it is told otherwise."""
    network = tiny_net()
    for part in (network.stem, network.mid, network.last):
        part.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen.*add 'frozen' to also_merge"):
        InMergeWrapper(network, **SETTINGS)
    model = InMergeWrapper(network, **SETTINGS, also_merge=("frozen",))
    optimizer = sgd(model)
    with pytest.warns(NoEffectWarning, match="all weights to merge are frozen"):
        model.attach(optimizer)
    train(model, optimizer, 2)
    network.requires_grad_(True)
    train(model, optimizer, 2)
    assert [layer.passes for layer in model.report()] == [2, 2]


def test_linear_probe_then_fine_tuning_by_two_optimizers() -> None:
    """LP-FT: the first optimizer holds the head alone, and has nothing to merge."""
    model = wrapped(similarity_threshold=-1.0, merge_probability=1.0)
    freeze(model)
    probe = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    message = r"holds none of the 2 weights to merge \(mid, \.\.\.\): they are frozen, and it was"
    with pytest.raises(ValueError, match=message):
        model.attach(probe)
    train(model, probe, 3)
    freeze(model, frozen=False)
    optimizer = sgd(model)
    model.attach(optimizer)
    train(model, optimizer, 2)
    assert model.step == 2 and model.report().merged


def test_an_optimizer_of_another_network_is_an_error_that_says_so() -> None:
    message = r"holds none of the 2 weights to merge .*: build it from the parameters of this model"
    with pytest.raises(ValueError, match=message):
        wrapped().attach(sgd(tiny_net()))


@pytest.mark.parametrize("way", ["in the network", "in place", "another list", "shorter"])
def test_a_weight_that_the_optimizer_loses_is_an_error_however_it_is_lost(way: str) -> None:
    model, optimizer = attached()
    train(model, optimizer, 1)
    loss_of(model, 1).backward()
    (group,) = optimizer.param_groups
    place = next(i for i, p in enumerate(group["params"]) if p is model.mid.weight)
    if way == "in the network":
        model.mid.weight = nn.Parameter(model.mid.weight.detach().clone())
    elif way == "in place":
        group["params"][place] = model.mid.weight.detach().clone()
    elif way == "shorter":
        del group["params"][place]
    else:
        group["params"] = [p for p in group["params"] if p is not model.mid.weight]
    with pytest.raises(RuntimeError, match="no longer holds the weights of mid: they were repl"):
        optimizer.step()


class Blurred(nn.Module):
    """As composer's BlurPool: a convolution inside of what took its place."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.avg_pool2d(x, 3, 1, 1))


@pytest.mark.parametrize("mode", ["step", "outputs"])
@pytest.mark.parametrize("by", [None, nn.Identity()])
def test_a_convolution_removed_after_attaching_is_an_error_with_its_remedy(
    mode: str, by: nn.Module | None
) -> None:
    model, optimizer = attached(mode=mode)
    model.module.last = by
    with pytest.raises(RuntimeError, match=r"\blast\b.*[Cc]hange the network first.*then wrap it"):
        optimizer.step()
    del model.module.last
    with pytest.raises(RuntimeError, match=r"has lost the convolution last, .*then wrap it"):
        optimizer.step()


def test_a_convolution_replaced_after_attaching_is_an_error_with_its_remedy() -> None:
    model, optimizer = attached()
    train(model, optimizer, 1)
    model.module.mid = Blurred(model.module.mid)
    with pytest.raises(
        RuntimeError, match=r"^mid: a Blurred took.* after the network was wrapped.*then wrap"
    ) as raised:
        train(model, optimizer, 1)
    assert "FSDP2" not in str(raised.value)


class Sites(nn.Module):
    """A branch for each hospital; a batch comes from one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 6, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(6, 8, 3) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, site: int = 0) -> Tensor:
        return self.head(self.branches[site](self.trunk(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"momentum": 0.9, "foreach": True}])
def test_a_branch_without_a_gradient_is_not_merged(to_none: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = InMergeWrapper(
        Sites(),
        include="branches.*",
        similarity_threshold=-1.0,
        merge_probability=1.0,
        example_input=EXAMPLE,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, **options)
    model.attach(optimizer)
    used, unused = (branch.weight for branch in model.module.branches)
    before = unused.detach().clone()
    for number in range(20):
        optimizer.zero_grad(set_to_none=to_none)
        images, labels = batch(number)
        nn.functional.cross_entropy(model(images, site=0), labels).backward()
        optimizer.step()
    assert torch.equal(unused, before)
    assert [layer.passes for layer in model.report()] == [20, 0]
    assert [layer.steps for layer in model.report()] == [20, 20]
    for number in range(3):  # its turn: the schedule is where the run is
        optimizer.zero_grad(set_to_none=True)
        images, labels = batch(number)
        nn.functional.cross_entropy(model(images, site=1), labels).backward()
        optimizer.step()
    assert [layer.passes for layer in model.report()] == [20, 3]
    assert not torch.equal(unused, before) and used.grad is None


@pytest.mark.parametrize("mode", ["step", "outputs"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_attaching_and_removing_leaves_no_hooks(name: str, mode: str) -> None:
    model = wrapped(mode=mode)
    optimizer = timm.optim.create_optimizer_v2(model, opt=name, lr=1e-2)

    def hooks() -> int:
        tables = [
            value
            for owner in (optimizer, *model.modules())
            for attribute, value in vars(owner).items()
            if attribute.endswith("_hooks")
        ]
        return sum(map(len, tables))

    model.attach(optimizer).remove()
    once, known = hooks(), len(model._driver._attachments)
    for _ in range(200):
        model.attach(optimizer).remove()
    assert hooks() == once and len(model._driver._attachments) == known == 1
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, 1)
    assert model.step == 0


# -- optimizers that nobody attached -------------------------------------------------------------


def test_a_replaced_optimizer_is_reported_soon() -> None:
    """fastai's reset_opt makes another one in mid-training."""
    model, optimizer = attached()
    train(model, optimizer, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 9)
    with pytest.warns(
        NoEffectWarning, match="AdamW took 10 steps without merging.*is not attached"
    ):
        train(model, optimizer, 1)
    train(model, optimizer, 20)  # a second warning would be an error here
    assert model.step == 2


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(start=50), Schedule(start=1, every=2)])
def test_a_forgotten_attach_is_reported_where_the_network_is_called_without_the_wrapper(
    schedule: Schedule,
) -> None:
    model = wrapped(schedule=schedule)
    optimizer = sgd(model)
    with pytest.warns(NoEffectWarning, match="SGD took 10 steps without merging"):
        train(model.module, optimizer, 10)


def test_optimizers_that_need_not_be_attached_are_not_reported() -> None:
    model = wrapped(schedule=Schedule(end=12))
    whole, head = sgd(model), torch.optim.SGD(model.head.parameters(), lr=0.1)
    beside = torch.optim.SGD(model.last.parameters(), lr=0.1)
    handle = model.attach(whole)
    for number in range(12):
        for optimizer in (whole, head, beside, sgd(tiny_net())):
            train(model.module, optimizer, 1, start=number)
    train(model.module, beside, 12)  # the schedule has ended merging
    model = wrapped()
    handle = model.attach(sgd(model))
    optimizer = sgd(model)
    handle = model.attach(optimizer)
    handle.remove()  # on purpose
    train(model.module, optimizer, 12)
    train(model.module, sgd(model), 12)
    model = wrapped()
    optimizer = sgd(model)
    for number in range(24):
        train(model, optimizer, 1, start=number)
        model.merge_()


# -- the counter in the optimizer's state --------------------------------------------------------


def resumed_from(
    weights: dict[str, Tensor],
    state: dict[str, Any],
    make: Callable[[nn.Module], Any] = sgd,
    **settings: Any,
) -> tuple[InMergeWrapper, Any]:
    """A fresh run that gets the bare network's weights and the optimizer's state."""
    model = wrapped(**settings)
    optimizer = make(model)
    model.attach(optimizer)
    model.module.load_state_dict(weights)
    optimizer.load_state_dict(state)
    return model, optimizer


def on_disk(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def lookahead(model: nn.Module) -> Any:
    return timm.optim.create_optimizer_v2(model, opt="lookahead_adamw", lr=1e-2)


STATEFUL = {
    "sgd": sgd,
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "lookahead": lookahead,
    "muon": lambda model: timm.optim.create_optimizer_v2(model, opt="muon", lr=1e-2),
}


@pytest.mark.parametrize(
    "name,mode",
    [
        (name, mode)
        for name in STATEFUL
        for mode in ("step", "outputs")
        if (name, mode) != ("lookahead", "step")  # refused, see above
    ],
)
def test_an_optimizers_state_resumes_merging(name: str, mode: str) -> None:
    straight = wrapped(mode=mode)
    optimizer = STATEFUL[name](straight)
    straight.attach(optimizer)
    train(straight, optimizer, 3)
    saved = on_disk((straight.module.state_dict(), optimizer.state_dict()))
    train(straight, optimizer, 3, start=3)
    resumed, optimizer = resumed_from(*saved, STATEFUL[name], mode=mode)
    assert resumed.step == 3
    train(resumed, optimizer, 3, start=3)
    assert digest(resumed.state_dict()) == digest(straight.state_dict())  # the statistics, too


def test_a_plain_optimizer_loads_the_state_and_a_plain_state_loads() -> None:
    model, optimizer = attached()
    train(model, optimizer, 2)
    state = on_disk(optimizer.state_dict())
    network = tiny_net()
    plain = sgd(network)
    plain.load_state_dict(state)
    train(network, plain, 1)
    assert plain.state_dict().keys() == {"state", "param_groups"}
    assert "inmerge" in state  # nobody took it out of the caller's dict
    model, _ = resumed_from(network.state_dict(), plain.state_dict())
    assert model.step == 0


def test_of_the_counters_of_model_and_optimizer_the_last_loaded_counts() -> None:
    first, second = wrapped(), wrapped()
    optimizers = [sgd(first), sgd(second)]
    for model, optimizer, steps in zip((first, second), optimizers, (2, 5), strict=True):
        model.attach(optimizer)
        train(model, optimizer, steps)
    weights, state = copy.deepcopy((first.state_dict(), optimizers[1].state_dict()))
    for order, expected in ((("weights", "state"), 5), (("state", "weights"), 2)):
        model, optimizer = attached()
        for what in order:
            if what == "weights":
                model.load_state_dict(weights)
            else:
                optimizer.load_state_dict(state)
        assert model.step == expected


def test_the_same_counter_changes_nothing() -> None:
    """Accelerate loads what it just read when it prepares an optimizer."""
    model, optimizer = attached(similarity_threshold=-1.0, merge_probability=1.0, inspect_every=1)
    train(model, optimizer, 2)
    report, entries = model.report(), len(model.history)
    optimizer.load_state_dict(optimizer.state_dict())
    assert model.statistics_lag and model.report() == report and len(model.history) == entries


def test_two_wrappers_of_one_optimizer_find_their_own_counters() -> None:
    def pair() -> tuple[list[InMergeWrapper], torch.optim.SGD]:
        models = [wrapped(), wrapped()]
        optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], lr=0.1)
        return models, optimizer

    models, optimizer = pair()
    models[0].attach(optimizer)
    loss_of(models[0], 0).backward()
    optimizer.step()
    models[1].attach(optimizer)  # begins later
    models[1]._driver.tally.steps = [7, 7]
    state = on_disk(optimizer.state_dict())
    for order in (1, -1):
        others, optimizer = pair()
        for model in others[::order]:
            model.attach(optimizer)
        optimizer.load_state_dict(state)
        assert [model.step for model in others] == [1, 7]


def test_an_ended_attachment_leaves_nothing_in_the_state() -> None:
    model = wrapped()
    optimizer = sgd(model)
    model.attach(optimizer).remove()
    assert "inmerge" not in optimizer.state_dict()
    model.attach(optimizer)
    assert len(optimizer.state_dict()["inmerge"]) == 1
    assert "inmerge" not in copy.deepcopy(optimizer).state_dict()  # as it merges nothing, either
    del model
    gc.collect()


def test_a_sam_carries_the_counter_itself() -> None:
    model = wrapped()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05)
    model.attach(optimizer)
    sam_step(model, optimizer, 0, "two calls")
    model, _ = resumed_from(
        model.module.state_dict(),
        optimizer.state_dict(),
        lambda model: SAM(model.parameters(), torch.optim.SGD, lr=0.05),
    )
    assert model.step == 1


def test_a_damaged_counter_in_an_optimizers_state_is_an_error() -> None:
    _model, optimizer = attached()
    state = optimizer.state_dict()
    ((place, numbers),) = state["inmerge"]
    state["inmerge"] = [[place, numbers[:-1]]]
    with pytest.raises(ValueError, match="the checkpoint is truncated"):
        optimizer.load_state_dict(state)


def test_an_optimizer_that_runs_no_hooks_is_refused() -> None:
    class Shell(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    model = wrapped()
    with pytest.raises(TypeError, match=r"Shell never called Optimizer\.__init__"):
        model.attach(Shell(sgd(model)))


# -- timm's optimizer factory --------------------------------------------------------------------

GROUPINGS = [
    ("resnet18", {"weight_decay": 0.05}),
    ("resnet18", {"weight_decay": 0.05, "layer_decay": 0.7}),
    ("convnext_atto", {"weight_decay": 0.05, "layer_decay": 0.7}),
    ("coatnet_nano_rw_224", {"weight_decay": 0.05}),  # has a no_weight_decay of its own
    ("efficientformer_l1", {"weight_decay": 0.05, "layer_decay": 0.7}),
]


@pytest.mark.parametrize("name,options", GROUPINGS)
def test_timm_groups_the_parameters_of_a_wrapper_as_those_of_its_network(
    name: str, options: dict[str, float]
) -> None:
    net = timm.create_model(name)
    names = {id(p): n for n, p in net.named_parameters()}

    def groups(model: nn.Module) -> list[Any]:
        optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, **options)
        return [
            (sorted(names[id(p)] for p in g["params"]), g["weight_decay"], g.get("lr_scale", 1.0))
            for g in optimizer.param_groups
        ]

    assert groups(InMergeWrapper(net)) == groups(net)
    if "layer_decay" in options:
        assert len(groups(net)) > 2


def test_the_twins_of_these_tests_would_notice_a_missing_or_double_merge() -> None:
    """The control: without the merge, and with two, the weights are others."""
    outcomes = []
    for passes in range(3):
        model = wrapped(merge_weight=ALPHA)
        train(model.module, sgd(model), 1)
        for _ in range(passes):
            model.merge_()
        outcomes.append(digest(weights_of(model)))
    assert len(set(outcomes)) == 3


def test_making_a_fresh_optimizers_state_is_no_step() -> None:
    """As a resume by torch.distributed.checkpoint does, before it loads the state."""
    model, optimizer = attached(similarity_threshold=-1.0, merge_probability=1.0)
    train(model, optimizer, 2)
    saved = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    resumed, fresh = attached(similarity_threshold=-1.0, merge_probability=1.0)
    resumed.load_state_dict(saved)
    set_optimizer_state_dict(resumed, fresh, state)
    assert resumed.step == 2
    assert equal(weights_of(resumed), weights_of(model))
    train(resumed, fresh, 1)
    train(model, optimizer, 1)
    assert resumed.step == 3 and equal(weights_of(resumed), weights_of(model))


def test_a_backbone_whose_head_alone_is_trained_is_not_merged() -> None:
    model, optimizer = attached(similarity_threshold=-1.0, merge_probability=1.0)
    head = next(m for m in model.modules() if isinstance(m, nn.Linear))
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    before = [weight.clone() for weight in convolutions]
    for _ in range(3):
        optimizer.zero_grad()
        head(torch.randn(4, head.in_features)).square().mean().backward()
        optimizer.step()
    assert all(map(torch.equal, before, convolutions)) and model.report().drawn == 0


def test_a_wrapper_is_freed_with_its_last_reference_and_changed_layers_disturb_no_other() -> None:
    gc.collect()
    gc.disable()
    try:
        model, optimizer = attached()
        train(model, optimizer, 1)
        gone = weakref.ref(model)
        del model, optimizer
        assert gone() is None
    finally:
        gc.enable()
    model = wrapped()
    name = next(iter(model.plan.merged)).name.rpartition(".")[0] or model.plan.merged[0].name
    parent, _, last = name.rpartition(".")
    delattr(model.module.get_submodule(parent), last)
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()  # of another network in the same process
