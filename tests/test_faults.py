"""Kills, damaged checkpoints and broken kernels: nothing whole is lost, nothing spreads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from inmerge_wrap import InMergeWrapper, export_weights
from tests.scripts.common import (
    MERGED,
    SETTINGS,
    TinyNet,
    attached,
    equal,
    next_pairs,
    train,
    weights_of,
    wrapped,
)

ROOT = Path(__file__).parents[1]


# -- killed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ruins(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    command = [sys.executable, ROOT / "tests/scripts/killed.py", tmp_path_factory.mktemp("ruins")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("act", ["export_small", "export_folder"])
def test_killed_at_any_file_event_the_old_or_the_new_weights_are_whole(
    ruins: list[dict[str, Any]], act: str
) -> None:
    found = [entry["found"] for entry in ruins if entry["act"] == act]
    killed = [entry["killed"] for entry in ruins if entry["act"] == act]
    assert set(found) == {1.0, 2.0}
    assert killed.count(True) >= 6 and killed[-1] is False
    # The old ones up to one moment, the new ones from then on, and always after an undisturbed run.
    assert found == sorted(found) and found[-1] == 2.0


@pytest.mark.parametrize("act", ["export_large", "checkpoint"])
def test_killed_while_writing_the_previous_file_is_whole(
    ruins: list[dict[str, Any]], act: str
) -> None:
    entries = [entry for entry in ruins if entry["act"] == act]
    assert entries and all(entry["killed"] for entry in entries)
    assert {entry["found"] for entry in entries} == {1.0}


def full_disk(state: Any, path: Any, metadata: Any) -> None:
    Path(path).write_bytes(b"half of")
    raise OSError(28, "No space left on device")


def silent_loss(state: Any, path: Any, metadata: Any) -> None:
    damaged = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    Path(path).write_bytes(safetensors.torch.save(damaged, metadata))


@pytest.mark.parametrize(
    "write,error,message",
    [
        (full_disk, OSError, "No space left"),
        (silent_loss, RuntimeError, "reads back differently"),
    ],
)
def test_a_write_that_fails_leaves_the_previous_file_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, error: Any, message: str
) -> None:
    path = tmp_path / "weights.safetensors"
    export_weights(wrapped(), path)
    before = path.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", write)
    with pytest.raises(error, match=message):
        export_weights(wrapped(seed=1), path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["weights.safetensors"]


# -- damaged and foreign checkpoints -------------------------------------------------------------


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda state: state[:-2], "_extra_state holds 20 numbers.*is truncated"),
        (lambda state: state[:2], "_extra_state of the checkpoint is not that of"),
        (
            lambda state: torch.cat([torch.full_like(state[:1], 9), state[1:]]),
            "_extra_state of the checkpoint is not that of",
        ),
        (
            lambda state: torch.cat([state[:-1], state[-1:] * torch.inf]),
            "holds numbers that are not finite",
        ),
        (lambda state: {"step": 3}, "_extra_state of the checkpoint is not that of"),
        (lambda state: b"something else", "_extra_state of the checkpoint is not that of"),
    ],
)
def test_a_damaged_or_foreign_counter_is_refused_by_name(damage: Any, message: str) -> None:
    model = wrapped()
    model.merge_()
    state = dict(model.state_dict())
    fresh = wrapped(seed=1)
    before = weights_of(fresh)
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict({**state, "_extra_state": damage(state["_extra_state"])})
    assert equal(before, weights_of(fresh)) and fresh.step == 0


@pytest.mark.parametrize(
    "convert",
    [
        lambda state: state.half(),
        lambda state: state.bfloat16(),
        lambda state: state.float(),
        lambda state: state.to(torch.int8),
        lambda state: torch.quantize_per_tensor(state.float(), 0.1, 0, torch.qint8),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quant:UserWarning", "ignore:.*quant:DeprecationWarning")
def test_a_converted_counter_is_ignored_with_one_warning(convert: Any) -> None:
    model = wrapped()
    model.merge_()
    state = dict(model.state_dict())
    fresh = wrapped(seed=1)
    with pytest.warns(UserWarning, match=r"_extra_state .* was converted to torch\.") as caught:
        fresh.load_state_dict({**state, "_extra_state": convert(state["_extra_state"])})
    assert len([w for w in caught if "_extra_state" in str(w.message)]) == 1
    assert equal(weights_of(model), weights_of(fresh)) and fresh.step == 0


@pytest.mark.parametrize("shares", [(0.1,) * 10, (1 / 3,) * 3, (0.7, 0.2, 0.1)])
def test_a_counter_survives_federated_averaging(shares: tuple[float, ...]) -> None:
    """As Flower's FedAvg adds up the state dicts of its clients."""
    clients = [wrapped() for _ in shares]
    for client in clients:
        for _ in range(7):
            client.merge_()
    states = [client.state_dict() for client in clients]
    mean = {
        name: sum(share * state[name] for share, state in zip(shares, states, strict=True))
        for name in states[0]
    }
    fresh = wrapped(seed=1)
    fresh.load_state_dict(mean)
    assert fresh.step == 7 and fresh.report().drawn == clients[0].report().drawn
    assert next_pairs(fresh) == next_pairs(clients[0])


