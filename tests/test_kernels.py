"""Computed weights: what is compared and blended is what the forward pass uses, and it stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from inmerge_wrap import MergePlan, plan_merging
from inmerge_wrap.kernels import find_layers, store_of
from inmerge_wrap.persistent import merge_pairs_
from inmerge_wrap.settings import MergeSettings
from tests import reference

PAIRS = [(0, 1), (1, 0), (2, 7), (5, 3), (6, 4)]
ALPHA = 0.8


def conv(**settings: int) -> nn.Conv2d:
    """Twelve kernels of 6x3x3, of different norms and all kinds of likeness."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Conv2d(6, 12, 3, **settings)
        with torch.no_grad():
            made.weight.copy_(torch.randn(12, 6, 3, 3) + torch.randn(1, 6, 3, 3))
            made.weight.mul_(torch.linspace(0.5, 2.0, 12).reshape(12, 1, 1, 1))
    return made


def pruned(structured: bool) -> nn.Conv2d:
    made = conv()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if structured:
            prune.ln_structured(made, "weight", amount=2, n=2, dim=1)
        else:
            prune.random_unstructured(made, "weight", amount=0.4)
    return made


def old_weight_norm() -> nn.Conv2d:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(conv())


def old_spectral_norm() -> nn.Conv2d:
    """After a forward pass in training, for its first estimate is random and may be negative."""
    made = nn.utils.spectral_norm(conv(), n_power_iterations=20)
    made(torch.ones(1, 6, 3, 3))
    return made


def scaled_weight_norm() -> nn.Conv2d:
    """With magnitudes that differ from the directions' norms, as after some training."""
    made = parametrizations.weight_norm(conv())
    with torch.no_grad():
        made.parametrizations.weight.original1.mul_(3.0)
        made.parametrizations.weight.original0.mul_(torch.linspace(0.5, 2, 12).reshape(12, 1, 1, 1))
    return made


FORMS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": conv,
    "channels_last": lambda: conv().to(memory_format=torch.channels_last),
    "weight_norm": lambda: parametrizations.weight_norm(conv()),
    "weight_norm, scaled": scaled_weight_norm,
    "weight_norm, old": old_weight_norm,
    "spectral_norm": lambda: parametrizations.spectral_norm(conv()),
    "spectral_norm, old": old_spectral_norm,
    "pruned entries": lambda: pruned(structured=False),
    "pruned channels": lambda: pruned(structured=True),
}


def effective(layer: nn.Conv2d) -> Tensor:
    """The kernels that a forward pass uses, by what comes out for images of a single one."""
    shape = layer.in_channels, *layer.kernel_size
    basis = torch.eye(shape[0] * shape[1] * shape[2], dtype=next(layer.parameters()).dtype)
    with torch.no_grad():
        nothing = layer(torch.zeros(1, *shape, dtype=basis.dtype))
        responses = layer(basis.reshape(-1, *shape)) - nothing
    return responses.flatten(1).T.reshape(layer.out_channels, *shape).clone()


def planned(layer: nn.Conv2d) -> tuple[nn.Sequential, MergePlan]:
    """A network that merges this convolution alone."""
    first = nn.Conv2d(3, layer.in_channels, 3, dtype=store_of(layer).parameters[0].dtype)
    network = nn.Sequential(first, nn.ReLU(), layer).eval()
    return network, plan_merging(network, include=["2"])


def merge(layer: nn.Conv2d, threshold: float = -1.0) -> Tensor:
    """Merges PAIRS of a convolution, as a step would that drew them; returns which merged."""
    network, plan = planned(layer)
    return merge_planned(network, plan, PAIRS, threshold)


@torch.no_grad()
def merge_planned(
    network: nn.Module, plan: MergePlan, pairs: list[tuple[int, int]], threshold: float
) -> Tensor:
    (found,) = find_layers(network, plan.merged)
    settings = MergeSettings(merge_weight=ALPHA, similarity_threshold=threshold)  # type: ignore
    targets, sources = torch.tensor(pairs).T
    with found.store.opened() as store:
        return merge_pairs_(store, targets, sources, settings, ALPHA, centred=found.site.centred)[1]


def halfway(kernels: Tensor) -> float:
    """A threshold that some of PAIRS pass, well away from every cosine."""
    cosines = sorted({round(reference.cosine(kernels[i], kernels[j]), 6) for i, j in PAIRS})
    assert cosines[2] - cosines[1] > 1e-3
    return (cosines[1] + cosines[2]) / 2


