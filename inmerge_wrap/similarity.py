"""Similarity of the kernels of a network: cosines and redundancy.

    layers = measure_similarity(model)
    layers[0].share_above(0.3), layers[0].effective_rank

``plots`` draws these results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inmerge_wrap.discovery import SKIPPED_KINDS, Pattern, plan_merging
from inmerge_wrap.kernels import rows_of, store_of
from inmerge_wrap.merging import centre
from inmerge_wrap.plan import ConvSite
from inmerge_wrap.unwrapping import unwrap

__all__ = [
    "KernelPair",
    "LayerSimilarity",
    "cosine_matrix",
    "effective_rank",
    "extreme_pairs",
    "measure_similarity",
    "read_kernels",
    "similarity_histogram",
]

_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.9)  # at which to_dict gives shares; 0.3 is the paper's


def effective_rank(kernels: Tensor, groups: int = 1) -> Tensor:
    """Returns the share of directions that kernels use: n / ||G||_F^2, G their cosine matrix.

    This is the participation ratio of the spectrum of G over the number of kernels n: 1 where the
    kernels are orthogonal, 1 / n where all point the same way. A fan-in d smaller than n bounds it
    by d / n. Kernels of norm zero, or with NaN or Inf, are left out. The function does not wait
    for the device.

    Args:
        kernels: (n, fan_in), one flattened kernel per row.
        groups: Groups of the convolution. Kernels of different groups read different channels, so
            they count as orthogonal.

    Returns:
        A scalar in [groups / n, 1], of float32 or wider; NaN where no kernel has a direction.
    """
    with torch.autocast(kernels.device.type, enabled=False):
        unit, known = _directions(kernels)
        banks = unit.unflatten(0, (groups, -1))
        # ||U U^T||_F = ||U^T U||_F: the smaller of the two products.
        gram = banks @ banks.mT if banks.shape[1] <= banks.shape[2] else banks.mT @ banks
        return known.sum() / gram.square().sum()


def cosine_matrix(kernels: Tensor, groups: int = 1) -> Tensor:
    """Returns the cosine of every kernel with every other (eq. 1 and 2 of the paper).

    Args:
        kernels: (n, fan_in), one flattened kernel per row.
        groups: Groups of the convolution.

    Returns:
        (n, n), symmetric, ones on the diagonal, of float32 or wider. NaN where there is nothing to
        compare: a kernel of norm zero or with NaN or Inf, or kernels of different groups, which
        read different channels.
    """
    with torch.autocast(kernels.device.type, enabled=False):
        unit, known = _directions(kernels)
        # One triangle, mirrored: on some processors the two differ in the last bit.
        upper = (unit @ unit.T).clamp(-1.0, 1.0).triu(1)
        cosines = upper + upper.T
    bank = torch.arange(groups, device=unit.device).repeat_interleave(len(unit) // groups)
    comparable = (bank[:, None] == bank) & known[:, None] & known
    cosines.fill_diagonal_(1.0)
    return torch.where(comparable, cosines, math.nan)


def similarity_histogram(cosines: Tensor, bins: int = 80) -> tuple[Tensor, Tensor]:
    """Returns the histogram of the cosines of all pairs of kernels.

    Args:
        cosines: A cosine matrix (n, n); every pair counts once; the diagonal and NaN are ignored.
        bins: Number of equal bins over [-1, 1].

    Returns:
        Counts (bins,) and edges (bins + 1,).

    Raises:
        ValueError: If ``bins`` is below 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    counts = torch.histc(pairs_of(cosines).float().cpu(), bins, -1.0, 1.0)
    return counts.long(), torch.linspace(-1.0, 1.0, bins + 1)


def extreme_pairs(cosines: Tensor, count: int = 4) -> tuple[list[tuple[int, int, float]], ...]:
    """Returns the most and the least similar pairs of kernels.

    Args:
        cosines: A cosine matrix (n, n).
        count: Number of pairs of each kind; fewer if there are not enough.

    Returns:
        Two lists of (first, second, cosine), the most similar pairs (highest cosine first) and the
        least similar ones (lowest first).
    """
    places, values = _comparable(cosines)
    extremes = []
    for largest in (True, False):
        found = values.topk(min(count, len(values)), largest=largest)
        first, second = places[:, found.indices].tolist()
        extremes.append([*zip(first, second, found.values.tolist(), strict=True)])
    return tuple(extremes)


