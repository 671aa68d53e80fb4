"""``inmerge export``: plain weights from a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inmerge_wrap.architectures import creation_arguments, resolve
from inmerge_wrap.cli import options
from inmerge_wrap.cli.options import check_image, load
from inmerge_wrap.cli.shell import command, print_json, say, warn
from inmerge_wrap.errors import ArgumentError, check_pixels
from inmerge_wrap.files import read_json

if TYPE_CHECKING:
    from inmerge_wrap.card import ModelCard


@command(
    "inmerge export checkpoints/epoch_9 weights.safetensors --arch resnet34",
    "inmerge export model.safetensors exported/ --arch resnet18 --input-size 3 28 28 "
    "--mean 0.5 --std 0.5 --card card.json",
)
def export(
    weights: options.Weights,
    output: Path,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    in_chans: options.InChans = None,
    key: options.Key = None,
    input_size: options.InputSize = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    label_names: str | None = None,
    card: Path | None = None,
    as_json: options.AsJson = False,
) -> None:
    """Turn a training checkpoint into weights that stock timm and torchvision load.

    Prefixes of wrappers (`module.`, `_orig_mod.`) and the state of merging are removed.

    Args:
        output: A .safetensors file for plain weights, or a folder for timm's `local-dir:`.
        mean: Mean of pixels in [0, 1]: one value, or one per channel (repeat the option).
        std: Standard deviation, likewise.
        label_names: Class names, separated by commas.
        card: JSON file with the fields of the model card.
    """
    check_image(input_size)
    check_pixels(mean, std)
    network, arguments = load(weights, arch, num_classes, in_chans, key)
    from inmerge_wrap.export import export_timm, export_weights

    if (weights / "preparation.json").is_file():
        warn(
            f"{weights} is of inmerge train, and its preparation.json (the range of values, the "
            "temperature, the thresholds) is not exported: copy the whole folder to keep it"
        )
    if output.suffix == ".safetensors":
        of_folders: dict[str, Any] = {"input_size": input_size, "mean": mean, "std": std}
        of_folders |= {"label_names": label_names, "card": card}
        unused = [f"<{name}>" for name, value in of_folders.items() if value]
        if unused:
            what = ", ".join(unused)
            raise ArgumentError(f"{output} is one file, and {what} can be written to a folder only")
        export_weights(network, output)
        arch = arch or read_json(weights / "config.json")["architecture"]
        line = _loading_line(arch, arguments, output)
    elif not hasattr(network, "pretrained_cfg"):
        raise ValueError(
            f"{arch} is not a timm model, and only timm loads such a folder: write to a "
            ".safetensors file"
        )
    else:
        if input_size is None or not mean or not std:
            raise ArgumentError(
                "a timm folder stores how images are prepared: give <input_size>, <mean> and <std> "
                "of the training; or write the weights alone to a .safetensors file"
            )
        line = export_timm(
            network,
            output,
            input_size=input_size,
            mean=_of_each(mean, input_size[0]),
            std=_of_each(std, input_size[0]),
            label_names=label_names and [name.strip() for name in label_names.split(",")],
            card=None if card is None else _card(card, weights, key),
        )
    if as_json:
        print_json({"output": str(output), "load": line})
    else:
        say(f"written: {output}\nload it with: {line}")


def _card(path: Path, weights: Path, key: str | None) -> ModelCard:
    """Returns the card in a JSON file, with what the checkpoint says of merging."""
    from inmerge_wrap.card import ModelCard
    from inmerge_wrap.checkpoints import read_merging

    card = ModelCard.from_dict(read_json(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading the file has warned already
        report = read_merging(weights, key=key)
    return card if report is None else card.with_report(report)


def _loading_line(arch: str, arguments: Mapping[str, Any], path: Path) -> str:
    library, name = resolve(arch)
    arguments = creation_arguments(library, name, arguments)
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    if library == "torchvision":
        return (
            f'model = torchvision.models.get_model("{name}"{given}); '
            f'model.load_state_dict(safetensors.torch.load_file("{path}"))'
        )
    return f'timm.create_model("{name}"{given}, checkpoint_path="{path}")'


def _of_each(values: list[float], channels: int) -> list[float]:
    return values * channels if len(values) == 1 else values
