"""What timm, Hugging Face's Trainer and checkpoints expect of a wrapped network."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from inmerge_wrap.steps import callers

_NEAR = 10  # frames between timm and a hook of the state dict, and some more


def renamed_for_timm(name: str, value: Any) -> Any:
    """Returns an attribute of the network with the wrapper's parameter names in it.

    timm's optimizer factory reads parameter names from ``no_weight_decay`` and ``group_matcher``.
    """
    if name == "no_weight_decay":
        return lambda: {f"module.{parameter}" for parameter in value()}
    if name == "group_matcher":
        return lambda *args, **kwargs: _prefixed_matcher(value(*args, **kwargs))
    return value


def _prefixed_matcher(matcher: Any) -> Any:
    """Returns timm's map from parameter names to layers, for names that begin with ``module.``."""
    if callable(matcher):
        return lambda name: cast(Callable[[str], Any], matcher)(name.removeprefix("module."))

    def prefixed(pattern: str) -> str:
        # timm matches at the start of the name anyway; an anchor would forbid the prefix.
        return r"module\.(?:" + re.sub(r"(?<![\\\[])\^", "", pattern) + ")"

    return {
        layer: (
            [(prefixed(part[0]), *part[1:]) for part in pattern]
            if isinstance(pattern, list | tuple)
            else pattern and prefixed(pattern)
        )
        for layer, pattern in matcher.items()
    }


def put_counter_last(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    """Moves the counter to the end of the state dict, where timm's training tasks expect it."""
    key = f"{prefix}_extra_state"
    if key in state_dict:
        state_dict[key] = state_dict.pop(key)


def plain_for_timms_export(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    """Gives timm's ``save_for_hf`` and ``push_to_hf_hub`` the network's own state dict.

    They write whatever ``state_dict()`` returns, beside the network's own configuration, and nobody
    could load the names of the wrapper. Nothing but the caller tells their call from another.
    """
    if not any(
        caller.f_code.co_name == "save_for_hf"
        and caller.f_globals.get("__name__") == "timm.models._hub"
        for caller in itertools.islice(callers(), _NEAR)  # kept nowhere: a frame holds its own
    ):
        return
    state_dict.pop(f"{prefix}_extra_state", None)
    for name in [name for name in state_dict if name.startswith(f"{prefix}module.")]:
        state_dict[prefix + name.removeprefix(f"{prefix}module.")] = state_dict.pop(name)


def accept_network_state(
    wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Accepts the network's own state dict, and one without the step counter, with a warning."""
    own = [name for name in cast(nn.Module, wrapper.module).state_dict() if name]
    if not any(f"{prefix}module.{name}" in state_dict for name in own):
        for name in own:
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}module.{name}"] = state_dict.pop(f"{prefix}{name}")
    key = f"{prefix}_extra_state"
    if key not in state_dict and any(name.startswith(prefix) for name in state_dict):
        warnings.warn(
            f"the state dict has no {key!r}: the weights are loaded, and merging counts its steps "
            f"from {wrapper.step}, unless the state of an attached optimizer brings the counter",
            stacklevel=2,
        )
        state_dict[key] = None
