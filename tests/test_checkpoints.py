"""Checkpoints as real training scripts write them, and what must not be run or guessed."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import json
import os
import pathlib
import pickle
import random
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from inmerge_wrap import InMergeWrapper, export_timm
from inmerge_wrap.checkpoints import load_network, read_state

ARCH = "resnet10t"


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(ARCH, num_classes=7)


def changed(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)


def equal(network: nn.Module, expected: nn.Module) -> bool:
    found, wanted = network.state_dict(), expected.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def written_by_timm(net: nn.Module, folder: Path, average: ModelEmaV3 | None = None) -> Path:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    settings = argparse.Namespace(model=ARCH, lr=0.1, sizes=[3, 64], log=None, out=folder)
    saver = CheckpointSaver(
        net, optimizer, args=settings, model_ema=average, checkpoint_dir=str(folder)
    )
    saver.save_checkpoint(epoch=3, metric=0.5)
    return folder / "last.pth.tar"


def test_what_timms_train_script_saves(net: nn.Module, tmp_path: Path) -> None:
    path = written_by_timm(net, tmp_path)
    assert isinstance(torch.load(path, weights_only=False)["args"], argparse.Namespace)
    network, arguments = load_network(path, ARCH)
    assert equal(network, net) and arguments == {"num_classes": 7}


def test_what_torchvisions_reference_script_saves(net: nn.Module, tmp_path: Path) -> None:
    content = {
        "model": net.state_dict(),
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1).state_dict(),
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "args": argparse.Namespace(model=ARCH, device="cuda", opt="sgd"),
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    assert equal(load_network(tmp_path / "checkpoint.pth", ARCH)[0], net)


@pytest.mark.parametrize("script", ["timm", "torchvision"])
def test_an_average_next_to_the_weights_is_named_and_can_be_chosen(
    script: str, net: nn.Module, tmp_path: Path
) -> None:
    averaged: Any
    if script == "timm":
        averaged, key = ModelEmaV3(net), "state_dict_ema"
        changed(net)
        path = written_by_timm(net, tmp_path, averaged)
    else:
        averaged, key = AveragedModel(net), "model_ema"
        changed(net)
        path = tmp_path / "checkpoint.pth"
        torch.save({"model": net.state_dict(), key: averaged.state_dict()}, path)
    with pytest.warns(UserWarning, match=f"moving average.*pass key={key}"):
        assert equal(load_network(path, ARCH)[0], net)
    average = load_network(path, ARCH, key=key)[0]
    assert equal(average, averaged.module) and not equal(average, net)
    with pytest.raises(ValueError, match=r"no entry 'ema'; it has .*epoch|no entry 'ema'"):
        read_state(path, key="ema")


def test_weights_under_another_name_are_found_by_key(net: nn.Module, tmp_path: Path) -> None:
    torch.save({"net": net.state_dict(), "optimizer": {}, "epoch": 3}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"they are in net or optimizer, name the entry with key$"):
        load_network(tmp_path / "last.pt", ARCH)
    assert equal(load_network(tmp_path / "last.pt", ARCH, key="net")[0], net)


def test_weights_without_counters_of_batches_are_loaded_as_torch_loads_them(
    net: nn.Module, tmp_path: Path
) -> None:
    """As of torch before 0.4.1, and converted from other frameworks."""
    state = {name: value for name, value in net.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pt")
    assert equal(load_network(tmp_path / "old.pt", ARCH)[0], net)


class _Runs:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_run_and_the_answer_is_for_people(net: nn.Module, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"model": net.state_dict(), "args": _Runs(trap)}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="could run code") as told:
        read_state(tmp_path / "bad.pt")
    assert not trap.exists()
    assert "posix.mkdir" in str(told.value) and "torch.save(model.state_dict(), path)" in str(
        told.value
    )
    torch.save(net, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="could run code") as told:
        read_state(tmp_path / "whole.pt")
    assert "\x1b" not in str(told.value) and "\n" not in str(told.value)
    assert "timm.models.resnet.ResNet" in str(told.value)


def test_an_unreadable_file_has_no_codes_of_a_terminal_in_its_answer(tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"weights": _Runs(tmp_path / "trap")}))
    (tmp_path / "text.pt").write_text("hello")
    for name in ("old.pt", "text.pt"):
        with pytest.raises(ValueError, match="cannot be read as a state dict") as told:
            read_state(tmp_path / name)
        assert "\x1b" not in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "trap").exists()


# -- what scripts save beside the weights --------------------------------------------------------


class _NewerPath:
    """A path as Python 3.13 pickles it."""

    def __reduce__(self) -> Any:
        return pathlib.PurePosixPath, ("runs", "last.pt")


def test_values_that_scripts_save_with_the_weights_are_read(net: nn.Module, tmp_path: Path) -> None:
    scores = np.array([0.5, 0.75])
    content = {
        "model": net.state_dict(),
        "best_auc": np.mean(scores),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "scores": scores,
        "names": np.array(["a", "bc"]),
        "ranks": np.arange(3, dtype=np.int16),
        "dtype": np.dtype("float32"),
        "began": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        "day": datetime.date(2026, 1, 2),
        "took": datetime.timedelta(seconds=3),
        "history": collections.defaultdict(list, loss=[1.0, 0.5]),
        "hits": collections.defaultdict(int, a=1),
        "out": tmp_path,
    }
    torch.save(content, tmp_path / "last.pt")
    assert equal(load_network(tmp_path / "last.pt", ARCH)[0], net)


@pytest.mark.parametrize(
    "name",
    ["numpy.core.multiarray\nscalar", "pathlib\nWindowsPath", "pathlib._local\nPosixPath"],
)
def test_values_of_other_systems_and_versions_are_read(
    net: nn.Module, tmp_path: Path, name: str
) -> None:
    """The same pickle with another system's name for the same thing."""
    value = np.float64(0.5) if "scalar" in name else _NewerPath()
    torch.save({"model": net.state_dict(), "x": value}, tmp_path / "new.pt")
    with (
        zipfile.ZipFile(tmp_path / "new.pt") as new,
        zipfile.ZipFile(tmp_path / "old.pt", "w") as old,
    ):
        for entry in new.infolist():
            data = new.read(entry)
            if entry.filename.endswith("data.pkl"):
                before = data
                for ours in (b"numpy._core.multiarray\nscalar", b"pathlib\nPurePosixPath"):
                    data = data.replace(ours, name.encode())
                assert data != before
            old.writestr(entry, data)
    assert equal(load_network(tmp_path / "old.pt", ARCH)[0], net)


