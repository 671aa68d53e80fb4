"""Kills (SIGKILL, which no code can catch) children that export or save, and looks at the ruins.

    python tests/scripts/killed.py FOLDER

Prints a JSON list of one entry per child: what it did, whether it was killed, and which of the two
versions of the weights is there afterwards, 1.0 (before) or 2.0 (after); null if neither is whole.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file
from torch import nn

from inmerge_wrap import InMergeWrapper, export_timm, export_weights
from tests.scripts.common import forget_accelerator, sgd, wrapped

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}


def filled(value: float, name: str = "test_resnet") -> InMergeWrapper:
    model = timm.create_model(name, num_classes=2)
    return InMergeWrapper(fill(model, value), shallow_layers=1)


def fill(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def version(tensors: Any) -> float | None:
    found = {value for tensor in tensors for value in (tensor.min().item(), tensor.max().item())}
    return found.pop() if len(found) == 1 else None


# -- what is done, and what is found afterwards --------------------------------------------------


def export_small(folder: Path, value: float) -> None:
    export_weights(filled(value), folder / "weights.safetensors")


def export_large(folder: Path, value: float) -> None:
    export_weights(filled(value, "resnet50"), folder / "weights.safetensors")


def exported(folder: Path) -> float | None:
    state = load_file(folder / "weights.safetensors")
    parameters = filled(0.0, "resnet50" if len(state) > 200 else "test_resnet").module
    return version(state[name] for name, _ in parameters.named_parameters())


def export_folder(folder: Path, value: float) -> None:
    export_timm(
        filled(value),
        folder,
        input_size=(3, 32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )


def loaded(folder: Path) -> float | None:
    return version(timm.create_model(f"local-dir:{folder}", pretrained=True).parameters())


def accelerator_of(folder: Path) -> tuple[Accelerator, InMergeWrapper]:
    forget_accelerator()
    project = ProjectConfiguration(
        project_dir=str(folder),
        automatic_checkpoint_naming=True,
        iteration=len(list(folder.glob("checkpoints/*"))),
    )
    accelerator = Accelerator(cpu=True, project_config=project)
    model = wrapped()
    accelerator.prepare(model, sgd(model))
    return accelerator, model


def checkpoint(folder: Path, value: float) -> None:
    accelerator, model = accelerator_of(folder)
    fill(model, value)
    model.merge_()
    accelerator.save_state()


def first_checkpoint(folder: Path) -> float | None:
    accelerator, model = accelerator_of(folder)
    accelerator.load_state(str(folder / "checkpoints" / "checkpoint_0"))
    assert model.step == 1
    return version(model.parameters())


# -- when it is killed ---------------------------------------------------------------------------


def child(act: Callable[[Path, float], None], folder: Path, moment: int | None) -> int:
    """Starts the act in a child; it kills itself right before its file event ``moment``."""
    pid = os.fork()
    if pid:
        return pid
    seen = -1

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and args and str(folder) in str(args[0]):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        act(folder, 2.0)
    finally:
        os._exit(0)


def killed_at_each_event(act: Any, find: Any, folder: Path) -> list[dict[str, Any]]:
    act(folder, 1.0)
    outcomes = []
    for moment in range(40):
        _, status = os.waitpid(child(act, folder, moment), 0)
        killed = os.WIFSIGNALED(status)
        outcomes.append({"act": act.__name__, "killed": killed, "found": find(folder)})
        if not killed:  # the act was over before that event
            return outcomes
        if outcomes[-1]["found"] == 2.0:
            act(folder, 1.0)
    raise AssertionError("the act has no end")


def killed_while_writing(
    act: Any, find: Any, folder: Path, drafts: str, sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Kills as soon as files that match ``drafts`` have some bytes: in the middle of a write."""
    act(folder, 1.0)
    before = set(folder.glob(drafts))
    outcomes = []
    for size in sizes:
        pid = child(act, folder, None)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not os.waitpid(pid, os.WNOHANG)[0]:
            written = 0
            for path in set(folder.glob(drafts)) - before:
                try:
                    written += path.stat().st_size
                except FileNotFoundError:
                    continue
            if written >= size:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                outcomes.append({"act": act.__name__, "killed": True, "found": find(folder)})
                break
        before = set(folder.glob(drafts))
    return outcomes


def main() -> None:
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    folders = [base / name for name in ("small", "large", "folder", "checkpoints")]
    for folder in folders:
        folder.mkdir()
    outcomes = killed_at_each_event(export_small, exported, folders[0])
    outcomes += killed_while_writing(
        export_large, exported, folders[1], ".*", (1, 1 << 20, 20 << 20)
    )
    outcomes += killed_at_each_event(export_folder, loaded, folders[2])
    sizes = (1, 6_000, 9_000)
    outcomes += killed_while_writing(
        checkpoint, first_checkpoint, folders[3], "checkpoints/*/*", sizes
    )
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
