"""Export of plain weights: files that stock timm and torchvision load without this library."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from inmerge_wrap.card import ModelCard, loading_line
from inmerge_wrap.errors import check_choice, check_pixels
from inmerge_wrap.files import read_json, replacing, replacing_files, supported_or_skipped
from inmerge_wrap.tracing import bystanders_kept
from inmerge_wrap.unwrapping import named_wrappers, unwrap
from inmerge_wrap.watch import NoEffectWarning

__all__ = ["export_timm", "export_weights", "plain_state_dict"]

_INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
_CROP_MODES = ("center", "squash", "border")


def _warn_of_merging(model: nn.Module) -> None:
    """Warns where nothing was ever merged, or BatchNorm measured other kernels."""
    wrappers = [cast(Any, wrapper) for _, wrapper in named_wrappers(model)]
    for wrapper in wrappers:
        idle = wrapper.report().idle
        if idle is not None:
            warnings.warn(
                f"the weights to export were never merged: {idle}", NoEffectWarning, stacklevel=3
            )
    lagging = any(wrapper.statistics_lag for wrapper in wrappers)
    if lagging and any(isinstance(module, _BatchNorm) for module in model.modules()):
        warnings.warn(
            "kernels were merged in the very last step, after BatchNorm measured its running "
            "statistics: call model.recalibrate(loader) before the export, or let merging end "
            "earlier with a schedule",
            stacklevel=3,
        )


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of the unwrapped network, as stock models load it.

    Tensors are contiguous copies on the CPU, each with its own memory; half precision is widened
    to float32, which changes no value. Computed weights (weight_norm, spectral_norm,
    pruning) are stored as their result, under the plain name. FSDP2 shards are gathered, for
    which all ranks must call this together.

    Raises:
        ValueError: If the state holds anything but tensors, which safetensors cannot store, or if
            the wrapper is part of a larger module.
    """
    network = unwrap(model)
    for name, _ in named_wrappers(network):
        raise ValueError(
            f"{type(network).__name__} holds an InMergeWrapper at {name!r}, which would change the "
            f"names in the file: export that part alone, model.{name}"
        )
    if any(_computes_weights(module) for module in network.modules()):
        network = _with_stored_weights(network)
    state = {}
    for name, value in _computed_state(network).items():
        name = name.replace("_orig_mod.", "")
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; only tensors can be exported")
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        state[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return state


def export_weights(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes the network's weights as one plain safetensors file and verifies them.

    A timm model loads the file with ``timm.create_model(name, num_classes=...,
    checkpoint_path=path)``, any other with ``model.load_state_dict(load_file(path))``. The file
    is replaced atomically: the previous one stays until the new one has been read back. (A
    torchvision MNASNet reads a version from its state dict, which safetensors cannot store; see
    docs/what-is-merged.md.)

    Args:
        model: A wrapper, the bare network, or either inside DDP or torch.compile. Every rank may
            call this; rank 0 writes.
        path: Must end in ``.safetensors``, because timm reads other names as pickles.

    Returns:
        The path.

    Raises:
        ValueError: If the name does not end in .safetensors or a tensor cannot be stored.
        RuntimeError: If the file reads back differently.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"the file must end in .safetensors, or timm cannot read it: {path}")
    state = plain_state_dict(model)
    _warn_of_merging(model)
    if _is_writer():
        with replacing(path) as draft:
            _save_verified(state, draft)
    return path


def export_timm(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    label_names: Sequence[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
    card: ModelCard | Mapping[str, Any] | None = None,
) -> str:
    """Writes the folder that ``timm.create_model("local-dir:...", pretrained=True)`` loads.

    It stores the preprocessing of *this* training run, not that of the ImageNet weights, so that
    ``timm.data.resolve_model_data_config`` returns it. Before anything is replaced, a fresh model
    is loaded from a draft and must give the same outputs, bit for bit. (With FSDP2 a single rank
    cannot run the model, so the weights are compared instead.)

    Args:
        model: A timm model, wrapped or not, as for :func:`export_weights`.
        directory: Folder for ``config.json``, ``model.safetensors`` and the card.
        input_size: (channels, height, width) of the training images.
        mean: Per channel, subtracted from pixels in [0, 1].
        std: Per channel, in the same units.
        crop_pct: Share of the resized image that the centre crop keeps.
        crop_mode: How images that are not square are fitted, in timm's names: ``"center"`` crops
            the longer side, ``"squash"`` changes the aspect ratio, ``"border"`` pads.
        interpolation: How images are resized, in timm's names: ``"bicubic"``, ``"bilinear"``, ...
        label_names: Names of the classes, in the order of the outputs.
        model_args: Arguments of ``timm.create_model`` that changed the architecture, if timm did
            not record them.
        card: The model card, or its fields as plain data; written to README.md with the metadata
            of the Hugging Face Hub.

    Returns:
        The line of code that loads the model.

    Raises:
        TypeError: If the network is not a timm model, or one of features only.
        ValueError: If the data configuration or the card does not fit the network, or the card is
            malformed.
        RuntimeError: If the draft does not load into an equal model, or the network's outputs are
            not finite. Nothing is replaced in that case.
    """
    network = unwrap(model)
    if not hasattr(network, "pretrained_cfg") or not hasattr(network, "num_classes"):
        raise TypeError(
            f"{type(network).__name__} is not a timm model; use export_weights(model, "
            "'weights.safetensors') and load it with model.load_state_dict(load_file(path))"
        )
    data_config: dict[str, Any] = {
        "input_size": tuple(map(int, input_size)),
        "mean": tuple(map(float, mean)),
        "std": tuple(map(float, std)),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
    }
    names = None if label_names is None else list(map(str, label_names))
    _check_facts(data_config, names, network)
    if card is not None:
        card = card if isinstance(card, ModelCard) else ModelCard.from_dict(card)
        _check_card(card, data_config["input_size"][0], cast(Any, network.num_classes))
    _warn_of_merging(model)
    state = plain_state_dict(network)
    if _is_writer():
        with replacing_files(directory) as draft:
            _write_timm_config(network, draft / "config.json", data_config, names, model_args)
            _save_verified(state, draft / "model.safetensors")
            with bystanders_kept(network), torch.device("cpu"):
                outputs = _check_timm_draft(network, state, draft, data_config)
            if card is not None:
                card.write(
                    draft,
                    model=model,
                    architecture=read_json(draft / "config.json")["architecture"],
                    data_config=data_config,
                    label_names=names,
                    several_outputs=outputs > 1,
                )
            elif (Path(directory) / "README.md").exists():
                warnings.warn(
                    f"{directory}/README.md was written for other weights and is kept: "
                    "pass a card, or delete it",
                    stacklevel=2,
                )
    return loading_line(f"local-dir:{Path(directory)}")


def _check_facts(
    data_config: Mapping[str, Any], label_names: Sequence[str] | None, network: nn.Module
) -> None:
    """Raises a ValueError if the preprocessing or the names do not fit the network."""
    channels = data_config["input_size"][0]
    for name in ("mean", "std"):
        if (count := len(data_config[name])) != channels:
            raise ValueError(f"{name} has {count} values for an image of {channels} channels")
    check_pixels(data_config["mean"], data_config["std"])
    classes: Any = network.num_classes
    if label_names is not None and len(label_names) != classes:
        raise ValueError(f"label_names has {len(label_names)} names for {classes} classes")
    if not 0.0 < data_config["crop_pct"] <= 1.0:
        raise ValueError(f"crop_pct must lie in (0, 1], got {data_config['crop_pct']}")
    for name, choices in (("crop_mode", _CROP_MODES), ("interpolation", _INTERPOLATIONS)):
        check_choice(name, data_config[name], choices)


def _check_card(card: ModelCard, channels: int, outputs: int) -> None:
    """Raises a ValueError if what a card says of its use is wrong for a network."""
    if card.task != "multilabel" and (card.task == "binary") != (outputs == 1):
        raise ValueError(
            f"task {card.task!r} of the card does not fit {outputs} outputs: a single output "
            "is 'binary', several are 'multiclass' or 'multilabel'"
        )
    if not card.code and channels not in (1, 3):
        raise ValueError(
            f"timm's code opens grey or colour images, not {channels} channels: pass the code "
            "that reads them (code=)"
        )


def _write_timm_config(
    network: nn.Module,
    path: Path,
    data_config: dict[str, Any],
    label_names: list[str] | None,
    model_args: Mapping[str, Any] | None,
) -> None:
    from timm.models._hub import save_config_for_hf  # save_for_hf's own, but without the weights

    shape = {"num_classes": network.num_classes, "in_chans": data_config["input_size"][0]}
    save_config_for_hf(
        network,
        str(path),
        model_config={"label_names": label_names} if label_names else None,
        model_args={**shape, **(model_args or {})},
        data_config=data_config,
    )
    config = read_json(path)
    config["pretrained_cfg"] |= data_config
    # These describe the weights that training started from.
    for stale in ("tag", "license", "origin_url", "paper_ids", "test_input_size", "test_crop_pct"):
        config["pretrained_cfg"].pop(stale, None)
    path.write_text(json.dumps(config, indent=2))


def _check_timm_draft(
    network: nn.Module, state: Mapping[str, Tensor], draft: Path, data_config: dict[str, Any]
) -> int:
    """Loads the draft with stock timm, compares outputs (if sharded, weights), and counts them."""
    import timm

    try:
        # In float32 although the default dtype, which timm follows, may be another.
        fresh = timm.create_model(f"local-dir:{draft}", pretrained=True).float().eval()
    except Exception as error:  # whatever timm raises, the cause is the same
        raise RuntimeError(
            f"timm cannot rebuild this {type(network).__name__} ({error}). If it was created with "
            "arguments that change its layers, pass them as model_args"
        ) from error
    if any(hasattr(parameter, "full_tensor") for parameter in network.parameters()):
        if not _same_bits(fresh.state_dict(), state):
            raise RuntimeError(f"the reloaded {type(network).__name__} holds other weights")
        return 1
    ours = _with_stored_weights(network).cpu().float().eval()
    # In channels_last the convolutions would round differently from the model that is loaded.
    ours.to(memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, *data_config["input_size"], generator=generator, dtype=torch.float32)
    with torch.no_grad():
        expected, actual = tree_leaves(ours(image)), tree_leaves(fresh(image))
    if not all(bool(output.isfinite().all()) for output in expected):
        raise RuntimeError(
            f"this {type(network).__name__} returns NaN or Inf, its training has diverged: "
            "export an earlier checkpoint (export_weights stores these weights anyway)"
        )
    if len(expected) != len(actual) or not all(map(torch.equal, expected, actual)):
        raise RuntimeError(
            f"the reloaded {type(network).__name__} gives other outputs. If it was created with "
            "arguments that change its computation, pass them as model_args"
        )
    return len(expected)


def _computes_weights(module: nn.Module) -> bool:
    """Returns whether a module computes part of its state from other tensors in each forward."""
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module) or any(map(_computes, hooks))


def _computes(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils")


def _computed_state(network: nn.Module) -> dict[str, Any]:
    """Returns the state dict, with parametrised tensors as the forward pass computes them."""
    state = dict(network.state_dict())
    for path, module in network.named_modules():
        if parametrize.is_parametrized(module):
            prefix = f"{path}." if path else ""
            # Not by removing the parametrisation of a copy: a copy shares its class with the
            # original, which would lose the attribute.
            for name in [name for name in state if name.startswith(f"{prefix}parametrizations.")]:
                del state[name]
            for tensor_name in cast(nn.ModuleDict, module.parametrizations):
                state[f"{prefix}{tensor_name}"] = getattr(module, tensor_name)
    return state


def _with_stored_weights(network: nn.Module) -> nn.Module:
    """Returns a copy in eval mode on which old-style hooks (weight_norm, pruning) no longer act."""
    from torch.nn.utils import prune

    # Old-style computed weights are no leaves, which deepcopy refuses: they are recomputed.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    twin = copy.deepcopy(network, memo).eval()
    for module in twin.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif _computes(hook):
                cast(Any, hook).remove(module)
                del module._forward_pre_hooks[key]
    return twin


def _save_verified(state: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    # One metadata key: safetensors writes several in random order, and equal weights should give
    # equal files.
    try:
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # its words for a full disk
        raise OSError(str(error)) from error
    with supported_or_skipped():
        path.chmod(mode)  # safetensors makes a file that only its owner can read
    if not _same_bits(safetensors.torch.load_file(path), state):
        raise RuntimeError(f"what was written to {path.name} reads back differently")


def _same_bits(stored: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    """Returns whether two states are equal, compared as bytes so that a NaN equals itself."""
    return stored.keys() == state.keys() and all(
        tensor.dtype == stored[name].dtype
        and torch.equal(tensor.view(-1).view(torch.uint8), stored[name].view(-1).view(torch.uint8))
        for name, tensor in state.items()
    )


def _is_writer() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