@dataclass(frozen=True)
class KernelPair:
    """Two kernels of one layer.

    Attributes:
        first: Index of the first kernel.
        second: Index of the second one.
        cosine: Their cosine.
        kernels: Their weights, shape (2, C_in / groups, *kernel size).
    """

    first: int
    second: int
    cosine: float
    kernels: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class LayerSimilarity:
    """Similarity of the kernels of one convolution.

    Attributes:
        name: The convolution.
        depth: Its position in the order of execution, from 1; None if it never runs.
        shape: Shape of its kernels, (C_out, C_in / groups, *kernel size).
        groups: Groups inside which kernels are compared.
        cosines: The cosine matrix, (C_out, C_out), on the CPU; see :func:`cosine_matrix`.
        effective_rank: See :func:`effective_rank`.
        undefined: Kernels without a direction: zero, or with NaN or Inf.
        most_similar: The pairs with the highest cosine, in descending order.
        least_similar: The pairs with the lowest cosine, in ascending order.
    """

    name: str
    depth: int | None
    shape: tuple[int, ...]
    groups: int
    cosines: Tensor = field(repr=False, compare=False)
    effective_rank: float
    undefined: int
    most_similar: tuple[KernelPair, ...] = field(repr=False)
    least_similar: tuple[KernelPair, ...] = field(repr=False)

    @property
    def pairs(self) -> int:
        """Pairs that have a cosine."""
        return len(pairs_of(self.cosines))

    @property
    def mean_cosine(self) -> float:
        """Mean over all pairs; NaN without a pair."""
        return pairs_of(self.cosines).double().mean().item()

    @property
    def chance(self) -> float:
        """Standard deviation of the cosine of two random kernels of this fan-in."""
        return 1.0 / math.sqrt(math.prod(self.shape[1:]))

    def share_above(self, threshold: float) -> float:
        """Returns the share of the pairs whose cosine is above a threshold; NaN without a pair."""
        return (pairs_of(self.cosines) > threshold).double().mean().item()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers for a JSON file: no matrix, and None in place of NaN."""

        def listed(pairs: Sequence[KernelPair]) -> list[dict[str, Any]]:
            return [{"kernels": [p.first, p.second], "cosine": p.cosine} for p in pairs]

        counts, edges = similarity_histogram(self.cosines)
        return {
            "name": self.name,
            "depth": self.depth,
            "shape": list(self.shape),
            "groups": self.groups,
            "pairs": self.pairs,
            "undefined_kernels": self.undefined,
            "mean_cosine": _finite(self.mean_cosine),
            "chance": self.chance,
            "effective_rank": _finite(self.effective_rank),
            "share_above": {f"{tau:g}": _finite(self.share_above(tau)) for tau in _THRESHOLDS},
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "most_similar": listed(self.most_similar),
            "least_similar": listed(self.least_similar),
        }


@torch.no_grad()
def measure_similarity(
    model: nn.Module,
    *,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    example_input: Any = None,
    pairs: int = 4,
) -> list[LayerSimilarity]:
    """Compares all kernels of each convolution, as the forward pass uses them.

    Kernels are compared as in merging: inside their group, and without their mean if the forward
    pass standardises them. Convolutions whose kernels cannot be compared (one kernel
    in a group, a weight that is computed in the forward pass or shared with an earlier layer) are
    left out; ``plan_merging(model)`` says which and why. The model is not changed.

    Args:
        model: Any network, also inside InMergeWrapper, DDP or torch.compile.
        include: Only the convolutions that match, as for :func:`inmerge_wrap.plan_merging`.
        exclude: Leave out convolutions that match.
        example_input: See :func:`inmerge_wrap.plan_merging`.
        pairs: Number of most and of least similar pairs to keep per layer.

    Returns:
        One entry per convolution, in depth order.

    Raises:
        ValueError: If no convolution is left, or a pattern matches none.
    """
    network = unwrap(model)
    plan = plan_merging(
        network,
        shallow_layers=0,
        include=include,
        exclude=exclude,
        also_merge=SKIPPED_KINDS,
        example_input=example_input,
    )
    return [_measure_layer(network, site, pairs) for site in plan.merged]


def _measure_layer(network: nn.Module, site: ConvSite, pairs: int) -> LayerSimilarity:
    kernels = read_kernels(network.get_submodule(site.name), centred=site.centred)
    cosines = cosine_matrix(kernels, site.pair_groups).cpu()
    weights = kernels.reshape(site.shape)
    most, least = (
        tuple(KernelPair(*pair, weights[[*pair[:2]]].cpu()) for pair in found)
        for found in extreme_pairs(cosines, pairs)
    )
    return LayerSimilarity(
        name=site.name,
        depth=site.depth,
        shape=site.shape,
        groups=site.pair_groups,
        cosines=cosines,
        effective_rank=effective_rank(kernels, site.pair_groups).item(),
        undefined=int(cosines.diagonal().isnan().sum()),
        most_similar=most,
        least_similar=least,
    )


def read_kernels(conv: nn.Module, *, centred: bool = False) -> Tensor:
    """Returns a copy of the kernels that the forward pass uses, (C_out, fan_in), float32 or wider.

    Args:
        conv: A convolution. Under FSDP2 all ranks must call this together.
        centred: Subtract the mean of each kernel, for layers that standardise their weight.
    """
    store = store_of(conv)
    if store.reason is not None and isinstance(weight := getattr(conv, "weight", None), Tensor):
        kernels = rows_of(conv, weight)  # computed in a way that none can write
    else:
        with store.opened() as stored:
            kernels = stored.read(torch.arange(stored.shape[0], device=stored.weight.device))
    return centre(kernels) if centred else kernels


def _directions(kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns unit kernels (n, fan_in), zero where undefined, and a mask of the defined (n,)."""
    wide = kernels.detach().to(torch.promote_types(kernels.dtype, torch.float32))
    # Scaled by the largest entry first, or the squares of very small or large kernels would not
    # be finite.
    largest = torch.linalg.vector_norm(wide, math.inf, dim=1, keepdim=True)
    known = largest.isfinite() & (largest > 0)
    scaled = wide / largest
    # In place, because the memory of a copy takes longer than what is computed.
    unit = scaled.div_(torch.linalg.vector_norm(scaled, dim=1, keepdim=True))
    return unit.masked_fill_(~known, 0.0), known.squeeze(1)


def pairs_of(cosines: Tensor) -> Tensor:
    """Returns the cosine of each comparable pair once, as a flat tensor."""
    return _comparable(cosines)[1]


def _comparable(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the comparable pairs as indices (2, pairs), each pair once, and their cosines."""
    places = torch.triu_indices(len(cosines), len(cosines), offset=1, device=cosines.device)
    values = cosines[places[0], places[1]]
    comparable = ~values.isnan()
    return places[:, comparable], values[comparable]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
