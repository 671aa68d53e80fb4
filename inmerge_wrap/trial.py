"""Whether an optimizer keeps what is merged into the weights: a trial on a throwaway.

Some optimizers keep a second copy of the weights, from which they write them again. A merge after
a step is then undone by later steps, in silence. The rule, measured and not a list of names: two
equal tensors take the same steps; one of them is changed, and both take as many steps again. If
less than 0.9 of the change is left, the optimizer is refused.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_STEPS = 24  # before the change and after it; a copy that is used less often is not found
_KEPT = 0.9


def refuse_undone(optimizer: Optimizer, weight: Tensor) -> None:
    """Raises a RuntimeError if the steps of an optimizer undo what is merged into a weight."""
    share = share_kept(optimizer, weight)
    if share is not None and share < _KEPT:
        raise RuntimeError(
            f"{type(optimizer).__name__} keeps a copy of the weights and writes them from it, so "
            f"that of a merge {share:.0%} are left after {_STEPS} steps (measured on a throwaway "
            "tensor): merge in the forward pass, which writes no weight (mode='outputs'), or use "
            "another optimizer"
        )


def share_kept(optimizer: Optimizer, weight: Tensor) -> float | None:
    """Returns the share of a change of the weights that is left after some steps.

    The steps are those of a twin of the optimizer that holds two small tensors, at a learning
    rate of 0 and without weight decay, which shrinks merged weights and others likewise. Neither
    the optimizer nor its state nor the global generators are touched. None if the trial fails, as
    for an optimizer that needs a closure.
    """
    devices = [weight.device] if weight.device.type == "cuda" else []
    before = random.getstate()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                share = _measured(optimizer, weight, fills_state=False)
            except Exception:  # perhaps because its constructor has filled its state
                share = _measured(optimizer, weight, fills_state=True)
    except Exception:  # someone else's code on tensors that it did not expect: no verdict
        return None
    finally:
        random.setstate(before)
    return share if abs(share) < float("inf") else None


def _measured(optimizer: Optimizer, weight: Tensor, *, fills_state: bool) -> float:
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(4, 2, 3, 3, generator=generator, device="cpu").to(weight.device)

    start, change = drawn(), drawn()
    changed, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    twin = _twin(optimizer, weight, [changed, plain], fills_state)
    step: Any = type(twin).step
    step = step.__wrapped__ if hasattr(step, "hooked") else step  # hooks are for real steps

    def train() -> None:
        for _ in range(_STEPS):
            gradient = drawn() * 1e-3
            changed.grad, plain.grad = gradient, gradient.clone()
            step(twin)

    train()
    changed.add_(change)
    train()
    return (((changed - plain) * change).sum() / change.square().sum()).item()


def _twin(
    optimizer: Optimizer, weight: Tensor, parameters: list[nn.Parameter], fills_state: bool
) -> Any:
    """Returns an optimizer of the same class and settings that holds other parameters."""
    (group, *_) = (g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
    options = {name: value for name, value in group.items() if name not in ("params", "lr")}
    rate = group.get("lr")
    zero = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
    groups = [{**copy.deepcopy(options), "params": parameters, "lr": zero}]
    if "weight_decay" in options:
        groups[0]["weight_decay"] = 0.0
    # What deepcopy meets of the original it replaces by that of the twin.
    replaced: dict[int, Any] = {
        id(p): parameters[0] for group in optimizer.param_groups for p in group["params"]
    }
    if fills_state:
        states = {p: _state_like(optimizer, weight, p) for p in parameters}
        replaced[id(optimizer.state)] = defaultdict(dict, states)
    return _copied(optimizer, groups, replaced)


def _state_like(optimizer: Optimizer, weight: Tensor, parameter: nn.Parameter) -> dict[str, Any]:
    """Returns the state of a weight as it would be for a parameter that has taken no step."""

    def like(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            return copy.deepcopy(value)
        is_copy = torch.equal(value, weight)
        return parameter.detach().clone() if is_copy else torch.zeros_like(parameter)

    return {name: like(value) for name, value in optimizer.state.get(weight, {}).items()}


def _copied(optimizer: Optimizer, groups: list[Any], replaced: dict[int, Any]) -> Any:
    twin = object.__new__(type(optimizer))
    replaced[id(optimizer)] = twin
    replaced[id(optimizer.param_groups)] = groups
    replaced.setdefault(id(optimizer.state), defaultdict(dict))
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            known = replaced.get(id(value))
            copied = _copied(value, groups, replaced) if known is None else known
        elif name.endswith("_hooks") and isinstance(value, Mapping):
            copied = OrderedDict()
        elif callable(value) and not isinstance(value, nn.Module):
            continue  # a scheduler's step would step the original
        else:
            copied = copy.deepcopy(value, replaced)
        vars(twin)[name] = copied
    return twin
