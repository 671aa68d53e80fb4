"""Command-line options of a recipe for the settings of merging.

An option that is left out has the value of ``InMergeWrapper.recommended``: for transient merging,
or with ``--persistent`` for merging that stays. With ``--paper`` it has the constructor's default,
which is the paper's. No default is written down a second time.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from inmerge_wrap import Fixed, InMergeWrapper, Quantile, Schedule, ZScore, recommended_settings

# The arguments of InMergeWrapper that can be given; --decay is a field of its schedule, and
# --persistent and --paper set the others.
GIVEN = ("merge_weight", "radius", "merge_probability", "similarity_threshold", "shallow_layers")
# Those that say how kernels merge, and not where, when a run repeats itself or what it records.
_ELSEWHERE = {"module", "schedule", "example_input", "include", "exclude", "also_merge", "plan"}
_ELSEWHERE |= {"seed", "inspect_every", "check_replicas_every", "compiled", "engine"}


def add_merging_arguments(parser: argparse.ArgumentParser, *, optional: bool = True) -> None:
    """Adds the merging options, each with its symbol in the paper (arXiv 2502.20516).

    They are None until ``parse_run`` fills them in, so that it can see which were passed. A recipe
    that always merges is not ``optional``: it has no ``--no-merge``.
    """
    group = parser.add_argument_group(
        "in-model merging (symbols of arXiv 2502.20516; by default what InMergeWrapper.recommended "
        "chooses)"
    )
    if optional:
        group.add_argument("--no-merge", action="store_true", help="train plainly, without merging")
    group.add_argument(
        "--persistent",
        action="store_true",
        help="merging that stays: deep pairs that are more similar than chance, fading out",
    )
    group.add_argument(
        "--paper",
        action="store_true",
        help="the paper's settings, which stay too: alpha .8, p .3, fixed tau .3, merging in every "
        "step to the end",
    )
    group.add_argument(
        "--merge-weight",
        type=float,
        metavar="ALPHA",
        help="alpha: weight of the kernel itself, with --persistent",
    )
    group.add_argument(
        "--radius",
        type=float,
        metavar="R",
        help="size of the move relative to the kernel, where merging is transient",
    )
    group.add_argument(
        "--merge-probability",
        type=float,
        metavar="P",
        help="p: probability that a kernel is drawn in a step",
    )
    group.add_argument(
        "--similarity-threshold",
        type=threshold,
        metavar="TAU",
        help="tau: cosine above which a pair merges, -1 to 1; or z=2, standard deviations above "
        "chance; or top=0.5, that share of the drawn pairs of each layer",
    )
    group.add_argument(
        "--shallow-layers",
        type=layers_or_share,
        metavar="L_S",
        help="L_s: first convolutions not to merge, a count such as 10 or a share of "
        "the depth such as 0.625",
    )
    group.add_argument(
        "--decay",
        choices=["constant", "linear", "cosine"],
        help="how merging fades out during training",
    )


def parse_run(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line of a recipe that merges, and fills in the settings of merging.

    The settings are those in force, for the results file: the recommended ones, the paper's, or
    None without merging. Arguments that would be ignored are an error.
    """
    options = parser.parse_args()
    merges = not getattr(options, "no_merge", False)
    given = [name for name in (*GIVEN, "decay") if getattr(options, name) is not None]
    presets = [name for name in ("paper", "persistent") if getattr(options, name)]
    ignored: list[str] = []
    switch = "--paper" if options.paper else "--persistent"
    if not merges:
        switch, ignored = "--no-merge", given + presets
    elif options.paper:
        heeded = "shallow_layers", "paper"
        ignored = [name for name in given + presets if name not in heeded]
    elif options.persistent:
        ignored = [name for name in given if name == "radius"]
    elif "merge_weight" in given:
        parser.error("--merge-weight is for --persistent; the size of a transient move is --radius")
    if ignored:
        names = ", ".join("--" + name.replace("_", "-") for name in ignored)
        parser.error(f"{switch} would ignore {names}: leave out one or the other")
    if merges:
        transient = not options.persistent
        in_force = paper_settings() if options.paper else recommended_options(transient=transient)
        vars(options).update({k: v for k, v in in_force.items() if k not in given})
    return options


def paper_settings() -> dict[str, Any]:
    """Returns the defaults of InMergeWrapper (the paper's) and the decay of its schedule."""
    parameters = inspect.signature(InMergeWrapper).parameters.values()
    settings = {p.name: p.default for p in parameters if p.name not in _ELSEWHERE}
    return settings | {"decay": Schedule().decay}


def recommended_options(*, transient: bool) -> dict[str, Any]:
    """Returns what ``InMergeWrapper.recommended`` chooses, and the decay of its schedule."""
    chosen = recommended_settings(total_steps=1, transient=transient)
    decay = chosen.pop("schedule").decay
    return paper_settings() | chosen | {"decay": decay}


def merging_settings(
    options: argparse.Namespace, total_steps: int, start: int = 0
) -> dict[str, Any]:
    """Returns the arguments of InMergeWrapper that are in force, merging from step ``start`` on.

    Merging that fades out ends at 95 % of the steps that follow ``start``.
    """
    names = [name for name in paper_settings() if name != "decay"]
    fading = recommended_settings(total_steps - start, transient=options.transient)["schedule"]
    end = None if options.decay == "constant" else start + fading.end
    schedule = replace(
        Schedule() if options.paper else fading, start=start, end=end, decay=options.decay
    )
    return {name: getattr(options, name) for name in names} | {"schedule": schedule}


def threshold(text: str) -> float | ZScore | Quantile:
    """Parses ``"0.3"`` (a fixed cosine), ``"z=2"`` and ``"top=0.5"`` (relative to the layer).

    Raises:
        argparse.ArgumentTypeError: If it is none of these, or out of range.
    """
    kind, given, number = text.rpartition("=")
    rules: dict[str, Callable[[float], Any]] = {"": Fixed, "z": ZScore, "top": Quantile}
    try:
        rule = rules[kind if given else ""](float(number))
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a threshold: pass a cosine such as 0.3, z=2 or top=0.5 ({error})"
        ) from error
    return rule.tau if isinstance(rule, Fixed) else rule


def layers_or_share(text: str) -> int | float:
    """Parses ``"10"`` (10 layers) and ``"0.5"`` (half of the depth)."""
    return int(text) if text.isdigit() else float(text)