# -- other ranks, groups, and transposed convolutions ---------------------------------------------

IN_GROUPS = [(0, 1), (1, 0), (2, 5), (7, 9), (11, 6)]  # of two groups of six kernels


def made(kind: str, dims: int, **settings: Any) -> Any:
    """Twelve kernels that read eight channels, of different norms and all kinds of likeness."""
    with torch.random.fork_rng():
        torch.manual_seed(dims)
        layer = getattr(nn, f"{kind}{dims}d")(8, 12, (3, 2, 4)[:dims], **settings)
        kernels_first = layer.weight.detach().transpose(0, 1 if layer.transposed else 0)
        kernels_first += torch.randn_like(kernels_first[:1])
        kernels_first *= torch.linspace(0.5, 2.0, len(kernels_first)).reshape(-1, *[1] * (1 + dims))
    return layer


def pruned_at_random(layer: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return prune.random_unstructured(layer, "weight", amount=0.4)


def spectral(layer: Any) -> Any:
    return parametrizations.spectral_norm(layer, n_power_iterations=20)


def old_weight_norm_over_columns(layer: Any) -> Any:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer, dim=1)


ANY_RANK: dict[str, Callable[[], Any]] = {
    **{
        f"{kind}{dims}d, groups={groups}": lambda kind=kind, dims=dims, groups=groups: made(
            kind, dims, groups=groups
        )
        for kind in ("Conv", "ConvTranspose")
        for dims in (1, 2, 3)
        for groups in (1, 2)
    },
    "channels_last_3d": lambda: made("Conv", 3).to(memory_format=torch.channels_last_3d),
    "transposed, channels_last": lambda: made("ConvTranspose", 2, groups=2).to(
        memory_format=torch.channels_last
    ),
    "transposed, channels_last_3d": lambda: made("ConvTranspose", 3).to(
        memory_format=torch.channels_last_3d
    ),
    "weight_norm 1d": lambda: parametrizations.weight_norm(made("Conv", 1, groups=2)),
    "weight_norm 3d": lambda: parametrizations.weight_norm(made("Conv", 3)),
    "weight_norm transposed": lambda: parametrizations.weight_norm(made("ConvTranspose", 3), dim=1),
    "weight_norm transposed, old": lambda: old_weight_norm_over_columns(made("ConvTranspose", 1)),
    "spectral_norm 3d": lambda: spectral(made("Conv", 3, groups=2)),
    "spectral_norm transposed": lambda: spectral(made("ConvTranspose", 2, groups=2)),
    "pruned 1d": lambda: pruned_at_random(made("Conv", 1, groups=2)),
    "pruned transposed": lambda: pruned_at_random(made("ConvTranspose", 3, groups=2)),
}


def responses(layer: Any) -> Tensor:
    """The kernels that a forward pass uses, with zeros for the channels of other groups."""
    size = [1] * len(layer.kernel_size) if layer.transposed else layer.kernel_size
    shape = layer.in_channels, *size
    basis = torch.eye(math.prod(shape)).reshape(-1, *shape)
    with torch.no_grad():
        found = layer(basis) - layer(torch.zeros(1, *shape))
    if layer.transposed:
        return found.transpose(0, 1).clone()
    return found.flatten(1).T.reshape(layer.out_channels, *shape).clone()


def merge_in_groups(layer: Any, threshold: float = -1.0) -> Tensor:
    first = getattr(nn, f"Conv{len(layer.kernel_size)}d")(3, layer.in_channels, 1)
    network = nn.Sequential(first, layer)
    plan = plan_merging(network, include="1")
    return merge_planned(network, plan, IN_GROUPS, threshold)


