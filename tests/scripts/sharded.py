"""Training under FSDP2 and FSDP1, compared with that of one process; see two_ranks.py."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import schedulefree
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import (
    load_fsdp_model,
    load_fsdp_optimizer,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from inmerge_wrap import InMergeWrapper, export_timm, export_weights
from tests.scripts.common import SETTINGS, attached, loss_of, sgd, tiny_net, train, wrapped

STEPS = 5
Case = Callable[[Path], dict[str, Any]]


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Groups as in a real network: one of its own for a layer, the root for the rest."""
    options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    fully_shard(model.get_submodule("module.last" if hasattr(model, "plan") else "last"), **options)
    fully_shard(model, **options)
    return model


def trained(
    model: Any, make: Callable[[Any], Any] = sgd, steps: int = STEPS, start: int = 0
) -> tuple[Any, Any]:
    """Attaches an optimizer and trains; returns the model and its optimizer."""
    optimizer = make(model)
    model.attach(optimizer)
    if hasattr(optimizer, "train"):
        optimizer.train()
    train(model, optimizer, steps, start)
    return model, optimizer


def alone(make: Callable[[Any], Any] = sgd) -> InMergeWrapper:
    """The same training in one process."""
    return trained(wrapped(), make)[0]


def same_reports(model: InMergeWrapper, expected: InMergeWrapper) -> bool:
    """Counts alike; cosines up to rounding, for shards and whole weights have other engines."""
    pairs = list(zip(map(asdict, model.report()), map(asdict, expected.report()), strict=True))
    floats = ("mean_cosine", "max_cosine")
    close = all(abs(a.pop(name) - b.pop(name)) < 1e-6 for a, b in pairs for name in floats)
    return close and all(a == b for a, b in pairs)


def distance(model: nn.Module, expected: nn.Module) -> float:
    """The largest difference of a weight, whole or sharded."""
    worst = 0.0
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        worst = max(worst, (whole - expected.get_parameter(name)).abs().max().item())
    return worst


def compare(model: InMergeWrapper, expected: InMergeWrapper) -> dict[str, Any]:
    return {
        "worst": distance(model, expected),
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        "local": sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)),
        "total": sum(p.numel() for p in expected.parameters()),
        "reports": same_reports(model, expected) or str(model.report()),
        "merged": model.report().merged,
    }


def wrapped_then_sharded(folder: Path) -> dict[str, Any]:
    model, _ = trained(shard(wrapped(check_replicas_every=2)))
    outcome = compare(model, alone())
    outcome["rows"] = len(model.module.mid.weight.to_local())
    export_weights(model, folder / "sharded.safetensors")
    if dist.get_rank() == 0:
        export_weights(alone().module, folder / "alone.safetensors")
    return outcome


def sharded_then_wrapped(folder: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        # The trace may need plain weights; the order of registration is right here, too.
        warnings.filterwarnings("ignore", "no forward pass was possible")
        model = InMergeWrapper(shard(tiny_net()), **SETTINGS)
    return compare(trained(model)[0], alone())


def attached_then_sharded(folder: Path) -> dict[str, Any]:
    """What Accelerate does: the optimizer is made first and given the shards afterwards."""
    model, optimizer = attached()
    names = {id(p): name for name, p in model.named_parameters()}
    shard(model)
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[names[id(p)]] for p in group["params"]]
    train(model, optimizer, STEPS)
    return compare(model, alone())


def attached_and_forgotten(folder: Path) -> dict[str, Any]:
    """The optimizer still holds the weights from before sharding: nothing would be trained."""
    model, optimizer = attached()
    shard(model)
    try:
        train(model, optimizer, 1)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def with_evaluation_between(folder: Path) -> dict[str, Any]:
    """A forward pass without a backward pass leaves the root unsharded when the step comes."""
    model = shard(wrapped())
    optimizer = sgd(model)
    model.attach(optimizer)
    kinds = set()
    for number in range(STEPS):
        model.train()
        optimizer.zero_grad()
        loss_of(model, number).backward()
        model.eval()
        with torch.no_grad():
            loss_of(model, 99)
        kinds.add(type(model.module.mid.weight).__name__)
        optimizer.step()
    return {**compare(model, alone()), "seen": sorted(kinds)}


def by_hand_after_evaluation(folder: Path) -> dict[str, Any]:
    """The same trap where the loop calls merge_() itself."""
    model, expected = shard(wrapped()), wrapped()
    for each in (model, expected):
        optimizer = sgd(each)
        for number in range(STEPS):
            train(each, optimizer, 1, start=number)
            with torch.no_grad():
                loss_of(each, 99)
            each.merge_()
    train_mode = model.train()  # the next forward pass gathers what the shards hold
    loss_of(train_mode, 0).backward()
    return compare(model, expected)