@pytest.mark.usefixtures("own_accelerator_state")
def test_a_truncated_checkpoint_file_does_not_load(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = attached()
    accelerator.prepare(model, optimizer)
    accelerator.save_state(str(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])
    before = weights_of(model)
    with pytest.raises(SafetensorError):
        accelerator.load_state(str(tmp_path))
    assert equal(before, weights_of(model))


def test_a_checkpoint_of_another_network_is_refused_by_the_names_of_its_weights() -> None:
    other = InMergeWrapper(TinyNet(classes=4), **SETTINGS)
    with pytest.raises(RuntimeError, match=r"size mismatch for module\.head\.weight"):
        wrapped().load_state_dict(other.state_dict())


def test_a_state_dict_without_the_counter_loads_with_a_warning() -> None:
    model, optimizer = attached()
    train(model, optimizer, 2)
    state = dict(model.state_dict())
    del state["_extra_state"]
    fresh = wrapped(seed=1)
    with pytest.warns(UserWarning, match="no '_extra_state'.*counts its steps from 0"):
        fresh.load_state_dict(state)
    assert equal(weights_of(model), weights_of(fresh)) and fresh.step == 0


def test_inside_of_another_module_it_is_named_with_its_place() -> None:
    parent = torch.nn.Sequential(wrapped())
    state = {name: v for name, v in parent.state_dict().items() if "_extra_state" not in name}
    with pytest.warns(UserWarning, match=r"no '0\._extra_state'"):
        parent.load_state_dict(state)


# -- broken kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e38])
def test_a_broken_kernel_does_not_spread_and_is_reported(value: float) -> None:
    model = wrapped(similarity_threshold=-1.0, merge_probability=1.0)
    broken = 4
    with torch.no_grad():
        model.last.weight[broken] = value
    for _ in range(50):
        before = model.last.weight.detach().clone()
        drawn = dict(next_pairs(model)[MERGED.index("last")])
        model.merge_()
        after = model.last.weight.detach()
        assert torch.equal(after[broken].nan_to_num(7.0), before[broken].nan_to_num(7.0))
        for target, source in drawn.items():
            if broken in (target, source):
                assert torch.equal(after[target].nan_to_num(7.0), before[target].nan_to_num(7.0))
            else:
                assert not torch.equal(after[target], before[target])
                assert after[target].isfinite().all()
    layers = model.report()
    assert (layers["mid"].drawn, layers["mid"].undefined, layers["mid"].share) == (50 * 7, 0, 1.0)
    assert layers["last"].undefined >= 50 and layers["last"].drawn == 50 * 9
    assert layers["last"].merged == layers["last"].drawn - layers["last"].undefined
    assert -1.0 <= layers["last"].mean_cosine <= layers["last"].max_cosine <= 1.0
    assert "mid" in str(layers)
    assert f"pairs without a cosine: {layers['last'].undefined:,}" in str(layers)


def test_a_diverged_run_keeps_its_counter_and_can_be_saved_and_loaded() -> None:
    model, optimizer = attached()
    train(model, optimizer, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    train(model, optimizer, 2, start=1)
    assert model.step == 3
    assert sum(layer.undefined for layer in model.report()) > 0
    fresh = wrapped()
    fresh.load_state_dict(model.state_dict())
    assert fresh.step == 3 and fresh.report() == model.report()