@pytest.mark.parametrize("form", ANY_RANK)
def test_any_rank_is_merged_as_the_paper_says(form: str) -> None:
    layer = ANY_RANK[form]().eval()
    before = responses(layer)
    stored = [parameter.detach().clone() for parameter in store_of(layer).parameters]
    formats = [parameter.stride() for parameter in store_of(layer).parameters]
    assert not merge_in_groups(layer, threshold=1.0).any()
    for parameter, old in zip(store_of(layer).parameters, stored, strict=True):
        assert torch.equal(parameter, old)
    cosines = sorted(reference.cosine(before[i], before[j]) for i, j in IN_GROUPS)
    threshold = (cosines[0] + cosines[-1]) / 2
    expected, similar = reference.merge(before, IN_GROUPS, ALPHA, threshold)
    assert merge_in_groups(layer, threshold).tolist() == similar
    assert 0 < sum(similar) < len(similar)
    after = responses(layer)
    if "pruned" in form:
        expected *= before != 0
    if "spectral" in form:  # one number divides all kernels, and it follows the new weights
        after, expected = after / after.norm(), expected / expected.norm()
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    assert [parameter.stride() for parameter in store_of(layer).parameters] == formats


def test_half_precision_of_a_transposed_layer_is_rounded_once() -> None:
    layer = made("ConvTranspose", 1, groups=2).bfloat16()
    before = responses(copy.deepcopy(layer).float())
    settings = MergeSettings(merge_weight=ALPHA, similarity_threshold=-1.0)  # type: ignore[arg-type]
    with torch.no_grad():
        merge_pairs_(store_of(layer), *torch.tensor(IN_GROUPS).T, settings, ALPHA)
    expected, _ = reference.merge(before, IN_GROUPS, ALPHA, -1.0)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(responses(copy.deepcopy(layer).float()), expected.bfloat16().float())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: parametrizations.weight_norm(made("ConvTranspose", 2)), "dim=1 is"),
        (lambda: parametrizations.weight_norm(made("ConvTranspose", 2, groups=2), dim=1), "groups"),
        (lambda: parametrizations.weight_norm(made("Conv", 1), dim=2), "not over each kernel"),
        (lambda: nn.LazyConvTranspose3d(12, 3), "lazy"),
        (lambda: nn.LazyConv1d(12, 3), "lazy"),
    ],
)
def test_other_norms_and_lazy_layers_of_any_rank_say_why(
    make: Callable[[], Any], reason: str
) -> None:
    layer = make()
    assert reason in (store_of(layer).reason or "")
    first = getattr(nn, f"Conv{len(layer.kernel_size)}d")(3, 8, 3)
    with pytest.raises(ValueError, match=f"1 .*{reason}"):
        plan_merging(nn.Sequential(first, layer), shallow_layers=0, exclude="0")


# -- of images ------------------------------------------------------------------------------------


def up_to_scale(weight: Tensor) -> Tensor:
    return weight / weight.norm()


@pytest.mark.parametrize("form", FORMS)
def test_a_forced_merge_is_the_papers_on_the_kernels_in_use(form: str) -> None:
    layer = FORMS[form]().eval()
    before = effective(layer)
    assert merge(layer).tolist() == [True] * len(PAIRS)
    after = effective(layer)
    expected, _ = reference.merge(before, PAIRS, ALPHA, -1.0)
    if "prune" in form:  # what is pruned stays so
        expected *= before != 0
    if "spectral" in form:  # one number divides all kernels, and it follows the new weights
        after, expected = up_to_scale(after), up_to_scale(expected)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_threshold_is_applied_to_the_kernels_in_use(form: str) -> None:
    layer = FORMS[form]().eval()
    before = effective(layer)
    threshold = halfway(before)
    outcome = merge(layer, threshold)
    after = effective(layer)
    similar = {i for i, j in PAIRS if reference.cosine(before[i], before[j]) > threshold}
    assert outcome.sum() == len(similar) in {2, 3}
    if "spectral" in form:
        scale = after[8].norm() / before[8].norm()  # no pair holds kernel 8
        after = after / scale
    changed = {i for i in range(12) if not torch.allclose(after[i], before[i], rtol=1e-6)}
    assert changed == similar


@pytest.mark.parametrize("form", FORMS)
def test_untouched_kernels_keep_every_stored_bit(form: str) -> None:
    layer = FORMS[form]()
    stored = [parameter.detach().clone() for parameter in store_of(layer).parameters]
    merge(layer, threshold=1.0)  # no pair is that similar
    for parameter, old in zip(store_of(layer).parameters, stored, strict=True):
        assert torch.equal(parameter, old)
    merge(layer)
    rest = [i for i in range(12) if i not in {target for target, _ in PAIRS}]
    for parameter, old in zip(store_of(layer).parameters, stored, strict=True):
        assert torch.equal(parameter[rest], old[rest])


