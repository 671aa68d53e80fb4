"""A wrapper that passes attributes through to its network and its settings."""

from __future__ import annotations

import inspect
from collections.abc import Sized
from dataclasses import fields, replace
from typing import Any, cast

from torch import nn

from inmerge_wrap import neighbours
from inmerge_wrap.schedule import Schedule
from inmerge_wrap.settings import DirectionRule, MergeSettings, Mode, PartnerRule
from inmerge_wrap.thresholds import Threshold
from inmerge_wrap.unwrapping import unwrap

_SETTINGS = frozenset(setting.name for setting in fields(MergeSettings))


class NetworkProxy(nn.Module):
    """Passes attributes, length, items and state dicts of a wrapper through to its network.

    Attributes of the network are looked up and set there; those that hold parameter names are
    translated to the names of the wrapper. The settings are attributes too, checked when they are
    set: this replaces the frozen object that holds them.
    """

    # For type checkers: a subclass holds the settings as one object, which __getattr__ reads.
    settings: MergeSettings
    mode: Mode
    merge_weight: float
    radius: float | None
    similarity_threshold: Threshold
    merge_probability: float
    schedule: Schedule
    partner: str | PartnerRule
    direction: str | DirectionRule
    shared_partner: bool
    shared_sign: bool
    keep_norm: bool
    merge_momentum: bool
    compiled: bool | None
    seed: int
    inspect_every: int
    check_replicas_every: int

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_state_dict_post_hook(neighbours.put_counter_last)
        self.register_state_dict_post_hook(neighbours.plain_for_timms_export)
        self.register_load_state_dict_pre_hook(neighbours.accept_network_state)

    def __getattr__(self, name: str) -> Any:
        if name in _SETTINGS:
            return getattr(self.settings, name)
        own = getattr(type(self), name, None)
        if isinstance(own, property):  # it failed inside: the network would fail by another name
            return own.__get__(self)
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("module"), name)
        return neighbours.renamed_for_timm(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            self.settings = replace(self.settings, **{name: value})
            return
        network = vars(self).get("_modules", {}).get("module")
        if name == "module" and network is not None and unwrap(value) is not unwrap(network):
            raise AttributeError(
                "model.module cannot become another network, whose convolutions the plan does not "
                "know: wrap that network, InMergeWrapper(network)"
            )
        part = isinstance(value, nn.Module | nn.Parameter) and name != "module"
        if part and hasattr(network, name):
            raise AttributeError(
                f"the network has a {name} of its own, which its forward pass would keep using: "
                f"set it there, model.module.{name} = ..., and before wrapping if it is to merge"
            )
        # A method stays: libraries patch those of the wrapper, whatever the network has.
        is_mine = name in vars(self) or hasattr(type(self), name) or callable(value)
        if hasattr(network, name) and not is_mine:
            setattr(network, name, value)
        else:
            super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Replaces a part of the network, as ``timm.utils.freeze`` does with its BatchNorm."""
        network = self._modules.get("module")
        if network is not None and name in network._modules:
            network.add_module(name, module)
        else:
            super().add_module(name, module)

    def __len__(self) -> int:
        return len(cast(Sized, self.module))

    def __getitem__(self, index: Any) -> Any:
        return cast(Any, self.module)[index]

    def __bool__(self) -> bool:
        return True  # whether or not the network has a length

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the network's ``forward`` takes any keyword, for Hugging Face's Trainer."""
        own = getattr(self.module, "accepts_loss_kwargs", None)
        parameters = inspect.signature(self.module.forward).parameters.values()
        return any(p.kind is p.VAR_KEYWORD for p in parameters) if own is None else own
