"""Random arguments of the public face: it works, or a ValueError or TypeError names one of them.

``RANDOM_ARGUMENTS=5000`` tries as many of each, other ones in each run.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inmerge_wrap import (
    Fixed,
    InMergeWrapper,
    Quantile,
    Schedule,
    ZScore,
    draw_pairs,
    plan_merging,
    recalibrate,
    recommended_settings,
)
from tests.scripts.common import EXAMPLE, SETTINGS, sgd, tiny_net, train

EXAMPLES = int(os.environ.get("RANDOM_ARGUMENTS", "40"))
_SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="RANDOM_ARGUMENTS" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)

_NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, -1, 0.0, 0.3, 1.0, -1.0, 2**32, 10**400, True]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(),
)
_ODD = st.one_of(
    st.none(),
    st.sampled_from(["", "random", "0.5", b"x", [], [1], (), {}, object(), 1j, math.nan, EXAMPLE]),
    _NUMBERS,
)


def _mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(good, good, good, good, good, good, _ODD)


def _fits_into_memory(count: Any) -> bool:
    return not isinstance(count, int) or count <= 2**16


_SHARES = st.floats(0, 1)
_STEPS = st.integers(0, 5)
_SCHEDULE: dict[str, st.SearchStrategy[Any]] = {
    "start": _mostly(_STEPS),
    "end": _mostly(st.one_of(st.none(), _STEPS)),
    "every": _mostly(st.integers(1, 3)),
    "decay": _mostly(st.sampled_from(["constant", "linear", "cosine"])),
    "anneals": _mostly(st.sampled_from(["probability", "strength"])),
}
_PLAN: dict[str, st.SearchStrategy[Any]] = {
    "mode": _mostly(st.sampled_from(["step", "outputs", "weights"])),
    "shallow_layers": _mostly(st.one_of(st.integers(0, 3), st.floats(0, 0.99))),
    "include": _mostly(st.one_of(st.none(), st.sampled_from(["mid", "*", ["last"], "no"]))),
    "exclude": _mostly(st.sampled_from([(), "mid", ["last"], "no*"])),
    "also_merge": _mostly(st.sampled_from([(), ["depthwise"], "nothing"])),
}
_WRAPPER: dict[str, st.SearchStrategy[Any]] = _PLAN | {
    "merge_weight": _mostly(st.floats(0, 2)),
    "radius": _mostly(st.one_of(st.none(), st.floats(0, 2))),
    "similarity_threshold": _mostly(
        st.one_of(st.floats(-1, 1), st.sampled_from([ZScore(1.0), Quantile(0.5), Fixed(0.1)]))
    ),
    "merge_probability": _mostly(_SHARES),
    "schedule": _mostly(st.one_of(st.none(), st.builds(Schedule, end=st.integers(1, 4)))),
    "partner": _mostly(st.sampled_from(["random", "most_similar"])),
    "direction": _mostly(st.sampled_from(["partner", "signed", "gaussian", "multiplicative"])),
    "shared_partner": _mostly(st.booleans()),
    "shared_sign": _mostly(st.booleans()),
    "keep_norm": _mostly(st.booleans()),
    "merge_momentum": _mostly(st.booleans()),
    "compiled": _mostly(st.sampled_from([None, False])),
    "seed": _mostly(st.integers(0, 2**32 - 1)),
    "inspect_every": _mostly(_STEPS),
    "check_replicas_every": _mostly(_STEPS),
}


def _wrap_and_train(**given: Any) -> None:
    model = InMergeWrapper(tiny_net(), **{"example_input": EXAMPLE, **given})
    optimizer = sgd(model)
    model.attach(optimizer)
    train(model, optimizer, 2)
    assert model.step == 2 and all(bool(p.isfinite().all()) for p in model.parameters())
    assert 0 <= model.report().merged <= model.report().drawn


def _draw(**given: Any) -> None:
    targets, sources = draw_pairs(generator=torch.Generator().manual_seed(0), **given)
    assert len(targets) == len(sources) <= given["num_kernels"] and (targets != sources).all()


def _level(**given: Any) -> None:
    assert all(0 <= Schedule(**given).level(step) <= 1 for step in range(8))


def _recommend(**given: Any) -> None:
    InMergeWrapper(tiny_net(), **{**SETTINGS, **recommended_settings(**given)})


def _measure(**given: Any) -> None:
    assert recalibrate(tiny_net(), [EXAMPLE, EXAMPLE], **given) in (1, 2)


FACE: dict[Callable[..., Any], dict[str, st.SearchStrategy[Any]]] = {
    _wrap_and_train: _WRAPPER,
    _level: _SCHEDULE,
    _draw: {
        "num_kernels": _mostly(st.integers(1, 20)).filter(_fits_into_memory),
        "probability": _mostly(_SHARES),
        "groups": _mostly(st.integers(1, 4)),
    },
    _recommend: {"total_steps": _mostly(st.integers(1, 1000)), "mode": _PLAN["mode"]},
    _measure: {"prior": _mostly(st.floats(0, 100))},
    Fixed: {"tau": _mostly(st.floats(-1, 1))},
    ZScore: {"z": _mostly(st.floats(-5, 5))},
    Quantile: {"share": _mostly(_SHARES)},
}
_REQUIRED = {_draw: ("num_kernels", "probability"), _recommend: ("total_steps",)}
_REQUIRED |= {Fixed: ("tau",), ZScore: ("z",), Quantile: ("share",)}


def _works_or_names(call: Callable[..., Any], given: Mapping[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(**given)
        except (TypeError, ValueError) as error:
            names = {*given, "similarity_threshold"} if call is Fixed else set(given)
            names |= {"kernels"} if call is _draw else set()
            assert any(name in str(error) for name in names), f"{error} names no argument"


@pytest.mark.parametrize("call", FACE, ids=lambda call: call.__name__.strip("_"))
def test_random_arguments_work_or_are_named(call: Callable[..., Any]) -> None:
    strategies, needed = FACE[call], _REQUIRED.get(call, ())
    arguments = st.fixed_dictionaries(
        {name: strategies[name] for name in needed},
        optional={name: each for name, each in strategies.items() if name not in needed},
    )

    @_SETTINGS
    @given(arguments)
    def check(given: dict[str, Any]) -> None:
        _works_or_names(call, given)

    check()


def test_plans_of_random_arguments() -> None:
    """Plans that wrappers do not reach, because other arguments were refused first."""

    @_SETTINGS
    @given(st.fixed_dictionaries({}, optional=_PLAN))
    def check(given: dict[str, Any]) -> None:
        call = lambda **more: plan_merging(tiny_net(), example_input=EXAMPLE, **more)  # noqa: E731
        _works_or_names(call, given)

    check()
