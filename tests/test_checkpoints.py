"""Checkpoints as real training scripts write them, and what must not be run or guessed."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

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