@pytest.mark.parametrize("form", FORMS)
def test_what_was_merged_survives_training_and_saving(form: str) -> None:
    layer, fresh = FORMS[form](), FORMS[form]()
    merge(layer)
    merged = effective(layer.eval())
    parameters = store_of(layer).parameters
    layer.train()(torch.ones(2, 6, 5, 5)).square().sum().backward()
    assert all(parameter.is_leaf and parameter.grad is not None for parameter in parameters)
    fresh.load_state_dict(layer.state_dict())
    if "spectral" not in form:  # its running estimate moves in train mode
        assert torch.equal(effective(layer.eval()), merged)
    assert torch.equal(effective(fresh.eval()), effective(layer.eval()))


def test_pruned_entries_keep_their_stored_value_and_stay_zero() -> None:
    layer = pruned(structured=False)
    mask = layer.weight_mask == 0
    stored = layer.weight_orig.detach().clone()
    merge(layer)
    assert mask.any() and torch.equal(layer.weight_orig[mask], stored[mask])
    assert (effective(layer)[mask] == 0).all()
    prune.remove(layer, "weight")
    assert (layer.weight[mask] == 0).all()


def test_half_precision_is_blended_in_single_and_rounded_once() -> None:
    layer = conv().bfloat16()
    before = layer.weight.detach().clone()
    merge(layer)
    expected, _ = reference.merge(before.float(), PAIRS, ALPHA, -1.0)
    assert layer.weight.dtype == torch.bfloat16
    # One rounding: a second would show as a difference of one unit in the last place.
    assert torch.equal(layer.weight, expected.bfloat16())


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_standardised_kernels_are_compared_as_the_forward_pass_uses_them(
    kind: type[nn.Conv2d],
) -> None:
    layer = kind(6, 12, 3, padding=0, bias=False).eval()
    with torch.no_grad():
        layer.weight.copy_(conv().weight + 3.0)  # an offset that the forward pass takes away
    stored, used = layer.weight.detach().clone(), effective(layer)
    threshold = halfway(used)
    assert all(reference.cosine(stored[i], stored[j]) > threshold for i, j in PAIRS)
    outcome = merge(layer, threshold)
    assert planned(layer)[1].merged[0].centred
    similar = [(i, j) for i, j in PAIRS if reference.cosine(used[i], used[j]) > threshold]
    assert outcome.sum() == len(similar) in {2, 3}
    expected, _ = reference.merge(stored, similar, ALPHA, -1.0)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-6)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled() -> nn.Conv2d:
    made = conv()
    parametrize.register_parametrization(made, "weight", Doubled())
    return made


def normed_twice() -> nn.Conv2d:
    return parametrizations.spectral_norm(parametrizations.weight_norm(conv()))


def without_parameter() -> nn.Conv2d:
    made = conv()
    weight = made.weight.detach()
    del made.weight
    made.weight = weight
    return made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (doubled, "parametrization Doubled"),
        (normed_twice, "parametrization _WeightNorm"),
        (lambda: parametrizations.orthogonal(conv()), "parametrization _Orthogonal"),
        (lambda: parametrizations.weight_norm(conv(), dim=1), "weight_norm that is not over each"),
        (lambda: nn.LazyConv2d(12, 3), "lazy"),
        (without_parameter, "not a parameter"),
    ],
)
def test_other_computed_weights_are_skipped_with_the_reason(
    make: Callable[[], nn.Conv2d], reason: str
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), make(), nn.BatchNorm2d(12))
    layer = network[2]
    assert reason in (store_of(layer).reason or "")
    with pytest.raises(RuntimeError, match=reason), store_of(layer).opened():
        pass
    with pytest.raises(AssertionError, match=r"opened\(\)"):
        store_of(layer).read(torch.arange(2))
    skipped = {site.name: site.reason for site in plan_merging(network, shallow_layers=0).skipped}
    assert skipped.keys() == {"2"} and reason in (skipped["2"] or "")
    with pytest.raises(ValueError, match=f"include names '2'.*{reason}"):
        plan_merging(network, include=["2"])


def test_weight_norm_over_everything_is_skipped_in_its_old_form_too() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(conv(), dim=1)
    assert "weight_norm that is not over each kernel" in (store_of(layer).reason or "")
    assert store_of(layer).parameters == ()