def exported_to_timm(folder: Path) -> dict[str, Any]:
    """Without a forward pass of the sharded network, which only all ranks together could make."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3)
    model = InMergeWrapper(network)
    twin = copy.deepcopy(network).eval()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    line = export_timm(
        model, folder / "timm", input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.5] * 3
    )
    dist.barrier()  # rank 0 writes
    loaded = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    image = torch.rand(2, 3, 32, 32)
    return {"line": line, "equal": torch.equal(loaded(image), twin(image))}


def inside_a_sharded_parent(folder: Path) -> dict[str, Any]:
    """As in a LightningModule: the root group belongs to a module around the wrapper."""
    model = wrapped()
    parent = nn.Sequential(model)
    fully_shard(parent, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = sgd(parent)
    model.attach(optimizer)
    train(parent, optimizer, STEPS)
    return compare(model, alone())


def replicated_and_sharded(folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("copies", "shards"))
    return compare(trained(shard(wrapped(), mesh=mesh))[0], alone())


def other_ranks(folder: Path) -> dict[str, Any]:
    """Volumes and signals; a transposed weight is split over its input channels."""

    def made() -> InMergeWrapper:
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv3d(2, 7, 3, padding=1), nn.ReLU(), nn.ConvTranspose3d(7, 6, 3, padding=1)),
            *(nn.ReLU(), nn.Flatten(2), nn.ConvTranspose1d(6, 8, 3, groups=2), nn.ReLU()),
            nn.Conv1d(8, 5, 3),
        )
        return InMergeWrapper(
            network, shallow_layers=0, include="*", similarity_threshold=0.0, merge_momentum=True
        )

    def train_on_volumes(model: nn.Module, optimizer: Any) -> None:
        for number in range(STEPS):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(number)
            model(torch.randn(2, 2, 3, 4, 5, generator=generator)).square().mean().backward()
            optimizer.step()

    model, expected = made(), made()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for each in (model, expected):
        optimizer = sgd(each)
        each.attach(optimizer)
        train_on_volumes(each, optimizer)
    return compare(model, expected)


def schedule_free(folder: Path) -> dict[str, Any]:
    def make(model: nn.Module) -> Any:
        return schedulefree.SGDScheduleFree(model.parameters(), lr=0.05, foreach=False)

    model, optimizer = trained(shard(wrapped()), make)
    expected, expected_optimizer = trained(wrapped(), make)
    for each in (optimizer, expected_optimizer):
        each.eval()  # the average, in which both sequences take part
    return compare(model, expected)


def resumed(folder: Path) -> dict[str, Any]:
    """Through torch.distributed.checkpoint's state dicts, step counter included."""

    def make(model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), lr=0.05)

    first, _ = trained(shard(wrapped()), make, 2)
    state = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in get_model_state_dict(first).items()
    }
    second = shard(wrapped(seed=7))
    second.seed = 0
    set_model_state_dict(second, state)
    trained(second, make, STEPS - 2, start=2)
    return compare(second, alone(make))


def sharded_run(steps: int, seed: int = 0) -> tuple[InMergeWrapper, torch.optim.SGD]:
    return trained(shard(wrapped(seed)), steps=steps)


def went_on(model: InMergeWrapper, optimizer: Any) -> dict[str, Any]:
    found = model.step
    train(model, optimizer, STEPS - found, start=found)
    return {**compare(model, alone()), "found": found}


def states_of(model: InMergeWrapper, optimizer: torch.optim.SGD) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def resumed_from(folder: Path, model: InMergeWrapper, optimizer: torch.optim.SGD) -> dict[str, Any]:
    states = states_of(model, optimizer)
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    return went_on(model, optimizer)


def resumed_with_its_optimizer(folder: Path) -> dict[str, Any]:
    """Saved and loaded by torch.distributed.checkpoint into an optimizer that has no state yet."""
    states = states_of(*sharded_run(2))
    checkpoint.save(states, checkpoint_id=folder / "checkpoint")
    return resumed_from(folder / "checkpoint", *sharded_run(0, seed=7))


def resumed_from_an_asynchronous_save(folder: Path) -> dict[str, Any]:
    """What is written meanwhile is the state as it was, not that of the steps that follow."""
    model, optimizer = sharded_run(2)
    states = states_of(model, optimizer)
    # It talks from a thread: without a group of its own it would answer the training.
    group = dist.new_group(backend="gloo")
    writing: Any = checkpoint.async_save(
        states, checkpoint_id=folder / "asynchronous", process_group=group
    )
    train(model, optimizer, 2, start=2)
    writing.result()
    return resumed_from(folder / "asynchronous", *sharded_run(1, seed=7))


def resumed_by_accelerate(folder: Path) -> dict[str, Any]:
    """Its own functions on sharded modules; its ``prepare`` shards on accelerators alone."""
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    place = str(folder / "accelerate")
    model, optimizer = sharded_run(2)
    save_fsdp_model(plugin, accelerator, model, place)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, place)
    model, optimizer = sharded_run(0, seed=7)
    load_fsdp_model(plugin, accelerator, model, place)
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, place)
    return went_on(model, optimizer)


def flattened(folder: Path) -> dict[str, Any]:
    """FSDP1, for real, in its two forms and with the optimizer attached before and after."""
    errors = {}
    for original in (False, True):
        for before in (False, True):
            model = wrapped()
            early = sgd(model)
            if before:
                model.attach(early)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    flat = FullyShardedDataParallel(
                        model, use_orig_params=original, device_id=torch.device("cpu")
                    )
                optimizer = early if before else sgd(flat)
                if not before:
                    model.attach(optimizer)
                train(flat, optimizer, 1)
                errors[f"{original} {before}"] = "none"
            except RuntimeError as error:
                errors[f"{original} {before}"] = str(error)
    return errors


CASES: tuple[Case, ...] = (
    wrapped_then_sharded,
    sharded_then_wrapped,
    attached_then_sharded,
    attached_and_forgotten,
    with_evaluation_between,
    by_hand_after_evaluation,
    exported_to_timm,
    inside_a_sharded_parent,
    replicated_and_sharded,
    other_ranks,
    schedule_free,
    resumed,
    resumed_with_its_optimizer,
    resumed_from_an_asynchronous_save,
    resumed_by_accelerate,
    flattened,
)
