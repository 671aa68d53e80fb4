"""Loads networks from the checkpoints of training scripts, whatever wrapped them.

Pickles are opened with ``weights_only=True``: they cannot run code.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import re
import types
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inmerge_wrap.architectures import build, is_timm_folder, resolve
from inmerge_wrap.errors import ArgumentError, ArgumentWarning
from inmerge_wrap.files import read_json
from inmerge_wrap.report import MergeReport
from inmerge_wrap.tally import Tally

__all__ = ["load_network", "read_merging", "read_pickle", "read_state"]

_WEIGHTS = ("state_dict", "model_state_dict", "model")  # where training scripts put weights
_AVERAGES = ("state_dict_ema", "model_ema")  # where timm and torchvision put their average
# What scripts save with the weights: settings, scores, times. They hold values and run no code.
_DTYPES = {type(np.dtype(code)) for code in np.typecodes["All"]}
_PATHS = [
    (kind, f"{module}.{name}")  # whatever system and version of Python wrote the path
    for module in ("pathlib", "pathlib._local")
    for name, kind in (("PosixPath", PurePosixPath), ("WindowsPath", PureWindowsPath))
]
_RECONSTRUCT = np.ndarray(0).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPYS = [
    (function, f"{module}.{name}")  # of numpy 1 and 2
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name, function in (("_reconstruct", _RECONSTRUCT), ("scalar", _SCALAR))
]


def _dict_for_default(*_: Any) -> collections.OrderedDict[Any, Any]:
    """Stands in for a defaultdict, whose items torch's restricted unpickler does not set."""
    return collections.OrderedDict()


_VALUES: list[Any] = [
    *(argparse.Namespace, types.SimpleNamespace),
    (_dict_for_default, "collections.defaultdict"),
    *(int, float, str, list, dict, tuple, set),  # what a defaultdict begins with
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(np.ndarray, np.dtype, *_DTYPES, *_NUMPYS, *_PATHS),
]
_FOLDER = 0x10  # an attribute in a zip file; torch leaves the memory of such a record as it was
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")


