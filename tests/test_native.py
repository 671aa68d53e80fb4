"""Native code against the plain functions, which are its specification, and a literal loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from inmerge_wrap import merging
from inmerge_wrap.changes import Blend
from inmerge_wrap.engines import native
from inmerge_wrap.merging import centre, pair_cosines
from inmerge_wrap.pairs import Pairs
from inmerge_wrap.stores import tensor_store
from tests import NEEDS_COMPILER, reference

# Longer than one part of a kernel, not a multiple of the lanes, a single entry; all dense.
SHAPES = [(40, 250, 3, 3), (9, 7, 1, 5), (24, 1, 1, 1), (2, 3, 3, 3)]


def random_layers(dtype: torch.dtype, channels_last: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    layers = [torch.randn(shape).to(dtype) for shape in SHAPES]
    if channels_last:
        layers = [layer.to(memory_format=torch.channels_last) for layer in layers]
    return layers


def everyone_with_another() -> tuple[list[int], Tensor, Tensor]:
    """Every kernel is a target, so that partners form cycles, and trees that end in one."""
    generator = torch.Generator().manual_seed(1)
    pairs = [shape[0] for shape in SHAPES]
    targets = [torch.arange(count) for count in pairs]
    sources = [
        (index + torch.randint(1, len(index), index.shape, generator=generator)) % len(index)
        for index in targets
    ]
    return pairs, torch.cat(targets), torch.cat(sources)


def compare(
    weights: list[Tensor], lengths: list[int], targets: Tensor, sources: Tensor, centred: list[bool]
) -> Tensor:
    stores = [tensor_store(weight) for weight in weights]
    return native.cosines(stores, paired(lengths, targets, sources), centred)


def blend_(
    weights: list[Tensor],
    lengths: list[int],
    targets: Tensor,
    sources: Tensor,
    changed: Tensor,
    merge_weight: float,
) -> None:
    stores = [tensor_store(weight) for weight in weights]
    native.change_(stores, paired(lengths, targets, sources), changed, Blend(merge_weight))


def paired(lengths: list[int], targets: Tensor, sources: Tensor) -> Pairs:
    layer = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Pairs(torch.stack([layer, targets, sources]), tuple(lengths))


@NEEDS_COMPILER
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cosines(dtype: torch.dtype, channels_last: bool) -> None:
    layers = random_layers(dtype, channels_last)
    layers[0][3] = 0.0
    layers[0][4, 5] = float("nan")
    layers[0][7, 1] = float("inf")
    layers[1] += 100  # far from centred: the mean must go before the products are taken
    pairs, targets, sources = everyone_with_another()
    centred = [False, True, False, True]
    found = compare(layers, pairs, targets, sources, centred)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    parts = zip(layers, found.split(pairs), targets.split(pairs), sources.split(pairs), strict=True)
    for (layer, cosines, ours, theirs), mean in zip(parts, centred, strict=True):
        rows = layer.flatten(1).to(found.dtype)
        rows = centre(rows) if mean else rows
        expected = pair_cosines(rows[ours], rows[theirs])
        torch.testing.assert_close(cosines, expected, rtol=0, atol=2e-5, equal_nan=True)
    assert found.split(pairs)[0].isnan().sum() >= 3


@NEEDS_COMPILER
@pytest.mark.parametrize("merge_weight", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_kernels_are_read_before_any_is_written(
    dtype: torch.dtype, merge_weight: float
) -> None:
    pairs, targets, sources = everyone_with_another()
    for share in (0.0, 0.5, 1.0):
        layers = random_layers(dtype)
        before = [layer.clone() for layer in layers]
        changed = torch.rand(len(targets), generator=torch.Generator().manual_seed(2)) < share
        blend_(layers, pairs, targets, sources, changed, merge_weight)
        parts = (part.split(pairs) for part in (targets, sources, changed))
        for layer, old, ours, theirs, mask in zip(layers, before, *parts, strict=True):
            expected = old.clone()
            for i, j in zip(ours[mask].tolist(), theirs[mask].tolist(), strict=True):
                blended = merge_weight * old[i].double() + (1 - merge_weight) * old[j].double()
                expected[i] = blended.to(dtype)
            torch.testing.assert_close(layer, expected)
            left = ours[~mask]
            assert torch.equal(layer[left], old[left])


@NEEDS_COMPILER
def test_the_literal_loop_merges_the_same_pairs() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        weight = torch.randn(30, 2, 3, 3) + torch.randn(2, 3, 3)
        targets = torch.randperm(30)[:20].sort().values
        sources = (targets + torch.randint(1, 30, (20,))) % 30
        expected, merged = reference.merge(
            weight, list(zip(targets.tolist(), sources.tolist(), strict=True)), 0.8, 0.4
        )
        cosines = compare([weight], [20], targets, sources, [False])
        blend_([weight], [20], targets, sources, cosines > 0.4, 0.8)
        torch.testing.assert_close(weight, expected)
        assert (cosines > 0.4).tolist() == merged


@NEEDS_COMPILER
def test_the_number_of_threads_changes_no_bit() -> None:
    pairs, targets, sources = everyone_with_another()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            layers = random_layers(torch.float32)
            cosines = compare(layers, pairs, targets, sources, [False] * len(layers))
            blend_(layers, pairs, targets, sources, cosines > 0, 0.8)
            results.append([cosines, *layers])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@NEEDS_COMPILER
def test_a_backward_pass_over_weights_that_were_merged_is_refused() -> None:
    """As after any other write: PyTorch must learn of it, and of no write that was none."""
    weights = [torch.randn(8, 4, 3, 3, requires_grad=True) for _ in range(2)]
    images = torch.randn(1, 4, 5, 5, requires_grad=True)
    losses = [torch.nn.functional.conv2d(images, weight).sum() for weight in weights]
    everyone = torch.arange(8)
    targets, sources = everyone.repeat(2), everyone.roll(1).repeat(2)
    mask = torch.arange(16) < 8
    blend_([weight.detach() for weight in weights], [8, 8], targets, sources, mask, 0.8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()
    losses[1].backward()


@NEEDS_COMPILER
def test_arguments_that_are_not_dense_are_read_aright() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3)
    everyone = torch.arange(8)
    rows = torch.stack([torch.zeros_like(everyone), everyone, everyone.roll(3)], dim=1)
    mask = torch.tensor([[True, False], [False, True]]).repeat(4, 1)[:, 0]
    results = []
    for dense in (False, True):
        layer, table, changed = tensor_store(weight.clone()), rows.T, mask
        if dense:
            table, changed = rows.T.contiguous(), mask.clone()
        pairs = Pairs(table, (8,))
        assert pairs.targets.is_contiguous() == changed.is_contiguous() == dense
        cosines = native.cosines([layer], pairs, [False])
        native.change_([layer], pairs, changed, Blend(0.8))
        results.append([cosines, layer.weight])
    assert all(map(torch.equal, *results)) and not torch.equal(results[0][1], weight)


def takes(weight: Tensor) -> bool:
    return native.takes(tensor_store(weight))


def test_what_is_taken() -> None:
    weight = torch.randn(8, 4, 3, 3)
    assert takes(weight) and takes(weight.to(memory_format=torch.channels_last))
    assert takes(weight.bfloat16()) and takes(weight.double())
    assert not takes(weight.half())
    assert not takes(weight.to("meta"))
    assert not takes(weight[:, :2]) and not takes(weight.transpose(2, 3))
    with FakeTensorMode():  # a subclass, without memory of its own
        assert not takes(torch.empty(8, 4, 3, 3))
    assert not takes(torch.eye(3).to_sparse())


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false", "true", "c++ '"])
def test_a_compiler_that_fails_is_told_before_the_training(
    compiler: str, later: bool, tmp_path: Path
) -> None:
    """One that is missing, one that refuses, one that makes nothing, one that can not be read."""
    code = "import timm; from inmerge_wrap import InMergeWrapper\n"
    code += "network = timm.create_model('test_resnet')\n"
    code += f"model = InMergeWrapper(network, engine={'auto' if later else 'native'!r})\n"
    code += "model.engine = 'native'"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CXX": compiler, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "engine='native' does not work here: native code needs a C++ compiler" in done.stderr
    assert f"line {3 + later}" in done.stderr
    assert list(tmp_path.iterdir()) == []


@NEEDS_COMPILER
def test_an_empty_variable_names_no_compiler() -> None:
    code = "from inmerge_wrap.engines import native; print(native.library())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CXX": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "CDLL" in done.stdout, done.stderr


@NEEDS_COMPILER
def test_draws_follow_a_generator_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may exchange its generator; the draws must not depend on who makes them."""
    plain = merging.draw_layers

    def changed(counts: Any, sizes: Any, probability: float, seeds: Any) -> Any:
        return plain(counts, sizes, probability, [seed ^ 1 for seed in seeds])

    monkeypatch.setattr(merging, "draw_layers", changed)
    native._draws_like_torch.cache_clear()
    arguments = [20, 30], [20, 10], 0.5, [3, 4]
    try:
        drawn, pairs = native.draw_layers(*arguments)
    finally:
        native._draws_like_torch.cache_clear()
    expected, expected_pairs = changed(*arguments)
    assert torch.equal(drawn, expected) and pairs == expected_pairs
    monkeypatch.undo()
    assert torch.equal(native.draw_layers(*arguments)[0], plain(*arguments)[0])
    assert native._draws_like_torch()
