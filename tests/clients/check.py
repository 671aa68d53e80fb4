"""What every client must show, and how a script says so."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from inmerge_wrap import InMergeWrapper
from tests.scripts.common import SETTINGS, batch, tiny_net

SURE = {"similarity_threshold": -1.0, "merge_probability": 0.5}  # half of the pairs merge


def wrapped(mode: str = "step", seed: int = 0) -> InMergeWrapper:
    """A wrapped tiny network of which half of the kernels merge in each step."""
    return InMergeWrapper(tiny_net(seed), **{**SETTINGS, **SURE, "mode": mode})


def loader(size: int = 16) -> DataLoader:
    """Batches of four in a fixed order: no client restores the order of a shuffled epoch."""
    return DataLoader(TensorDataset(*batch(0, size=size)), batch_size=4)


def check(what: str, passed: object) -> None:
    """Prints what was found, and ends the script where it is not so."""
    print(f"{'ok' if passed else 'FAILED':6}  {what}", flush=True)
    if not passed:
        sys.exit(1)


def merged(model: InMergeWrapper, steps: int) -> None:
    """Merging acted with each of so many steps, on every drawn pair; on the outputs, on half."""
    report = model.report()
    check(f"{steps} steps were seen", model.step == steps)
    if model.mode == "outputs":  # where all images x channels count as drawn
        check("half of the channels merged", 0.3 < report.merged / report.drawn < 0.7)
    else:
        check("all drawn pairs merged", 0 < report.merged == report.drawn)


def run(packages: tuple[str, ...], *cases: Callable[[Path, str], None]) -> None:
    """Runs the cases after each step and in the forward pass, each in an empty folder."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in (*packages, "torch")]
    print(", ".join(versions))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for mode in ("step", "outputs"):
        for case in cases:
            print(f"{case.__name__}, mode={mode}")
            with tempfile.TemporaryDirectory() as folder:
                case(Path(folder), mode)
