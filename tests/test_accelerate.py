"""Accelerate's life cycle, weight averages, and torch.compile."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from inmerge_wrap import InMergeWrapper, NoEffectWarning, export_weights
from tests.scripts.common import (
    Nested,
    TinyNet,
    attached,
    batch,
    digest,
    equal,
    loss_of,
    sgd,
    tiny_net,
    train,
    weights_of,
    wrapped,
)
from tests.scripts.resume import HALF, WHOLE, Run

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("own_accelerator_state")


@pytest.fixture(scope="module")
def plain() -> str:
    """Four steps in a plain loop."""
    model, optimizer = attached()
    train(model, optimizer, 4)
    assert model.report().merged > 0
    return digest(model.state_dict())


# -- prepare and attach in any order -------------------------------------------------------------

Prepared = tuple[nn.Module, Any]


def attach_then_prepare(a: Accelerator, model: InMergeWrapper, optimizer: Any) -> Prepared:
    model.attach(optimizer)
    return a.prepare(model, optimizer)


def prepare_then_attach(a: Accelerator, model: InMergeWrapper, optimizer: Any) -> Prepared:
    prepared, optimizer = a.prepare(model, optimizer)
    model.attach(optimizer)
    return prepared, optimizer


def attach_the_inner_one_later(a: Accelerator, model: InMergeWrapper, optimizer: Any) -> Prepared:
    prepared, outer = a.prepare(model, optimizer)
    a.unwrap_model(prepared).attach(optimizer)
    return prepared, outer


def apart_model_first(a: Accelerator, model: InMergeWrapper, optimizer: Any) -> Prepared:
    prepared = a.prepare(model)
    model.attach(optimizer)
    return prepared, a.prepare(optimizer)


def apart_optimizer_first(a: Accelerator, model: InMergeWrapper, optimizer: Any) -> Prepared:
    optimizer = a.prepare(optimizer)
    model.attach(optimizer)
    return a.prepare(model), optimizer


def attached_before_and_after(a: Accelerator, model: InMergeWrapper, optimizer: Any) -> Prepared:
    handle = model.attach(optimizer)
    prepared, optimizer = a.prepare(model, optimizer)
    assert model.attach(optimizer) is handle
    return prepared, optimizer


ORDERS: list[Callable[..., Prepared]] = [
    attach_then_prepare,
    prepare_then_attach,
    attach_the_inner_one_later,
    apart_model_first,
    apart_optimizer_first,
    attached_before_and_after,
]


@pytest.mark.parametrize("order", ORDERS)
def test_prepare_and_attach_in_any_order(order: Callable[..., Prepared], plain: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = wrapped()
    prepared, optimizer = order(accelerator, model, sgd(model))
    for number in range(4):
        optimizer.zero_grad()
        accelerator.backward(loss_of(prepared, number))
        optimizer.step()
    assert digest(model.state_dict()) == plain


def test_accumulation_merges_once_per_real_step() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer = attached()
    loader = DataLoader(TensorDataset(*batch(0, size=28)), batch_size=4)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = []
    for images, labels in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(images), labels))
            optimizer.step()
            optimizer.zero_grad()
        steps.append(model.step)
    assert steps == [0, 0, 1, 1, 1, 2, 3]  # the last window is cut short by the end of the epoch


def test_clipping_and_scheduling_change_nothing_about_it() -> None:
    accelerator = Accelerator(cpu=True)
    model = wrapped()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
    model.attach(optimizer)
    prepared, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for number in range(4):
        accelerator.backward(loss_of(prepared, number))
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert model.step == 4


# -- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_a_run_saved_in_mid_epoch_continues_bit_for_bit(tmp_path: Path, safe: bool) -> None:
    run = Run(seed=0)
    straight = run.train(tmp_path, safe=safe)
    assert run.model.step == WHOLE and run.model.report().merged > 10
    assert run.resume(tmp_path) == straight
    if not safe:
        return
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests/scripts/resume.py", tmp_path, "safe", "resume"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == straight, done.stderr[-4000:]


def test_transient_merging_continues_bit_for_bit(tmp_path: Path) -> None:
    run = Run(seed=0, mode="outputs")
    straight = run.train(tmp_path)
    assert run.model.step == WHOLE and run.model.report().merged > 10
    assert Run(seed=1, mode="outputs").resume(tmp_path) == straight


@pytest.mark.parametrize("of_the_optimizer", [True, False])
def test_without_the_counter_it_would_not(tmp_path: Path, of_the_optimizer: bool) -> None:
    """The control: a counter, the model's or the optimizer's, makes the draws continue."""
    run = Run(seed=0)
    straight = run.train(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    assert state.pop("_extra_state").dtype == torch.float64
    save_file(state, path, metadata={"format": "pt"})
    if not of_the_optimizer:
        state = torch.load(tmp_path / "optimizer.bin", weights_only=True)
        del state["inmerge"]
        torch.save(state, tmp_path / "optimizer.bin")
    fresh = Run(seed=0)
    with pytest.warns(UserWarning, match="no '_extra_state'.*unless the state of an attached opt"):
        fresh.accelerator.load_state(str(tmp_path))
    assert fresh.model.step == (HALF if of_the_optimizer else 0)
    assert (fresh.train(first=HALF) == straight) is of_the_optimizer
    assert equal(weights_of(fresh.model), weights_of(run.model)) is of_the_optimizer


def test_the_networks_own_state_dict_loads_into_the_wrapper() -> None:
    source = tiny_net(3)
    model = wrapped()
    with pytest.warns(UserWarning, match="no '_extra_state'.*counts its steps from 0"):
        model.load_state_dict(source.state_dict())
    assert equal(model.module.state_dict(), source.state_dict())


def test_a_foreign_state_dict_does_not_load() -> None:
    model = wrapped()
    before = weights_of(model)
    with (
        pytest.warns(UserWarning, match="no '_extra_state'"),
        pytest.raises(RuntimeError, match=r"Missing key.*module\.stem\.weight"),
    ):
        model.load_state_dict(nn.Linear(2, 2).state_dict())
    assert equal(before, weights_of(model))


# -- averages of weights -------------------------------------------------------------------------


def count_optimizers() -> int:
    gc.collect()
    # Not isinstance: it looks at what lazy modules and deprecated names pretend to be.
    return sum(issubclass(type(thing), torch.optim.Optimizer) for thing in gc.get_objects())


def torch_average(model: nn.Module) -> Any:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "timm v3": lambda model: ModelEmaV3(model, decay=0.9),
    "timm v2": lambda model: ModelEmaV2(model, decay=0.9),
    "torch": torch_average,
}


@pytest.mark.filterwarnings("ignore:The `foreach` optimization is not yet:UserWarning")
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_follows_the_merged_weights_and_merges_nothing(kind: str) -> None:
    model, optimizer = attached(similarity_threshold=-1.0)
    train(model, optimizer, 1)
    optimizers = count_optimizers()
    average = AVERAGES[kind](model)
    if kind == "torch":
        average.update_parameters(model)  # the first call copies
    copied: InMergeWrapper = average.module
    assert copied is not model
    assert count_optimizers() == optimizers
    expected = weights_of(model)
    for number in range(1, 5):
        train(model, optimizer, 1, start=number)
        if kind == "torch":
            average.update_parameters(model)
        else:
            average.update(model)
        for name, parameter in model.named_parameters():
            expected[name].lerp_(parameter.detach(), 0.1)
    assert copied.step == 1 and model.step == 5
    for name, parameter in copied.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-6)
    copied.eval()
    assert copied(batch(0)[0]).shape == (4, 3)


def test_an_average_is_exported_as_plain_weights(tmp_path: Path) -> None:
    model = wrapped()
    average = ModelEmaV3(model)
    export_weights(average, tmp_path / "ema.safetensors")
    TinyNet().load_state_dict(load_file(tmp_path / "ema.safetensors"))


# -- torch.compile -------------------------------------------------------------------------------


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compile_outside(model: InMergeWrapper, backend: str) -> Any:
    return torch.compile(model, backend=backend)


def compile_in_place(model: InMergeWrapper, backend: str) -> Any:
    model.compile(backend=backend)
    return model


def compile_network(model: InMergeWrapper, backend: str) -> Any:
    model.module.compile(backend=backend)
    return model


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("how", [compile_outside, compile_in_place, compile_network])
def test_a_compiled_model_is_merged_and_not_compiled_again(
    how: Callable[..., Any], attach_first: bool, plain: str
) -> None:
    model = wrapped()
    optimizer = sgd(model)
    if attach_first:
        model.attach(optimizer)
    compiled = how(model, "eager")
    if not attach_first:
        model.attach(optimizer)
    seen = []
    for number in range(4):
        train(compiled, optimizer, 1, start=number)
        seen.append(graphs())
        if number == 0:
            torch._dynamo.config.error_on_recompile = True
    assert seen[0] >= 1 and len(set(seen)) == 1
    assert digest(model.state_dict()) == plain


@pytest.fixture(autouse=True)
def _own_compiler_state() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    before = torch._dynamo.config.error_on_recompile
    yield
    torch._dynamo.config.error_on_recompile = before


def test_a_model_compiled_with_autograd_sees_the_merged_weights(plain: str) -> None:
    model, optimizer = attached()
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, optimizer, 4)
    assert model.step == 4
    reference, reference_optimizer = attached()
    train(reference, reference_optimizer, 4)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_an_unattached_compiled_model_is_reported() -> None:
    model = wrapped()
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(NoEffectWarning, match="no optimizer is attached"):
        train(compiled, sgd(model), 10)


@pytest.mark.filterwarnings("ignore:.*record_function.*:UserWarning")
# Dynamo itself looks at .grad of the outputs, where it goes on after backward().
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", [torch.optim.SGD, Nested])
@pytest.mark.parametrize("what", ["step", "whole iteration"])
def test_a_compiled_step_merges_once_and_is_not_compiled_again(kind: Any, what: str) -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # torch now hooks SGD.step, too
    outcomes = []
    for compiled in (False, True):
        model = wrapped()
        optimizer = kind(model.parameters(), lr=0.05, momentum=0.9)
        model.attach(optimizer)
        step = optimizer.step

        def iteration(images: Tensor, labels: Tensor) -> None:
            nn.functional.cross_entropy(model(images), labels).backward()  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023

        if compiled:
            iteration = iteration if what == "step" else torch.compile(iteration, backend="eager")
            optimizer.step = torch.compile(step, backend="eager") if what == "step" else step
        seen = []
        for number in range(6):
            iteration(*batch(number))
            seen.append(graphs())
        assert model.step == 6
        if compiled:
            assert seen[0] >= 1 and seen[2:] == [seen[2]] * 4  # momentum appears in step 2
        outcomes.append(digest(weights_of(model)))
    assert outcomes[0] == outcomes[1]


def test_compiled_by_accelerate() -> None:
    accelerator = Accelerator(cpu=True, dynamo_backend="eager")
    model, optimizer = attached()
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for number in range(3):
        optimizer.zero_grad()
        accelerator.backward(loss_of(prepared, number))
        optimizer.step()
    assert graphs() >= 1 and model.step == 3
    assert accelerator.unwrap_model(prepared, keep_torch_compile=False) is model


def test_a_compiled_wrapper_is_exported_as_plain_weights(tmp_path: Path) -> None:
    model = InMergeWrapper(timm.create_model("resnet18", num_classes=2))
    export_weights(torch.compile(model, backend="eager"), tmp_path / "compiled.safetensors")
    stock = timm.create_model("resnet18", num_classes=2)
    stock.load_state_dict(load_file(tmp_path / "compiled.safetensors"))
    assert equal(dict(stock.named_parameters()), dict(model.module.named_parameters()))


def test_copies_of_a_compiled_run_are_independent() -> None:
    model, optimizer = attached()
    compiled = torch.compile(model, backend="eager")
    train(compiled, optimizer, 1)
    twin = copy.deepcopy(model)
    train(compiled, optimizer, 1, start=1)
    assert (twin.step, model.step) == (1, 2)
