"""The models of timm and torchvision by name.

The names are read from the libraries' source files, because importing either takes seconds: shell
completion and the error for a mistyped name appear at once.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_FOLDERS = {
    "timm": ("models",),
    # Models of torchvision.models.quantization and .optical_flow are not trained like a CNN.
    "torchvision": ("models", "models/segmentation", "models/detection", "models/video"),
}
# A function under @register_model, with any other decorators between the two.
_REGISTERED = re.compile(r"^@register_model\b.*\n(?:(?:@|[ )]).*\n)*def (\w+)\(", re.MULTILINE)


@functools.cache
def known_models(library: str) -> frozenset[str]:
    """Returns the model names of ``"timm"`` or ``"torchvision"``; none if it is not installed."""
    found = importlib.util.find_spec(library)
    if found is None or not found.submodule_search_locations:
        return frozenset()
    root = Path(found.submodule_search_locations[0])
    return frozenset(
        name
        for folder in _FOLDERS[library]
        for path in (root / folder).glob("*.py")
        for name in _REGISTERED.findall(path.read_text(encoding="utf-8"))
    )


def is_timm_folder(path: str | Path) -> bool:
    """Returns whether a path is a folder that ``export_timm`` or timm itself wrote."""
    return (Path(path) / "config.json").is_file() and (Path(path) / "model.safetensors").is_file()


def resolve(name: str) -> tuple[str, str]:
    """Returns the library that a model belongs to, and its name there; timm if both have it.

    A name is ``"NAME"``, ``"timm:NAME"`` or ``"torchvision:NAME"``. timm's may end in a set of
    weights, as in ``"resnet34.tv_in1k"``.
    """
    library, _, rest = name.rpartition(":")
    if library and library not in _FOLDERS:
        raise ValueError(f"{name!r}: a model is NAME, timm:NAME or torchvision:NAME")
    libraries = [library] if library else list(_FOLDERS)
    for candidate in libraries:
        plain = rest.partition(".")[0] if candidate == "timm" else rest
        if plain in known_models(candidate):
            return candidate, rest
    choices = sorted(set().union(*(known_models(candidate) for candidate in libraries)))
    close = difflib.get_close_matches(rest, choices, n=5, cutoff=0.5)
    hint = f"close names: {', '.join(close)}" if close else "see timm.list_models()"
    raise ValueError(f"no model is called {name!r}; {hint}")


def build(name: str, num_classes: int | None = None, in_chans: int | None = None) -> nn.Module:
    """Returns an untrained model, or the trained one of a timm folder.

    The name is as for :func:`resolve`, or a folder. Without ``num_classes`` or ``in_chans`` the
    model has as many outputs and image channels as the architecture by default.
    """
    wanted = {"num_classes": num_classes, "in_chans": in_chans}
    given: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    if is_timm_folder(name):
        import timm

        return timm.create_model(f"local-dir:{name}", pretrained=True, **given)
    library, name = resolve(name)
    if library == "timm":
        import timm

        return timm.create_model(name, **given)
    import torchvision

    if given.pop("in_chans", 3) != 3:
        raise ValueError(f"torchvision's {name} reads 3 channels; for others use a timm model")
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce a slow initialisation, which weights overwrite anyway.
        warnings.simplefilter("ignore", FutureWarning)
        return torchvision.models.get_model(name, **creation_arguments(library, name, given))


def creation_arguments(library: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that create a model without downloading anything.

    Some of torchvision's models download ImageNet weights for their backbone by default.
    """
    if library == "torchvision":
        import torchvision

        builder = torchvision.models.get_model_builder(name)
        if "weights_backbone" in inspect.signature(builder).parameters:
            return {"weights_backbone": None, **given}
    return dict(given)
