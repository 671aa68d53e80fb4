"""Native code against the plain functions, which are its specification, and a literal loop."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from inmerge_wrap import InMergeWrapper, Quantile, ZScore, merging
from inmerge_wrap.changes import Blend
from inmerge_wrap.discovery import ConvSite
from inmerge_wrap.engines import building, native, torch_blocks
from inmerge_wrap.layers import Layers, MergedLayer, find_layers
from inmerge_wrap.merge_pass import Kept, draw_step, merge_step
from inmerge_wrap.merging import centre, pair_cosines
from inmerge_wrap.pairs import Outcome, Pairs, Totals, mix
from inmerge_wrap.settings import MergeSettings
from inmerge_wrap.stores import tensor_store
from inmerge_wrap.tally import Tally
from inmerge_wrap.thresholds import Fixed, Threshold
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


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


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


# -- a whole pass in one call --------------------------------------------------------------------


class InSteps:
    """A threshold that native code does not know, so that the pass is made step by step."""

    def __init__(self, rule: Threshold) -> None:
        self.rule = rule

    def alike(self, cosines: Tensor, fan_in: int) -> Tensor:
        return self.rule.alike(cosines, fan_in)


def layers_of(weights: list[Tensor], centred: bool) -> Layers:
    found = []
    for number, weight in enumerate(weights):
        conv = nn.Conv2d(1, 1, 1, bias=False)
        conv.weight = nn.Parameter(weight)
        site = ConvSite(f"{number}", number + 1, tuple(weight.shape), centred=centred)
        found.append(MergedLayer(number, site, conv, tensor_store(conv.weight)))
    return Layers(found)


@torch.no_grad()
def one_pass(
    threshold: Any, probability: float, dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], Outcome | Totals, list[Kept]]:
    weights = random_layers(dtype, options.get("channels_last", False))
    weights[0][3] = 0.0
    weights[0][4, 5] = float("nan")
    weights[1][2, 1] = float("inf")
    kept: list[Kept] = []
    settings = MergeSettings(
        similarity_threshold=threshold,
        merge_weight=0.8,
        merge_probability=probability,
        direction=options.get("direction", "partner"),
        seed=options.get("seed", 0),
        engine="native",
    )
    outcome = merge_step(
        layers_of(weights, options.get("centred", False)),
        settings,
        step=3,
        skip=options.get("skip"),
        keep=kept if "keep" in options else None,
    )
    return weights, outcome, kept


def counts(outcome: Outcome | Totals) -> Tensor:
    """What a tally of one pass holds."""
    tally = Tally(len(SHAPES))
    tally.add(range(len(SHAPES)), outcome)
    return tally.to_state(0)


def any_merged(outcome: Outcome | Totals) -> bool:
    return any(outcome.has_merged(number) for number in range(len(SHAPES)))


RULES = [
    Fixed(-1.0),
    Fixed(0.0),
    Fixed(1.0),
    ZScore(0.5),
    Quantile(0.5),
    Quantile(0.07),
    Quantile(1),
]
same = pytest.mark.parametrize("rule", RULES, ids=repr)


@NEEDS_COMPILER
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    before = torch.get_num_threads()
    for rule in (Fixed(0.0), Quantile(0.5)):
        found = one_pass(rule, 1.0, torch.float32)
        torch.set_num_threads(1)
        expected = one_pass(rule, 1.0, torch.float32)
        torch.set_num_threads(before)
        assert all(map(equal, found[0], expected[0]))
        assert torch.equal(counts(found[1]), counts(expected[1]))


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@NEEDS_COMPILER
@same
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_call_does_what_the_steps_do_one_by_one(
    rule: Threshold, probability: float, dtype: torch.dtype
) -> None:
    for options in ({"seed": 5}, {"seed": 6, "centred": True, "channels_last": True}):
        weights, outcome, _ = one_pass(rule, probability, dtype, **options)
        expected, steps, _ = one_pass(InSteps(rule), probability, dtype, **options)
        assert isinstance(outcome, Totals) and isinstance(steps, Outcome)
        assert all(map(equal, weights, expected))
        torch.testing.assert_close(counts(outcome), counts(steps), rtol=1e-12, atol=1e-12)
        for number in range(len(SHAPES)):
            assert outcome.has_merged(number) == steps.has_merged(number)


@NEEDS_COMPILER
@pytest.mark.parametrize("probability", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signed_moves_go_where_those_of_plain_torch_go(
    dtype: torch.dtype, probability: float
) -> None:
    for rule in (Fixed(-1.0), Fixed(0.0), Quantile(0.5)):  # a sign must not depend on who merges
        options = {"seed": 5, "direction": "signed"}
        weights, outcome, _ = one_pass(rule, probability, dtype, **options)
        expected, steps, _ = one_pass(InSteps(rule), probability, dtype, **options)
        assert isinstance(outcome, Totals) and isinstance(steps, Outcome)
        torch.testing.assert_close(counts(outcome), counts(steps), rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(weights, expected, strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)
    before = random_layers(dtype)
    assert not torch.equal(weights[2], before[2])


@NEEDS_COMPILER
def test_native_code_draws_the_signs_of_plain_torch() -> None:
    streams, lengths = [0, 7, 3, 10_000], [5, 0, 700, 1]
    signs = native.draw_signs(streams, lengths, 2**63 + 1, 4)
    expected = []
    for stream, length in zip(streams, lengths, strict=True):
        seed = mix(2**63 + 1, 4, 2**40 + stream)
        generator = torch.Generator().manual_seed(seed)
        expected.append(2 * torch.randint(0, 2, (length,), generator=generator) - 1)
    assert signs.tolist() == torch.cat(expected).tolist() and 300 < signs.eq(1).sum() < 400


@NEEDS_COMPILER
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_native_code_draws_the_pairs_of_plain_torch(probability: float) -> None:
    """Those of groups too, and of one kernel alone in each."""
    convs = [nn.Conv2d(groups, 8 * groups, 1, groups=groups) for groups in (1, 4, 3)]
    convs.append(nn.Conv2d(10, 5, 3, groups=5))
    found = []
    for number, conv in enumerate(convs):
        weight = conv.weight.detach()
        site = ConvSite(f"{number}", 7 * number + 1, tuple(weight.shape), conv.groups)
        found.append(MergedLayer(number, site, conv, tensor_store(conv.weight)))
    layers = Layers(found)
    for seed, step in ((0, 0), (5, 11), (2**32 - 1, 10**6)):
        expected = draw_step(
            layers, MergeSettings(merge_probability=probability, seed=seed, engine="torch"), step
        )
        assert expected.lengths[3] == 0 and (len(expected) > 40) == (probability > 0.5)
        run = native._Pass(layers)
        run.draw(probability, seed, step)
        assert torch.equal(run.pairs().table, expected.table)
        assert run.pairs().lengths == expected.lengths


@NEEDS_COMPILER
def test_a_cosine_at_the_threshold_passes_in_no_engine() -> None:
    """0.6 is no float32: where the comparison is made in decides."""
    weight = torch.zeros(2, 2, 1, 1)
    weight[0, 0], weight[1, 0], weight[1, 1] = 1.0, 0.6, 0.8
    for rule in (Fixed(0.6), InSteps(Fixed(0.6)), ZScore(0.6 * 2**0.5), Fixed(0.5999999)):
        settings = MergeSettings(
            similarity_threshold=rule,  # type: ignore[arg-type]
            merge_weight=1.0,
            merge_probability=1.0,
            engine="native",
        )
        with torch.no_grad():
            outcome = merge_step(layers_of([weight.clone()], False), settings, 0)
        assert outcome.has_merged(0) == (rule == Fixed(0.5999999))


@NEEDS_COMPILER
def test_a_skipped_step_compares_and_merges_nothing() -> None:
    before = one_pass(Fixed(1.0), 1.0, torch.float32)[0]
    for skip in (torch.tensor(1.0), torch.tensor([1.0])):
        weights, outcome, _ = one_pass(Fixed(-1.0), 1.0, torch.float32, skip=skip)
        assert all(map(equal, weights, before))
        assert not any_merged(outcome)
        assert isinstance(outcome, Totals) and all(largest > -1 for largest in outcome.sums[4])
    assert any_merged(one_pass(Fixed(-1.0), 1.0, torch.float32, skip=torch.tensor(0.0))[1])


@NEEDS_COMPILER
@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@same
def test_kept_kernels_are_put_back_bit_for_bit(
    rule: Threshold, channels_last: bool, exchanged: bool, threads: int
) -> None:
    options = {"channels_last": channels_last, "seed": 3}
    before = one_pass(Fixed(1.0), 1.0, torch.float32, **options)[0]
    weights, outcome, (kept,) = one_pass(rule, 1.0, torch.float32, keep=True, **options)
    changed = [not equal(one, other) for one, other in zip(weights, before, strict=True)]
    assert any(changed) == any_merged(outcome)
    if exchanged:
        for module, weight in zip(kept.modules, weights, strict=True):
            module.weight = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
    with torch.no_grad():
        kept.put_back_()
    now = [module.weight.detach() for module in kept.modules]
    assert all(map(equal, now, before))
    if exchanged:  # and nowhere else
        was = zip(weights, before, strict=True)
        assert [not equal(one, other) for one, other in was] == changed


@NEEDS_COMPILER
def test_blends_of_both_engines_are_equal_to_the_last_bit() -> None:
    """So that replicas of which one has no compiler part where a cosine is at the threshold."""
    lengths, targets, sources = everyone_with_another()
    for merge_weight in (0.0, 0.3, 0.8, 1.3):
        results = []
        for engine in (native, torch_blocks):
            stores = [tensor_store(weight) for weight in random_layers(torch.float32)]
            pairs = paired(lengths, targets, sources)
            engine.change_(stores, pairs, None, Blend(merge_weight))
            results.append([store.weight for store in stores])
        assert all(map(torch.equal, *results))


# -- what was found is found again only if nothing has changed -----------------------------------


def swapped_data(conv: nn.Conv2d) -> None:
    conv.weight.data = conv.weight.data.clone()


def another_parameter(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(conv.weight.detach().clone())


def other_order(conv: nn.Conv2d) -> None:
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)


def other_view(conv: nn.Conv2d) -> None:
    """The same memory, seen in another order."""
    conv.weight.data = conv.weight.data.as_strided((8, 8, 3, 3), (72, 1, 24, 8))


def freed(conv: nn.Conv2d) -> None:
    """As FSDP does with what it has gathered: the same storage, at another place."""
    storage, size = conv.weight.untyped_storage(), conv.weight.untyped_storage().nbytes()
    before = conv.weight.data_ptr()
    storage.resize_(0)
    conv.taken = [torch.empty(size // 4) for _ in range(1000)]  # one of them in its place
    storage.resize_(size)
    assert conv.weight.data_ptr() != before
    with torch.no_grad():
        conv.weight.normal_()


CHANGES = [swapped_data, another_parameter, other_order, other_view, freed, nn.Module.double]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("engine", ["torch", pytest.param("native", marks=NEEDS_COMPILER)])
def test_weights_that_were_exchanged_between_steps_are_merged(engine: Any, change: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
    model = InMergeWrapper(
        network, shallow_layers=0, similarity_threshold=-1.0, merge_probability=1.0, engine=engine
    )
    model.merge_()
    first = model._layers()
    assert model._layers() is first
    change(network[1])
    assert find_layers(network, model.plan.merged, first) is not first
    conv = network[1]
    expected = conv.weight.detach().clone()
    targets, sources = model.next_pairs()["1"]
    assert sources is not None
    reference.merge_on(
        expected,
        list(zip(targets.tolist(), sources.tolist(), strict=True)),
        merge_weight=0.8,
        similarity_threshold=-1.0,
    )
    model.merge_()
    torch.testing.assert_close(conv.weight.detach(), expected)


def test_a_module_that_was_replaced_is_noticed() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3)))
    model = InMergeWrapper(network, shallow_layers=0, engine="torch")
    first = model._layers()
    network[1] = nn.Sequential(nn.Conv2d(8, 8, 3))
    found = model._layers()
    assert found is not first and found[1].module is network[1][0]
    network[1] = nn.Sequential(nn.Conv2d(8, 9, 3))
    with pytest.raises(RuntimeError, match=r"1\.0 have the shape"):
        model.merge_()


# -- the compiler --------------------------------------------------------------------------------


TRAIN = """
import sys, time, timm, torch
from inmerge_wrap import InMergeWrapper
torch.set_num_threads(1)
model = InMergeWrapper(timm.create_model("test_resnet"), similarity_threshold=-1.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model.attach(optimizer)
model(torch.zeros(2, 3, 32, 32)).sum().backward()
began = time.perf_counter()
optimizer.step()
print(time.perf_counter() - began)
print(model.report())
"""


def train(folder: Path, **variables: str) -> tuple[float, str]:
    """Seconds of the first step and the last line of the report, in a process of its own."""
    caches = {"XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        env={**os.environ, **caches, **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    return float(lines[0]), lines[-1]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false", "true", "c++ '"])
def test_training_goes_on_without_a_compiler_and_says_so(compiler: str, tmp_path: Path) -> None:
    _, engine = train(tmp_path, CXX=compiler)
    assert engine.startswith("Engine: torch (6 layers: no native code, ")


def test_a_compiler_that_hangs_is_waited_for_no_longer_than_two_seconds(tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    child = f"for _ in $(seq 600); do echo x >> {beats}; sleep 0.1; done"
    compiler = script(tmp_path / "slow", f"({child}) & wait")
    seconds, engine = train(tmp_path, CXX=compiler)
    assert "the compiler took more than 2 s" in engine
    assert seconds < 10  # of a machine that has other work as well
    written = beats.stat().st_size
    time.sleep(1)
    assert beats.stat().st_size == written > 0  # the compiler's child has ended with it
    assert list((tmp_path / "cache" / "inmerge_wrap").iterdir()) == []


@NEEDS_COMPILER
def test_it_is_compiled_once_and_by_several_processes_at_a_time(tmp_path: Path) -> None:
    compiler = script(tmp_path / "counted", f'echo x >> {tmp_path / "count"}; exec c++ "$@"')
    environment = {
        **os.environ,
        "CXX": compiler,
        "XDG_CACHE_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    code = "from inmerge_wrap.engines import native; native.library()"
    command = [sys.executable, "-c", code]
    together = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait(240) for process in together] == [0, 0, 0]
    compiled = (tmp_path / "count").read_text()
    subprocess.run(command, env=environment, check=True, timeout=240)
    assert (tmp_path / "count").read_text() == compiled
    assert len(list((tmp_path / "inmerge_wrap").iterdir())) == 1


@NEEDS_COMPILER
@pytest.mark.parametrize("cache", ["a file", "a broken library", "others may write"])
def test_native_code_needs_no_cache(cache: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    folder = home / "inmerge_wrap"
    if cache == "a file":
        home.write_text("")
    else:
        folder.mkdir(parents=True)
    if cache == "others may write":
        folder.chmod(0o777)
    if cache == "a broken library":
        train(tmp_path, XDG_CACHE_HOME=str(home))
        for library in folder.iterdir():
            library.write_bytes(b"half of a libr")
    code = "from inmerge_wrap.engines import native; print(native.problem(insist=True))"
    environment = {**os.environ, "XDG_CACHE_HOME": str(home), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout == "None\n", done.stderr
    if cache == "others may write":
        assert list(folder.iterdir()) == []
    assert not list(tmp_path.glob("inmerge-*"))


@NEEDS_COMPILER
def test_a_folder_that_may_not_execute_is_left_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load = building.ctypes.CDLL

    def refuses(path: str) -> Any:
        if path.startswith(str(tmp_path)):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(building.ctypes, "CDLL", refuses)
    build = building.Build()
    assert build.wait(240) is None and build.library is not None


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false", "true", "c++ '"])
def test_a_compiler_that_fails_is_reported_before_the_training(
    compiler: str, later: bool, tmp_path: Path
) -> None:
    """One that is missing, one that refuses, one that makes nothing, one that cannot be read."""
    code = "import timm; from inmerge_wrap import InMergeWrapper\n"
    code += "network = timm.create_model('test_resnet')\n"
    code += f"model = InMergeWrapper(network, engine={'auto' if later else 'native'!r})\n"
    code += "model.engine = 'native'"
    folders = {"TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **folders, "CXX": compiler},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "engine='native' does not work here: native code needs a C++ compiler" in done.stderr
    assert f"line {3 + later}" in done.stderr
    assert not list(tmp_path.rglob("inmerge-*"))


# -- which engine computes what ------------------------------------------------------------------


@NEEDS_COMPILER
def test_the_report_says_which_engine_computes_what() -> None:
    network = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(4)))
    nn.utils.parametrizations.weight_norm(network[3])
    model = InMergeWrapper(network, shallow_layers=0, engine="native")
    network[2].half()
    expected = "native (2 layers), torch (2 layers: float16, weightnormed weights)"
    assert model.engine_in_use == model.report().engine == expected
    assert str(model.report()).endswith(f"Engine: {expected}.")
    model.engine = "torch"
    assert model.engine_in_use == "torch (4 layers)"


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

    run = native._Pass(layers_of(random_layers(torch.float32), False))
    run.draw(0.5, 3, 4)
    before = run.pairs()
    monkeypatch.setattr(merging, "draw_layers", changed)
    native._draws_like_torch.cache_clear()
    try:
        run.draw(0.5, 3, 4)
    finally:
        native._draws_like_torch.cache_clear()
    kernels = [shape[0] for shape in SHAPES]
    seeds = [mix(3, 4, number + 1) for number in range(len(SHAPES))]
    expected, lengths = changed(kernels, kernels, 0.5, seeds)
    assert torch.equal(run.pairs().table, expected) and run.pairs().lengths == tuple(lengths)
    assert run.pairs().lengths != before.lengths
    monkeypatch.undo()
    assert native._draws_like_torch()
    run.draw(0.5, 3, 4)
    assert torch.equal(run.pairs().table, before.table)