def load_network(
    weights: str | Path,
    arch: str | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    key: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a network with the weights of a checkpoint, whatever wrapped it when saved.

    Prefixes of wrappers and training frameworks, the number of outputs and the image channels are
    found by comparison with the network.

    Args:
        weights: A .safetensors file, a state dict (.pt, .pth) or a training script's checkpoint,
            a checkpoint folder of Accelerate, or a timm folder.
        arch: The architecture, see :func:`inmerge_wrap.architectures.resolve`; a timm folder has
            its own.
        num_classes: Number of outputs; that of the weights if None.
        in_chans: Image channels; those of the weights if None.
        key: See :func:`read_state`.

    Returns:
        The network, and the arguments that its architecture is created with.

    Raises:
        ValueError: If the file cannot be read or does not fit the network; the message names
            what would.
    """
    weights = Path(weights)
    if is_timm_folder(weights) and key is None:  # read_state refuses a key
        return _load_timm_folder(weights, arch, num_classes, in_chans)
    state = read_state(weights, key=key)
    if arch is None:
        raise ArgumentError(f"{weights} holds only weights: name the network with <arch>")
    network = build(arch, num_classes, in_chans)
    fitted = _without_prefix(state, network, arch)
    fitting = _fitting_arguments(fitted, network)
    asked = {"num_classes": num_classes, "in_chans": in_chans}
    if fitting:
        if wrong := [f"{name}={asked[name]}" for name in fitting if asked[name] is not None]:
            options = " ".join(f"<{name}={value}>" for name, value in fitting.items())
            raise ArgumentError(
                f"{weights} does not fit {arch} with {', '.join(wrong)}: pass {options}, or leave "
                "it out"
            )
        asked |= fitting
        network = build(arch, **asked)
    _check_shapes(fitted, network, weights, arch)
    network.load_state_dict(fitted)
    return network, {name: value for name, value in asked.items() if value is not None}


def read_state(path: str | Path, *, key: str | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, by name.

    Args:
        path: A file, or a folder that Accelerate wrote.
        key: The entry of a training script's checkpoint that holds the weights, for example
            ``"state_dict_ema"``; found automatically if None. If the checkpoint also holds a
            moving average, the weights are used, with a warning.

    Raises:
        ValueError: If there is no such file or entry, or it cannot be read without running code.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    if key is not None and (path.is_dir() or path.suffix == ".safetensors"):
        raise ArgumentError(f"{path} holds one set of weights and no entries: leave out <key>")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_pickle(path)
    entries = content if isinstance(content, Mapping) else {}
    if key is not None and key not in entries:
        known = ", ".join(map(str, entries)) or "none"
        raise ValueError(f"{path} has no entry {key!r}; it has {known}")
    if entries:
        content = _weights_of(entries, path) if key is None else entries[key]
    named = content.items() if isinstance(content, Mapping) else ()
    state = {str(name): value for name, value in named if isinstance(value, Tensor)}
    if not state:
        inner = [str(name) for name, value in named if isinstance(value, Mapping)]
        hint = f": if they are in {' or '.join(inner)}, name the entry with <key>" if inner else ""
        raise ArgumentError(f"{path} holds no weights but a {type(content).__name__}{hint}")
    return state


def _load_timm_folder(
    folder: Path, arch: str | None, num_classes: int | None, in_chans: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    config = read_json(folder / "config.json")
    arguments = config.get("model_args") or {}
    if not isinstance(config.get("architecture"), str) or not isinstance(arguments, dict):
        raise ArgumentError(
            f"{folder / 'config.json'} names no architecture, so timm cannot load the folder: "
            "write it again with export_timm, or pass its model.safetensors and <arch>"
        )
    if arch is not None and resolve(arch)[1].partition(".")[0] != config["architecture"]:
        raise ArgumentError(
            f"{folder} holds a {config['architecture']}, not {arch}: leave out <arch>; if other "
            "weights need it, export them to a folder, too"
        )
    _read_safetensors(folder / "model.safetensors")  # timm names neither the file nor the fault
    try:
        network: Any = build(str(folder))
    except Exception as error:  # whatever timm raises, the cause is a file of the folder
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"timm cannot load {folder} ({type(error).__name__}: {reason})") from error
    arguments = {**arguments, "num_classes": network.num_classes}
    for name, asked, held in (
        ("num_classes", num_classes, network.num_classes),
        ("in_chans", in_chans, arguments.get("in_chans", 3)),
    ):
        if asked not in (None, held):  # timm would draw a new head at random
            raise ArgumentError(
                f"{folder} does not fit {name}={asked}: pass <{name}={held}>, or leave it out"
            )
    return network, arguments


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # besides its own error, KeyError for types that torch lacks
        raise ValueError(f"{path} is not a safetensors file ({error})") from error


def read_merging(path: str | Path, *, key: str | None = None) -> MergeReport | None:
    """Returns what merging did in the training run that wrote a checkpoint, if it is recorded.

    A checkpoint does not store layer names, so layers are numbered in the order of the plan.

    Args:
        path: See :func:`read_state`.
        key: See :func:`read_state`.

    Raises:
        ValueError: As :func:`read_state`.
    """
    reports = []
    for name, value in read_state(path, key=key).items():
        if name.endswith("_extra_state") and value.ndim == 1 and value.dtype == torch.float64:
            with contextlib.suppress(ValueError):  # the state of another library's module
                if tally := Tally.from_state(value):
                    reports.append(tally.report([str(n) for n in range(len(tally.steps))]))
    return reports[0] if len(reports) == 1 else None


def _weights_of(content: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    """Returns the weights inside a training checkpoint, or the content itself if it is bare."""
    averages = [name for name in _AVERAGES if isinstance(content.get(name), Mapping)]
    weights = [name for name in _WEIGHTS if isinstance(content.get(name), Mapping)]
    if averages and weights:
        message = ArgumentWarning(
            f"{path} holds the weights ({weights[0]}) and their moving average ({averages[0]}): "
            f"the weights are used; for the average, pass <key={averages[0]}>"
        )
        warnings.warn(message, stacklevel=3)
    for name in _WEIGHTS:  # one may hold another
        if isinstance(content.get(name), Mapping):
            content = content[name]
    return content


def read_pickle(path: Path) -> Any:
    """Returns what a file of torch.save holds, on the CPU; code in it does not run.

    Raises:
        ValueError: If it is damaged, or holds more than tensors and plain values.
    """
    _check_sums(path)
    try:
        with torch.serialization.safe_globals(_VALUES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle can raise anything
        raise ValueError(
            f"{path} cannot be read as a state dict ({_why_unreadable(path, error)}): write one "
            "with torch.save(model.state_dict(), path) or export_weights(model, path)"
        ) from error


def _check_sums(path: Path) -> None:
    """Raises a ValueError if a file of torch.save does not fit its checksums.

    torch itself reads such a file without a word, and a flipped bit becomes another weight.
    """
    try:
        if not zipfile.is_zipfile(path):  # of a torch before 1.6, without checksums
            return
        with zipfile.ZipFile(path) as archive:
            folders = [entry for entry in archive.infolist() if entry.external_attr & _FOLDER]
            damaged = folders[0].filename if folders else archive.testzip()
    except Exception as error:  # of a damaged directory anything
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    if damaged is not None:
        raise ValueError(
            f"{path} is damaged: {damaged} does not fit its checksum. Copy it again (a file that "
            "was written after torch.serialization.set_crc32_options(False) has none: write it "
            "again with torch.save)"
        )


def _why_unreadable(path: Path, error: Exception) -> str:
    try:
        with torch.serialization.safe_globals(_VALUES):
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a file of torch.save, or an old one
        foreign = []
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        return f"it holds objects that could run code: {', '.join(foreign[:3])}{more}"
    said = _TERMINAL_CODES.sub("", str(error)).strip()
    return said.partition("\n")[0] or type(error).__name__


def _read_folder(path: Path) -> dict[str, Tensor]:
    """Returns the weights of a folder that Accelerate wrote; it splits none of less than 10 GB."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return read_state(path / name)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{path} holds no model.safetensors (it holds {found}): name the file of the weights; if "
        "they are in several, save them again in one file, with max_shard_size"
    )