# -- folders -------------------------------------------------------------------------------------


def exported(net: nn.Module, folder: Path) -> Path:
    export_timm(net, folder, input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.5] * 3)
    return folder


def test_a_timm_folder_without_num_classes_loads_as_timm_loads_it(
    net: nn.Module, tmp_path: Path
) -> None:
    config = exported(net, tmp_path) / "config.json"
    content = json.loads(config.read_text())
    del content["num_classes"]
    config.write_text(json.dumps(content))
    loaded, arguments = load_network(tmp_path)
    assert equal(loaded, net) and arguments["num_classes"] == 7


@pytest.mark.parametrize(("name", "held"), [("num_classes", 7), ("in_chans", 3)])
def test_a_timm_folder_gets_no_random_layer(
    net: nn.Module, tmp_path: Path, name: str, held: int
) -> None:
    exported(net, tmp_path)
    assert equal(load_network(tmp_path, **{name: held})[0], net)
    with pytest.raises(ValueError, match=f"does not fit {name}=1: pass {name}={held},"):
        load_network(tmp_path, **{name: 1})


def test_a_key_is_refused_where_nothing_has_entries(net: nn.Module, tmp_path: Path) -> None:
    exported(net, tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match="no entries: leave out key"):
            read_state(path, key="state_dict_ema")
        with pytest.raises(ValueError, match="no entries: leave out key"):
            load_network(path, key="state_dict_ema")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds a list, not names with values"),
        ("{}", "names no architecture"),
        ('{"architecture": "resnet10t", "model_args": 3}', "names no architecture"),
        ('{"architecture": "no_such_net"}', "timm cannot load"),
        ('{"architecture": "resnet10t", "num_classes": "many"}', "timm cannot load"),
        ('{"architecture": "resnet10t", "num_classes": 3}', "timm cannot load"),
        ('{"architecture": "resnet10t", "pretrained_cfg": []}', "timm cannot load"),
    ],
)
def test_a_config_that_is_none_is_named(
    net: nn.Module, tmp_path: Path, content: str, told: str
) -> None:
    (exported(net, tmp_path) / "config.json").write_text(content)
    with pytest.raises(ValueError, match=told):
        load_network(tmp_path)


@pytest.mark.usefixtures("own_accelerator_state")
@pytest.mark.parametrize("safe", [True, False])
def test_what_accelerate_saves_is_read_and_parts_are_refused(
    net: nn.Module, tmp_path: Path, safe: bool
) -> None:
    save = partial(Accelerator(cpu=True).save_model, InMergeWrapper(net), safe_serialization=safe)
    save(tmp_path / "whole")
    assert equal(load_network(tmp_path / "whole", ARCH)[0], net)
    save(tmp_path / "parts", max_shard_size="2MB")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors .*one file, with max_shard"):
        load_network(tmp_path / "parts", ARCH)


# -- damaged files -------------------------------------------------------------------------------


def written(folder: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    state = {f"layer{n}.weight": torch.randn(3, 4, generator=generator) for n in range(3)}
    path = folder / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        content = {"model": state, "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path, state


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_a_flipped_bit_is_an_error_or_changes_nothing_where_the_format_can_know(
    tmp_path: Path, kind: str
) -> None:
    path, state = written(tmp_path, kind)
    data = path.read_bytes()
    bits = random.Random(0)
    changed = refused = 0
    for bit in bits.sample(range(8 * len(data)), 400):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = read_state(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            same = found.keys() == state.keys() and all(
                torch.equal(found[name], value) for name, value in state.items()
            )
            changed += not same
            assert same or kind != "zip"  # the other two have no checksums
    assert refused > 50 and (changed > 0) == (kind != "zip")


def test_a_record_that_is_marked_as_a_folder_is_refused(tmp_path: Path) -> None:
    """torch.load would return the memory of that tensor as it happens to be."""
    path, _ = written(tmp_path, "zip")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (record,) = [e for e in archive.infolist() if e.filename.endswith("data/0")]
    directory = data.index(b"PK\x01\x02")
    place = data.index(record.filename.encode(), directory) - 46
    data[place + 38] |= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged: \S+/data/0 does not fit"):
        read_state(path)


@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, kind: str) -> None:
    path, _ = written(tmp_path, kind)
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=str(path)):
            read_state(path)


def test_weights_of_another_type_are_not_converted_in_silence(
    net: nn.Module, tmp_path: Path
) -> None:
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["fc.weight"] = (100 * state["fc.weight"]).to(torch.int8)
    torch.save(state, tmp_path / "quantised.pt")
    with pytest.raises(ValueError, match=r"types: fc\.weight is torch\.int8 instead of"):
        load_network(tmp_path / "quantised.pt", ARCH)
    torch.save(copy.deepcopy(net).half().state_dict(), tmp_path / "half.pt")
    assert equal(load_network(tmp_path / "half.pt", ARCH)[0], copy.deepcopy(net).half().float())
