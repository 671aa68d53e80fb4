"""What a trained network is like inside: how much mixed channels and corruption change it.

Three figures on clean images and one corruption of them: how far the predicted probabilities move
when the outputs of the convolutions are mixed as merging per image mixes them, how correlated the
channels of the last features are, and how similar the features of clean and corrupted images are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from studies.common.channels import convolutions, for_each_channel
from studies.common.evaluation import evaluating

SHARE = 0.2  # of the difference to the partner, as in training


@contextmanager
def mixed(network: nn.Module, share: float, generator: torch.Generator) -> Iterator[None]:
    """Adds ``+-share`` of the difference to a random other channel, drawn for each image."""

    def hook(_: nn.Module, __: object, outputs: Tensor) -> Tensor:
        count, channels = outputs.shape[:2]
        offset = int(torch.randint(1, max(2, channels), (), generator=generator))
        signs = torch.randint(0, 2, (count, channels), generator=generator) * 2 - 1
        signs = for_each_channel(signs, outputs)
        return outputs + share * signs * (outputs.roll(offset, 1) - outputs)

    hooks = [layer.register_forward_hook(hook) for layer in convolutions(network)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Returns linear centred kernel alignment of features (N, F), in [0, 1] (arXiv 1905.00414)."""
    first, second = (x.double() - x.double().mean(0) for x in (first, second))
    cross = (first.T @ second).norm() ** 2
    return float(cross / ((first.T @ first).norm() * (second.T @ second).norm()))


def channel_correlation(features: Tensor) -> float:
    """Returns the mean absolute correlation between channels of features (N, F).

    Channels that never change are left out.
    """
    kept = features.double()[:, features.std(0) > 0]
    correlation = torch.corrcoef(kept.T).abs()
    count = len(correlation)
    return float((correlation.sum() - count) / (count * (count - 1)))


@torch.no_grad()
def mechanism(
    network: nn.Module, clean: Tensor, corrupted: Tensor, *, draws: int = 2, seed: int = 0
) -> dict[str, float]:
    """Returns the three figures for normalised images (N, C, H, W) and their corruption."""
    generator = torch.Generator().manual_seed(seed)
    with evaluating(network):
        before = network(clean).softmax(1)
        moves = []
        for _ in range(draws):
            with mixed(network, SHARE, generator):
                moves.append((network(clean).softmax(1) - before).abs().sum(1).mean() / 2)
        features = [
            network.forward_features(x).flatten(2).mean(2)  # type: ignore[operator]
            for x in (clean, corrupted)
        ]
    return {
        "moved_by_mixing": round(float(torch.stack(moves).mean()), 5),
        "channel_correlation": round(channel_correlation(features[0]), 5),
        "cka_under_noise": round(linear_cka(*features), 5),
    }