def _without_prefix(
    state: Mapping[str, Tensor], network: nn.Module, arch: str
) -> dict[str, Tensor]:
    """Returns the entries of a state dict that belong to the network, without prefixes.

    Prefixes (``module.``, ``model.``) are found by comparison with the network's own names.
    """
    plain = {
        name.replace("_orig_mod.", ""): value
        for name, value in state.items()
        if not name.endswith("_extra_state")
    }
    own = list(network.state_dict())
    prefixes = {
        name.removesuffix(mine)
        for mine in (own[0], own[-1])
        for name in plain
        if name == mine or name.endswith(f".{mine}")
    } or {""}
    held = {prefix: sum(f"{prefix}{name}" in plain for name in own) for prefix in sorted(prefixes)}
    best = max(held, key=lambda prefix: held[prefix])
    rivals = [prefix for prefix in held if held[prefix] == held[best] > 0]
    if len(rivals) > 1:
        raise ValueError(
            f"the checkpoint holds {arch} {len(rivals)} times, under {', '.join(rivals)}; save the "
            "state dict of the one you want"
        )
    if held[best] < 0.5 * len(own):
        first = next(iter(plain), "nothing")
        raise ValueError(
            f"these are not the weights of {arch}: {held[best]} of its {len(own)} tensors are "
            f"in the file (it begins with {first!r}, the network with {own[0]!r})"
        )
    return {
        name.removeprefix(best): value for name, value in plain.items() if name.startswith(best)
    }


def _fitting_arguments(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, int]:
    """Returns the output and channel counts of the weights that differ from the network's."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    outputs = getattr(network, "num_classes", layers[-1].weight.shape[0])
    channels = next((m.in_channels for m in layers if isinstance(m, nn.Conv2d)), None)
    fitting = {}
    for name, mine in network.state_dict().items():
        theirs = state.get(name)
        if theirs is None or theirs.ndim != mine.ndim or theirs.ndim == 0:
            continue
        (my_rows, *my_rest), (rows, *rest) = mine.shape, theirs.shape
        if rest == my_rest and my_rows == outputs != rows:
            fitting["num_classes"] = rows
        elif mine.ndim == 4 and rows == my_rows and my_rest[0] == channels != rest[0]:
            fitting["in_chans"] = rest[0]
    return fitting


def _check_shapes(
    state: Mapping[str, Tensor], network: nn.Module, weights: Path, arch: str
) -> None:
    own = network.state_dict()
    shared = [(name, state[name], mine) for name, mine in own.items() if name in state]
    found = {
        "missing": [
            name
            for name in own
            # A counter that is not there begins at 0, as in torch.
            if name not in state and not name.endswith("num_batches_tracked")
        ],
        "not in it": [name for name in state if name not in own],
        "shapes": [
            f"{name} is {tuple(value.shape)} instead of {tuple(mine.shape)}"
            for name, value, mine in shared
            if value.shape != mine.shape
        ],
        "types": [
            f"{name} is {value.dtype} instead of {mine.dtype}"
            for name, value, mine in shared
            if value.is_floating_point() != mine.is_floating_point()
        ],
    }
    problems = [
        f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in found.items()
        if names
    ]
    if problems:
        raise ValueError(f"{weights} does not fit {arch}; {'; '.join(problems)}")
